"""LIBERO itself, in an environment of its own (`make test-libero`): skipped if it is not installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vla_pruner.errors import SessionError
from vla_pruner.preprocessing.libero import libero_image, rotate_180
from vla_pruner.simulators import Environment, SimulatorUnavailable, Suite, SuiteError, find_suite
from vla_pruner.simulators.libero import LiberoSuite
from vla_pruner.simulators.libero_check import SUITES, check_task, main

pytestmark = pytest.mark.sim

BETWEEN = "between the plate and the ramekin"
STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])
ACTIONS = np.random.default_rng(0).uniform(-0.6, 0.6, (6, 7))


@pytest.fixture(scope="module", autouse=True)
def suite() -> LiberoSuite:
    try:
        return LiberoSuite("libero_object")
    except SimulatorUnavailable as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="module")
def environment(suite):
    soup = suite.make(0)
    yield soup
    soup.close()


@pytest.fixture(scope="module")
def goal():
    """The cabinet and the stove of this suite stand where a generator draws them."""
    bowl = find_suite("libero_goal").make("put_the_bowl_on_the_plate")
    yield bowl
    bowl.close()


@pytest.mark.parametrize(
    ("name", "tasks", "steps", "first"),
    [
        (
            "libero_spatial",
            10,
            220,
            "pick up the black bowl between the plate and the ramekin and place it on the plate",
        ),
        ("libero_object", 10, 280, "pick up the alphabet soup and place it in the basket"),
        ("libero_goal", 10, 300, "open the middle drawer of the cabinet"),
        ("libero_10", 10, 520, "put both the alphabet soup and the tomato sauce in the basket"),
        ("libero_90", 90, 400, "close the top drawer of the cabinet"),
    ],
)
def test_the_suites_are_the_published_ones(name, tasks, steps, first):
    suite = find_suite(name)
    assert isinstance(suite, Suite)
    assert suite.settling_steps == 10
    assert suite.action_size == 7
    assert len(suite.tasks) == tasks
    assert {task.max_steps for task in suite.tasks} == {steps}
    assert {task.initial_states for task in suite.tasks} == {50}
    assert suite.tasks[0].instruction == first
    assert suite.versions()["mujoco"] == "3.3.2"
    if name != "libero_object":
        with pytest.raises(SuiteError, match=f"{name} has no scripted expert"):
            suite.expert()


@pytest.mark.parametrize("suffix", [".pruned_init", ".bddl"])
def test_a_file_of_the_package_that_was_cut_off_is_refused_before_any_episode(monkeypatch, suffix):
    whole = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda path: whole(path)[:-1] if path.name.endswith(suffix) else whole(path)
    )
    said = rf"{suffix} is damaged: .*hf-libero installed.*--force-reinstall.*hf-libero=="
    with pytest.raises(SimulatorUnavailable, match=said):
        LiberoSuite("libero_object")


@pytest.mark.parametrize("name", SUITES)
def test_a_task_of_every_suite_is_as_published(name):
    # All forty: python -m vla_pruner.simulators.libero_check
    finding = check_task(LiberoSuite(name), 5 if name == "libero_spatial" else 0, steps=5)
    assert finding.problems == []
    assert set(finding.brightness) == {"agentview", "robot0_eye_in_hand"}


def test_an_initial_state_fixes_the_episode_whatever_ran_before(goal):
    environment = goal
    assert isinstance(environment, Environment)
    np.random.seed(3)  # noqa: NPY002
    random_state = np.random.get_state(legacy=False)["state"]["key"].copy()  # noqa: NPY002
    seen, info = environment.reset(initial_state=3)
    assert info["success"] is False
    first = [seen, *(environment.step(action)[0] for action in ACTIONS)]
    images = [dict(first[-1].images)]
    after = np.random.get_state(legacy=False)["state"]["key"]  # noqa: NPY002
    np.testing.assert_array_equal(after, random_state)
    other, _ = environment.reset(initial_state=4)
    assert np.abs(other.images["agentview"].astype(int) - images[0]["agentview"]).max() > 50
    np.random.seed(4)  # noqa: NPY002
    environment.step(ACTIONS[0])
    seen, _ = environment.reset(initial_state=3)
    again = [seen, *(environment.step(action)[0] for action in ACTIONS)]
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one.proprio, two.proprio)
    for camera, image in images[0].items():
        np.testing.assert_array_equal(again[-1].images[camera], image)
    with pytest.raises(SuiteError, match="initial states from 0 to 49; found 50"):
        environment.reset(initial_state=50)


def test_images_are_drawn_only_when_looked_at(environment, goal):
    seen, _ = environment.reset(initial_state=0)
    drawn = environment.images_drawn
    later = [environment.step(action)[0] for action in ACTIONS][-1]
    assert environment.images_drawn == drawn
    assert later.images["agentview"] is later.images["agentview"]
    assert environment.images_drawn == drawn + 1
    now = environment.frame(96)
    assert now.shape == (96, 96, 3)
    # An image of this episode may still be looked at, and looking changes nothing.
    assert np.abs(seen.images["robot0_eye_in_hand"].astype(int) - later.images["robot0_eye_in_hand"]).max() > 20
    np.testing.assert_array_equal(environment.frame(96), now)
    # Nor does another environment, whose rendering context is the current one now.
    goal.reset(initial_state=0)
    np.testing.assert_array_equal(environment.frame(96), now)
    environment.reset(initial_state=0)
    with pytest.raises(SessionError, match="after the environment had moved on"):
        seen.images["agentview"]


def test_everything_is_what_liberos_own_environment_gives(suite, environment):
    """Beside `environment`, which stays open: drawing one must not draw the other."""
    package = suite._package
    bddl = package.root / "bddl_files" / suite.name / f"{suite.tasks[0].name}.bddl"
    official = package.make(bddl_file_name=str(bddl), camera_heights=256, camera_widths=256)
    with package.loading(0):
        official.reset()
        theirs = official.set_init_state(suite._initial_states(0)[7])
    for _ in range(10):
        theirs, *_ = official.step(STILL.tolist())
    ours, _ = environment.reset(initial_state=7)
    axis = sys.modules["robosuite.utils.transform_utils"].quat2axisangle
    for action in (*ACTIONS, None):
        for camera in ours.images:
            np.testing.assert_array_equal(ours.images[camera], rotate_180(theirs[f"{camera}_image"]))
        state = [theirs["robot0_eef_pos"], axis(theirs["robot0_eef_quat"].copy()), theirs["robot0_gripper_qpos"]]
        np.testing.assert_allclose(ours.proprio, np.concatenate(state), atol=1e-6)
        if action is not None:
            theirs, *_ = official.step(action.tolist())
            ours, *_ = environment.step(action)
    pytest.importorskip("simplejpeg")
    from vla_pruner.policies.random import random_policy

    shown = suite.convention(random_policy("openvla")).observe(ours)
    images, proprio = shown.images, shown.proprio
    np.testing.assert_array_equal(images["image"], libero_image(theirs["agentview_image"]))
    assert proprio is None
    official.close()


def test_the_grippers_sign_and_actions_that_are_none(environment):
    environment.reset(initial_state=0)
    gap = np.linalg.norm(environment.truth.fingers())
    closing = [environment.step(np.array([0, 0, 0, 0, 0, 0, 1.0]))[0] for _ in range(4)][-1]
    assert np.linalg.norm(environment.truth.fingers()) < 0.8 * gap
    assert closing.proprio.shape == (8,)
    for wrong in (np.zeros(6), np.zeros((1, 7)), np.full(7, np.nan)):
        with pytest.raises(SuiteError, match="7 finite numbers"):
            environment.step(wrong)


def test_the_expert_succeeds_without_an_image_where_doing_nothing_fails(suite, environment):
    expert = suite.expert()
    drawn = environment.images_drawn
    assert dict(suite.convention(expert).cameras) == {}
    environment.reset(initial_state=0)
    expert.watch(environment)
    expert.reset()
    ends = _run(environment, lambda: expert.act({}, "")[0])
    assert ends[-1] == (1.0, True, False, {"success": True})
    assert len(ends) < 200
    assert environment.images_drawn == drawn
    with pytest.raises(SessionError, match="episode is over"):
        environment.step(STILL)
    environment.reset(initial_state=0)
    ends = _run(environment, lambda: STILL)
    assert ends[-1] == (0.0, False, True, {"success": False})
    assert len(ends) == 280


def _run(environment, act):
    ends = []
    while not ends or not (ends[-1][1] or ends[-1][2]):
        _, *end = environment.step(act())
        ends.append(tuple(end))
    return ends


def test_the_expert_refuses_a_task_without_a_basket_and_nobody_uses_what_is_closed(suite, goal):
    with pytest.raises(SuiteError, match="the task put_the_bowl_on_the_plate of libero_goal is another"):
        suite.expert().watch(goal)
    goal.close()
    with pytest.raises(SessionError, match="is closed"):
        goal.reset(initial_state=0)


def test_a_mesh_that_is_missing_is_one_clear_line(suite, tmp_path):
    for path in suite._package.assets.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "stable_hope_objects").unlink()
    (tmp_path / "stable_hope_objects").mkdir()
    with pytest.raises(SimulatorUnavailable, match=f"cannot build pick_up_the_alphabet_soup.*{tmp_path}"):
        LiberoSuite("libero_object", assets=tmp_path).make(0)


def test_nothing_is_asked_and_nothing_written_into_the_home(tmp_path):
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONWARNINGS": "error::ResourceWarning"}
    environment.pop("LIBERO_CONFIG_PATH", None)
    script = (
        "import logging, os; from vla_pruner.simulators import find_suite\n"
        "handler = logging.FileHandler; suite = find_suite('libero_goal')\n"
        "assert logging.FileHandler is handler and 'LIBERO_CONFIG_PATH' not in os.environ\n"
        "assert not any(isinstance(h, handler) for h in logging.getLogger('robosuite_logs').handlers)"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")
    assert not (tmp_path / ".libero").exists()


def test_the_check_says_what_it_found_and_what_it_needs(capsys, tmp_path):
    assert main(["--suites", "libero_object", "--tasks", "1"]) == 0
    assert "libero_object  0  drift" in capsys.readouterr().out
    assert main(["--assets", str(tmp_path / "absent")]) == 2
    assert "there is no such folder" in capsys.readouterr().err
