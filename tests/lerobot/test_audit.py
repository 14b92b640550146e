"""The audit passes on LeRobot's policies, and fails if they are broken on purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.state import whole_state
from vla_pruner.auditing import share
from vla_pruner.auditing.run import CHECKS
from vla_pruner.auditing.subject import Subject

QUEUES = {"._queues", "._action_queue", "._rollout_action_generator"}
"""LeRobot's reset() makes new ones."""

METHOD = vp.VLAPruner(keep=0.25, window=1, preset="paper")


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(share, "WARM_UP", 0)
    monkeypatch.setattr(share, "MOST", 3)


NAMES = ("lerobot-pi0", "lerobot-pi05", "lerobot-pi0-fast", "lerobot-smolvla", "lerobot-molmoact2")
BARE = ("lerobot-groot", "lerobot-eo1", "lerobot-vla-jepa")
"""Policies without a loader."""
TWO_CAMERAS = ("lerobot-molmoact2", "lerobot-eo1", "lerobot-vla-jepa")
EAGER = ("lerobot-pi0", "lerobot-pi05", "lerobot-smolvla")


@pytest.mark.parametrize("name", [*NAMES, *BARE])
def test_passes(name):
    if name in ("lerobot-groot", "lerobot-vla-jepa"):
        pytest.importorskip("diffusers", reason="diffusers is not installed; make test-lerobot installs it")
    policy = vp.random_policy(name)
    Subject(policy, METHOD)  # LeRobot sets the attention backend in the first call
    before = whole_state(policy.module)  # type: ignore[attr-defined]
    report = vp.audit(policy, METHOD)
    assert report.passed, report.failures
    unasked = {check.name for check in report.checks if check.passed is None}
    assert unasked == ({"reference freeze"} if name == "lerobot-groot" else set())
    assert report["vision towers"].figure == f"1 x {2 if name in TWO_CAMERAS else 3} images a step"
    assert f"{'32 of 128' if name in TWO_CAMERAS else '48 of 192'} visual tokens kept" in report["lengths"].figure
    assert ("slower than sdpa" in report["environment"].detail) == (name in EAGER)
    assert report.settings["lerobot"].startswith("0.6")
    after = whole_state(policy.module)  # type: ignore[attr-defined]
    assert {place for place in before if before[place] != after.get(place)} <= QUEUES
    assert set(after) == set(before)


@pytest.fixture(params=["lerobot-pi0", "lerobot-smolvla"])
def subject(request):
    return Subject(vp.random_policy(request.param), METHOD)


def test_a_camera_that_is_not_seen(subject):
    camera, original = subject.policy.cameras[1], subject.policy.act
    subject.policy.act = lambda images, *rest: original({**images, camera: np.zeros_like(images[camera])}, *rest)
    check = CHECKS["cameras"](subject)
    assert check.passed is False
    assert repr(camera) in check.detail


def test_gathering_the_wrong_rows(subject, monkeypatch):
    from vla_pruner.attach.shortening import Shortening

    original = Shortening.live_rows
    monkeypatch.setattr(Shortening, "live_rows", lambda self, tensor: original(self, tensor).roll(1, 1))
    for name in ("reference drop", "reference freeze"):
        assert CHECKS[name](subject).passed is False, name


def test_wrong_columns_for_the_expert(subject, monkeypatch):
    """Only the expert's own reading of the cache is wrong; the prompt is right."""
    from vla_pruner.attach.shortening import Shortening

    original = Shortening.reader_mask

    def reader_mask(self, mask, buffer):
        found = original(self, mask, buffer)
        hidden = False if found.dtype == torch.bool else torch.finfo(found.dtype).min
        return found.index_fill(-1, torch.arange(8), hidden)

    monkeypatch.setattr(Shortening, "reader_mask", reader_mask)
    assert CHECKS["reference drop"](subject).passed is False
    assert CHECKS["lengths"](subject).passed


def test_an_attribute_left_behind(subject, monkeypatch):
    original = vp.Session.detach

    def detach(self):
        original(self)
        subject.module.model.pruned = True

    monkeypatch.setattr(vp.Session, "detach", detach)
    check = CHECKS["detach"](subject)
    assert check.passed is False
    assert "model.pruned" in check.detail
