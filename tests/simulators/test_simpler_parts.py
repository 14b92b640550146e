"""The parts of SIMPLER that need no simulator: refusals, and how OpenVLA sees it."""

from __future__ import annotations

import math
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vla_pruner.errors import ObservationError
from vla_pruner.evaluation.policies import DoNothing, check_fits
from vla_pruner.policies.random import random_policy
from vla_pruner.simulators import SimulatorUnavailable, Suite, SuiteError, find_suite, simpler_package
from vla_pruner.simulators.simpler import SimplerSuite
from vla_pruner.simulators.simpler_conventions import CAMERA, axis_angle, simpler_convention, widowx_actions
from vla_pruner.wording import a_type


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Versions that pip seems to have installed, and empty folders for the assets; change them in the test."""
    versions = {**simpler_package.VERSIONS, "gymnasium": "1.4.0", "numpy": "2.4.6"}

    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(simpler_package, "version", version)
    monkeypatch.setenv("MS_ASSET_DIR", str(tmp_path))
    for name in ("custom", "real_inpainting", "stages"):
        (tmp_path / "data" / "tasks" / "bridge_v2_real2sim_dataset" / name).mkdir(parents=True)
    (tmp_path / "data" / "robots" / "widowx").mkdir(parents=True)
    return versions


def test_the_protocol_is_the_published_one(installed: dict[str, str]) -> None:
    suite = find_suite("simpler_widowx")
    assert isinstance(suite, Suite)
    assert [(task.index, task.name, task.instruction, task.max_steps) for task in suite.tasks] == [
        (0, "widowx_spoon_on_towel", "put the spoon on the towel", 60),
        (1, "widowx_carrot_on_plate", "put carrot on plate", 60),
        (2, "widowx_stack_cube", "stack the green block on the yellow block", 60),
        (3, "widowx_put_eggplant_in_basket", "put eggplant into yellow basket", 120),
    ]
    assert {task.initial_states for task in suite.tasks} == {24}
    assert not any(task.ends_at_success for task in suite.tasks)
    assert (suite.action_size, suite.cameras, suite.settling_steps) == (7, ("3rd_view_camera",), 0)
    assert suite.versions() == installed
    with pytest.raises(SuiteError, match="simpler_widowx has no scripted expert"):
        suite.expert()


@pytest.mark.parametrize("package", ["mani-skill", "sapien"])
def test_a_missing_package_is_one_line_with_the_extra_and_the_assets(installed: dict[str, str], package: str) -> None:
    del installed[package]
    with pytest.raises(
        SimulatorUnavailable, match=rf"not installed \({package} is missing\)\. To fix it, run: "
    ) as error:
        find_suite("simpler_widowx")
    assert error.value.fix == (
        "pip install 'vla-pruner[simpler]' && python -m mani_skill.utils.download_asset bridge_v2_real2sim && "
        "python -m mani_skill.utils.download_asset widowx250s"
    )


def test_another_version_is_refused(installed: dict[str, str]) -> None:
    installed["sapien"] = "3.1.0"
    with pytest.raises(SimulatorUnavailable, match=r"run on sapien 3\.0\.3 here, .* found 3\.1\.0"):
        find_suite("simpler_widowx")


def test_missing_assets_are_named_and_never_asked_for(
    installed: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "data" / "robots" / "widowx").rmdir()
    with pytest.raises(SimulatorUnavailable, match=r"lacks robots/widowx of .*download_asset widowx250s"):
        find_suite("simpler_widowx")
    monkeypatch.delenv("MS_ASSET_DIR")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with pytest.raises(
        SimulatorUnavailable, match=r"home/\.maniskill/data lacks tasks/bridge_v2_real2sim_dataset/custom"
    ):
        find_suite("simpler_widowx")


@pytest.mark.parametrize("name", ["simpler_google_robot", "simpler_google"])
def test_the_google_robot_is_refused_with_what_it_needs(name: str) -> None:
    with pytest.raises(SuiteError, match=r"not supported: .*SAPIEN 2\.2\.2, numpy < 2 .*the suite simpler_widowx"):
        find_suite(name)


def test_other_names_and_options_are_refused(installed: dict[str, str]) -> None:
    with pytest.raises(SuiteError, match="SIMPLER has no suite 'simpler_franka' here; its suite is simpler_widowx"):
        SimplerSuite("simpler_franka")
    with pytest.raises(SuiteError, match=r"simpler_widowx has no option 'assets' .* its options are dataset"):
        find_suite("simpler_widowx", assets="/somewhere")
    with pytest.raises(SuiteError, match="initial states from 0 to 23; found 24"):
        find_suite("simpler_widowx").tasks[0].check_initial_state(24)


def test_openvla_acts_by_one_camera_and_fits(installed: dict[str, str]) -> None:
    policy: Any = random_policy("openvla")
    convention = simpler_convention(policy)
    assert dict(convention.cameras) == {"image": CAMERA}
    assert (convention.proprio, convention.horizon, convention.repeat) == (False, None, 1)
    check_fits(policy, find_suite("simpler_widowx"), convention)
    assert convention.plan(np.array([0.01, -0.02, 0.03, 0, 0, 0, 0.9])).tolist() == [[0.01, -0.02, 0.03, 0, 0, 0, 1.0]]
    assert convention.path(np.array([[0.03, 0, 0.04, 9, 9, 9, 9]])) == pytest.approx(0.05)
    policy.cameras = ("front", "wrist")
    with pytest.raises(SuiteError, match="shows one camera; this policy takes 'front', 'wrist'"):
        simpler_convention(policy)


def test_the_images_are_averaged_down_and_not_cropped() -> None:
    pytest.importorskip("cv2", reason="OpenCV comes with the extra simpler")
    image = np.zeros((448, 448, 3), np.uint8)
    image[:2, 0] = 200
    image[-2:, -2:] = 100
    small = simpler_convention(random_policy("openvla")).image(image)
    assert (small.shape, small.dtype) == ((224, 224, 3), np.uint8)
    assert small[0, 0].tolist() == [100] * 3  # half of the first cell
    assert small[-1, -1].tolist() == [100] * 3
    assert int(small.astype(int).sum()) == 600
    wide = np.zeros((480, 640, 3), np.uint8)
    wide[:, :320] = 90
    stretched = simpler_convention(random_policy("openvla")).image(wide)
    assert (stretched.shape, stretched[:, :112].min(), stretched[:, 112:].max()) == ((224, 224, 3), 90, 0)


def test_without_opencv_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(SimulatorUnavailable, match=r"OpenCV.* pip install 'vla-pruner\[simpler\]'"):
        simpler_convention(random_policy("openvla")).image(np.zeros((480, 640, 3), np.uint8))


def test_the_gripper_is_open_or_closed() -> None:
    chunk = np.zeros((4, 7))
    chunk[:, 6] = (0.0, 0.5, 0.51, 1.0)
    assert widowx_actions(chunk)[:, 6].tolist() == [-1.0, -1.0, 1.0, 1.0]
    assert chunk[:, 6].tolist() == [0.0, 0.5, 0.51, 1.0], "the policy's actions are left alone"
    with pytest.raises(ObservationError, match="actions of 7 numbers; found 4"):
        widowx_actions(np.zeros((1, 4)))


def turned(axis: int, angle: float) -> np.ndarray:
    """(3, 3): the rotation about x, y or z."""
    one, two = ((1, 2), (2, 0), (0, 1))[axis]
    matrix = np.eye(3)
    matrix[one, one] = matrix[two, two] = math.cos(angle)
    matrix[two, one] = math.sin(angle)
    matrix[one, two] = -math.sin(angle)
    return matrix


def as_matrix(axis_times_angle: np.ndarray) -> np.ndarray:
    """(3, 3): Rodrigues' formula."""
    angle = float(np.linalg.norm(axis_times_angle))
    x, y, z = axis_times_angle / angle if angle else np.zeros(3)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def test_roll_pitch_and_yaw_become_axis_and_angle() -> None:
    generator = np.random.default_rng(0)
    for roll, pitch, yaw in [*generator.uniform(-math.pi, math.pi, (50, 3)), *generator.normal(0, 1e-4, (5, 3))]:
        found = axis_angle(roll, pitch, yaw)
        assert np.linalg.norm(found) <= math.pi + 1e-9
        expected = turned(2, yaw) @ turned(1, pitch) @ turned(0, roll)  # about the fixed axes: x first
        np.testing.assert_allclose(as_matrix(found), expected, atol=1e-9)
    assert axis_angle(0, 0, 0).tolist() == [0, 0, 0]
    np.testing.assert_allclose(axis_angle(0, 0, 1e-13), [0, 0, 1e-13], atol=1e-20)
    np.testing.assert_allclose(widowx_actions(np.array([0, 0, 0, 0, 0.3, 0, 1.0]))[3:6], [0, 0.3, 0], atol=1e-12)


def test_other_statistics_are_refused_unless_they_are_named() -> None:
    policy: Any = random_policy("openvla")
    stats = policy.norm_stats["random"]
    policy.norm_stats = {"bridge_orig": stats, "fractal20220817_data": stats}
    with pytest.raises(SuiteError, match=r"give unnorm_key, .*need --option unnorm_key=bridge_orig"):
        simpler_convention(policy)
    policy.unnorm_key = "bridge_orig"
    assert simpler_convention(policy).cameras == {"image": CAMERA}
    policy.unnorm_key = "fractal20220817_data"
    with pytest.raises(SuiteError, match=r"scales them by 'fractal20220817_data'.*--suite-option dataset=fractal"):
        simpler_convention(policy)
    policy.norm_stats, policy.unnorm_key = {"my_widowx": stats}, None
    with pytest.raises(SuiteError, match="'bridge_orig'; this policy scales them by 'my_widowx'"):
        simpler_convention(policy)
    assert simpler_convention(policy, "my_widowx").cameras == {"image": CAMERA}


@pytest.mark.parametrize("name", ["openvla-oft", "pi0", "reference", "reference-chunk"])
def test_families_without_a_published_convention_are_refused(name: str) -> None:
    policy = random_policy(name)
    with pytest.raises(SuiteError, match=rf"How {a_type(policy)} sees SIMPLER is not known here; OpenVLA's"):
        simpler_convention(policy)


def test_a_policy_without_images_is_shown_none() -> None:
    assert simpler_convention(DoNothing(7)).cameras == {}
