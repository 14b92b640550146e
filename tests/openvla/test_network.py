"""OpenVLA: the official outputs, batches, types, and refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache, StaticCache

from tests.openvla.tiny import load_openvla, padded, random_openvla, tiny_inputs, write_checkpoint
from vla_pruner.errors import CheckpointError, ObservationError

TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def folder(golden):
    return golden / "openvla_tiny"


@pytest.fixture
def expected(folder):
    return np.load(folder / "golden.npz")


@pytest.fixture
def policy(folder):
    return load_openvla(folder)


@pytest.fixture
def inputs(expected):
    return {
        "input_ids": torch.from_numpy(expected["input_ids"]),
        "attention_mask": torch.from_numpy(expected["attention_mask"]),
        "pixel_values": torch.from_numpy(expected["pixel_values_t0"]),
    }


def pixels(policy, expected, frame):
    return policy.processor.pixel_values([expected["image224"][frame]])


def logits_of(policy, inputs, **options):
    """Logits (B, V) of every call of the language model in one control step."""
    found = []
    handle = policy.language_model.register_forward_hook(
        lambda module, args, output: found.append(output.logits[:, -1])
    )
    try:
        policy.predict_action(**inputs, **options)
    finally:
        handle.remove()
    return found


@torch.no_grad()
def test_vision_and_projector_agree_with_the_official_code(policy, expected):
    for frame in (0, 3):
        features = policy.vision_backbone(pixels(policy, expected, frame))[0]
        np.testing.assert_allclose(features, expected[f"vision_features_t{frame}"], **TOLERANCE)
    for frame in range(4):
        tokens = policy.visual_tokens(pixels(policy, expected, frame), 1)[0]
        np.testing.assert_allclose(tokens, expected["projector_features"][frame], **TOLERANCE)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_hidden_states_and_logits_agree_with_the_official_code(folder, expected, inputs, backend):
    policy = load_openvla(folder, attn_implementation=backend)
    output = policy(**inputs, output_hidden_states=True)
    np.testing.assert_allclose(output.hidden_states[0][0], expected["inputs_embeds_t0"], **TOLERANCE)
    np.testing.assert_allclose(torch.cat(output.hidden_states), expected["hidden_states_t0"], **TOLERANCE)
    np.testing.assert_allclose(output.logits[0, -1], expected["first_logits_t0"], **TOLERANCE)
    assert policy.visual_slice == slice(1, 257)


@pytest.mark.parametrize("frame", range(4))
def test_actions_agree_with_the_official_code(policy, expected, inputs, frame):
    inputs["pixel_values"] = pixels(policy, expected, frame)
    tokens = policy.decode_tokens(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], 7)
    assert tokens[0].tolist() == expected["action_token_ids"][frame].tolist()
    action = policy.predict_action(**inputs)
    assert action.dtype == np.float64
    np.testing.assert_array_equal(action, expected["actions"][frame])
    logits = torch.cat(logits_of(policy, inputs))[:, 31744:32000]
    np.testing.assert_allclose(logits, expected["decode_logits_action_range"][frame], **TOLERANCE)


def test_cache_agrees_with_the_official_code(policy, expected, inputs):
    cache: Any = DynamicCache()
    policy.predict_action(**inputs, past_key_values=cache)
    np.testing.assert_allclose(cache.layers[0].keys[0], expected["layer0_k_t0"], **TOLERANCE)


def test_static_cache_gives_the_same_action(policy, expected, inputs):
    cache = StaticCache(config=policy.language_model.config, max_cache_len=320)
    np.testing.assert_array_equal(policy.predict_action(**inputs, past_key_values=cache), expected["actions"][0])


def test_empty_token_is_appended_and_a_mask_is_not_needed(policy, expected, inputs):
    ids = inputs["input_ids"][:, :-1]
    assert inputs["input_ids"][0, -1] == 29871
    for mask in (None, inputs["attention_mask"][:, :-1]):
        action = policy.predict_action(ids, pixel_values=inputs["pixel_values"], attention_mask=mask, do_sample=False)
        np.testing.assert_array_equal(action, expected["actions"][0])


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_batch_rows_equal_single_rows(folder, expected, inputs, side, backend):
    policy = load_openvla(folder, attn_implementation=backend)
    ids = inputs["input_ids"]
    # Different lengths, one without the empty token.
    prompts = [ids, torch.cat([ids[:, :9], ids[:, 14:]], dim=1), ids[:, :-4], ids]
    images = [pixels(policy, expected, frame) for frame in range(4)]
    single = [
        logits_of(policy, {"input_ids": p, "pixel_values": i, "attention_mask": torch.ones_like(p)})
        for p, i in zip(prompts, images, strict=True)
    ]
    actions = [policy.predict_action(p, pixel_values=i) for p, i in zip(prompts, images, strict=True)]
    batch_ids, mask = padded(prompts, side)
    batch = {"input_ids": batch_ids, "attention_mask": mask, "pixel_values": torch.cat(images)}
    found = policy.predict_action(**batch)
    assert found.shape == (4, 7)
    np.testing.assert_array_equal(found, np.stack(actions))
    assert len({tuple(row) for row in found}) > 1
    # After the prefill each call has one position, so the last logits are those of the row's newest token.
    for step, logits in enumerate(logits_of(policy, batch)[1:], start=1):
        torch.testing.assert_close(logits, torch.cat([row[step] for row in single]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("oft", [False, True])
def test_the_processors_padding_needs_no_mask(tmp_path, oft, loaded):
    policy = random_openvla(oft=oft)
    if loaded:
        # Another padding token than the published one, and a tokenizer without any.
        policy.config.pad_token_id = 31001
        tokenizer = policy.processor.tokenizer
        policy = load_openvla(write_checkpoint(tmp_path / "model", policy))
        policy.processor.tokenizer = tokenizer
    ids, mask = policy.processor.tokenize([policy.processor.prompt(text) for text in ("pick up the red bowl", "go")])
    assert ids[1, -1] == policy.config.pad_token_id == (31001 if loaded else 32000)
    inputs = {"pixel_values": tiny_inputs(policy)["pixel_values"].repeat(2, 1, 1, 1)}
    if oft:
        inputs["proprio"] = np.zeros((2, 8))
    found = policy.predict_action(ids, **inputs)
    np.testing.assert_array_equal(found, policy.predict_action(ids, attention_mask=mask, **inputs))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(folder, inputs, dtype):
    exact, half = load_openvla(folder), load_openvla(folder, dtype=dtype)
    frequencies = half.language_model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    torch.testing.assert_close(frequencies, exact.language_model.model.rotary_emb.inv_freq, rtol=0, atol=0)
    expected, found = (policy(**inputs).logits[0, -1] for policy in (exact, half))
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < (0.1 if dtype is torch.bfloat16 else 0.02) * expected.abs().max()
    assert half.predict_action(**inputs).shape == (7,)


def test_rotary_frequencies_are_those_of_the_formula(policy):
    # from_pretrained builds on the meta device, where a buffer that is in no file would be left undefined.
    rotary = policy.language_model.model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, 10000.0 ** (-torch.arange(0, 8, 2) / 8))
    assert not any(tensor.is_meta for tensor in [*policy.parameters(), *policy.buffers()])


def test_casting_a_policy_leaves_its_positions_exact():
    policy = random_openvla()
    inputs, exact = tiny_inputs(policy), policy.language_model.model.rotary_emb.inv_freq.clone()
    policy.to(torch.bfloat16)
    assert policy.projector.fc1.weight.dtype == torch.bfloat16
    torch.testing.assert_close(policy.language_model.model.rotary_emb.inv_freq, exact, rtol=0, atol=0)
    assert policy.predict_action(**inputs).shape == (7,)


def test_the_policy_sees(policy, inputs):
    shape = (224, 224, 3)
    images = [np.zeros(shape, np.uint8), np.full(shape, 255, np.uint8)]
    found = [
        policy.predict_action(**{**inputs, "pixel_values": policy.processor.pixel_values([image])}) for image in images
    ]
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_a_step_calls_each_tower_once_and_the_language_model_once_a_token():
    policy = random_openvla()
    calls = []
    for module in (*policy.vision_towers, policy.projector, policy.language_model, policy.language_model.model):
        module.register_forward_pre_hook(lambda module, args: calls.append(module))
    policy.predict_action(**tiny_inputs(policy))
    assert [calls.count(tower) for tower in policy.vision_towers] == [1, 1]
    assert calls.count(policy.projector) == 1
    assert calls.count(policy.language_model) == calls.count(policy.language_model.model) == 7


def test_act_is_predict_action_with_the_processor():
    policy = random_openvla()
    image = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    inputs = tiny_inputs(policy, "Pick up the Cup")
    found = policy.act({"image": image}, "pick up the cup")
    assert found.shape == (1, 7)
    np.testing.assert_array_equal(found[0], policy.predict_action(**inputs))
    policy.reset()
    np.testing.assert_array_equal(policy.act({"image": image}, "pick up the cup"), found)


def test_statistics_are_chosen_by_name():
    policy = random_openvla()
    wide = {"action": {**policy.norm_stats["random"]["action"], "q99": [1.5] * 7}}
    policy.norm_stats = {"narrow": policy.norm_stats["random"], "wide": wide}
    inputs = tiny_inputs(policy)
    narrow, wider = (policy.predict_action(**inputs, unnorm_key=key) for key in ("narrow", "wide"))
    np.testing.assert_allclose((wider[:6] + 0.5) / 2, (narrow[:6] + 0.5) / 1, atol=1e-12)
    assert narrow[6] == wider[6]  # masked out: as it is
    assert policy.get_action_dim("wide") == 7
    assert policy.get_action_stats("wide") is wide["action"]
    policy.unnorm_key = "wide"
    np.testing.assert_array_equal(policy.predict_action(**inputs), wider)
    policy.unnorm_key = None
    with pytest.raises(ObservationError, match=r"several datasets; .* one of: narrow, wide .*--option unnorm_key=NAME"):
        policy.predict_action(**inputs)
    with pytest.raises(ObservationError, match=r"unnorm_key='other' was given, .* narrow, wide"):
        policy.predict_action(**inputs, unnorm_key="other")


@pytest.mark.parametrize("oft", [False, True])
def test_statistics_that_are_not_enough_are_the_checkpoints_fault(oft):
    policy = random_openvla(oft=oft)
    images = {camera: np.zeros((224, 224, 3), np.uint8) for camera in policy.cameras}
    state = np.zeros(8) if oft else None
    whole = policy.norm_stats["random"]
    cases = [
        ({"proprio": whole["proprio"]}, "'random' have no 'action'; found proprio"),
        (7, f"'random' have no '{'proprio' if oft else 'action'}'; found nothing"),
        ({**whole, "action": {"mask": [True]}}, "'random' have neither q01 nor min .* found mask"),
        ({**whole, "action": {"q01": 1.0}}, "'random' have neither q01 nor min .* found q01"),
        (
            {**whole, "action": {**whole["action"], "q01": [9.0] * 7}},
            "an action have q01 9.0 and q99 0.5 in dimension 0",
        ),
        ({**whole, "action": {"min": [0.0] * 7, "max": [1.0] * 7}}, "of an action lack q01 and q99"),
    ]
    if oft:
        cases += [
            ({"action": whole["action"]}, "'random' have no 'proprio'; found action"),
            ({**whole, "proprio": {"min": [0.0] * 8}}, "of a state lack q01 and q99"),
        ]
    for stats, message in cases:
        policy.norm_stats = {"random": stats}
        with pytest.raises(CheckpointError, match=message):
            policy.act(images, "go", state)


@pytest.mark.parametrize("oft", [False, True])
def test_prompts_that_do_not_begin_with_bos_are_refused(oft):
    policy = random_openvla(oft=oft)
    inputs = tiny_inputs(policy)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    message = r"begins with token 1 \(BOS\), after which the images go; found a row that begins with {}\. "
    for call in (policy.predict_action, policy):
        with pytest.raises(ObservationError, match=message.format(int(ids[0, 1]))):
            call(input_ids=ids[:, 1:], attention_mask=mask[:, 1:], pixel_values=inputs["pixel_values"])
    # Padded on the left by hand, with another token than the model's.
    with pytest.raises(ObservationError, match=message.format(0) + ".*another token than 32000, give attention_mask"):
        policy.predict_action(torch.cat([torch.zeros_like(ids[:, :2]), ids], dim=1), **inputs)
    ids = torch.cat([torch.full_like(ids[:, :2], 32000), ids], dim=1)
    assert np.isfinite(policy.predict_action(ids, **inputs)).all()


def test_wrong_arguments_are_refused():
    policy = random_openvla()
    inputs = tiny_inputs(policy)
    image = np.zeros((224, 224, 3), np.uint8)
    with pytest.raises(ObservationError, match="do_sample=False"):
        policy.predict_action(**inputs, do_sample=True)
    with pytest.raises(ObservationError, match=r"\(1, 6, 224, 224\).*found the shape \(1, 12, 224, 224\)"):
        policy.predict_action(**{**inputs, "pixel_values": inputs["pixel_values"].repeat(1, 2, 1, 1)})
    with pytest.raises(ObservationError, match="found none"):
        policy(inputs["input_ids"])
    with pytest.raises(ObservationError, match="attention_mask has the shape"):
        policy.predict_action(**{**inputs, "attention_mask": inputs["attention_mask"][:, 1:]})
    with pytest.raises(ObservationError, match="no real token"):
        policy.predict_action(**{**inputs, "attention_mask": torch.zeros_like(inputs["attention_mask"])})
    with pytest.raises(ObservationError, match=r"\(batch, tokens\)"):
        policy.predict_action(**{**inputs, "input_ids": inputs["input_ids"][0]})
    for wrong in (-1, 32064):
        ids = inputs["input_ids"].clone()
        ids[0, 3] = wrong
        with pytest.raises(ObservationError, match="the vocabulary has 0 to 32063"):
            policy.predict_action(**{**inputs, "input_ids": ids})
    with pytest.raises(ObservationError, match=r"of integers; found .* of torch\.float32"):
        policy.predict_action(**{**inputs, "input_ids": inputs["input_ids"].float()})
    for name in ("input_ids", "attention_mask", "pixel_values"):
        with pytest.raises(ObservationError, match=rf"{name} .* a tensor .*found ndarray"):
            policy.predict_action(**{**inputs, name: inputs[name].numpy()})
    with pytest.raises(ObservationError, match="a ndarray; this policy takes exactly 'image'"):
        policy.act(image, "go")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ObservationError, match=r"An instruction is a string, .* found NoneType"):
        policy.act({"image": image}, None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ObservationError, match="'top'; this policy takes exactly 'image'"):
        policy.act({"top": image}, "go")
    with pytest.raises(ObservationError, match="give no proprio"):
        policy.act({"image": image}, "go", proprio=np.zeros(8))
    policy.processor = None
    with pytest.raises(CheckpointError, match="no processor"):
        policy.act({"image": image}, "go")


def test_an_early_end_token_does_not_end_the_action():
    policy = random_openvla()
    inputs = tiny_inputs(policy)
    calls = []

    def end(module, args, output):
        calls.append(module)
        if len(calls) == 3:
            output.logits[..., 2] = 1e4

    handle = policy.language_model.register_forward_hook(end)
    tokens = policy.decode_tokens(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], 7)
    handle.remove()
    assert (tokens == 2).tolist() == [[False, False, True, False, False, False, False]]
    calls.clear()
    policy.language_model.register_forward_hook(end)
    stats = policy.norm_stats["random"]["action"]
    found = policy.predict_action(**inputs)
    assert found.shape == (7,)
    np.testing.assert_allclose(found[2], (1 - 1 / 255) * stats["q99"][2], rtol=0, atol=1e-12)
