"""Every check can fail: policies and pruners that are broken on purpose, each found by the check made for it."""

from __future__ import annotations

import functools
import importlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vla_pruner as vp
from vla_pruner import timing
from vla_pruner.attach import recorder, runner, short_layers
from vla_pruner.attach.shortening import Shortening
from vla_pruner.auditing import environment
from vla_pruner.auditing.run import CHECKS, audit
from vla_pruner.auditing.subject import Subject
from vla_pruner.cli import main
from vla_pruner.families.base import TransformersFamily

METHOD = vp.VLAPruner(keep=0.25, window=1, preset="paper")


def ask(name, policy, method=METHOD):
    return CHECKS[name](Subject(policy, method))


@pytest.fixture
def policy() -> Any:
    return vp.random_policy("reference")


@pytest.fixture
def two_cameras() -> Any:
    return vp.random_policy("pi0")


def replace_act(policy, change):
    """Make `policy.act` see `change(images)` instead of its images."""
    original = policy.act
    policy.act = lambda images, *rest: original(change(dict(images)), *rest)


def black(images):
    return {camera: np.zeros_like(image) for camera, image in images.items()}


def test_a_blind_policy(policy):
    replace_act(policy, black)
    check = ask("images", policy)
    assert check.passed is False
    assert "black - white and black - noise and white - noise gave the same action" in check.detail
    assert ask("scenes", policy).passed is False


def test_a_policy_that_tells_only_bright_from_dark(policy):
    replace_act(policy, lambda images: {name: np.full_like(x, 255 * (x.mean() > 200)) for name, x in images.items()})
    check = ask("images", policy)
    assert check.passed is False
    assert check.detail.startswith("black - noise gave the same action")


def test_a_policy_that_ignores_one_camera(two_cameras):
    assert ask("cameras", two_cameras).passed
    replace_act(two_cameras, lambda images: {**images, "wrist": black(images)["wrist"]})
    assert ask("images", two_cameras).passed
    check = ask("cameras", two_cameras)
    assert check.passed is False
    assert "the image of 'wrist'" in check.detail


def test_a_policy_that_is_not_repeatable(policy):
    original, draws = policy.act, np.random.default_rng(0)
    policy.act = lambda *args: original(*args) + 1e-6 * draws.normal()
    assert ask("repeatable", policy).passed is False


def test_actions_that_are_no_numbers(policy):
    original = policy.act
    policy.act = lambda *args: original(*args) * np.nan
    check = ask("repeatable", policy)
    assert check.passed is False
    assert "not finite" in check.detail
    assert ask("images", policy).passed is False


def test_vision_called_twice(policy):
    original = policy.act

    def act(images, *rest):
        policy.visual_tokens(torch.as_tensor(images["image"])[None])
        return original(images, *rest)

    policy.act = act
    check = ask("vision towers", policy)
    assert check.passed is False
    assert "unpruned, tower 1 saw 2 images" in check.detail


def test_one_image_shown_for_both_cameras(two_cameras):
    replace_act(two_cameras, lambda images: {**images, "wrist": images["base"]})
    check = ask("vision towers", two_cameras)
    assert check.passed is False
    assert "the same image twice" in check.detail


def test_vision_that_is_skipped_while_pruned(policy):
    original, last = policy.visual_tokens, {}

    def visual_tokens(images):
        # A cache of features that is used only with a session attached.
        if "reset" in vars(policy) and last:
            return last["tokens"]
        last["tokens"] = original(images)
        return last["tokens"]

    policy.visual_tokens = visual_tokens
    check = ask("vision towers", policy)
    assert check.passed is False
    assert "pruned, tower 1 saw 0 images" in check.detail
    assert "unpruned, tower" not in check.detail


def test_pruning_that_starts_a_layer_late(policy, monkeypatch):
    original = runner.stages_of
    monkeypatch.setattr(
        runner, "stages_of", lambda *given: {layer + 1: stage for layer, stage in original(*given).items()}
    )
    method = vp.RandomKeep(keep=0.25)
    check = ask("lengths", policy, method)
    assert check.passed is False
    assert "layer 3 [72] and not [24]" in check.detail
    assert ask("reference drop", policy, method).passed is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gathering_the_wrong_rows(dtype, monkeypatch):
    policy = vp.random_policy("reference", dtype=dtype)
    original = Shortening.live_rows
    monkeypatch.setattr(Shortening, "live_rows", lambda self, tensor: original(self, tensor).roll(1, 1))
    for name in ("reference drop", "reference freeze"):
        assert ask(name, policy).passed is False, name
    assert ask("lengths", policy).passed, "the lengths alone do not show it"


def test_positions_counted_anew(policy, monkeypatch):
    """The classic: kept tokens are given the positions of a shorter prompt."""
    monkeypatch.setattr(
        short_layers, "_angles", lambda function, tensors: tuple(x[:, : function(x).shape[1]] for x in tensors)
    )
    check = ask("reference drop", policy)
    assert check.passed is False
    assert "computes something else" in check.detail


def test_frozen_tokens_that_say_nothing(policy, monkeypatch):
    original = TransformersFamily.keys_values
    monkeypatch.setattr(
        TransformersFamily,
        "keys_values",
        lambda self, *args: tuple(torch.zeros_like(part) for part in original(self, *args)),
    )
    assert ask("reference freeze", policy).passed is False
    assert ask("reference drop", policy).passed


def test_columns_of_an_expert_left_as_they_were(two_cameras, monkeypatch):
    """An expert that reads the wrong columns: only its own calls can show it."""
    original = Shortening.reader_mask
    monkeypatch.setattr(
        Shortening,
        "reader_mask",
        lambda self, mask, buffer: original(self, mask, buffer) & (torch.arange(mask.shape[-1] - 96) > 8),
    )
    assert ask("reference drop", two_cameras).passed is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_comparison_that_could_not_fail_does_not_pass(dtype):
    """If the layers from the pruning layer on do nothing, agreement with the reference means nothing."""
    policy: Any = vp.random_policy("reference", dtype=dtype)
    with torch.no_grad():
        for layer in policy.language_model.model.layers[3:]:
            layer.self_attn.o_proj.weight.zero_()
    assert ask("reference drop", policy).passed is False


def test_a_recorder_that_touches_what_it_reads(policy, monkeypatch):
    original = recorder._record

    def record(*args, **kwargs):
        output, weights = original(*args, **kwargs)
        return output * 1.01, weights

    monkeypatch.setattr(recorder, "_record", record)
    # Hidden states show it; a hundredth need not turn an action token over.
    check = ask("keep 1.0", policy)
    assert check.passed is False
    assert "not bit-identical" in check.detail


@dataclass(frozen=True)
class Stubborn(vp.VLAPruner):
    """Looks at the scene and keeps the same tokens."""

    def select(self, evidence, k):
        return torch.arange(k).expand(len(evidence.valid), k)


def test_a_choice_that_does_not_follow_the_scene(policy):
    check = ask("scenes", policy, Stubborn(keep=0.25, window=1, preset="paper"))
    assert check.passed is False
    assert "same tokens" in check.detail


def test_a_policy_that_remembers_over_its_reset(policy):
    original, seen = policy.act, []

    def act(images, *rest):
        seen.append(float(images["image"].mean()))
        return original(images, *rest) + 1e-3 * len(seen)

    policy.act = act
    check = ask("reset", policy)
    assert check.passed is False
    assert "the policy alone" in check.detail


def test_a_session_that_remembers_over_its_reset(policy, monkeypatch):
    monkeypatch.setattr(vp.Session, "reset", lambda self, rows=None: None)
    check = ask("reset", policy)
    assert check.passed is False
    assert "other tokens are kept" in check.detail
    assert "the policy alone" not in check.detail


def leave(what):
    """Session.detach that leaves something behind."""
    original = vp.Session.detach

    def detach(self):
        attached = "reset" in vars(leave.policy)
        original(self)
        if attached:
            what(leave.policy)

    return functools.wraps(original)(detach)


@pytest.mark.parametrize(
    ("what", "where"),
    [
        (lambda policy: setattr(policy.language_model, "pruned", True), "language_model.pruned"),
        (lambda policy: policy.projector.register_forward_hook(print_nothing), "projector._forward_hooks"),
        (lambda policy: setattr(policy.language_model.config, "use_cache", False), "language_model.config.use_cache"),
        (lambda policy: policy.projector[0].bias.data.add_(1e-3), "projector.0._parameters"),
        (lambda policy: setattr(policy, "extra", nn.Linear(1, 1)), "(module)._modules"),
    ],
    ids=["attribute", "hook", "config", "weight", "module"],
)
def test_something_left_behind(policy, monkeypatch, what, where):
    subject = Subject(policy, METHOD)
    leave.policy = policy
    monkeypatch.setattr(vp.Session, "detach", leave(what))
    check = CHECKS["detach"](subject)
    assert check.passed is False
    assert where in check.detail


def print_nothing(*_):
    """A hook that does nothing but be there."""


def test_only_an_exception_leaves_something_behind(policy, monkeypatch):
    def leave_session(self, kind, *_):
        self.detach()
        if kind is not None:
            policy.failed = True

    monkeypatch.setattr(vp.Session, "__exit__", leave_session)
    check = ask("detach", policy)
    assert check.passed is False
    assert "(module).failed (after an exception)" in check.detail


def test_time_that_cannot_be_measured(policy, monkeypatch):
    monkeypatch.setattr(timing.Span, "_open", lambda *_: None)
    assert ask("share", policy).passed is False


def test_transformers_out_of_range(policy, monkeypatch):
    real = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: "4.57.6" if name == "transformers" else real(name))
    check = ask("environment", policy)
    assert check.passed is False
    assert "transformers 4.57.6 is installed; supported is 5.4 to " in check.detail


def test_transformers_that_no_test_ran_on_is_called_so(policy, monkeypatch):
    real = environment.installed
    monkeypatch.setattr(environment, "installed", lambda name: "5.99.0" if name == "transformers" else real(name))
    check = ask("environment", policy)
    assert check.passed is False
    assert "transformers 5.99.0 is installed, which no test has run on yet; supported is 5.4 to " in check.detail


def test_torchvision_of_another_build(policy, monkeypatch):
    real = importlib.import_module

    def import_module(name, *rest):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        return real(name, *rest)

    monkeypatch.setattr(environment, "installed", lambda name: {"torchvision": "0.28.0"}.get(name, "5.23.0"))
    monkeypatch.setattr(importlib, "import_module", import_module)
    check = ask("environment", policy)
    assert check.passed is False
    assert "nms does not exist" in check.detail


def test_eager_attention_is_a_warning():
    policy: Any = vp.random_policy("reference")
    policy.language_model.set_attn_implementation("eager")
    check = ask("environment", policy)
    assert check.passed
    assert "slower than sdpa" in check.detail


def test_a_policy_that_breaks_off_is_a_finding(policy):
    original = policy.act

    def act(images, *rest):
        if images["image"].mean() > 250:
            raise ZeroDivisionError("white is\n too bright")
        return original(images, *rest)

    policy.act = act
    report = audit(policy, METHOD)
    assert not report.passed
    assert [check.name for check in report.failures] == ["images", "cameras"]
    assert report["images"].detail == "It broke off with ZeroDivisionError: white is too bright"


@pytest.mark.parametrize("first", [True, False], ids=["in its first step", "in its first pruned step"])
@pytest.mark.parametrize("error", [vp.SessionError, RuntimeError, KeyError, OSError])
def test_what_breaks_before_the_first_check_is_a_finding_too(policy, error, first, capsys, monkeypatch, tmp_path):
    """The audit looks for the first pruned step before it asks anything."""
    original = runner.Runner.choose

    def choose(self, hidden, layer):
        if self.step.prunes or first:
            raise error("steps cannot be interleaved")
        return original(self, hidden, layer)

    monkeypatch.setattr(runner.Runner, "choose", choose)
    report = audit(policy, METHOD)
    broken = {check.name: check.detail for check in report.failures}
    assert {"lengths", "reference drop", "reference freeze", "scenes", "reset", "detach", "share"} <= set(broken)
    assert all(f"It broke off with {error.__name__}" in detail for detail in broken.values())
    assert report["environment"].passed
    assert report["images"].passed
    assert len(report.checks) == len(CHECKS)
    vp.VLAPruner(keep=0.25, preset="paper").attach(policy).detach()  # nothing is left attached

    file = tmp_path / "audit.json"
    assert main(["audit", "reference", "--random-weights", "--json", str(file)]) == 1
    assert "FAIL" in capsys.readouterr().out
    assert json.loads(file.read_text())["passed"] is False


def test_what_was_asked_for_and_does_not_fit_is_no_finding(policy):
    with pytest.raises(vp.OptionError, match="5000"):
        audit(policy, vp.VLAPruner(keep=5000, preset="paper"))
    with vp.FastV().attach(policy), pytest.raises(vp.SessionError, match="has a session already"):
        audit(policy, METHOD)
