"""The arms of an evaluation: combinations, names, and controls that prune the same steps."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from tests.evaluation.fakes import FakeSuite, settings, tiny_policy
from tests.evaluation.test_run import UNIT
from vla_pruner.errors import OptionError
from vla_pruner.evaluation import EvaluationError
from vla_pruner.evaluation.arms import CONTROLS, all_arms, check_layers, method_arms
from vla_pruner.evaluation.flags import add_eval, settings_of
from vla_pruner.evaluation.lockstep import shares
from vla_pruner.evaluation.manifest import Manifest, Plan, identity
from vla_pruner.evaluation.options import PRUNING, ArmOptions
from vla_pruner.evaluation.settings import EvalSettings
from vla_pruner.method_names import told_of_fates, was_pruned
from vla_pruner.methods import EncoderReuse, FastV, Memory, Method, RandomKeep, VLAPruner


def test_arms_are_every_combination_once() -> None:
    arms = all_arms(
        method_arms(("vla-pruner", "vla-pruner:unseen=carry:window=5", "random"), (0.5, 64), (2, 0), ("drop",)),
        ("random",),
    )
    keys = [arm.key for arm in arms]
    assert len(set(keys)) == len(keys) == 1 + 12 + 8
    carried: Any = next(
        arm.method for arm in arms if arm.key == "vla-pruner-0.5-drop-K0-unseencarry-window5-semantic_querieslast"
    )
    assert (carried.unseen, carried.window, carried.refresh_every) == ("carry", 5, 8)
    control: Any = next(arm for arm in arms if arm.key == "random-64-drop-K2-after-5")
    assert control.method.warmup_steps == 5
    paired = next(arm for arm in arms if arm.key == "vla-pruner-64-drop-K2-unseencarry-window5-semantic_querieslast")
    assert paired.random == control.key


def test_a_method_may_say_its_own_keep_layer_and_fate() -> None:
    names = ("fastv:keep=64:layer=2:pruned=freeze", "vla-pruner:window=2:layer=1", "fastv")
    arms = method_arms(names, (0.5, 0.25), (3,), ("drop",))
    assert [arm.title for arm in arms] == [
        "fastv 64 freeze K=2",
        "vla-pruner 0.5 drop K=1 window=2 semantic_queries=last",
        "vla-pruner 0.25 drop K=1 window=2 semantic_queries=last",
        "fastv 0.5 drop K=3",
        "fastv 0.25 drop K=3",
    ]
    assert arms[0].method == FastV(keep=64, layer=2, pruned="freeze")
    with pytest.raises(OptionError, match="fastv can only drop or freeze"):
        method_arms(("fastv:pruned=burn",), (0.5,), (3,), ("drop",))


def test_the_preset_decides_what_is_left_out() -> None:
    names = ("vla-pruner", "vla-pruner:preset=paper", "vla-pruner:semantic_queries=text", "fastv")
    arms = method_arms(names, (0.25,), (3,), None)
    assert [arm.title for arm in arms] == [
        "vla-pruner 0.25 freeze K=3 semantic_queries=last",
        "vla-pruner 0.25 drop K=3 preset=paper",
        "vla-pruner 0.25 freeze K=3 semantic_queries=text",
        "fastv 0.25 drop K=3",
    ]
    assert [arm.method for arm in arms[:2]] == [VLAPruner(), VLAPruner(preset="paper")]


def test_methods_of_different_fates_are_told_apart() -> None:
    def told(*names: str, pruned: tuple[str, ...] | None = None) -> str:
        options = [arm.options for arm in method_arms(names, (0.25, 0.5), (3,), pruned)]
        return told_of_fates((one.method, one.pruned) for one in options if one is not None)

    assert told("vla-pruner", "fastv", "divprune").startswith(
        "These methods differ in the fate of the other tokens, too (vla-pruner freeze, fastv drop, divprune drop)"
    )
    for same in (("vla-pruner",), ("fastv", "divprune"), ("vla-pruner", "vla-pruner:preset=paper"), ()):
        assert told(*same) == ""
    assert told("vla-pruner", "fastv", pruned=("freeze", "drop")) == ""


def test_the_random_control_waits_as_long_as_the_method() -> None:
    waits = {
        "vla-pruner": 3,
        "vla-pruner:warmup=semantic": 0,
        "action-only:window=4": 4,
        "action-only:warmup_steps=5": 5,
        "fastv": 0,
        "fastv:warmup_steps=2": 2,
    }
    for name, steps in waits.items():
        control: Any = all_arms(method_arms((name,), (0.25,), (2,), ("drop",)), ("random",))[-1]
        assert (control.kind, control.method.warmup_steps) == ("random", steps), name


def test_a_random_choice_is_another_one_in_every_unit() -> None:
    policy = tiny_policy()
    arm = all_arms(method_arms(("fastv",), (0.25,), (1,), ("drop",)), ("random",))[-1]
    assert arm.kind == "random"
    kept = set()
    for state in range(4):
        with arm.attach(policy, dataclasses.replace(UNIT, initial_state=state)) as session:
            policy.act({"image": np.zeros((32, 32, 3), np.uint8)}, "reach the ball", np.zeros(4, np.float32))
            kept.add(tuple(session.kept[0].tolist()))
    assert len(kept) == 4


def test_one_token_and_all_of_them_are_two_arms() -> None:
    arms = method_arms(("fastv",), (1.0, 1), (3,), ("drop",))
    assert [arm.title for arm in arms] == ["fastv 1.0 drop K=3", "fastv 1 drop K=3"]
    assert len(all_arms(arms, ("random",))) == 1 + 2 + 2


def test_the_vision_encoder_makes_arms_of_its_own() -> None:
    methods = method_arms(("fastv",), (0.5,), (1,), ("drop",), (1.0, 0.5, 4), 3)
    arms = all_arms(methods, ("random",))
    assert [arm.title for arm in arms] == [
        "unpruned",
        "fastv 0.5 drop K=1",
        "fastv 0.5 drop K=1 encoder=0.5 refresh=3",
        "fastv 0.5 drop K=1 encoder=4 refresh=3",
        "random 0.5 drop K=1",
        "random 0.5 drop K=1 encoder=0.5 refresh=3",
        "random 0.5 drop K=1 encoder=4 refresh=3",
    ]
    assert arms[2].key == "fastv-0.5-drop-K1-encoder0.5-refresh3"
    assert arms[2].random == arms[5].key
    assert [arm.encoder for arm in arms[1:4]] == [None, EncoderReuse(0.5, 3), EncoderReuse(4, 3)]
    assert arms[5].encoder == arms[2].encoder
    assert "encoder" not in arms[1].to_json()
    assert arms[2].to_json()["encoder"] == repr(arms[2].encoder)
    assert [shares(arm) for arm in arms[:3]] == [True, True, False]
    whole = method_arms(("fastv",), (1.0, 1), (1,), ("drop",), (1.0, 0.5))
    assert [arm.title for arm in whole] == [
        "fastv 1.0 drop K=1 encoder=0.5",
        "fastv 1 drop K=1",
        "fastv 1 drop K=1 encoder=0.5",
    ]
    (default,) = method_arms(("fastv",), (0.5,), (1,), ("drop",), (0.5,))
    assert (default.title, default.encoder) == ("fastv 0.5 drop K=1 encoder=0.5", EncoderReuse(0.5, 8))
    with pytest.raises(OptionError, match="--encoder-refresh is for --encoder-keep"):
        method_arms(("fastv",), (0.5,), (1,), ("drop",), None, 3)


def test_arms_carry_their_options() -> None:
    methods = method_arms(("vla-pruner:refresh_every=4:window=2",), (0.5, 64), (1,), ("freeze",), (1.0, 0.5), 3)
    arms = all_arms(methods, ("again", "random", "blank"))
    own = ["refresh_every=4", "window=2", "semantic_queries=last"]
    given = {"method": "vla-pruner", "pruned": "freeze", "layer": 1, "own": own}
    no_encoder = {"encoder_keep": None, "encoder_refresh": None}
    record = json.loads(json.dumps([arm.to_json() for arm in arms]))
    assert record[1]["options"] == {**given, "keep": 0.5, **no_encoder}
    assert record[2]["options"] == {**given, "keep": 0.5, "encoder_keep": 0.5, "encoder_refresh": 3}
    assert record[3]["options"] == {**given, "keep": 64, **no_encoder}
    assert record[6]["title"] == "random 0.5 freeze K=1 after 2 refresh_every=4"
    assert record[6]["options"]["own"] == ["warmup_steps=2", "refresh_every=4"]
    for arm, one in zip(arms, record, strict=True):
        assert ("options" in one) == (arm.kind in PRUNING)
        if arm.options is not None:
            assert ArmOptions.of(one) == arm.options
            assert ArmOptions.of({"title": arm.title}) == arm.options, "in records from before arms carried them"


@pytest.mark.parametrize("name", ["study/grid", "study/options", "study/confirm", "layer_zero"])
def test_the_options_of_committed_runs_are_in_their_titles(name: str) -> None:
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / name
    if not folder.is_dir():
        pytest.skip("the committed results are not in this tree")
    manifest = Manifest.read(folder)
    pruning = [arm for arm in manifest.identity["arms"] if arm["kind"] in PRUNING]
    assert len(pruning) >= 2
    for arm in pruning:
        found = ArmOptions.of(arm)
        assert f"pruned='{found.pruned}'" in arm["method"]
        assert f"keep={found.keep!r}" in arm["method"]
        assert f"layer={found.layer}," in arm["method"]
        for name, _, value in (word.partition("=") for word in found.own):
            assert {f"{name}={value}", f"{name}='{value}'"} & set(re.split(r"[(), ]+", arm["method"])), arm["title"]


def test_a_run_from_before_arms_carried_options_goes_on(tmp_path: Path) -> None:
    asked = settings(tmp_path, methods=("vla-pruner",), controls=("random",))
    now = Manifest(identity(asked, {"weights": "w"}), Plan(FakeSuite().tasks, 0, 2, 0), for_claims=False)
    arms = [{name: value for name, value in arm.items() if name != "options"} for arm in now.identity["arms"]]
    before = dataclasses.replace(now, identity={**now.identity, "arms": arms})
    assert before.run == now.run
    before.write(tmp_path)
    assert Manifest.read(tmp_path).continued(now, tmp_path).identity == now.identity
    fewer = dataclasses.replace(now, identity={**now.identity, "arms": arms[:-1]})
    with pytest.raises(EvaluationError, match="was run with other settings than the command"):
        before.continued(fewer, tmp_path)


def test_a_run_from_before_the_default_changed_says_what_continues_it(tmp_path: Path) -> None:
    def manifest(method: str) -> Manifest:
        asked = settings(tmp_path, methods=(method,), controls=())
        return Manifest(identity(asked, {"weights": "w"}), Plan(FakeSuite().tasks, 0, 2, 0), for_claims=False)

    now, named = manifest("vla-pruner"), manifest("vla-pruner:preset=paper")
    arms = json.loads(json.dumps(named.identity["arms"]).replace("-presetpaper", "").replace(" preset=paper", ""))
    before = dataclasses.replace(now, identity={**now.identity, "arms": arms})
    told = r"from before 28 November 2026.*In another --out, --method vla-pruner:preset=paper has its rule"
    for asked in (now, named):
        with pytest.raises(EvaluationError, match=told):
            before.continued(asked, tmp_path)
        with pytest.raises(EvaluationError, match="or repeat the command that started it"):
            named.continued(now, tmp_path)


def test_an_arm_that_only_reuses_patches_is_no_unpruned_one() -> None:
    """Its steps count as pruned, or its verdict would be that it is the unpruned policy once more."""
    (arm,) = method_arms(("vla-pruner:window=1",), (1.0,), (1,), ("drop",), (0.5,))
    policy = tiny_policy()
    found = []
    with arm.attach(policy, UNIT) as session:
        for _ in range(3):
            policy.act({"image": np.zeros((32, 32, 3), np.uint8)}, "reach the ball", np.zeros(4, np.float32))
            assert session.kept is None
            found.append(was_pruned(session))
    assert found == [False, True, True]
    assert not was_pruned(None)


def test_a_vision_encoder_that_cannot_is_refused_before_anything_runs() -> None:
    (arm,) = method_arms(("fastv",), (0.5,), (1,), ("drop",), (1000,))
    with pytest.raises(EvaluationError, match=r"'fastv 0\.5 drop K=1 encoder=1000' does not fit .* has 16"):
        check_layers([arm], tiny_policy())


def test_two_different_arms_of_one_name_are_refused() -> None:
    (arm,) = method_arms(("fastv",), (0.5,), (3,), ("drop",))
    other = dataclasses.replace(arm, method=FastV(keep=0.25))
    with pytest.raises(EvaluationError, match=r"Two different arms are both called 'fastv 0\.5 drop K=3'"):
        all_arms((arm, other), ())
    assert len(all_arms((arm, arm), ())) == 2


@pytest.mark.parametrize("name", ["vla-pruner:preset=recommended", "vla-pruner:window=3", "vla-pruner:decay=0.80"])
def test_a_method_that_is_written_in_two_ways_is_refused(name: str) -> None:
    arms = method_arms(("vla-pruner", name), (0.5,), (3,), None)
    with pytest.raises(EvaluationError, match="are the same method; leave one of them out"):
        all_arms(arms, CONTROLS)
    assert len(all_arms(method_arms(("vla-pruner", name), (0.5,), (3,), None)[1:], CONTROLS)) == 5


@pytest.mark.parametrize("name", ["vla-pruner:preset=paper:preset=recommended", "vla-pruner:keep=0.5:keep=0.25"])
def test_an_option_that_is_given_twice_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match=r"has the option (preset|keep) twice; give it once\."):
        method_arms((name,), None, (3,), None)


@pytest.mark.parametrize("name", ["vla-pruner:refresh_every=4", "vla-pruner:layer=0", "vla-pruner:window=2"])
def test_the_random_control_prunes_the_steps_of_the_method(name: str) -> None:
    made, control = (
        cast(Method, arm.method) for arm in all_arms(method_arms((name,), (0.25,), (2,), ("drop",)), ("random",))[1:]
    )
    assert isinstance(control, RandomKeep)
    memory = Memory.empty(1, 3, 9)
    steps = []
    for _ in range(20):
        steps.append((made.prunes(memory), control.prunes(memory)))
        memory = dataclasses.replace(memory, steps=memory.steps + 1)
    assert all(first == second for first, second in steps)
    assert {first for first, _ in steps} == {True, False}


def test_a_refresh_is_an_int_of_two_or_more() -> None:
    with pytest.raises(OptionError, match="refresh_every=1"):
        RandomKeep(refresh_every=1)


def eval_options(*flags: str) -> EvalSettings:
    parser = argparse.ArgumentParser()
    add_eval(parser.add_subparsers())
    given = ("eval", "--policy", "reference", "--suite", "metaworld:mt4", "--out", "run", *flags)
    return settings_of(parser.parse_args(given))


def test_a_recipe_runs_every_budget_and_layer_dropped_and_frozen() -> None:
    asked = eval_options("--recipe", "freeze-vs-drop", "--margin", "5")
    arms = [arm for arm in asked.arms() if arm.kind == "method"]
    methods: list[Any] = [arm.method for arm in arms]
    assert {(m.keep, m.layer, m.pruned) for m in methods} == {
        (keep, layer, fate) for keep in (0.25, 0.125) for layer in (3, 8) for fate in ("drop", "freeze")
    }
    assert [arm.kind for arm in asked.arms() if arm.kind != "method"] == ["baseline", "again"]
    assert asked.margin == 0.05


@pytest.mark.parametrize("flags", [("--keep", ".5"), ("--controls", "none"), ("--method", "fastv"), ("--layer", "2")])
def test_what_a_recipe_sets_is_not_set_twice(flags: tuple[str, ...]) -> None:
    with pytest.raises(EvaluationError, match=f"sets {flags[0]} itself"):
        eval_options("--recipe", "freeze-vs-drop", *flags)
