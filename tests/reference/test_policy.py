"""The shipped policy on recorded observations (two seeds of two tasks): its behaviour before any pruning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vla_pruner.errors import ObservationError
from vla_pruner.models.reference import ReferencePolicy, load_autoregressive_policy
from vla_pruner.models.reference.loading import SHIPPED_WEIGHTS
from vla_pruner.models.reference.tokenizer import encode, split_words

RECORDED = np.load(Path(__file__).parent / "observations.npz")
IMAGES, PROPRIO = RECORDED["images"], RECORDED["proprio"]
INSTRUCTIONS = [str(text) for text in RECORDED["instructions"]]


@pytest.fixture(scope="module")
def policy() -> ReferencePolicy:
    torch.set_num_threads(1)
    return load_autoregressive_policy()


def test_shape_of_the_policy(policy: ReferencePolicy) -> None:
    config = policy.config
    assert config.num_visual_tokens >= 196
    assert len(policy.language_model.model.layers) == config.num_layers >= 8
    assert (SHIPPED_WEIGHTS / "model.safetensors").stat().st_size <= 20e6
    assert len(config.tasks) >= 6
    prompt = policy.prompt(torch.as_tensor(IMAGES[:1]), INSTRUCTIONS[:1], torch.as_tensor(PROPRIO[:1]))
    assert prompt.shape == (1, config.prompt_length, config.hidden_size)
    visual = policy.visual_tokens(torch.as_tensor(IMAGES[:1]))
    assert torch.equal(prompt[:, config.visual], visual)


def test_a_batch_is_its_rows(policy: ReferencePolicy) -> None:
    together = policy.predict_action(IMAGES, INSTRUCTIONS, PROPRIO)
    alone = [policy.predict_action(*row) for row in zip(IMAGES, INSTRUCTIONS, PROPRIO, strict=True)]
    assert together.shape == (len(IMAGES), 4)
    assert together.dtype == np.float32
    assert all(action.shape == (4,) for action in alone)
    np.testing.assert_array_equal(together, np.stack(alone))
    assert np.abs(together).max() <= 1.0


def test_it_is_deterministic(policy: ReferencePolicy) -> None:
    first, second = (policy.predict_action(IMAGES, INSTRUCTIONS, PROPRIO) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_act_gives_a_chunk_of_one(policy: ReferencePolicy) -> None:
    chunk = policy.act(images={"image": IMAGES[0]}, instruction=INSTRUCTIONS[0], proprio=PROPRIO[0])
    assert chunk.shape == (1, 4)
    np.testing.assert_array_equal(chunk[0], policy.predict_action(IMAGES[0], INSTRUCTIONS[0], PROPRIO[0]))
    with pytest.raises(ValueError, match="cameras are 'image'; it was given"):
        policy.act(images={"wrist": IMAGES[0]}, instruction=INSTRUCTIONS[0], proprio=PROPRIO[0])


def test_the_image_changes_the_action(policy: ReferencePolicy) -> None:
    """Packed-sequence detection in transformers once cut all attention to the image; the loss curve looked fine."""
    seen = policy.predict_action(IMAGES, INSTRUCTIONS, PROPRIO)
    other_scene = policy.predict_action(np.roll(IMAGES, 1, axis=0), INSTRUCTIONS, PROPRIO)
    assert (np.abs(seen - other_scene).max(axis=1) > 0.1).mean() > 0.5


def test_the_instruction_changes_the_action(policy: ReferencePolicy) -> None:
    reach = INSTRUCTIONS.index("reach the green ball")
    actions = [
        policy.predict_action(IMAGES[reach], text, PROPRIO[reach])
        for text in ("reach the green ball", "push the puck to the ball")
    ]
    assert np.abs(actions[0] - actions[1]).max() > 0.2


def test_wrong_inputs_are_named(policy: ReferencePolicy) -> None:
    with pytest.raises(ValueError, match="uint8"):
        policy.predict_action(IMAGES[0].astype(np.float32), INSTRUCTIONS[0], PROPRIO[0])
    with pytest.raises(ValueError, match="Proprio"):
        policy.predict_action(IMAGES[0], INSTRUCTIONS[0], PROPRIO[0][:3])
    with pytest.raises(ValueError, match="instructions"):
        policy.predict_action(IMAGES[:2], INSTRUCTIONS[:1], PROPRIO[:2])
    with pytest.raises(ValueError, match="banana"):
        policy.predict_action(IMAGES[0], "reach the banana", PROPRIO[0])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_states_that_are_not_finite_are_refused(policy: ReferencePolicy, wrong: float) -> None:
    state = PROPRIO[:2].copy()
    state[1, 2] = wrong
    with pytest.raises(ObservationError, match="proprio holds numbers that are not finite"):
        policy.predict_action(IMAGES[:2], INSTRUCTIONS[:2], state)
    with pytest.raises(ObservationError, match="proprio holds numbers that are not finite"):
        policy.act({"image": IMAGES[0]}, INSTRUCTIONS[0], state[1])


def test_what_is_no_observation_is_a_sentence(policy: ReferencePolicy) -> None:
    untyped: Any = policy
    image, text, state = IMAGES[0], INSTRUCTIONS[0], PROPRIO[0]
    for absent, message in (
        ((None, text, state), "The images are an array of numbers; found NoneType"),
        ((image, None, state), "instruction is a string, .* found NoneType"),
        ((image, 7, state), "instruction is a string, .* found int"),
        ((image, [None], state), "instruction is a string, .* found NoneType"),
        ((image, text, None), "proprio is an array of numbers; found NoneType"),
        ((image, text, "left"), "proprio is an array of numbers; found str"),
    ):
        with pytest.raises(ObservationError, match=message):
            untyped.predict_action(*absent)
    with pytest.raises(ObservationError, match=r"images are a ndarray; give a mapping .*\{'image': \.\.\.\}"):
        untyped.act(image, text, state)
    with pytest.raises(ObservationError, match="images are a NoneType"):
        untyped.act(None, text, state)
    for wrong, message in (
        (image[::2, ::2], r"image of 'image' has shape \(56, 56, 3\) .*; the policy takes \(112, 112, 3\) of uint8"),
        (image.astype(np.float32), "and type float32; the policy takes"),
        ([[1], [2, 3]], "The image of 'image' is no array of numbers; found list"),
    ):
        with pytest.raises(ObservationError, match=message):
            untyped.act({"image": wrong}, text, state)


def test_the_shape_of_a_state_is_told_as_it_was_given(policy: ReferencePolicy) -> None:
    with pytest.raises(ObservationError, match=r"Proprio must have shape \(4,\); got \(3,\)"):
        policy.act({"image": IMAGES[0]}, INSTRUCTIONS[0], PROPRIO[0][:3])


def test_an_image_that_is_turned_is_the_image_that_it_shows(policy: ReferencePolicy) -> None:
    """A view with negative strides, which is what upside-down cameras are usually put right with, and torch refuses."""
    turned = np.ascontiguousarray(IMAGES[0][::-1, ::-1])[::-1, ::-1]
    state = PROPRIO[0].astype(">f8")
    expected = policy.act({"image": IMAGES[0]}, INSTRUCTIONS[0], PROPRIO[0])
    np.testing.assert_array_equal(policy.act({"image": turned}, INSTRUCTIONS[0], state), expected)


@pytest.mark.parametrize("wrong", [PROPRIO[0] * 1j, torch.from_numpy(PROPRIO[0] * 1j), PROPRIO[0].astype(str), 1e300])
def test_states_that_no_float_holds_are_refused(policy: ReferencePolicy, wrong: Any) -> None:
    state = np.full(4, wrong) if isinstance(wrong, float) else wrong
    with pytest.raises(ObservationError, match=r"proprio (is an array of numbers; found|holds .* in float32)"):
        policy.act({"image": IMAGES[0]}, INSTRUCTIONS[0], state)


def test_a_batch_is_one_of_each_for_every_robot(policy: ReferencePolicy) -> None:
    untyped: Any = policy
    images, texts, states = [{"image": image} for image in IMAGES[:2]], list(INSTRUCTIONS[:2]), list(PROPRIO[:2])
    for wrong, message in (
        (([], [], []), "0 images, 0 instructions, 0 states; give as many of each, for one robot or more"),
        ((images, texts[:1], states), "2 images, 1 instructions, 2 states"),
        ((images[0], texts, states), "takes a list of images, one for each robot; found a dict"),
        ((images, texts[0], states), "takes a list of instructions, one for each robot; found a str"),
        ((images, texts, iter(states)), "takes a list of states, one for each robot; found a list_iterator"),
        ((images, texts, [states[0], states[1][:3]]), r"Proprio of row 1 must have shape \(4,\); got \(3,\)"),
        ((images, texts, [states[0], None]), "proprio is an array of numbers; found NoneType"),
    ):
        with pytest.raises(ObservationError, match=message):
            untyped.act_batch(*wrong)
    with pytest.raises(ObservationError, match="images of no robot"):
        policy.predict_action(IMAGES[:0], "reach the green ball", PROPRIO[:0])


def test_instructions_are_padded_on_the_left() -> None:
    assert split_words("Open the DOOR!") == ["open", "the", "door"]
    assert encode("open door", ("door", "open"), 4) == [1, 1, 3, 2]
    with pytest.raises(ValueError, match="no words"):
        encode("", ("door",), 4)
    with pytest.raises(ValueError, match="up to 1"):
        encode("door door", ("door",), 1)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    for name in ("model.safetensors", "config.json"):
        shutil.copy(SHIPPED_WEIGHTS / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("damage", ["cut", "missing", "config", "unknown", "mismatch"])
def test_bad_files_are_one_clear_error(weights: Path, damage: str) -> None:
    tensors, config = weights / "model.safetensors", weights / "config.json"
    bad = tensors if damage in ("cut", "missing", "mismatch") else config
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "config":
        config.write_text("{")
    elif damage == "unknown":
        config.write_text(json.dumps({"colour": "red"}))
    else:
        values = json.loads(config.read_text())
        config.write_text(json.dumps({**values, "intermediate_size": values["intermediate_size"] + 32}))
    with pytest.raises(ValueError) as error:
        load_autoregressive_policy(weights)
    assert bad.name in str(error.value)
    assert str(weights) in str(error.value)


def test_half_precision_runs(policy: ReferencePolicy) -> None:
    action = load_autoregressive_policy(dtype=torch.bfloat16).predict_action(IMAGES, INSTRUCTIONS, PROPRIO)
    assert action.dtype == np.float32
    assert np.abs(action - policy.predict_action(IMAGES, INSTRUCTIONS, PROPRIO)).mean() < 0.15
