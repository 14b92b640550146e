"""The demo end to end on stand-ins: files, exit codes, Ctrl-C, and one clear line for each wrong input."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.demo.conftest import FakeEnvironment, FakeEnvironments, PairEnvironment
from vla_pruner.demo import Arm, DemoError, DemoSettings, default_arms, run_demo
from vla_pruner.demo.settings import DEFAULT_MINUTES, QUICK_MINUTES, choose_tasks
from vla_pruner.methods import VLAPruner
from vla_pruner.models.reference import save_policy
from vla_pruner.policies.reference import reference_policy
from vla_pruner.simulators.metaworld_suite import TASKS


def _run(policy: Any, environments: Any, arms: tuple[Arm, ...], **settings: Any) -> tuple[int, str]:
    console = Console(record=True, width=100, quiet=False, file=open("/dev/null", "w"), highlight=False)  # noqa: SIM115
    try:
        code = run_demo(DemoSettings(**{"compile": False, **settings}), console, policy, environments, arms)
    finally:
        console.file.close()
    return code, console.export_text()


def test_it_writes_table_results_and_report(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], tmp_path: Path
) -> None:
    code, text = _run(policy, environments, arms, episodes=2, out=tmp_path / "new", seed=0)
    assert code == 0
    assert "4 paired episodes an arm" in text
    assert "episodes solved" in text
    assert text.index("success") < text.index("95 % interval") < text.index("ms a pruned step") < text.index("speed")
    assert str(tmp_path / "new" / "report.html") in text.replace("\n", "")
    assert environments.made["reach"].closed

    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["format"] == "vla-pruner demo 2"
    assert results["interrupted"] is False
    assert results["paired_episodes"] == 4
    assert len(results["episodes"]) == 12
    assert {episode["arm"] for episode in results["episodes"]} == {"unpruned", "drop", "random"}
    assert all(len(episode["milliseconds"]) == episode["steps"] for episode in results["episodes"])
    assert results["arms"][0]["success"]["successes"] == 2
    assert "VLAPruner(layer=1" in results["arms"][1]["method"]
    assert {"torch", "transformers", "mujoco"} <= set(results["conditions"]["versions"])
    assert results["conditions"]["threads"] >= 1
    assert results["machine_was_busy"] is False
    assert (tmp_path / "new" / "table.md").read_text().count("\n") > 15


@pytest.mark.parametrize("used", [(99.0, 0.0), (0.0, 99.0)])
def test_a_busy_machine_finds_out_no_speed(
    policy: Any,
    environments: FakeEnvironments,
    arms: tuple[Arm, ...],
    tmp_path: Path,
    busy: list[float],
    used: tuple[float, float],
) -> None:
    busy[:] = used
    _, text = _run(policy, environments, arms, episodes=1, out=tmp_path, seed=0)
    assert ("Note: other programs keep this machine busy" in text) == bool(used[0])
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["machine_was_busy"] is True
    assert "repeat the demo when the machine is idle" in results["verdict"][0]
    assert not re.search(r"\dx| ms\b|fast as", " ".join(results["verdict"]))
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    for shown in (text, page, (tmp_path / "table.md").read_text()):
        assert "speed, busy" in shown
        assert re.findall(r"[\d.]+x\b", shown) == re.findall(r"(?<=\()[\d.]+x(?=\))", shown) != []


def test_the_two_camera_policy(chunk_policy: Any, tmp_path: Path) -> None:
    """With the arms that the demo has of its own."""
    settings = {"tasks": ("reach", "push"), "episodes": 1, "out": tmp_path, "seed": 0}
    code, text = _run(chunk_policy, PairEnvironment, default_arms(), **settings)
    assert code == 0
    assert "The recommended setting (0.25 freeze, layer 2, last row) takes" in " ".join(text.split())
    assert "no rule at this layer" in " ".join(text.split())
    results = json.loads((tmp_path / "results.json").read_text())
    assert [arm["arm"] for arm in results["arms"]] == ["unpruned", "recommended", "paper", "random"]
    assert [arm["cost"]["visual_tokens_kept"] for arm in results["arms"]] == [128, 32, 32, 32]
    floors = [arm["cost"]["decoder_floor_flops"] for arm in results["arms"]]
    assert floors[0] > floors[1] > floors[2] == floors[3]
    assert (results["conditions"]["policy"], results["decoder_layers"]) == ("ChunkPolicy", 6)
    assert results["verdict"][0].startswith("The recommended setting")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert (data["grid"], data["cameras"], data["frame_size"], data["hero"]) == (8, 2, 160, 1)
    assert "Cameras, from the left: image, wrist_image." in page


def test_arms_that_keep_everything_are_named_as_such(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], tmp_path: Path
) -> None:
    everything = (arms[0], Arm("drop", "VLA-Pruner 1 drop", "drop", VLAPruner(keep=1.0, layer=1, preset="paper")))
    code, text = _run(policy, environments, everything, episodes=1, out=tmp_path, seed=0)
    assert code == 0
    assert "It pruned no control step at all" in " ".join(text.split())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["arms"][1]["milliseconds_pruned_steps"]["p50"] is None
    assert results["arms"][1]["cost"]["visual_tokens_kept"] == 16


def test_the_report_is_self_contained(
    policy: Any, environments: FakeEnvironments, arms: tuple[Arm, ...], tmp_path: Path
) -> None:
    _run(policy, environments, arms, episodes=1, out=tmp_path, seed=0)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "$" not in re.sub(r"\$\{|\$\d", "", page.split("<script")[0]), "every placeholder was filled in"
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data = json.loads(found[1])
    assert (data["grid"], data["cameras"], data["frame_size"]) == (4, 1, 224)
    assert [unit["task"] for unit in data["units"]] == ["reach", "push"]
    arm = data["units"][0]["arms"][1]
    assert len(arm["frames"]) == len(arm["kept"]) + 1
    assert [None if ids is None else len(ids) for ids in arm["kept"]] == [None, None, None, 4, 4]


def test_ctrl_c_leaves_what_was_finished(policy: Any, arms: tuple[Arm, ...], tmp_path: Path) -> None:
    class Interrupting(FakeEnvironment):
        def step(self, chunk: Any) -> Any:
            if len(self.resets) > len(arms) + 2:  # in the second unit; the first reset is the probe's
                raise KeyboardInterrupt
            return super().step(chunk)

    made: list[Interrupting] = []

    def make(task: str) -> Interrupting:
        made.append(Interrupting(task))
        return made[-1]

    code, text = _run(policy, make, arms, tasks=("reach",), episodes=9, out=tmp_path, seed=0)
    assert code == 130
    assert "Interrupted" in text
    assert "1 paired episode an arm" in text
    assert json.loads((tmp_path / "results.json").read_text())["interrupted"] is True
    assert all(environment.closed for environment in made)


def test_ctrl_c_before_anything_is_finished(policy: Any, arms: tuple[Arm, ...], tmp_path: Path) -> None:
    class Interrupting(FakeEnvironment):
        def step(self, chunk: Any) -> Any:
            raise KeyboardInterrupt

    code, text = _run(policy, Interrupting, arms, out=tmp_path)
    assert code == 130
    assert "nothing to show" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.0}, "--keep is 0.0; it is a fraction"),
        ({"keep": 2.0}, "--keep is 2.0; it is a fraction"),
        ({"keep": float("nan")}, "--keep is nan"),
        ({"episodes": 0}, "--episodes is 0; it is a whole number of 1 or more"),
        ({"seed": -1}, "--seed is -1; it is a whole number of 0 or more"),
        ({"tasks": ()}, "names no task"),
        ({"tasks": ("reach", "fly")}, "Unknown task fly; the policy knows these tasks: 0 reach, 1 push"),
        ({"out": Path("/dev/null/x")}, "cannot be written to"),
    ],
)
def test_wrong_settings_are_refused_before_anything_runs(
    policy: Any, arms: tuple[Arm, ...], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    def never(_: str) -> Any:
        raise AssertionError("no environment may be made")

    with pytest.raises(DemoError, match=message):
        _run(policy, never, arms, **{"out": tmp_path, **settings})


def test_tasks_are_chosen_once_and_in_the_order_asked() -> None:
    assert choose_tasks(None, ("a", "b")) == ("a", "b")
    assert choose_tasks(("b", "a", "b"), ("a", "b")) == ("b", "a")
    assert choose_tasks(("1", "a", "b"), ("a", "b")) == ("b", "a")


@pytest.mark.parametrize("name", ["metaworld", "autoregressive"])
def test_numbers_of_tasks_are_those_of_the_suite(name: str) -> None:
    """As `eval --tasks` counts them; LIBERO's are tested where it is installed."""
    config = reference_policy(name).config
    assert tuple(task for task, _ in config.tasks) == TASKS["metaworld:mt8"]


def test_only_defaults_are_cut_short() -> None:
    assert DemoSettings().minutes == DEFAULT_MINUTES
    assert DemoSettings(quick=True).minutes == QUICK_MINUTES
    assert DemoSettings(episodes=50).minutes is None
    assert DemoSettings(quick=True).episodes_a_task < DemoSettings().episodes_a_task


def test_damaged_weights_are_one_clear_line(policy: Any, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    save_policy(policy, weights)
    damaged = weights / "model.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    settings = DemoSettings(weights=weights, out=tmp_path / "out")
    with pytest.raises(DemoError, match=r"model.safetensors is damaged"):
        run_demo(settings, Console(quiet=True))
    shutil.rmtree(weights)
    with pytest.raises(DemoError, match=r"no reference policy .*, and no folder of that name"):
        run_demo(settings, Console(quiet=True))
