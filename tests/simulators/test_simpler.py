"""SIMPLER itself, in an environment of its own (`make test-simpler`): skipped if it is not installed.

Its robot and scenes are not part of the project. Those of MS_ASSET_DIR are used, or the reduced set beside the
checkout, whose table and eggplant are stand-ins: scores mean nothing, semantics are real.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.simulators.carrier import Carrier
from vla_pruner import cli
from vla_pruner.errors import SessionError
from vla_pruner.evaluation import Unit, read_records
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.episode import run_episode
from vla_pruner.evaluation.records import EPISODES, TIMES
from vla_pruner.simulators import Environment, SimulatorUnavailable, SuiteError
from vla_pruner.simulators.simpler import SimplerSuite
from vla_pruner.simulators.simpler_conventions import CAMERA, axis_angle

pytestmark = pytest.mark.sim

SHARED = Path(os.environ.get("VLA_PRUNER_SIMPLER", Path(__file__).parents[3] / "shared" / "simpler"))
DRIVER = Path(sys.prefix) / "vulkan" / "lvp_icd.json"
"""The driver that .ci/vulkan unpacked, if this machine had none."""

STILL = np.array([0, 0, 0, 0, 0, 0, 1.0])
ACTIONS = np.random.default_rng(0).uniform(-1, 1, (5, 7)) * [0.02, 0.02, 0.02, 0.1, 0.1, 0.1, 1.0]


def unpack(folder: Path) -> None:
    """Put the reduced set where ManiSkill3 looks for its assets."""
    archives = [SHARED / name for name in ("real2sim_min.tar.zst", "ms3_widowx.tar.zst")]
    lacking = [str(path) for path in archives if not path.exists()]
    if lacking:
        pytest.skip(f"MS_ASSET_DIR names no assets, and there is no {lacking[0]}")
    if shutil.which("zstd") is None:
        pytest.skip("the assets of SIMPLER are packed by zstd, which is not installed (apt-get install zstd)")
    for path in archives:
        subprocess.run(["tar", "--zstd", "-xf", str(path), "-C", str(folder)], check=True)
    bridge = folder / "data" / "tasks" / "bridge_v2_real2sim_dataset"
    bridge.mkdir(parents=True)
    for source in ("custom", "real_inpainting", "hab2_bench_assets/stages"):
        shutil.move(folder / "data" / source, bridge)
    shutil.move(folder / "robots", folder / "data")


@pytest.fixture(scope="module", autouse=True)
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimplerSuite]:
    if importlib.util.find_spec("mani_skill") is None:
        pytest.skip("ManiSkill3 is not installed (make test-simpler)")
    with pytest.MonkeyPatch.context() as patch:
        if "MS_ASSET_DIR" not in os.environ:
            folder = tmp_path_factory.mktemp("assets")
            unpack(folder)
            patch.setenv("MS_ASSET_DIR", str(folder))
        if "VK_ICD_FILENAMES" not in os.environ and DRIVER.exists():
            patch.setenv("VK_ICD_FILENAMES", str(DRIVER))
        try:
            made = SimplerSuite()
            made.make(0).close()
        except SimulatorUnavailable as missing:
            pytest.skip(str(missing))
        yield made


@pytest.fixture(scope="module")
def carrot(suite: SimplerSuite) -> Iterator[Any]:
    environment = suite.make("widowx_carrot_on_plate")
    yield environment
    environment.close()


def test_the_tasks_are_mani_skills_own(suite: SimplerSuite) -> None:
    from mani_skill.utils.registration import REGISTERED_ENVS

    for task in suite.tasks:
        environment = suite.make(task)
        assert isinstance(environment, Environment)
        seen, info = environment.reset(initial_state=23)
        assert (seen.instruction, seen.proprio, info) == (task.instruction, None, {"success": False})
        image = seen.images[CAMERA]
        assert (image.shape, image.dtype) == ((480, 640, 3), np.uint8)
        assert image.std() > 20
        simulator = environment.simulator
        assert REGISTERED_ENVS[simulator.spec.id].max_episode_steps == task.max_steps
        starts = len(simulator.xyz_configs) * len(simulator.quat_configs)
        assert starts == (64 if "eggplant" in task.name else 24)
        assert simulator.control_freq == 5
        environment.close()


def test_an_episode_depends_on_its_number_alone(suite: SimplerSuite, carrot: Any) -> None:
    def ran(number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        def facts(seen: Any) -> tuple[np.ndarray, np.ndarray]:
            return seen.images[CAMERA], carrot.simulator.get_state().numpy().copy()

        return [facts(carrot.reset(initial_state=number)[0]), *(facts(carrot.step(action)[0]) for action in ACTIONS)]

    first = ran(3)
    assert np.abs(first[0][0].astype(int) - ran(4)[0][0]).max() > 50
    # Its photograph of the sink must not appear behind the carrot: ManiSkill3 keeps one table of them for all.
    eggplant = suite.make("widowx_put_eggplant_in_basket")
    eggplant.reset(initial_state=0)
    for (image, state), (again, state_again) in zip(first, ran(3), strict=True):
        np.testing.assert_array_equal(image, again)
        np.testing.assert_array_equal(state, state_again)
    eggplant.close()


def test_an_instruction_that_changes_is_seen(carrot: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    carrot.reset(initial_state=0)
    drawn = carrot.images_drawn
    monkeypatch.setattr(carrot.simulator, "get_language_instruction", lambda: ["now the other one"])
    assert carrot.step(STILL)[0].instruction == "now the other one"
    assert carrot.images_drawn == drawn + 1
    assert carrot.frame(96).shape == (96, 96, 3)


def test_actions_are_metres_and_radians_and_the_gripper_opens_at_one(carrot: Any) -> None:
    link, robot = (carrot.simulator.agent.robot.links_map["ee_gripper_link"], carrot.simulator.agent.robot)
    carrot.reset(initial_state=0)
    start = link.pose.p[0].numpy().copy()
    for _ in range(5):
        carrot.step(np.array([0.01, 0, 0.01, 0, 0, 0, 1.0]))
    for _ in range(3):
        carrot.step(STILL)
    np.testing.assert_allclose(link.pose.p[0].numpy() - start, [-0.05, 0, 0.05], atol=0.012)
    opened = float(robot.get_qpos()[0, -1])
    for _ in range(5):
        carrot.step(-STILL)
    assert opened > 0.035
    assert float(robot.get_qpos()[0, -1]) < 0.02


def test_a_rotation_is_the_one_of_published_scripts() -> None:
    from transforms3d.euler import euler2axangle

    for rotation in np.random.default_rng(1).uniform(-0.5, 0.5, (20, 3)):
        axis, angle = euler2axangle(*rotation)
        np.testing.assert_allclose(axis_angle(*rotation), axis * angle, atol=1e-9)


def run(carrot: Any, suite: SimplerSuite, policy: Any, **options: Any) -> Any:
    unit = Unit(suite.name, carrot.task.index, carrot.task.name, 0, 0)
    arm = Arm("unpruned", "unpruned", "baseline")
    return run_episode(policy, carrot, suite.convention(policy), arm, unit, run="x", **options)


def test_a_scripted_controller_places_the_carrot(suite: SimplerSuite, carrot: Any) -> None:
    record = run(carrot, suite, Carrier())
    assert record.error is None
    assert (record.success, record.termination, record.steps) == (True, "success", 60), "no end at the first success"
    assert 15 < record.sum_reward < 45, "it was solved long before the last step, and stayed so"
    with pytest.raises(SessionError, match="The episode is over"):
        carrot.step(STILL)


def test_what_is_placed_and_taken_away_again_is_no_success(suite: SimplerSuite, carrot: Any) -> None:
    record = run(carrot, suite, Carrier(takes_away=True))
    assert record.error is None
    assert (record.success, record.termination, record.steps) == (False, "max_steps", 60)
    assert record.max_reward == 1.0


def test_impossible_actions_and_closed_environments_are_refused(suite: SimplerSuite) -> None:
    cube = suite.make("widowx_stack_cube")
    with pytest.raises(SessionError, match="none has begun"):
        cube.step(STILL)
    with pytest.raises(SuiteError, match="initial states from 0 to 23; found 24"):
        cube.reset(initial_state=24)
    cube.reset(initial_state=0)
    for wrong in (np.zeros(6), np.full(7, np.nan)):
        with pytest.raises(SuiteError, match="actions of 7 finite numbers"):
            cube.step(wrong)
    cube.close()
    cube.close()
    for use in (lambda: cube.reset(initial_state=0), lambda: cube.step(STILL)):
        with pytest.raises(SessionError):
            use()


@pytest.mark.parametrize(
    "missing", ["info_bridge_custom_v0.json", "collision.obj", "textured.*", "*.glb", "bridge_real_eval_1.png"]
)
def test_an_incomplete_download_is_named(
    suite: SimplerSuite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str
) -> None:
    from mani_skill.envs.tasks.digital_twins.bridge_dataset_eval import base_env

    there = base_env.BRIDGE_DATASET_ASSET_PATH
    shutil.copytree(there, tmp_path / "bridge", ignore=shutil.ignore_patterns(missing))
    monkeypatch.setattr(base_env, "BRIDGE_DATASET_ASSET_PATH", tmp_path / "bridge")
    with pytest.raises(SimulatorUnavailable, match=r"cannot build PutCarrot.*download_asset bridge_v2_real2sim"):
        suite.make("widowx_carrot_on_plate")


def test_an_incomplete_robot_is_named(suite: SimplerSuite, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mani_skill.agents.robots.widowx.widowx import WidowX250S

    there = Path(WidowX250S.urdf_path)
    shutil.copytree(there.parent, tmp_path / "robot", ignore=shutil.ignore_patterns("*Finger.stl"))
    monkeypatch.setattr(WidowX250S, "urdf_path", str(tmp_path / "robot" / there.name))
    with pytest.raises(SimulatorUnavailable, match=r"no collision mesh of .*Finger\.stl.*download_asset widowx250s"):
        suite.make("widowx_carrot_on_plate")


def test_global_generators_are_left_alone(suite: SimplerSuite) -> None:
    def states() -> list[Any]:
        return [*np.random.get_state()[1:3], *torch.get_rng_state()]  # noqa: NPY002

    before = states()
    spoon = suite.make("widowx_spoon_on_towel")
    spoon.reset(initial_state=1)
    spoon.step(STILL)
    for one, two in zip(before, states(), strict=True):
        assert np.array_equal(one, two)
    spoon.close()


def facts(folder: Path) -> list[dict[str, Any]]:
    """The records without times."""
    found = [asdict(record) for record in read_records(folder / EPISODES)]
    return [{name: value for name, value in record.items() if name not in TIMES} for record in found]


def test_openvla_runs_all_four_tasks_paired_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "eval --policy openvla --random-weights --suite simpler_widowx --episodes 2 --max-steps 5 --controls again"
    asked = [*flags.split(), "--keep", "0.5", "--out", str(tmp_path / "run")]
    assert cli.main(asked) == 0
    whole = facts(tmp_path / "run")
    assert len(whole) == 4 * 2 * 3
    assert {(record["steps"], record["control_steps"], record["termination"]) for record in whole} <= {
        (5, 5, "max_steps"),
        (5, 5, "success"),
    }
    assert {record["versions"]["mani-skill"] for record in whole} == {"3.0.1"}
    pruned = [record for record in whole if record["arm"] == "vla-pruner-0.5-freeze-K3-semantic_querieslast"]
    assert all(record["pruned_steps"] > 0 and record["kept_tokens"][0] < record["visual_tokens"] for record in pruned)
    path = tmp_path / "run" / EPISODES
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:10]) + lines[10][:-20])
    assert cli.main(asked) == 0
    assert "10 of 24 episodes are done" in capsys.readouterr().out
    assert facts(tmp_path / "run") == whole
    assert cli.main([*asked[:-2], "--episodes", "25", "--out", str(tmp_path / "more")]) == 2
    assert "has 24 initial states a task" in capsys.readouterr().err


def test_without_a_driver_the_fix_is_named(tmp_path: Path) -> None:
    flags = "eval --policy nothing --suite simpler_widowx --preset smoke --out"
    told = subprocess.run(
        [Path(sys.executable).with_name("vla-pruner"), *flags.split(), str(tmp_path / "run")],
        env={**os.environ, "VK_ICD_FILENAMES": str(tmp_path / "none.json")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 2
    assert "SAPIEN cannot draw on this machine" in told.stderr
    assert "mesa-vulkan-drivers" in told.stderr
    assert "Traceback" not in told.stderr
