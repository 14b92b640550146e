"""OpenVLA-OFT's action heads and projectors, and reading them from the published .pt files.

Module names are those of the files, so that their weights load by name. The networks, the DDIM sampler and their
constants follow OFT's action_heads.py and projectors.py and diffusers' DDIMScheduler with its defaults; they agree with
golden outputs of that code.
"""

from __future__ import annotations

import math
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from vla_pruner.checkpoints.files import is_file, listed, reason
from vla_pruner.errors import CheckpointError, OptionError

State = Mapping[str, Tensor]
Built = TypeVar("Built", bound=nn.Module)
HEAD_FILES = ("action_head", "proprio_projector", "noisy_action_projector")


class MLPResNetBlock(nn.Module):
    """x + ReLU(Linear(LayerNorm(x)))."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.ffn = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.ffn(x)


class MLPResNet(nn.Module):
    """LayerNorm, linear, ReLU, residual blocks, LayerNorm, linear; (..., input_dim) -> (..., output_dim)."""

    def __init__(self, blocks: int, input_dim: int, hidden_dim: int, output_dim: int) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(input_dim)
        self.fc1 = nn.Linear(input_dim, hidden_dim)
        self.relu = nn.ReLU()
        self.mlp_resnet_blocks = nn.ModuleList(MLPResNetBlock(hidden_dim) for _ in range(blocks))
        self.layer_norm2 = nn.LayerNorm(hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, output_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.fc1(self.layer_norm1(x)))
        for block in self.mlp_resnet_blocks:
            x = block(x)
        return self.fc2(self.layer_norm2(x))


class L1ActionHead(nn.Module):
    """Actions straight from the hidden states of the action rows: the head of the published OFT checkpoints.

    Args:
        input_dim: width D of the language model.
        hidden_dim: width of the head.
        action_dim: numbers in one action.
        blocks: residual blocks.
    """

    def __init__(self, input_dim: int = 4096, hidden_dim: int = 4096, action_dim: int = 7, blocks: int = 2) -> None:
        super().__init__()
        self.input_dim, self.action_dim = input_dim, action_dim
        self.model = MLPResNet(blocks, input_dim * action_dim, hidden_dim, action_dim)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Return the head that a file's weights describe; CheckpointError lists what is missing, unexpected or
        misshapen.
        """
        return _filled(state, cls, *_resnet_sizes(state, "model."))

    def forward(self, action_hidden: Tensor) -> Tensor:
        """Normalised actions.

        Args:
            action_hidden: (B, chunk * action_dim, D) final hidden states of the action rows, action by action.

        Returns:
            (B, chunk, action_dim).
        """
        return self.model(_by_action(action_hidden, self.action_dim, self.input_dim))


class _NoisePredictor(nn.Module):
    def __init__(self, resnet: MLPResNet) -> None:
        super().__init__()
        self.mlp_resnet = resnet


class DiffusionActionHead(nn.Module):
    """Predicts the noise in an action chunk; `DDIM` removes it step by step. Arguments as in `L1ActionHead`."""

    def __init__(self, input_dim: int = 4096, hidden_dim: int = 4096, action_dim: int = 7, blocks: int = 2) -> None:
        super().__init__()
        self.input_dim, self.action_dim = input_dim, action_dim
        self.noise_predictor = _NoisePredictor(MLPResNet(blocks, input_dim * action_dim, hidden_dim, action_dim))

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Return the head that a file's weights describe; CheckpointError lists what is missing, unexpected or
        misshapen.
        """
        return _filled(state, cls, *_resnet_sizes(state, "noise_predictor.mlp_resnet."))

    def predict_noise(self, action_hidden: Tensor) -> Tensor:
        """Return the noise in the actions: (B, chunk * action_dim, D) -> (B, chunk, action_dim)."""
        return self.noise_predictor.mlp_resnet(_by_action(action_hidden, self.action_dim, self.input_dim))

    def time_encoding(self, timestep: Tensor | int) -> Tensor:
        """Return the token that gives the language model the diffusion timestep.

        Args:
            timestep: one for all rows, or (B,).

        Returns:
            (1 or B, D) float32: sines of D / 2 frequencies, then their cosines. One more dimension makes it a token.
        """
        half = self.input_dim // 2
        times = torch.as_tensor(timestep).reshape(-1).float()
        steps = torch.arange(half, device=times.device, dtype=torch.float32)
        angles = times[:, None] * torch.exp(steps * (-math.log(10000.0) / (half - 1)))
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class DDIM:
    """Deterministic DDIM sampling: cosine schedule, "leading" timesteps, noise prediction, x0 clipped to [-1, 1].

    Args:
        num_train_steps: steps of the noise schedule in training (50 in OFT).
        num_inference_steps: steps taken in a control step; at most `num_train_steps`. It is not in the checkpoint.

    Attributes:
        timesteps: (num_inference_steps,) int64, from noisy to clean.
        alphas_cumprod: (num_train_steps,) float32.

    Raises:
        OptionError: more steps than in training, or none.
    """

    def __init__(self, num_train_steps: int = 50, num_inference_steps: int = 10) -> None:
        if not isinstance(num_inference_steps, int) or not 1 <= num_inference_steps <= num_train_steps:
            raise OptionError(
                f"DDIM takes from 1 to {num_train_steps} inference steps (the number it was trained with); "
                f"found {num_inference_steps!r}."
            )
        self.stride = num_train_steps // num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1) * self.stride

        def signal(time: float) -> float:
            return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

        # Double precision until the betas, single from there on: the order that the trained schedule was rounded in.
        betas = [
            min(1 - signal((step + 1) / num_train_steps) / signal(step / num_train_steps), 0.999)
            for step in range(num_train_steps)
        ]
        self.alphas_cumprod = torch.cumprod(1.0 - torch.tensor(betas, dtype=torch.float32), dim=0)

    def step(self, noise_pred: Tensor, timestep: Tensor | int, sample: Tensor) -> Tensor:
        """Return the sample one step cleaner.

        The predicted noise is used as it is, even if x0 was clipped.

        Args:
            noise_pred: the head's output for `sample`, of its shape.
            timestep: the entry of `timesteps` that `sample` is at.
            sample: (B, chunk, action_dim) noisy actions.

        Returns:
            the sample at the next timestep; after the last, the normalised actions.
        """
        now = int(timestep)
        # 0-dimensional tensors on the CPU go with samples on any device and in any type.
        alpha = self.alphas_cumprod[now]
        alpha_next = self.alphas_cumprod[now - self.stride] if now >= self.stride else torch.tensor(1.0)
        clean = ((sample - (1 - alpha) ** 0.5 * noise_pred) / alpha**0.5).clamp(-1.0, 1.0)
        return alpha_next**0.5 * clean + (1 - alpha_next) ** 0.5 * noise_pred


class ProprioProjector(nn.Module):
    """One token from the robot's normalised state: (B, proprio_dim) -> (B, llm_dim)."""

    def __init__(self, proprio_dim: int, llm_dim: int = 4096) -> None:
        super().__init__()
        self.proprio_dim = proprio_dim
        self.fc1 = nn.Linear(proprio_dim, llm_dim)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Return the projector that a file's weights describe; errors as for the heads."""
        llm_dim, proprio_dim = _matrix(state, "fc1.weight")
        return _filled(state, cls, proprio_dim, llm_dim)

    def forward(self, proprio: Tensor) -> Tensor:
        return self.fc2(self.act_fn1(self.fc1(proprio)))


class NoisyActionProjector(nn.Module):
    """A token from each number of the noisy actions: (B, chunk * action_dim, 1) -> (B, chunk * action_dim, llm_dim)."""

    def __init__(self, llm_dim: int = 4096) -> None:
        super().__init__()
        self.fc1 = nn.Linear(1, llm_dim)
        self.act_fn1 = nn.GELU()
        self.fc2 = nn.Linear(llm_dim, llm_dim)

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Return the projector that a file's weights describe; errors as for the heads."""
        return _filled(state, cls, _matrix(state, "fc1.weight")[0])

    def forward(self, noisy_actions: Tensor) -> Tensor:
        return self.fc2(self.act_fn1(self.fc1(noisy_actions)))


def action_head_from_state(state: State) -> L1ActionHead | DiffusionActionHead:
    """Return the action head that a file's weights describe, of the kind that their names imply.

    Raises:
        CheckpointError: they are of neither kind, or not complete.
    """
    if any(name.startswith("noise_predictor.") for name in state):
        return DiffusionActionHead.from_state(state)
    if any(name.startswith("model.") for name in state):
        return L1ActionHead.from_state(state)
    raise CheckpointError(
        f"The action head is of an unknown kind: its weights are {_listed(state)}. "
        "Supported are OFT's L1 head (model.*) and its diffusion head (noise_predictor.*)."
    )


def find_heads(folder: str | Path) -> dict[str, Path]:
    """Return the head files of an OFT checkpoint folder: NAME--STEP_checkpoint.pt for each NAME of `HEAD_FILES`.

    Returns:
        name to path, for those that are there.

    Raises:
        CheckpointError: one name has several files; which step belongs to the model's weights cannot be known.
    """
    found = {}
    for name in HEAD_FILES:
        files = sorted(Path(folder).glob(f"{name}--*_checkpoint.pt"))
        if len(files) > 1:
            raise CheckpointError(
                f"{folder} has {len(files)} files for the {name}: {', '.join(file.name for file in files)}. "
                "Keep the one that was saved with this folder's model weights, and move the others elsewhere."
            )
        if files:
            found[name] = files[0]
    return found


def read_head(path: str | Path) -> dict[str, Tensor]:
    """Weights of a head file, on the CPU, without the prefix `module.` that distributed training leaves.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything but tensors by name.
    """
    path = Path(path)
    advice = "Download it again, or point to a file that OpenVLA-OFT's training wrote."
    if not is_file(path):
        raise CheckpointError(f"The head file {path} is missing. {advice}")
    try:
        _refuse_compressed(path)
        # Only tensors and plain containers are unpickled, so a file from a stranger can run no code.
        with warnings.catch_warnings():
            # torch 2.14 warns of sparse tensors, which are refused below.
            warnings.filterwarnings("ignore", "Validating sparse tensor invariants")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # torch's own advice here is to unpickle the file anyway, which would run whatever it holds.
        raise CheckpointError(
            f"The head file {path} is damaged or holds more than weights, which are not unpickled. {advice}"
        ) from error
    except Exception as error:  # torch's readers raise errors of every kind
        raise CheckpointError(
            f"The head file {path} is damaged or holds more than weights ({reason(error)}). {advice}"
        ) from error
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(name, str) and isinstance(item, Tensor) for name, item in state.items())
    ):
        raise CheckpointError(f"The head file {path} holds no weights by name but {type(state).__name__}. {advice}")
    wrong = {name: fault for name, tensor in state.items() if (fault := _fault(tensor)) is not None}
    if wrong:
        faults = listed(f"{name} {fault}" for name, fault in wrong.items())
        raise CheckpointError(f"The head file {path} holds no usable weights: {faults}. {advice}")
    prefix = "module."
    if all(name.startswith(prefix) for name in state):
        return {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    return dict(state)


def _refuse_compressed(path: Path) -> None:
    """Refuse a compressed file: torch stores tensors uncompressed, and others can be 1000 times as large in memory."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise ValueError("it is compressed, as torch writes none")


def _fault(tensor: Tensor) -> str | None:
    """Return why a tensor is no weight; None if it is one."""
    if tensor.layout != torch.strided:
        return f"is {tensor.layout}"
    if tensor.is_meta:
        return "is on the device 'meta' and has no numbers"
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        return f"has a shape {tuple(tensor.shape)} that is larger than what is stored"
    if not tensor.is_floating_point():
        return f"is of {tensor.dtype}"
    return None if tensor.isfinite().all() else "is not finite (NaN or infinity)"


def _by_action(hidden: Tensor, action_dim: int, width: int) -> Tensor:
    """(B, chunk * action_dim, D) -> (B, chunk, action_dim * D)."""
    if hidden.ndim != 3 or hidden.shape[1] % action_dim or hidden.shape[2] != width:
        raise ValueError(
            f"The action head takes hidden states of shape (B, chunk * {action_dim}, {width}); "
            f"found {tuple(hidden.shape)}."
        )
    return hidden.reshape(hidden.shape[0], hidden.shape[1] // action_dim, action_dim * width)


def _resnet_sizes(state: State, prefix: str) -> tuple[int, int, int, int]:
    """Input, hidden and action dimensions, and number of blocks, of the MLP-ResNet under `prefix`."""
    hidden_dim, flat_dim = _matrix(state, f"{prefix}fc1.weight")
    action_dim, _ = _matrix(state, f"{prefix}fc2.weight")
    blocks = {name.split(".")[-4] for name in state if name.startswith(f"{prefix}mlp_resnet_blocks.")}
    if flat_dim % action_dim:
        raise CheckpointError(
            f"The action head reads {flat_dim} numbers for an action of {action_dim}; it must be a multiple, since "
            "each number of the action has a hidden state of its own."
        )
    return flat_dim // action_dim, hidden_dim, action_dim, len(blocks)


def _matrix(state: State, name: str) -> tuple[int, int]:
    if name not in state or state[name].ndim != 2:
        raise CheckpointError(f"The head's weights lack the matrix {name}; they are {_listed(state)}.")
    rows, columns = state[name].shape
    return rows, columns


def _filled(state: State, build: type[Built], *sizes: int) -> Built:
    """Return a module of these sizes that holds exactly these weights, in their own type."""
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced
        module = build(*sizes)
    expected = module.state_dict()
    missing = [name for name in expected if name not in state]
    unexpected = [name for name in state if name not in expected]
    wrong = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    found = {"missing": missing, "unexpected": unexpected, "of another size": wrong}
    if any(found.values()):
        lists = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in found.items() if names)
        raise CheckpointError(f"The weights do not make a {build.__name__}: {lists}. Use the file that was published.")
    module.load_state_dict(dict(state), assign=True)
    return module


def _listed(state: State) -> str:
    names = list(state)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "none"
