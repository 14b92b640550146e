"""Closed-loop episodes of the policy: one image in, one action out, until success or the cap."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vla_pruner.simulators.metaworld import MetaWorldEnv, Observation

Seen = Callable[[Observation, int], Observation]
"""A function from the true observation at a control step to the one that the policy sees: controls are made of
these.
"""


@dataclass
class Episode:
    success: bool
    steps: int
    images: list[np.ndarray]
    states: list[np.ndarray]


def run_episode(
    act: Callable[[Observation], np.ndarray], env: MetaWorldEnv, seed: int, seen: Seen | None = None
) -> Episode:
    """Run one episode; `act` maps an observation to an action (4,)."""
    observation, success, done = env.reset(seed), False, False
    images, states = [], []
    while not done:
        images.append(observation.images["image"])
        states.append(env.state)
        shown = observation if seen is None else seen(observation, len(images) - 1)
        observation, success, done = env.step(act(shown))
    return Episode(success, len(images), images, states)


def policy_actor(policy: object) -> Callable[[Observation], np.ndarray]:
    """The policy as a function of an observation."""
    return lambda shown: policy.predict_action(shown.images["image"], shown.instruction, shown.proprio)  # type: ignore[attr-defined]
