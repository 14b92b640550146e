"""The audit passes on every family that runs here, and its figures are those of the model."""

from __future__ import annotations

import json

import pytest
import torch

import vla_pruner as vp
from tests.state import whole_state
from vla_pruner.auditing.report import AuditReport, Check
from vla_pruner.auditing.run import CHECKS
from vla_pruner.policies.base import example_of, module_of

OF_64 = ("llava", "paligemma", "paligemma2")
OF_16 = ("smolvlm", "qwen2.5-vl", "qwen3-vl", "internvl", "gemma3", "idefics3", "qwen2-vl")
VLMS = (*OF_64, *OF_16, "llava-next")
NAMES = ("reference", "reference-chunk", "openvla", "openvla-oft", "pi0", *VLMS)
LENGTHS = {
    "reference-chunk": "144 tokens in layers 0 to 2, 48 in layers 3 to 5 (32 of 128 visual tokens kept)",
    "reference": "72 tokens in layers 0 to 2, 24 in layers 3 to 5 (16 of 64 visual tokens kept)",
    "openvla": "(64 of 256 visual tokens kept)",
    "openvla-oft": "(128 of 512 visual tokens kept)",
    "pi0": "176 tokens in layers 0 to 2, 80 in layers 3 to 5 (32 of 128 visual tokens kept)",
    "llava": "179 tokens in layers 0 to 2, 83 in layers 3 to 5 (32 of 128 visual tokens kept)",
    **dict.fromkeys(OF_64[1:], "174 tokens in layers 0 to 2, 78 in layers 3 to 5 (32 of 128 visual tokens kept)"),
    "llava-next": "723 tokens in layers 0 to 2, 219 in layers 3 to 5 (168 of 672 visual tokens kept)",
    **dict.fromkeys(OF_16, "83 tokens in layers 0 to 2, 59 in layers 3 to 5 (8 of 32 visual tokens kept)"),
}
TOWERS = {
    "reference": "1 x 1 images a step",
    "reference-chunk": "1 x 2 images a step",
    "openvla": "2 x 1 images a step",
    "openvla-oft": "2 x 2 images a step",
    "pi0": "1 x 2 images a step",
    **dict.fromkeys(VLMS, "1 x 2 images a step"),
    "llava-next": "1 x 10 images a step",
}


def act(policy):
    given = example_of(policy)
    return policy.act(given.images, given.instruction, given.proprio)


def state(policy):
    """Return the whole state, except what Qwen-VL itself keeps of the last prompt."""
    found = whole_state(module_of(policy))
    return {place: value for place, value in found.items() if not place.endswith("rope_deltas")}


@pytest.mark.parametrize("name", NAMES)
def test_passes_on_every_family(name):
    policy = vp.random_policy(name)
    if name in VLMS:
        act(policy)  # transformers registers hooks of its own on some models in their first call
    before = state(policy)
    heard = []
    report = vp.audit(policy, vp.VLAPruner(keep=0.25, window=1, preset="paper"), progress=heard.append)
    assert report.passed, report.failures
    assert [check.name for check in report.checks] == list(CHECKS)
    assert tuple(heard) == report.checks
    assert all(check.passed for check in report.checks)
    assert LENGTHS[name] in report["lengths"].figure
    assert report["vision towers"].figure == TOWERS[name]
    assert "%" in report["share"].figure
    assert "ceiling" in report["share"].detail
    assert state(policy) == before
    loaded = json.loads(json.dumps(report.to_json()))
    assert loaded["passed"] is True
    assert loaded["settings"]["attention"] == ("eager" if name == "paligemma2" else "sdpa")
    assert loaded["settings"]["cameras"] == list(policy.cameras)
    assert len(loaded["checks"]) == len(CHECKS)


def test_half_precision_is_compared_with_what_pruning_changes():
    report = vp.audit(
        vp.random_policy("reference", dtype=torch.bfloat16), vp.VLAPruner(keep=0.25, window=1, preset="paper")
    )
    assert report.passed, report.failures
    assert "half precision" in report["reference drop"].detail
    assert report.settings["dtype"] == "bfloat16"


def test_methods_without_eyes_are_not_asked_about_scenes():
    report = vp.audit(vp.random_policy("reference"), vp.RandomKeep(keep=8, pruned="freeze"))
    assert report.passed, report.failures
    assert [check.name for check in report.checks if check.passed is None] == ["scenes", "position"]
    assert "8 of 64" in report["lengths"].figure


def test_a_method_that_never_prunes_is_not_asked_about_pruning():
    report = vp.audit(vp.random_policy("reference"), vp.Unpruned())
    assert report.passed, report.failures
    skipped = {check.name for check in report.checks if check.passed is None}
    assert skipped == {"lengths", "keep 1.0", "reference drop", "reference freeze", "scenes", "position", "share"}


def test_the_shipped_policy_is_told_what_it_knows():
    report = vp.audit(vp.load_policy("reference:autoregressive"), vp.VLAPruner(keep=0.25, window=1, preset="paper"))
    assert report.passed, report.failures


def test_refusals():
    policy = vp.random_policy("reference")
    with pytest.raises(vp.BudgetError, match="6 layers"):
        vp.audit(policy, vp.VLAPruner(layer=9, preset="paper"))
    with pytest.raises(vp.UnsupportedModelError, match="has no act, reset, cameras, vision_towers, proprio_size"):
        vp.audit(policy.language_model)  # type: ignore[arg-type,attr-defined]
    with vp.Unpruned().attach(policy), pytest.raises(vp.SessionError, match="already"):
        vp.audit(policy)
    with pytest.raises(vp.ObservationError, match="juggle"):
        vp.audit(policy, instruction="juggle")
    with pytest.raises(vp.ObservationError, match="empty"):
        vp.audit(policy, instruction="")


@pytest.mark.parametrize(
    ("method", "shown"), [(0.25, "0.25"), (vp.VLAPruner, "the class VLAPruner"), ("drop", "'drop'")]
)
def test_what_is_no_method_is_refused(method, shown):
    with pytest.raises(vp.OptionError, match=f"method is {shown}; it must be a Method"):
        vp.audit(vp.random_policy("reference"), method)


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, True])
def test_what_is_no_seed_is_refused(seed):
    with pytest.raises(vp.OptionError, match=f"seed={seed} was given; it is an int from 0"):
        vp.audit(vp.random_policy("reference"), seed=seed)


def test_a_check_that_does_not_exist_lists_those_that_do():
    report = AuditReport("P", "M", {}, (Check("images", True), Check("keep 1.0", True)))
    assert report["keep 1.0"].passed
    with pytest.raises(KeyError, match=r"no check is called foo; there are images, keep 1\.0"):
        report["foo"]


def test_remote_code_is_refused():
    remote = type("OpenVLAForActionPrediction", (), {"__module__": "transformers_modules.openvla.modeling_prismatic"})
    with pytest.raises(vp.UnsupportedModelError, match=r"load_policy"):
        vp.audit(remote())
