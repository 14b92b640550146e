"""The parts that turn OpenVLA's network into an OFT policy: the heads, and settings that no file has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from vla_pruner.checkpoints.files import described_by
from vla_pruner.errors import CheckpointError, OptionError
from vla_pruner.models.openvla import heads
from vla_pruner.models.openvla.oft import OpenVLAOFT
from vla_pruner.models.openvla.robots import camera_names, find_platform

TRAINING_STEPS = 50
"""The number of steps in the diffusion head's noise schedule; a constant of the official training."""


def equip(
    policy: OpenVLAOFT,
    folder: Path,
    files: dict[str, Path],
    dtype: torch.dtype,
    cameras: tuple[str, ...] | None,
    chunk: int | None,
    denoising_steps: int | None,
) -> None:
    """Give `policy` its heads and settings.

    Args:
        policy: with its weights and statistics.
        folder: of the checkpoint, for messages.
        files: the heads' files by name, as `find_heads` gives them; none for discrete actions without a state.
        dtype: of the heads.
        cameras, chunk, denoising_steps: as in `load_openvla`.

    Raises:
        CheckpointError: a file is damaged, one lacks its counterpart or fits another language model, or the chunk's
            length is not known.
        OptionError: `denoising_steps` is out of range, or was given though nothing is denoised.
    """
    makers: dict[str, Any] = {
        "action_head": heads.action_head_from_state,
        "proprio_projector": heads.ProprioProjector.from_state,
        "noisy_action_projector": heads.NoisyActionProjector.from_state,
    }
    for name, file in files.items():
        with as_checkpoint_error(), described_by(file):
            setattr(policy, name, makers[name](heads.read_head(file)))
    if denoising_steps is not None and not policy.diffusion:
        raise OptionError(
            f"denoising_steps={denoising_steps} was given, but {folder} has no diffusion head: nothing is denoised. "
            "Leave it out."
        )
    policy.ddim = heads.DDIM(TRAINING_STEPS, TRAINING_STEPS if denoising_steps is None else denoising_steps)
    if policy.diffusion != (policy.noisy_action_projector is not None):
        absent = "action_head of the diffusion kind" if not policy.diffusion else "noisy_action_projector"
        raise CheckpointError(f"{folder} has {', '.join(files)} but no {absent}. Download the checkpoint again.")
    _check_widths(policy, files)
    device = policy.projector.fc1.weight.device
    for module in (policy.action_head, policy.proprio_projector, policy.noisy_action_projector):
        if module is not None:
            module.to(device, dtype)
    _settle(policy, folder, cameras, chunk)


def _check_widths(policy: OpenVLAOFT, files: dict[str, Path]) -> None:
    head, proprio, noisy = policy.action_head, policy.proprio_projector, policy.noisy_action_projector
    widths = {
        "action_head": None if head is None else head.input_dim,
        "proprio_projector": None if proprio is None else proprio.fc2.out_features,
        "noisy_action_projector": None if noisy is None else noisy.fc2.out_features,
    }
    for name, width in widths.items():
        if width not in (None, policy.llm_dim):
            raise CheckpointError(
                f"{files[name]} is made for a language model of width {width}; this one's is {policy.llm_dim}. "
                "Use the files that were saved together."
            )


def _settle(policy: OpenVLAOFT, folder: Path, cameras: tuple[str, ...] | None, chunk: int | None) -> None:
    """Set everything about an OFT policy that no file says."""
    head, proprio = policy.action_head, policy.proprio_projector
    datasets = list(policy.norm_stats)
    if head is not None:
        policy.action_dim = head.action_dim
    elif datasets:
        policy.action_dim = policy.get_action_dim(datasets[0])
    else:
        raise CheckpointError(f"{folder} has no action head and no statistics, so the action's size is not known.")
    proprio_dim = None if proprio is None else proprio.proprio_dim
    platform = find_platform(policy.action_dim, proprio_dim, datasets)
    if platform is not None:
        policy.chunk, policy.bounds = platform.chunk, platform.bounds
    elif chunk is None:
        raise CheckpointError(
            f"{folder} has actions of {policy.action_dim} numbers, states of {proprio_dim or 'no'} numbers and the "
            f"datasets {', '.join(datasets) or 'none'}; that is not clearly LIBERO, ALOHA or Bridge, so the length of "
            "its chunks is not known. Give it: load_policy(..., chunk=8)."
        )
    if chunk is not None:
        policy.chunk = chunk
    policy.cameras = camera_names(1 if platform is None or proprio is None else platform.cameras, cameras)


@contextmanager
def as_checkpoint_error() -> Iterator[None]:
    """Raise errors about the content of a file as CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(str(error)) from error
