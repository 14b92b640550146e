"""The benchmark of LeRobot's policies: it runs what the formulas count, and nothing stays on the policy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.plan import PLAN
from tests.bench.conftest import subject_of
from tests.lerobot.test_audit import BARE, NAMES
from tests.state import whole_state
from vla_pruner.benching.arms import Turns, arms_of
from vla_pruner.benching.feeds import feed
from vla_pruner.benching.measure import count_stages, time_stages
from vla_pruner.benching.roofline import least_work
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.families import family_of
from vla_pruner.plugins import class_at
from vla_pruner.policies.random import random_policy
from vla_pruner.registry import row_named, row_of

ROOT = Path(__file__).parents[2]
CASES = (
    BenchSettings("pi05", size="tiny", layers=4, cameras=2, denoise_steps=2, pruned=("drop", "freeze")),
    BenchSettings("smolvla", size="tiny", batch=2, denoise_steps=2, pruned=("drop", "freeze")),
    BenchSettings("molmoact2", size="tiny", batch=2, denoise_steps=2, pruned=("drop", "freeze")),
    BenchSettings("eo1", size="tiny", layers=4, batch=2, denoise_steps=2, pruned=("drop", "freeze")),
    BenchSettings("pi0-fast", size="tiny", layers=4, cameras=2, decode_tokens=4, pruned=("drop", "freeze")),
    BenchSettings("groot", size="tiny", cameras=2, denoise_steps=2, pruned=("drop",)),
    BenchSettings("vla-jepa", size="tiny", batch=2, pruned=("drop", "freeze")),
)
NEEDS_DIFFUSERS = ("groot", "vla-jepa")


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: settings.model)
def test_counted_flops_are_those_of_the_formula(settings: BenchSettings) -> None:
    _import_diffusers(settings.model)
    # Modulations by the timestep, one row in each block, are no part of the formula; so few rows as here they show.
    allowed = {"decode": 0.04} if settings.model == "groot" else {}
    subject = subject_of(settings)
    subject.step()  # LeRobot sets the attention backend in its first call
    before = whole_state(subject.module)
    turns = Turns(subject, arms_of(settings))
    for arm in turns.arms:
        counted = count_stages(turns, arm)
        formula = least_work(subject, turns.kept[arm.name], arm.layer, arm.pruned).flops
        for stage in ("vision", "prefill", "decode") if subject.vision_by_formula else ("prefill", "decode"):
            expected = pytest.approx(formula[stage], rel=allowed.get(stage, 0.01))
            assert counted[stage] == expected, (arm.name, stage)
    assert whole_state(subject.module) == before


@pytest.mark.parametrize("model", ["pi05", "smolvla"])
def test_an_encoder_that_reuses_patches_computes_what_the_formula_says(model: str) -> None:
    subject = subject_of(BenchSettings(model, size="tiny", denoise_steps=2, encoder_keep=(0.25,)))
    turns = Turns(subject, arms_of(subject.settings))
    seen = []
    for arm in turns.arms:
        counted = count_stages(turns, arm)
        formula = least_work(subject, turns.kept[arm.name], arm.layer, arm.pruned, encoder=arm.encoder).flops
        assert counted["vision"] == pytest.approx(formula["vision"], rel=0.01), arm.name
        seen.append(counted["vision"])
    assert seen[1] < 0.75 * seen[0], "patching and the projector run whole"


@pytest.mark.parametrize("settings", CASES, ids=lambda settings: settings.model)
def test_stages_are_found(settings: BenchSettings) -> None:
    _import_diffusers(settings.model)
    turns = Turns(subject_of(settings), arms_of(settings))
    acting = {"pi0-fast": "decode", "vla-jepa": ""}.get(settings.model, "denoise")
    assert turns.subject.acting == acting
    for found in time_stages(turns, 1).values():
        assert min(found[stage] for stage in ("vision", "prefill", "other")) > 0
        assert (found["decode"] > 0) == bool(acting)


def _import_diffusers(model: str) -> None:
    if model in NEEDS_DIFFUSERS:
        pytest.importorskip("diffusers", reason="diffusers is not installed; make test-lerobot installs it")


@pytest.mark.parametrize("name", [*NAMES, *BARE])
def test_every_kind_has_its_own_row(name: str) -> None:
    _import_diffusers(name.removeprefix("lerobot-"))
    policy = random_policy(name)
    row = row_of(policy)
    assert row is row_named(name)
    assert row is not None
    assert type(family_of(policy)) is class_at(row.family)
    assert (row.bench is not None and row.bench.first_layer) == family_of(policy).first_layer


def test_depth_and_cameras_are_those_asked_for() -> None:
    subject = subject_of(CASES[0])
    assert (subject.family.depth, len(subject.anatomy.experts[0].layers)) == (4, 4)
    assert subject.policy.cameras == ("camera1", "camera2")
    assert subject_of(BenchSettings("smolvla", size="tiny", layers=4)).family.depth == 4


def test_a_chunk_that_ends_early_is_counted_as_it_is() -> None:
    policy = random_policy("pi0-fast")
    settings = BenchSettings(type(policy).__name__, loaded=True)
    assert feed(policy, settings, torch.device("cpu")).decoded == 7
    tokens = []
    inner = policy.module.model  # type: ignore[attr-defined]
    head = inner.paligemma_with_expert.paligemma.lm_head
    hook = head.register_forward_hook(lambda _, __, logits: tokens.append(int(logits.argmax())))
    feed(policy, settings, torch.device("cpu"))
    hook.remove()
    inner._paligemma_tokenizer.marker = tokens[3]
    first = tokens.index(tokens[3])
    assert feed(policy, settings, torch.device("cpu")).decoded == first


@pytest.mark.parametrize("item", [item for item in PLAN if item.needs == "lerobot"], ids=lambda item: item.name)
def test_the_items_for_a_gpu_run_dry(item, tmp_path):
    """`make test` runs the items that do not need lerobot."""
    file = tmp_path / "found.json"
    words = [sys.executable, "-m", "benchmarks.gpu.child", item.name, str(file), "--dry"]
    paths = {"PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=ROOT, env=os.environ | paths, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert [job["name"] for job in found["jobs"]] == [job.name for job in item.jobs]
    for job in found["jobs"]:
        assert all(arm["stages"]["prefill"] > 0 for arm in job["report"]["arms"])
