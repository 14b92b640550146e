"""The score maps of an unpruned episode: the scores that methods would have read, from a second look at its trace."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import torch

from vla_pruner.accelerators import generators_put_back
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.evaluation.episode import generator_devices
from vla_pruner.evaluation.traces import Trace, by_camera
from vla_pruner.families import family_of
from vla_pruner.methods import VLAPruner

LAYER = 3
"""The layer of the semantic score: the published pruning layer, or a shallower model's last."""


def with_score_maps(policy: Any, trace: Trace) -> Trace:
    """An unpruned trace with semantic and action scores of all visual tokens, by `VLAPruner` with everything kept.

    The preset is the paper's: the report compares the scores with the paper's figures, and every model can drop tokens.

    The episode itself ran untouched; here its observations are replayed, with the same noise, so that neither its
    actions nor its milliseconds change. The policy begins a new episode afterwards.

    Returns:
        the trace as it was if the policy sees nothing or `VLAPruner` cannot be attached to it.
    """
    if not trace.images or not len(trace):
        return trace
    try:
        layer = min(LAYER, family_of(policy).depth - 1)
        attached = VLAPruner(keep=1.0, layer=layer, preset="paper").attach(policy)
    except (UnsupportedModelError, OptionError):
        return trace
    scores: dict[str, list[np.ndarray]] = {"semantic": [], "action": []}
    counts: tuple[int, ...] = ()
    with generators_put_back(generator_devices(policy)), attached as session:
        policy.reset()
        for step in range(len(trace)):
            torch.manual_seed(int(trace.noise_seeds[step]))
            seen = trace.observation(step)
            policy.act(seen.images, seen.instruction, seen.proprio)
            for name, score in session.scores.items():
                scores[name].append(score[0].float().cpu().numpy().copy())
            counts = () if session.step is None else session.step.layout.cameras
        policy.reset()
    return dataclasses.replace(
        trace,
        scores={name: np.stack(found) for name, found in scores.items() if len(found) == len(trace)},
        camera_tokens=by_camera(tuple(policy.cameras), counts),
    )
