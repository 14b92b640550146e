"""pi0 of transformers: stored actions, weights that must all fit, and the files around the model."""

from __future__ import annotations

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vla_pruner as vp
from vla_pruner.models.openvla.tokenizer import StandInTokenizer
from vla_pruner.policies.pi0 import TransformersPI0, load_pi0, prepare_image

NAMES = ("state", "input_ids", "pixel_values", "noise", "attention_mask", "pixel_attention_mask")


@pytest.fixture
def folder(golden):
    return golden / "transformers_pi0_tiny"


@pytest.fixture
def copy(folder, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, tmp_path / name)
    return tmp_path


def sample(policy, folder):
    inputs = np.load(folder / "inputs.npz")
    return policy.module.sample_actions(**{name: torch.tensor(inputs[name]) for name in NAMES})


def change(folder, edit):
    weights = load_file(folder / "model.safetensors")
    changed = edit(weights)
    save_file(weights if changed is None else changed, folder / "model.safetensors")


def test_golden_actions(folder):
    expected = np.load(folder / "golden.npz")["actions"]
    np.testing.assert_allclose(sample(load_pi0(folder), folder), expected, rtol=0, atol=1e-4)


def lerobots(weights):
    """Return the weights as LeRobot publishes them: a prefix, and the tied token embeddings under the head's name
    alone.
    """
    embedding = "paligemma_with_expert.paligemma.model.language_model.model.embed_tokens.weight"
    weights = dict(weights)
    weights["paligemma_with_expert.paligemma.lm_head.weight"] = weights.pop(embedding)
    weights = {name.replace("language_model.model.", "language_model."): tensor for name, tensor in weights.items()}
    return {f"model.{name}": tensor for name, tensor in weights.items()}


def own(weights):
    """Return the weights by the model's own names."""
    from vla_pruner.policies.pi0 import _renamed

    return _renamed(weights, nested=False)


def nested(weights):
    """With the vision tower as versions of transformers before 5.6 have it."""
    return {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("layout", [lerobots, own, nested])
def test_other_layouts_of_the_same_weights(copy, folder, layout):
    change(copy, layout)
    expected = np.load(folder / "golden.npz")["actions"]
    np.testing.assert_allclose(sample(load_pi0(copy), folder), expected, rtol=0, atol=1e-4)


def test_shards(copy, folder):
    weights = load_file(copy / "model.safetensors")
    files = {name: f"model-0000{number % 2 + 1}-of-00002.safetensors" for number, name in enumerate(sorted(weights))}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, copy / file)
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    expected = np.load(folder / "golden.npz")["actions"]
    np.testing.assert_allclose(sample(load_pi0(copy), folder), expected, rtol=0, atol=1e-4)
    (copy / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(vp.CheckpointError, match=r"files that are missing: model-00002-of-00002\.safetensors"):
        load_pi0(copy)


def test_missing_unexpected_and_misshapen_weights_are_listed(copy):
    def edit(weights):
        del weights["action_out_proj.bias"]
        weights["film.weight"] = torch.zeros(1)
        weights["state_proj.bias"] = torch.zeros(3)

    change(copy, edit)
    with pytest.raises(vp.CheckpointError) as refusal:
        load_pi0(copy)
    text = str(refusal.value)
    assert "Missing: action_out_proj.bias. Unexpected: film.weight." in text
    assert "embed_action_time.state_proj.bias (3,), not (32,)" in text


def test_damaged_weights(copy):
    (copy / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(vp.CheckpointError, match="damaged"):
        load_pi0(copy)


def test_act_gives_the_model_what_it_was_trained_with(folder):
    """Images, text and state as the golden inputs have them; the mask always."""
    inputs = np.load(folder / "inputs.npz")
    policy = load_pi0(folder, cameras=("one", "two"))
    policy.tokenizer = StandInTokenizer(512)
    given = {}
    original = policy.module.sample_actions

    def sample_actions(**kwargs):
        given.update(kwargs)
        return original(**kwargs)

    policy.module.sample_actions = sample_actions
    torch.manual_seed(0)
    images = {"two": inputs["images"][0, 1], "one": inputs["images"][0, 0]}
    chunk = policy.act(images, "lift", inputs["state"][0])
    assert chunk.shape == (10, 32)
    assert chunk.dtype == np.float32
    np.testing.assert_array_equal(given["pixel_values"][0], inputs["pixel_values"][0])
    np.testing.assert_array_equal(given["state"][0], inputs["state"][0])
    text = [1, *(3 + byte for byte in b"lift\n")]
    assert given["input_ids"].tolist() == [[500] * 512 + text]
    assert given["attention_mask"].tolist() == [[1] * (512 + len(text))]
    assert given["pixel_attention_mask"].tolist() == [[True, True]]


def test_statistics_scale_state_and_actions(copy, folder):
    mean, deviation = [0.5, -1.0, 2.0], [2.0, 0.5, 0.1]
    statistics = {"state_mean": mean, "state_std": deviation, "actions_mean": mean, "actions_std": deviation}
    (copy / "processor_config.json").write_text(json.dumps({"processor_class": "PI0Processor", **statistics}))
    scaled, plain = load_pi0(copy, cameras=("one", "two")), load_pi0(folder, cameras=("one", "two"))
    images = dict(zip(("one", "two"), np.load(folder / "inputs.npz")["images"][0], strict=True))
    state = np.array([1.0, 2.0, 3.0], dtype=np.float32)
    normalised = (state - mean) / (np.array(deviation) + 1e-8)
    chunks = []
    for policy, proprio in ((scaled, state), (plain, normalised)):
        policy.tokenizer = StandInTokenizer(512)
        torch.manual_seed(1)
        chunks.append(policy.act(images, "lift", proprio))
    assert scaled.proprio_size == 3
    assert plain.proprio_size == 32
    np.testing.assert_allclose(chunks[0], chunks[1][:, :3] * deviation + np.array(mean), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("height", "width"), [(112, 224), (300, 150), (448, 448), (5, 600)])
def test_images_are_centred_on_black(height, width):
    image = np.full((height, width, 3), 200, dtype=np.uint8)
    pixels = prepare_image(image, 224)
    assert pixels.shape == (3, 224, 224)
    inside = pixels[0] > -1
    np.testing.assert_allclose(pixels[0][inside], 200 / 127.5 - 1)
    rows, columns = inside.any(1).nonzero().flatten(), inside.any(0).nonzero().flatten()
    ratio = max(height, width) / 224
    assert len(rows) == max(1, int(height / ratio))
    assert len(columns) == max(1, int(width / ratio))
    assert abs(int(rows[0]) - (223 - int(rows[-1]))) <= 1
    assert abs(int(columns[0]) - (223 - int(columns[-1]))) <= 1


class Reads:
    """A tokenizer that reads the same ids in every text."""

    bos_token_id = 1

    def __init__(self, ids: list[int]) -> None:
        self._ids = ids

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": self._ids}


def test_refusals(folder):
    policy = load_pi0(folder, cameras=("one", "two"))
    image = np.zeros((4, 4, 3), dtype=np.uint8)
    both = {"one": image, "two": image}
    with pytest.raises(vp.CheckpointError, match=r"no tokenizer\. Put tokenizer\.json"):
        policy.act(both, "lift", np.zeros(8))
    policy.tokenizer = StandInTokenizer(512)
    for wrong in ({}, {**both, "three": image}):
        with pytest.raises(vp.ObservationError, match="takes one or more of 'one', 'two'"):
            policy.act(wrong, "lift", np.zeros(8))
    with pytest.raises(vp.ObservationError, match="give proprio"):
        policy.act(both, "lift")
    with pytest.raises(vp.ObservationError, match=r"shape \(33,\); this policy takes \(32,\) or fewer"):
        policy.act(both, "lift", np.zeros(33))
    with pytest.raises(vp.ObservationError, match=r"\(H, W, 3\) uint8"):
        policy.act({**both, "two": image.astype(np.float32)}, "lift", np.zeros(8))
    untyped: Any = policy
    with pytest.raises(vp.ObservationError, match=r"images are a ndarray; give a mapping .*'one': \.\.\., 'two'"):
        untyped.act(image, "lift", np.zeros(8))
    with pytest.raises(vp.ObservationError, match=r"instruction is a string, .* found NoneType"):
        untyped.act(both, None, np.zeros(8))
    with pytest.raises(vp.ObservationError, match="character 2 is half of one"):
        policy.act(both, "li\ud800ft", np.zeros(8))
    with pytest.raises(vp.ObservationError, match="proprio holds numbers that are not finite"):
        policy.act(both, "lift", np.array([0.0, np.nan]))
    image_token = policy.module.config.vlm_config.image_token_id
    policy.tokenizer = Reads([3, image_token, 4])
    with pytest.raises(vp.ObservationError, match="holds the image token, which stands for an image"):
        policy.act(both, "lift <image>", np.zeros(8))
    policy.tokenizer = StandInTokenizer(512)
    with pytest.raises(vp.ObservationError, match="proprio is an array of numbers; found str"):
        untyped.act(both, "lift", "left")
    with pytest.raises(vp.UnsupportedModelError, match="'flash_attention_2' was given; 'sdpa' and 'eager'"):
        load_pi0(folder, attn_implementation="flash_attention_2")


@pytest.mark.parametrize("present", [("one", "three"), ("two",)])
@pytest.mark.parametrize("method", [None, vp.Unpruned(), vp.VLAPruner(keep=1.0, preset="paper")])
def test_an_absent_camera_is_one_that_the_model_has_not(present, method):
    """An absent camera's tokens are padding that nothing attends to: the actions are those of the present cameras."""
    random = np.random.default_rng(0)
    images = {name: random.integers(0, 256, (112, 112, 3), dtype=np.uint8) for name in present}
    chunks = []
    for cameras in (("one", "two", "three"), present):
        made: Any = vp.random_policy("pi0")
        policy = TransformersPI0(made.module, cameras, made.tokenizer)
        if method is not None:
            method.attach(policy)
        torch.manual_seed(1)
        chunks.append(policy.act(images, "lift", np.zeros(8)))
    np.testing.assert_allclose(chunks[0], chunks[1], rtol=0, atol=1e-4)  # products of other lengths round differently


def test_an_absent_camera_takes_no_budget():
    made: Any = vp.random_policy("pi0")
    policy = TransformersPI0(made.module, ("one", "two", "three"), made.tokenizer)
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
    with vp.VLAPruner(keep=0.25, preset="paper").attach(policy) as session:
        for _ in range(4):
            policy.act({"one": image, "three": image}, "lift", np.zeros(8))
        each = session.step.layout.cameras[0]
        assert session.kept.shape == (1, each // 2)
        assert set((session.kept[0] // each).tolist()) <= {0, 2}


def test_another_number_of_cameras_than_was_named(folder):
    policy = load_pi0(folder)
    assert len(policy.cameras) == 3
    message = r"holds 2 per row\. .* load_policy\(\.\.\., cameras=\(\.\.\.\)\); .* attach\(policy\.module\)"
    with vp.RandomKeep(keep=0.5).attach(policy), pytest.raises(vp.SessionError, match=message):
        sample(policy, folder)
    with vp.RandomKeep(keep=0.5).attach(policy.module) as session:
        sample(policy, folder)
        assert session.kept is not None
    policy = load_pi0(folder, cameras=("one", "two"))
    with vp.RandomKeep(keep=0.5).attach(policy) as session:
        sample(policy, folder)
        assert session.kept is not None


def test_keep_per_camera_and_reset():
    policy = vp.random_policy("pi0")
    assert isinstance(policy, TransformersPI0)
    images = {
        name: np.random.default_rng(i).integers(0, 256, (40, 60, 3), np.uint8) for i, name in enumerate(policy.cameras)
    }
    with vp.VLAPruner(keep={"base": 10, "wrist": 0.5}, warmup="semantic", preset="paper").attach(policy) as session:
        policy.act(images, "lift", np.zeros(8))
        assert session.kept is not None
        assert (session.kept < 64).sum() == 10
        assert session.kept.shape == (1, 42)
        policy.reset()
        assert session.memory is None


@pytest.mark.parametrize(
    ("statistics", "message"),
    [
        ({"actions_std": [np.nan] * 7}, r"actions_std .*must be a list of finite numbers"),
        ({"actions_mean": [np.inf] * 7}, r"actions_mean .*must be a list of finite numbers"),
        ({"state_mean": ["x"] * 7}, r"state_mean .*must be a list of finite numbers"),
        ({"state_std": {"a": 1}}, r"state_std .*must be a list of finite numbers"),
        ({"actions_std": [1.0] * 3}, "7 numbers of actions_mean and 3 of actions_std"),
        ({"state_std": None}, "7 numbers of state_mean and none of state_std"),
        ({"actions_mean": [0.0] * 500, "actions_std": [1.0] * 500}, "no more than the model's 32"),
        ({"actions_std": [-1.0] * 7}, r"actions_std .*no deviation is below 0"),
    ],
)
def test_statistics_that_scale_nothing_are_refused_when_they_are_read(copy, statistics, message):
    whole = {f"{part}_{name}": [1.0] * 7 for part in ("state", "actions") for name in ("mean", "std")}
    (copy / "processor_config.json").write_text(json.dumps(whole | statistics))
    with pytest.raises(vp.CheckpointError, match=rf"processor_config\.json has .*{message}"):
        load_pi0(copy)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_networks_that_are_not_finite_never_act(copy, folder, wrong):
    policy = load_pi0(folder, cameras=("one", "two"))
    policy.tokenizer = StandInTokenizer(512)
    with torch.no_grad():
        policy.module.action_out_proj.bias[0] = wrong
    images = dict.fromkeys(("one", "two"), np.zeros((8, 8, 3), np.uint8))
    with pytest.raises(vp.CheckpointError, match=r"numbers that are not finite .* in float32, though its inputs are"):
        policy.act(images, "lift", np.zeros(8))

    def spoil(weights):
        weights["action_out_proj.bias"][0] = wrong

    change(copy, spoil)
    with pytest.raises(vp.CheckpointError, match=r"model\.safetensors hold .*not finite.*action_out_proj\.bias"):
        load_pi0(copy)


def test_a_config_without_a_dtype_is_of_float32(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "dtype": None}))
    assert load_pi0(copy).module.dtype == torch.float32


@pytest.mark.parametrize(
    "edit",
    [
        {"chunk_size": 10**9},
        {"dtype": "os"},
        {"dtype": ["float32"]},
        {"quantization_config": {"quant_method": "strange"}},
        {"vlm_config": 3},
        {"vlm_config": {"text_config": {"num_hidden_layers": 10**6}}},
        {"vlm_config": {"vision_config": {"patch_size": 0}}},
        {"dit_config": {"num_hidden_layers": 10**6}},
        {"dit_config": {"hidden_size": "x"}},
    ],
)
def test_configs_that_lie_cost_nothing(copy, monkeypatch, edit):
    """Nothing is built but on "meta", and no more layers than there are weights of."""
    from vla_pruner.policies import pi0

    built = []
    original = pi0.build
    monkeypatch.setattr(pi0, "build", lambda *given: built.append(given[1]) or original(*given))
    config = json.loads((copy / "config.json").read_text())

    def merged(values, changes):
        for name, value in changes.items():
            is_inner = isinstance(value, dict) and isinstance(values.get(name), dict)
            values[name] = merged(values[name], value) if is_inner else value
        return values

    (copy / "config.json").write_text(json.dumps(merged(config, edit)))
    with pytest.raises(vp.CheckpointError, match=r"config\.json"):
        load_pi0(copy)
    assert set(built) <= {"meta"}


def test_kernels_that_a_config_names_are_not_fetched(copy):
    config = json.loads((copy / "config.json").read_text())
    config["vlm_config"]["text_config"]["_attn_implementation"] = "kernels-community/evil"
    config["attn_implementation"] = "kernels-community/evil"
    config["num_labels"] = 10**8
    (copy / "config.json").write_text(json.dumps(config))
    module = load_pi0(copy).module
    assert module.model.vlm.language_model.config._attn_implementation == "sdpa"
