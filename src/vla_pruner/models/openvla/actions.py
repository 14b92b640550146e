"""From token ids and network outputs to the robot's action: bins, dataset statistics, LIBERO's gripper.

Facts from the official code of OpenVLA and OpenVLA-OFT (prediction_to_action of both, constants.py and
openvla_utils.py of OFT), checked against golden outputs of that code. All results are numpy float64, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch

from vla_pruner.errors import CheckpointError, ObservationError, OptionError
from vla_pruner.observations import array_of

Bounds = Literal["q99", "minmax"]
OFT_EPSILON = 1e-8
"""The number that OFT adds to every range, so that a constant dimension is no division by zero. OpenVLA adds nothing.
"""

_ADVICE = "Copy the dataset's statistics from the checkpoint as it was published."
_KEYS = {"q99": ("q01", "q99"), "minmax": ("min", "max")}


def bin_index(ids: np.ndarray | torch.Tensor | Sequence, vocab_size: int = 32000, n_bins: int = 256) -> np.ndarray:
    """Return the bin of each action token: the last token of the vocabulary is bin 0, and so on downwards.

    `n_bins` edges enclose `n_bins - 1` bins, so the lowest two action tokens share the last bin. As in the official
    code an id outside the action tokens goes to the nearest bin.

    Args:
        ids: token ids of any shape, integers.
        vocab_size: of the text model without its padding rows (32064 - 64 in the published checkpoints).
        n_bins: number of edges (`n_action_bins` of config.json).

    Returns:
        int64 of the same shape, in 0..n_bins - 2.

    Raises:
        ObservationError: the ids are not integers.
    """
    found = _array(ids)
    if not np.issubdtype(found.dtype, np.integer):
        raise ObservationError(f"Action tokens are integer ids; found an array of {found.dtype}.")
    return np.clip(vocab_size - found.astype(np.int64) - 1, 0, n_bins - 2)


def decode_bins(ids: np.ndarray | torch.Tensor | Sequence, vocab_size: int = 32000, n_bins: int = 256) -> np.ndarray:
    """Return the normalised value of each action token: its bin's centre in [-1, 1]. Arguments as in `bin_index`.

    Returns:
        float64 of the same shape.
    """
    edges = np.linspace(-1.0, 1.0, n_bins)
    centres = (edges[:-1] + edges[1:]) / 2.0
    return centres[bin_index(ids, vocab_size, n_bins)]


def unnormalize(
    normalized: np.ndarray | torch.Tensor | Sequence,
    stats: Mapping[str, Any],
    epsilon: float = 0.0,
    bounds: Bounds = "q99",
) -> np.ndarray:
    """Scale values from [-1, 1] to the units of the training data in dimensions whose `mask` is true; others stay
    unchanged.

    Args:
        normalized: (..., dim), for example one action or a chunk of them.
        stats: the `action` part of one dataset's statistics: `q01` and `q99` (or `min` and `max`), each dim long, and
            `mask`, which is all true if absent.
        epsilon: added to the range: 0 for OpenVLA, `OFT_EPSILON` for OFT.
        bounds: the statistics that -1 and 1 stand for: the 1st and 99th percentile ("q99": all published checkpoints
            but OFT's for ALOHA), or the extremes ("minmax": those).

    Returns:
        (..., dim) float64. A dimension whose range is zero, as in some published statistics, is that constant.

    Raises:
        CheckpointError: a statistic is absent or no number, or the statistics do not agree among themselves.
        ObservationError: they are of another number of dimensions than `normalized`.
        OptionError: `bounds` is neither of the two.
    """
    values = _floats(normalized)
    low, high, mask = _limits(stats, bounds, values, "an action")
    return np.where(mask, 0.5 * (values + 1.0) * (high - low + epsilon) + low, values)


def normalize_proprio(
    proprio: np.ndarray | torch.Tensor | Sequence, stats: Mapping[str, Any], bounds: Bounds = "q99"
) -> np.ndarray:
    """Return the robot's state as OFT's network reads it: scaled to [-1, 1] by the dataset's statistics, and clipped.

    Args:
        proprio: (..., dim) in the units of the training data.
        stats: the `proprio` part of one dataset's statistics, keys as in `unnormalize`.
        bounds: as in `unnormalize`.

    Returns:
        (..., dim) float64 in [-1, 1].

    Raises:
        ObservationError: `proprio` is not finite, or of another number of dimensions than the statistics.
        CheckpointError, OptionError: as in `unnormalize`.
    """
    values = _floats(proprio)
    if not np.isfinite(values).all():
        # Clipping would turn infinity into a valid state.
        raise ObservationError("proprio holds numbers that are not finite (NaN or infinity); give finite ones.")
    low, high, mask = _limits(stats, bounds, values, "a state")
    return np.clip(np.where(mask, 2.0 * (values - low) / (high - low + OFT_EPSILON) - 1.0, values), -1.0, 1.0)


def libero_gripper(actions: np.ndarray | torch.Tensor | Sequence) -> np.ndarray:
    """Return actions with the gripper as LIBERO takes it: -1 opens, +1 closes.

    The policies are trained with 0 for closed and 1 for open, so values above one half become -1 and values below
    become +1. Exactly one half becomes 0, as in the official evaluation.

    Args:
        actions: (..., dim) un-normalised actions, the gripper last.

    Returns:
        a float64 copy.
    """
    values = _floats(actions).copy()
    values[..., -1] = -np.sign(2.0 * values[..., -1] - 1.0)
    return values


def _limits(
    stats: Mapping[str, Any], bounds: Bounds, values: np.ndarray, what: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if bounds not in _KEYS:
        raise OptionError(f"bounds={bounds!r} is not supported; give one of {', '.join(map(repr, _KEYS))}.")
    names = _KEYS[bounds]
    absent = [name for name in names if name not in stats]
    if absent:
        raise CheckpointError(
            f"The statistics of {what} lack {' and '.join(absent)}; found {', '.join(map(str, stats)) or 'nothing'}. "
            f"bounds={bounds!r} needs {' and '.join(names)}: give that part of one dataset's statistics."
        )
    try:
        low, high = (np.asarray(stats[name], dtype=np.float64) for name in names)
        mask = np.asarray(stats.get("mask", np.ones(low.shape)), dtype=bool)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The statistics of {what} are not lists of numbers ({error}). {_ADVICE}") from error
    if low.ndim != 1 or not low.shape == high.shape == mask.shape:
        raise CheckpointError(
            f"The statistics of {what} do not agree: {names[0]} has shape {low.shape}, {names[1]} {high.shape}, "
            f"mask {mask.shape}; they need one number for each dimension."
        )
    wrong = np.flatnonzero(mask & ~(np.isfinite(low) & np.isfinite(high) & (low <= high)))
    if len(wrong):
        first = wrong[0]
        raise CheckpointError(
            f"The statistics of {what} have {names[0]} {low[first]} and {names[1]} {high[first]} in dimension {first}; "
            f"they must be finite, and {names[0]} not above {names[1]}. {_ADVICE}"
        )
    if values.shape[-1] != len(low):
        raise ObservationError(
            f"The statistics describe {what} of {len(low)} dimensions; found an array of shape {values.shape}, which "
            f"must end in {len(low)}. Use the statistics of the dataset that this robot belongs to."
        )
    return low, high, mask


def _floats(values: np.ndarray | torch.Tensor | Sequence) -> np.ndarray:
    found = _array(values).astype(np.float64)
    if found.ndim == 0:
        raise ObservationError(f"An array of shape (..., dimensions) is needed; found the single number {found}.")
    return found


def _array(values: np.ndarray | torch.Tensor | Sequence) -> np.ndarray:
    try:
        return array_of(values)
    except (TypeError, ValueError) as error:
        raise ObservationError(f"An array of numbers is needed; found {type(values).__name__} ({error}).") from error
