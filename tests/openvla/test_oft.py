"""OpenVLA-OFT: the official outputs of all three kinds of heads, batches, types, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.openvla.tiny import OFT_PROPRIO, load_openvla, padded, random_openvla, tiny_inputs
from vla_pruner.errors import ObservationError
from vla_pruner.models.openvla.heads import (
    DDIM,
    NoisyActionProjector,
    action_head_from_state,
    find_heads,
    read_head,
)

TOLERANCE = {"rtol": 0, "atol": 1e-4}
KINDS = ["l1", "diffusion", None]


@pytest.fixture
def folder(golden):
    return golden / "openvla_oft_tiny"


@pytest.fixture
def expected(folder):
    return np.load(folder / "golden.npz")


def inputs_of(policy, expected, frame):
    images = [expected["full_crop224"][frame], expected["wrist_crop224"][frame]]
    return {
        "input_ids": torch.from_numpy(expected["input_ids"]),
        "attention_mask": torch.from_numpy(expected["attention_mask"]),
        "pixel_values": policy.processor.pixel_values(images),
        "proprio": expected["proprio_normalized"][frame],
    }


def recorded(policy, inputs, *modules, **options):
    """Calls (arguments, output) of each of `modules`, and the action, of one control step."""
    calls = {module: [] for module in modules}
    handles = [
        module.register_forward_hook(
            lambda module, args, kwargs, output: calls[module].append(((args, kwargs), output)), with_kwargs=True
        )
        for module in modules
    ]
    try:
        action = policy.predict_action(**inputs, **options)
    finally:
        for handle in handles:
            handle.remove()
    return [calls[module] for module in modules], action


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_every_stage_agrees_with_the_official_code(folder, expected, backend):
    policy = load_openvla(folder, attn_implementation=backend)
    assert (policy.cameras, policy.chunk, policy.action_dim) == (("image", "wrist_image"), 8, 7)
    decoder = policy.language_model.model
    modules = (policy.vision_backbone, policy.projector, policy.proprio_projector, decoder, decoder.layers[2])
    (vision, projector, proprio, final, layer), _ = recorded(policy, inputs_of(policy, expected, 0), *modules)
    np.testing.assert_allclose(vision[0][1][0], expected["vision_features_t0"], **TOLERANCE)
    np.testing.assert_allclose(projector[0][1][0], expected["projector_features"][0], **TOLERANCE)
    np.testing.assert_allclose(proprio[0][1][0], expected["proprio_features"][0], **TOLERANCE)
    (_, called), output = final[0]
    np.testing.assert_allclose(called["inputs_embeds"][0], expected["inputs_embeds_t0"], **TOLERANCE)
    np.testing.assert_allclose(output.last_hidden_state[0], expected["final_hidden_t0"], **TOLERANCE)
    hidden = layer[0][1]
    np.testing.assert_allclose(hidden.squeeze(0), expected["hidden_after_layer3_t0"], **TOLERANCE)
    assert called["attention_mask"].shape == (1, 1, 594, 594)


@pytest.mark.parametrize("frame", range(4))
def test_actions_agree_with_the_official_code(folder, expected, frame):
    policy = load_openvla(folder)
    inputs = inputs_of(policy, expected, frame)
    (head,), action = recorded(policy, inputs, policy.action_head)
    (hidden,), _ = head[0][0]
    np.testing.assert_allclose(hidden[0], expected["action_hidden_states"][frame], **TOLERANCE)
    np.testing.assert_allclose(head[0][1][0], expected["normalized_actions"][frame], **TOLERANCE)
    assert action.dtype == np.float64
    np.testing.assert_allclose(action, expected["actions"][frame], **TOLERANCE)
    policy.action_head = None
    np.testing.assert_array_equal(policy.predict_action(**inputs), expected["discrete_actions"][frame])


def test_rows_that_act_are_where_the_official_code_reads(folder, expected):
    policy = load_openvla(folder)
    start, stop = expected["action_slice"].tolist()
    rows = policy.action_rows(torch.from_numpy(expected["attention_mask"]))
    assert rows.tolist() == [list(range(start, stop))]
    sequence = torch.ones(1, int(expected["seq_len"]), dtype=torch.bool)
    assert policy.rows_in_sequence(sequence).tolist() == rows.tolist()
    padded_sequence = torch.cat([sequence, torch.zeros(1, 3, dtype=torch.bool)], dim=1)
    assert policy.rows_in_sequence(padded_sequence).tolist() == rows.tolist()
    assert policy.visual_slice == slice(1, 513)


def diffusion_policy(golden, steps=10, dtype=torch.float32):
    policy = load_openvla(golden / "openvla_oft_tiny", dtype=dtype)
    states = {n: read_head(file) for n, file in find_heads(golden / "openvla_oft_tiny_diffusion").items()}
    policy.action_head = action_head_from_state(states["action_head"]).to(dtype)
    policy.noisy_action_projector = NoisyActionProjector.from_state(states["noisy_action_projector"]).to(dtype)
    policy.ddim = DDIM(num_train_steps=50, num_inference_steps=steps)
    return policy


def test_diffusion_agrees_with_the_official_code(golden, expected):
    policy = diffusion_policy(golden)
    wanted = np.load(golden / "openvla_oft_tiny_diffusion" / "golden.npz")
    head = policy.action_head.noise_predictor.mlp_resnet
    decoder, noise = policy.language_model.model, torch.from_numpy(wanted["noise"])
    inputs = inputs_of(policy, expected, 0)
    modules = (head, decoder, policy.vision_backbone)
    (predictions, passes, vision), action = recorded(policy, inputs, *modules, noise=noise)
    np.testing.assert_allclose(torch.cat([p for _, p in predictions]), wanted["noise_pred_per_step"], **TOLERANCE)
    (_, called), _ = passes[-1]
    np.testing.assert_allclose(called["inputs_embeds"][0], wanted["inputs_embeds_last_step"], **TOLERANCE)
    # By the last pass rounding has grown ten times over, so the pass itself is checked on the official input.
    called["inputs_embeds"] = torch.from_numpy(wanted["inputs_embeds_last_step"])[None]
    with torch.no_grad():
        hidden = decoder(**called).last_hidden_state
    rows = policy.action_rows(inputs["attention_mask"])[0]
    np.testing.assert_allclose(hidden[0, rows], wanted["action_hidden_last_step"], **TOLERANCE)
    np.testing.assert_allclose(action, wanted["actions"], **TOLERANCE)
    assert (len(passes), len(vision)) == (10, 1)


def test_denoising_step_tells_which_pass_runs():
    policy = random_openvla(oft=True, head="diffusion", denoising_steps=3)
    seen = []
    handle = policy.language_model.model.register_forward_pre_hook(lambda *_: seen.append(policy.denoising_step))
    policy.predict_action(**tiny_inputs(policy))
    assert seen == [0, 1, 2]
    assert policy.denoising_step is None
    handle.remove()

    def fail(*_):
        raise RuntimeError("stop here")

    policy.language_model.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="stop here"):
        policy.predict_action(**tiny_inputs(policy))
    assert policy.denoising_step is None


def test_drawn_noise_follows_the_generator():
    policy = random_openvla(oft=True, head="diffusion")
    inputs = tiny_inputs(policy)
    torch.manual_seed(7)
    first, second = policy.predict_action(**inputs), policy.predict_action(**inputs)
    torch.manual_seed(7)
    noise = torch.randn(1, 8, 7)
    np.testing.assert_array_equal(first, policy.predict_action(**inputs, noise=noise))
    assert np.abs(first - second).max() > 1e-3


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("head", KINDS)
def test_batch_rows_equal_single_rows(head, side, backend):
    policy = random_openvla(oft=True, head=head, attn_implementation=backend, denoising_steps=2)
    rows = [
        tiny_inputs(policy, instruction, seed)
        for seed, instruction in enumerate(("pick up the red cup", "go", "open the drawer"))
    ]
    noise = torch.randn(3, 8, 7, generator=torch.Generator().manual_seed(0))
    extra = [{"noise": row[None]} if head == "diffusion" else {} for row in noise]
    single = [policy.predict_action(**row, **more) for row, more in zip(rows, extra, strict=True)]
    ids, mask = padded([row["input_ids"] for row in rows], side)
    found = policy.predict_action(
        ids,
        proprio=np.stack([row["proprio"] for row in rows]),
        pixel_values=torch.cat([row["pixel_values"] for row in rows]),
        attention_mask=mask,
        **({"noise": noise} if head == "diffusion" else {}),
    )
    assert found.shape == (3, 8, 7)
    np.testing.assert_allclose(found, np.stack(single), **TOLERANCE)
    assert np.abs(found[0] - found[1]).max() > 1e-3


@pytest.mark.parametrize("head", KINDS)
def test_backends_agree(head):
    found = []
    for backend in ("sdpa", "eager"):
        policy = random_openvla(oft=True, head=head, attn_implementation=backend, denoising_steps=2)
        torch.manual_seed(0)
        found.append(policy.predict_action(**tiny_inputs(policy)))
    np.testing.assert_allclose(found[0], found[1], **TOLERANCE)


def test_the_last_image_reaches_the_first_row_that_acts():
    # Attention goes both ways: the first row sees more than the positions before it.
    policy = random_openvla(oft=True)
    decoder = policy.language_model.model
    embeds = []
    handle = decoder.register_forward_pre_hook(lambda m, a, kwargs: embeds.append(kwargs), with_kwargs=True)
    policy.predict_action(**tiny_inputs(policy))
    handle.remove()
    changed = embeds[0]["inputs_embeds"].clone()
    changed[:, -1] += 1.0
    with torch.no_grad():
        before, after = (
            decoder(**{**embeds[0], "inputs_embeds": e}).last_hidden_state
            for e in (embeds[0]["inputs_embeds"], changed)
        )
    assert (before[:, 0] - after[:, 0]).abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", KINDS)
def test_half_precision_is_close_to_single(golden, expected, head, dtype):
    exact, half = (
        diffusion_policy(golden, steps=1, dtype=kind)
        if head == "diffusion"
        else load_openvla(golden / "openvla_oft_tiny", dtype=kind)
        for kind in (torch.float32, dtype)
    )
    noise = {"noise": torch.zeros(1, 8, 7)} if head == "diffusion" else {}
    decoders = [policy.language_model.model for policy in (exact, half)]
    results = [
        recorded(policy, inputs_of(policy, expected, 0), decoder, **noise)
        for policy, decoder in zip((exact, half), decoders, strict=True)
    ]
    hidden, actions = zip(*results, strict=True)
    single, low = (calls[0][0][1].last_hidden_state for calls in hidden)
    assert (single.dtype, low.dtype) == (torch.float32, dtype)
    assert (low.float() - single).abs().mean() < (0.05 if dtype is torch.bfloat16 else 0.01)
    assert all(action.shape == (8, 7) and np.isfinite(action).all() for action in actions)
    if head is not None:  # discrete actions have near ties
        assert np.abs(actions[0] - actions[1]).max() < (0.1 if dtype is torch.bfloat16 else 0.02)


@pytest.mark.parametrize("head", KINDS)
def test_the_policy_sees_every_camera(head):
    cameras = ("image", "left_wrist_image", "right_wrist_image")
    policy = random_openvla(oft=True, head=head, cameras=cameras, denoising_steps=2)
    assert policy.num_images_in_input == 3
    images = {camera: np.full((224, 224, 3), 100, np.uint8) for camera in policy.cameras}
    noise = []

    def act(observed):
        torch.manual_seed(0)
        return policy.act(observed, "go", proprio=OFT_PROPRIO)

    noise.append(act(images))
    for camera in policy.cameras:
        noise.append(act({**images, camera: np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)}))
        assert np.abs(noise[-1] - noise[0]).max() > 1e-3
    assert not np.allclose(noise[1], noise[2])


def test_a_step_calls_each_tower_once():
    policy = random_openvla(oft=True)
    modules = (*policy.vision_towers, policy.projector, policy.language_model, policy.language_model.model)
    calls, _ = recorded(policy, tiny_inputs(policy), *modules)
    assert [len(found) for found in calls] == [1] * 5
    assert (policy.proprio_size, random_openvla().proprio_size) == (8, None)


def test_act_normalises_the_state_and_predict_action_does_not(folder, expected):
    policy = load_openvla(folder)
    policy.processor.tokenizer = random_openvla().processor.tokenizer
    images = {"image": expected["full_crop224"][0], "wrist_image": expected["wrist_crop224"][0]}
    found = policy.act(images, "go", proprio=expected["state"][0])
    ids, mask = policy.processor.tokenize([policy.processor.prompt("go")])
    inputs = {**inputs_of(policy, expected, 0), "input_ids": ids, "attention_mask": mask}
    np.testing.assert_allclose(found, policy.predict_action(**inputs), rtol=0, atol=1e-12)
    policy.bounds = "minmax"
    assert not np.allclose(policy.act(images, "go", proprio=expected["state"][0]), found)


def test_wrong_arguments_are_refused():
    policy = random_openvla(oft=True)
    inputs = tiny_inputs(policy)
    # The official scripts pass the parts that they loaded beside the model: here they are inside.
    own = {"proprio_projector": policy.proprio_projector, "action_head": policy.action_head}
    np.testing.assert_array_equal(
        policy.predict_action(**inputs, **own, use_film=False, do_sample=False), policy.predict_action(**inputs)
    )
    with pytest.raises(ObservationError, match="action_head was given"):
        policy.predict_action(**inputs, action_head=torch.nn.Linear(1, 1))
    with pytest.raises(ObservationError, match="use_film"):
        policy.predict_action(**inputs, use_film=True)
    with pytest.raises(ObservationError, match="do_sample=True was given; nothing is sampled") as refusal:
        policy.predict_action(**inputs, do_sample=True)
    assert "film" not in str(refusal.value).lower()
    with pytest.raises(ObservationError, match="give proprio"):
        policy.predict_action(**{**inputs, "proprio": None})
    with pytest.raises(ObservationError, match=r"proprio must have the shape \(1, 8\); found \(1, 7\)"):
        policy.predict_action(**{**inputs, "proprio": np.zeros(7)})
    for wrong in ("state", [{}] * 8, {"eef": 1.0}):
        with pytest.raises(ObservationError, match=f"proprio is an array of numbers; found {type(wrong).__name__}"):
            policy.predict_action(**{**inputs, "proprio": wrong})
    images = {camera: np.zeros((224, 224, 3), np.uint8) for camera in policy.cameras}
    with pytest.raises(ObservationError, match="An array of numbers is needed; found str"):
        policy.act(images, "go", "state")
    with pytest.raises(ObservationError, match=r"a state of 8 dimensions; found an array of shape \(7,\)"):
        policy.act(images, "go", np.zeros(7))
    with pytest.raises(ObservationError, match="give proprio"):
        policy.act(images, "go")
    with pytest.raises(ObservationError, match="only a diffusion head"):
        policy.predict_action(**inputs, noise=torch.zeros(1, 8, 7))
    policy.norm_stats = {"short": {"action": {"q01": [0.0] * 6, "q99": [1.0] * 6}}}
    with pytest.raises(ObservationError, match="6 dimensions, the policy of 7"):
        policy.predict_action(**inputs)
    blind = random_openvla(oft=True, head="diffusion")
    with pytest.raises(ObservationError, match=r"noise must be a tensor of the shape \(1, 8, 7\); found \(8, 7\)"):
        blind.predict_action(**tiny_inputs(blind), noise=torch.zeros(8, 7))
    with pytest.raises(ObservationError, match="found ndarray"):
        blind.predict_action(**tiny_inputs(blind), noise=np.zeros((1, 8, 7)))
    blind.proprio_projector = None
    with pytest.raises(ObservationError, match="no proprio projector"):
        blind.predict_action(**tiny_inputs(blind))
