"""Compiled arms: all of them, before the episodes, with the same actions, and with nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.demo.conftest import FakeEnvironment, FakeEnvironments, PairEnvironment
from tests.state import whole_state
from vla_pruner import cli
from vla_pruner.demo import Arm, DemoSettings, run, run_demo
from vla_pruner.demo.arms import UncompiledArms, default_arms
from vla_pruner.demo.compiled import CompiledArms, Compiling, why_not
from vla_pruner.demo.settings import DEFAULT_MINUTES
from vla_pruner.policies.compiled_copies import sharing_copy

# torch says the first while it imports its own compiler, and looks at .grad of every tensor that it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def _run(policy: Any, environments: Any, arms: Any, backend: Any = "eager", **settings: Any) -> tuple[int, str]:
    with open("/dev/null", "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=100, file=nowhere, highlight=False)
        asked = DemoSettings(**{"compile": True, "seed": 0, **settings})
        code = run_demo(asked, console, policy, environments, arms, backend)
    return code, " ".join(console.export_text().split())


def _results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every copy that is made of the policy."""
    made: list[Any] = []

    def remembered(policy: Any) -> Any:
        made.append(sharing_copy(policy))
        return made[-1]

    monkeypatch.setattr("vla_pruner.demo.compiled.sharing_copy", remembered)
    return made


def _untouched(policy: Any) -> bool:
    hooks = [part for part in policy.modules() if part._forward_hooks or part._forward_pre_hooks]
    replaced = {"embed_prompt", "decode", "predict_action", "forward", "reset"}
    return not hooks and not any(replaced & vars(part).keys() for part in policy.modules())


def test_every_arm_is_compiled_before_the_episodes(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], copies: list[Any], tmp_path: Path
) -> None:
    before = whole_state(policy)
    code, text = _run(policy, environments, arms, episodes=1, out=tmp_path)
    assert code == 0
    assert whole_state(policy) == before
    assert len(copies) == len(arms)
    assert all(map(_untouched, copies))
    results = _results(tmp_path)
    made = results["compiled"]
    # The prompt's embeddings, and what follows: unpruned, pruned, or both.
    assert made["graphs"] == {"unpruned": 2, "drop": 3, "random": 2}
    assert (made["backend"], made["one_graph"], made["anew"]) == ("eager", True, 0)
    assert set(made["seconds"]) == set(made["graphs"])
    assert all(milliseconds > 0 for milliseconds in made["unpruned_ms"])
    assert results["why_not_compiled"] is None
    for arm in arms:
        assert f"Compiled: {arm.title}, in" in text
    assert text.index("Compiled: random") < text.index("paired episodes an arm, compiled")
    assert "2 paired episodes an arm, every arm compiled." in results["verdict"][0]
    assert results["amdahl_ceiling"] is None
    assert "Prompt and actions are one graph" in " ".join(results["verdict"])
    for arm in results["arms"]:
        stages = arm["milliseconds_pruned_steps"]["stages"]
        assert stages["prefill"] > 0
        assert stages["vision"] > 0
        assert stages["decode"] == 0
    told = 'it is part of "prompt, actions"; "choosing, outside" is what a session does around the graphs'
    assert told in text
    page = " ".join((tmp_path / "report.html").read_text(encoding="utf-8").replace("&quot;", '"').split())
    assert told in page
    assert "every arm compiled (eager)" in page
    assert '<b class="pruning"></b>choosing, outside</span>' in page
    assert '<b class="decode"></b>' not in page


def test_the_two_camera_policy_has_its_one_pass_compiled(chunk_policy: Any, tmp_path: Path) -> None:
    code, text = _run(chunk_policy, PairEnvironment, default_arms()[:2], episodes=1, tasks=("reach",), out=tmp_path)
    assert code == 0
    results = _results(tmp_path)
    assert results["compiled"]["graphs"] == {"unpruned": 2, "recommended": 3}
    assert (results["compiled"]["one_graph"], results["compiled"]["anew"]) == (False, 0)
    assert results["amdahl_ceiling"] >= 1
    assert [arm["cost"]["visual_tokens_kept"] for arm in results["arms"]] == [128, 32]
    assert "The action rows are part of the prompt's one pass" in text
    assert " in prompt and choosing, " in text


@pytest.mark.parametrize("kind", ["policy", "chunk_policy"])
def test_compiled_arms_act_as_uncompiled_ones(kind: str, arms: tuple[Arm, ...], request: Any) -> None:
    policy = request.getfixturevalue(kind)
    environment = (PairEnvironment if kind == "chunk_policy" else FakeEnvironment)("reach")
    with CompiledArms(policy, arms[:2], environment.reset(3), "eager") as compiled:
        for seed in (0, 1):  # the second episode remembers nothing of the first
            for arm in arms[:2]:
                steps = []
                for opened in (UncompiledArms(policy), compiled):
                    seen, acted = environment.reset(seed), []
                    with opened.open(arm, seed) as (runs, session):
                        for _ in range(5):
                            chunk = runs.act(seen.images, seen.instruction, seen.proprio)
                            acted.append((torch.as_tensor(chunk), None if session is None else session.kept))
                            seen = environment.step(chunk)[0]
                    steps.append(acted)
                for (chunk, kept), (other, compiled_kept) in zip(*steps, strict=True):
                    torch.testing.assert_close(other, chunk)
                    assert (kept is None) == (compiled_kept is None)
                    assert kept is None or torch.equal(kept, compiled_kept)
        assert compiled.compiling.anew == 0


def test_a_compiled_random_arm_draws_anew_in_each_episode(policy: Any, arms: tuple[Arm, ...]) -> None:
    seen = FakeEnvironment("reach").reset(0)
    with CompiledArms(policy, arms[2:], seen, "eager") as compiled:

        def drawn(seed: int) -> list[list[int]]:
            kept = []
            with compiled.open(arms[2], seed) as (runs, session):
                for _ in range(3):
                    runs.act(seen.images, seen.instruction, seen.proprio)
                    kept.append(session.kept[0].tolist())
            return kept

        first, other, again = drawn(7), drawn(8), drawn(7)
        assert first == again
        assert first != other
        assert len({tuple(ids) for ids in first}) > 1
        assert compiled.compiling.anew == 0


def test_without_a_c_compiler_nothing_is_compiled_and_it_is_said(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], tmp_path: Path
) -> None:
    from torch._inductor import config

    with config.patch("cpp.cxx", (None, "no-such-compiler")):
        assert "torch finds no C++ compiler here" in (why_not() or "")
        code, text = _run(policy, environments, arms, "inductor", compile=None, episodes=1, out=tmp_path)
    assert code == 0
    assert "apt-get install g++" in text
    results = _results(tmp_path)
    assert results["compiled"] is None
    assert results["why_not_compiled"] == results["verdict"][-1]
    assert "torch finds no C++ compiler" in (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "every arm compiled" not in text
    assert all(arm["milliseconds_all_steps"]["stages"]["decode"] > 0 for arm in results["arms"])


def test_a_policy_that_cannot_be_compiled_runs_as_it_is(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], copies: list[Any], tmp_path: Path
) -> None:
    graphs: list[Any] = []

    def broken(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        if len(graphs) > 3:  # the first arm is compiled by then, and no arm may stay so
            raise RuntimeError("no header Python.h\nand more")
        return graph.forward

    before = whole_state(policy)
    code, text = _run(policy, environments, arms, broken, episodes=1, out=tmp_path)
    assert code == 0
    assert text.count("No arm is compiled, since compiling this policy failed") == 2  # at once, and below the table
    assert "(RuntimeError: no header Python.h)" in text
    assert "and more" not in text
    assert _results(tmp_path)["compiled"] is None
    assert "Compiled: unpruned" in text
    assert whole_state(policy) == before
    assert len(copies) == 2
    assert all(map(_untouched, copies))


def test_ctrl_c_while_it_compiles(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], copies: list[Any], tmp_path: Path
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    before = whole_state(policy)
    code, text = _run(policy, environments, arms, interrupted, episodes=1, out=tmp_path)
    assert code == run.INTERRUPTED
    assert "nothing to show" in text
    assert whole_state(policy) == before
    assert len(copies) == 1
    assert all(map(_untouched, copies))
    assert environments.made["reach"].closed


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_in_an_episode_leaves_nothing_compiled(
    error: type[BaseException], policy: Any, arms: tuple[Arm, ...], copies: list[Any], tmp_path: Path
) -> None:
    arms = (arms[0], arms[2])

    class Failing(FakeEnvironment):
        def step(self, chunk: Any) -> Any:
            if len(self.resets) > len(arms) + 2:  # in the second unit; the first reset is the probe's
                raise error
            return super().step(chunk)

    before = whole_state(policy)
    asked = {"tasks": ("reach",), "episodes": 9, "out": tmp_path}
    if error is KeyboardInterrupt:
        code, text = _run(policy, Failing, arms, **asked)
        assert code == run.INTERRUPTED
        assert "1 paired episode an arm, every arm compiled" in text
        assert _results(tmp_path)["compiled"]["anew"] == 0
    else:
        with pytest.raises(error):
            _run(policy, Failing, arms, **asked)
    assert whole_state(policy) == before
    assert len(copies) == len(arms)
    assert all(map(_untouched, copies))


def test_compiling_counts_into_the_minutes(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clock, left = [0.0], []

    def compiles(*_: Any) -> tuple[None, None]:
        clock[0] += 120.0
        return None, None

    monkeypatch.setattr(run, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(run, "_compile", compiles)
    monkeypatch.setattr(run, "_run", lambda *args: left.append(args[2].minutes))
    _run(policy, environments, arms, tasks=("reach",), out=tmp_path)
    environments.made.clear()
    _run(policy, environments, arms, tasks=("reach",), out=tmp_path, quick=True)
    assert left == [pytest.approx(DEFAULT_MINUTES - 2), 0.0]


def test_what_is_compiled_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert DemoSettings().compiles
    assert DemoSettings(suite="libero_object").compiles
    assert not DemoSettings(quick=True).compiles
    assert DemoSettings(quick=True, compile=True).compiles
    assert not DemoSettings(compile=False).compiles
    asked: list[DemoSettings] = []
    monkeypatch.setattr("vla_pruner.demo.run_demo", lambda settings, _: asked.append(settings) or 0)
    for flags in ([], ["--compile"], ["--no-compile"]):
        assert cli.main(["demo", *flags]) == 0
    assert [settings.compile for settings in asked] == [None, True, False]


def test_seconds_in_the_file_are_readable() -> None:
    made = Compiling("inductor", False, {"unpruned": 2}, {"unpruned": 20.04}, (30.0, 29.0))
    assert made.to_json() == {
        "backend": "inductor",
        "one_graph": False,
        "graphs": {"unpruned": 2},
        "seconds": {"unpruned": 20.0},
        "unpruned_ms": (30.0, 29.0),
        "anew": 0,
    }
    assert replace(made, seconds={"a": 1.0, "b": 2.0}).total_seconds == 3.0
