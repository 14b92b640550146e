"""Does the policy see: do its actions follow its images, and does each image go through each vision tower once?"""

from __future__ import annotations

import itertools

import numpy as np
import torch

from vla_pruner.auditing.probes import TowerProbe
from vla_pruner.auditing.report import Check
from vla_pruner.auditing.subject import Images, Subject

NOISES = 3


def repeatable(subject: Subject) -> Check:
    """The same observation gives the same action; without that no other check means anything."""
    images = subject.scene(0)
    first, again = subject.act(images), subject.act(images)
    finite = bool(np.isfinite(first).all())
    detail = "" if finite else "The action is not finite."
    if finite and not np.array_equal(first, again):
        detail = (
            "The same images, instruction and noise gave another action, so no difference can be put down to anything. "
            "Put the policy into eval mode, and switch sampling and nondeterministic kernels off."
        )
    return Check("repeatable", not detail, f"action chunk {first.shape[0]} x {first.shape[1]}", detail)


def images(subject: Subject) -> Check:
    """Black, white and noise images give actions that differ from each other."""
    actions = {"black": [subject.act(subject.flat(0))], "white": [subject.act(subject.flat(255))]}
    actions["noise"] = [subject.act(subject.noise(number)) for number in range(NOISES)]
    distances = {
        f"{one} - {other}": max(
            distance(first, second) for first, second in itertools.product(actions[one], actions[other])
        )
        for one, other in itertools.combinations(actions, 2)
    }
    same = [pair for pair, far in distances.items() if not far > 0]
    detail = "L1: the mean absolute difference of the numbers of the action chunk; of three noise images the largest."
    if same:
        detail = (
            f"{' and '.join(same)} gave the same action: the policy does not see what it is shown. If it was loaded "
            "through remote code or by another library, load it with vla_pruner.load_policy."
        )
    return Check("images", not same, ", ".join(f"{pair} {far:.3g}" for pair, far in distances.items()), detail)


def cameras(subject: Subject) -> Check:
    """Changing the image of one camera alone changes the action, for every camera."""
    base = subject.scene(0)
    action = subject.act(base)
    changes = [subject.flat(0), subject.flat(255), *(subject.noise(number) for number in range(NOISES))]
    moved = {
        camera: max(distance(subject.act({**base, camera: change[camera]}), action) for change in changes)
        for camera in subject.policy.cameras
    }
    blind = [camera for camera, far in moved.items() if not far > 0]
    detail = "L1 between a scene and the same scene with this camera's image replaced; the largest of five."
    if blind or not moved:
        detail = f"The action does not depend on the image of {', '.join(map(repr, blind)) or 'any camera'}."
    figure = ", ".join(f"{camera} {far:.3g}" for camera, far in moved.items())
    return Check("cameras", bool(moved) and not blind, figure, detail)


def towers(subject: Subject) -> Check:
    """Each vision tower sees each camera's image, or each of its tiles, exactly once in a control step, unpruned and
    pruned.
    """
    wanted, problems = len(subject.policy.cameras) * getattr(subject.policy, "tiles", 1), []
    blank = 0
    if not subject.policy.vision_towers:
        problems.append("the policy names no vision tower")
    for state in ("unpruned", "pruned"):
        probe = _watch(subject, pruned=state == "pruned")
        blank = max([blank, *probe.blank])
        for index, seen in enumerate(probe.images):
            if len(seen) != wanted:
                problems.append(f"{state}, tower {index + 1} saw {len(seen)} images")
            elif _repeated(seen):
                problems.append(f"{state}, tower {index + 1} saw the same image twice")
    figure = f"{len(subject.policy.vision_towers)} x {wanted} images a step"
    figure += f", and {blank} blank" if blank else ""
    detail = "Counted over all calls of a control step; images of one colour (absent cameras) apart."
    if problems:
        detail = f"Each tower must see {wanted} different images, as many of each camera; but {'; '.join(problems)}."
    return Check("vision towers", not problems, figure, detail)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Return the L1 distance: the mean absolute difference."""
    return float(np.abs(one - other).mean())


def _watch(subject: Subject, pruned: bool) -> TowerProbe:
    shown: Images = subject.noise(0)
    probe = TowerProbe(subject.policy.vision_towers, subject.family.anatomy.patched)
    if not pruned:
        with probe:
            subject.act(shown)
        return probe
    with subject.attach():
        subject.begin()
        for step in range((subject.steps or 1) - 1):
            subject.act(shown, step)
        with probe:
            subject.act(shown)
    return probe


def _repeated(seen: list[torch.Tensor]) -> bool:
    return any(one.shape == other.shape and torch.equal(one, other) for one, other in itertools.combinations(seen, 2))
