"""The interface itself: images are drawn when looked at, numbers and names are checked, conventions carry them out."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vla_pruner import simulators
from vla_pruner.errors import SessionError
from vla_pruner.flags import option
from vla_pruner.simulators import Convention, Images, Observation, SuiteError, Task, find_suite
from vla_pruner.simulators.base import find_task

TASKS = tuple(Task("fruit", index, name, f"pick the {name}", 10, 3) for index, name in enumerate(("pear", "fig")))


class Scene:
    """Draws grey images and counts them."""

    def __init__(self) -> None:
        self.drawn: list[str] = []
        self.present = True

    def images(self) -> Images:
        return Images(self._draw, ("front", "hand"), lambda: self.present)

    def _draw(self, camera: str) -> np.ndarray:
        self.drawn.append(camera)
        return np.full((2, 2, 3), len(self.drawn), np.uint8)


def test_an_image_is_drawn_when_looked_at_and_once():
    scene = Scene()
    images = scene.images()
    assert list(images) == ["front", "hand"]
    assert len(images) == 2
    assert "front" in images
    assert "rear" not in images
    assert scene.drawn == []
    assert images["hand"] is images["hand"]
    assert scene.drawn == ["hand"]
    with pytest.raises(KeyError, match="rear"):
        images["rear"]


def test_what_was_not_looked_at_in_time_is_refused_and_what_was_stays():
    scene = Scene()
    images = scene.images()
    front = images["front"]
    scene.present = False
    assert images["front"] is front
    with pytest.raises(SessionError, match="'hand' was asked for after the environment had moved on"):
        images["hand"]


@pytest.mark.parametrize("number", [0, 2, np.int64(1)])
def test_initial_states_that_there_are(number):
    TASKS[0].check_initial_state(number)


@pytest.mark.parametrize("number", [-1, 3, 1.0, True, "0", None])
def test_initial_states_that_there_are_not(number):
    with pytest.raises(SuiteError, match=r"fruit task 0 \(pear\) has initial states from 0 to 2; found"):
        TASKS[0].check_initial_state(number)


def test_a_task_without_a_last_initial_state():
    task = Task("fruit", 0, "pear", "", 10, None)
    task.check_initial_state(10**6)
    with pytest.raises(SuiteError, match="from 0 on; found -1"):
        task.check_initial_state(-1)


def test_a_task_is_found_by_itself_its_number_and_its_name():
    for wanted in (TASKS[1], 1, "fig"):
        assert find_task(TASKS, wanted) is TASKS[1]
    for wanted in (2, -1, True, "plum"):
        with pytest.raises(SuiteError, match=r"fruit has no task .*; its tasks are 0 pear, 1 fig"):
            find_task(TASKS, wanted)


def test_an_unknown_suite_is_named_beside_those_that_there_are():
    with pytest.raises(SuiteError, match=r"no suite 'libero_spacial'; the suites are libero_spatial, .*metaworld:mt8"):
        find_suite("libero_spacial")


def test_a_convention_draws_only_the_policys_cameras_and_shortens_its_chunks():
    scene = Scene()
    seen = Observation(scene.images(), "pick the pear", np.arange(3, dtype=np.float32))
    convention = Convention({"wrist": "hand"}, True, lambda image: image + 100, lambda chunk: -chunk, horizon=2)
    shown = convention.observe(seen)
    images, proprio = shown.images, shown.proprio
    assert scene.drawn == ["hand"]
    assert images["wrist"].tolist() == np.full((2, 2, 3), 101).tolist()
    assert proprio is seen.proprio
    assert convention.plan(np.arange(6).reshape(3, 2)).tolist() == [[0, -1], [-2, -3]]
    blind = Convention({}, proprio=False)
    assert blind.observe(seen) == Observation({}, seen.instruction)
    assert blind.plan(np.arange(6).reshape(3, 2)).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert blind.plan(np.arange(2)).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("center_crop=maybe", "center_crop of libero_object is 'maybe' .* it is true or false"),
        ("image_size=x", "image_size of libero_object is 'x' .* pixels from 1 to 4096"),
        ("image_size=0", "image_size of libero_object is 0 "),
        ("seed=-1", "seed of libero_object is '-1' .* 0 or more"),
        ("assets=3", "assets of libero_object is 3 .* it is a folder; if its name is a number, ./NAME"),
        ("pro=a,b", r"pro of libero_object is \('a', 'b'\) .* it is a folder"),
    ],
)
def test_a_value_that_no_suite_takes_is_refused_before_its_simulator_is_looked_for(text: str, message: str):
    name, value = option(text)
    with pytest.raises(SuiteError, match=message):
        find_suite("libero_object", **{name: value})


def test_an_option_that_says_false_is_false(monkeypatch: pytest.MonkeyPatch):
    """As a text it would be true: checkpoints that were trained without crops would be shown them."""
    given: list[dict[str, Any]] = []
    monkeypatch.setitem(simulators.SUITES, "libero_goal", lambda name, **options: given.append(options))
    monkeypatch.setitem(simulators._OPTIONS, simulators.SUITES["libero_goal"], ("center_crop",))
    for text in ("center_crop=false", "center_crop=0", "center_crop=True"):
        find_suite("libero_goal", **dict([option(text)]))
    assert [bool(one["center_crop"]) for one in given] == [False, False, True]
