"""LeRobot's policies loaded and called with images and a sentence."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.lerobot.tiny import KINDS, load_tiny, save_processors, size_of
from vla_pruner.errors import CheckpointError, ObservationError
from vla_pruner.policies.lerobot import LeRobotPolicy, load_lerobot, random_lerobot
from vla_pruner.policies.lerobot_random import built_with

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def folder(golden, tmp_path, request):
    """A copy of a golden checkpoint that may be changed, and how to load it."""

    def copy(kind):
        source = golden / f"lerobot_{kind}_tiny"
        target = tmp_path / kind
        target.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(source / name, target / name)
        return target, lambda: load_in(source, kind, target)

    return copy


def load_in(source, kind, target):
    with built_with(kind, size_of(source)):
        return load_lerobot(target)


def pictures(policy, seed=0, side=100):
    rng = np.random.default_rng(seed)
    return {camera: rng.integers(0, 256, (side, 80, 3), dtype=np.uint8) for camera in policy.cameras}


@each_kind
def test_loaded_policy(golden, kind):
    policy = load_tiny(golden, kind)
    assert policy.cameras == ("base", "wrist")
    assert policy.proprio_size == 8
    assert policy.dtype == torch.float32
    assert policy.device.type == "cpu"
    assert [type(tower).__name__ for tower in policy.vision_towers] in (
        ["SiglipVisionModel"],
        ["SmolVLMVisionTransformer"],
    )
    assert not policy.module.training
    with pytest.raises(CheckpointError, match=r"policy_preprocessor\.json"):
        policy.act(pictures(policy), "go", np.zeros(8))


@each_kind
def test_load_policy_knows_them(golden, kind):
    source = golden / f"lerobot_{kind}_tiny"
    with built_with(kind, size_of(source)):
        policy = vp.load_policy(source)
    assert isinstance(policy, LeRobotPolicy)
    assert policy.module.config.type == kind


@each_kind
def test_weights_that_are_missing_or_unexpected_are_listed(folder, kind):
    target, load = folder(kind)
    weights = load_file(target / "model.safetensors")
    missing = next(name for name in weights if name.endswith("layers.2.self_attn.k_proj.weight"))
    weights["model.surplus"] = weights.pop(missing)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        CheckpointError, match=r"Missing: .*layers.2.self_attn.k_proj.weight.*Unexpected: model.surplus"
    ):
        load()


@each_kind
def test_weights_of_another_shape_are_listed(folder, kind):
    target, load = folder(kind)
    weights = load_file(target / "model.safetensors")
    weights["model.action_in_proj.bias"] = torch.zeros(5)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"another shape: model.action_in_proj.bias \(5,\), not"):
        load()


@each_kind
def test_weights_that_are_not_there(folder, kind):
    target, load = folder(kind)
    (target / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load()


@each_kind
def test_weights_that_are_damaged(folder, kind):
    target, load = folder(kind)
    damaged = (target / "model.safetensors").read_bytes()[:5000]
    (target / "model.safetensors").write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load()


def test_a_checkpoint_with_shared_weights_and_the_openpi_names(folder):
    """pi0 stores one of two weights that share their memory, and older checkpoints lack "model." in front."""
    target, load = folder("pi0")
    weights = load_file(target / "model.safetensors")
    assert not any(name.endswith("language_model.embed_tokens.weight") for name in weights)
    expected = load().module.state_dict()
    renamed = {name.removeprefix("model."): value for name, value in weights.items()}
    save_file(renamed, target / "model.safetensors", metadata={"format": "pt"})
    actual = load().module.state_dict()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_another_type_of_policy(folder):
    target, load = folder("pi0")
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({"type": "act"}))
    with pytest.raises(
        vp.UnsupportedModelError, match="of type 'act'; supported are pi0, pi05, pi0_fast, smolvla, molmoact2"
    ):
        load()
    for strange in ({**config, "type": "pi99"}, {**config, "colour": "red"}):
        (target / "config.json").write_text(json.dumps(strange))
        with pytest.raises(CheckpointError, match=r"pi99|colour"):
            load()
    (target / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load()


@each_kind
def test_saved_processors_are_used(folder, tmp_path, kind):
    target, load = folder(kind)
    save_processors(load().module, kind, target)
    policy = load()
    torch.manual_seed(0)
    actions = policy.act(pictures(policy), "pick up the bowl", np.linspace(-1, 1, 8))
    assert actions.shape == (10, 7)
    assert actions.dtype == np.float32
    # The last of LeRobot's steps un-normalises with the statistics of the folder: mean 1, deviation 2, or 0 to 4.
    torch.manual_seed(0)
    raw = policy.module.predict_action_chunk(policy.preprocessor(batch(policy)))[0]
    expected = (raw + 1) * 2 if kind == "pi05" else raw * 2 + 1
    np.testing.assert_allclose(actions, expected, rtol=0, atol=1e-5)


def batch(policy):
    images = {
        f"observation.images.{camera}": torch.tensor(image).permute(2, 0, 1).float() / 255
        for camera, image in pictures(policy).items()
    }
    state = torch.linspace(-1, 1, 8)
    return {**images, "observation.state": state, "task": "pick up the bowl"}


@each_kind
def test_act_sees_images_instruction_and_state(kind):
    policy = random_lerobot(kind)

    def act(seed=0, instruction="pick up the bowl", proprio=0.3, **changed):
        torch.manual_seed(0)
        return policy.act({**pictures(policy, seed), **changed}, instruction, np.full(8, proprio))

    actions = act()
    assert actions.shape == (10, 7)
    np.testing.assert_array_equal(actions, act())
    for other in (act(seed=1), act(instruction="put down the bowl"), act(proprio=-0.3)):
        assert np.abs(actions - other).max() > 1e-3
    black = np.zeros((100, 80, 3), dtype=np.uint8)
    for camera in policy.cameras:
        assert np.abs(actions - act(**{camera: black})).max() > 1e-4, camera
    torch.manual_seed(0)
    alone = policy.act({policy.cameras[0]: black}, "pick up the bowl", np.full(8, 0.3))
    assert np.abs(actions - alone).max() > 1e-4


@each_kind
def test_act_refuses_what_it_cannot_use(kind):
    policy = random_lerobot(kind)
    good, state = pictures(policy), np.zeros(8)
    for images, proprio, message in (
        ({}, state, "no camera"),
        ({"front": good[policy.cameras[0]]}, state, policy.cameras[0]),
        ({policy.cameras[0]: np.zeros((100, 80, 3))}, state, "float64"),
        ({policy.cameras[0]: np.zeros((3, 100, 80), dtype=np.uint8)}, state, r"\(H, W, 3\)"),
        *(
            ({policy.cameras[0]: np.zeros((*size, 3), np.uint8)}, state, "no frame")
            for size in ((0, 0), (0, 8), (8, 0))
        ),
        (good, None, r"\(8,\)"),
        (good, np.zeros(7), r"\(8,\)"),
    ):
        with pytest.raises(ObservationError, match=message):
            policy.act(images, "go", proprio)


@each_kind
def test_random_weights_are_those_of_the_seed(kind):
    one, same, other = (random_lerobot(kind, seed=seed).module.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_random_policies_that_there_are_not():
    for options in ({"kind": "act"}, {"size": "huge"}, {"dtype": torch.float16}):
        with pytest.raises(vp.UnsupportedModelError, match="kind is one of"):
            random_lerobot(**options)


@each_kind
def test_built_in_names_are_put_back(kind):
    import importlib

    module = importlib.import_module(
        "lerobot.policies.smolvla.smolvlm_with_expert"
        if kind == "smolvla"
        else f"lerobot.policies.{kind}.modeling_{kind}"
    )
    before = dict(vars(module))
    random_lerobot(kind)
    assert dict(vars(module)) == before
