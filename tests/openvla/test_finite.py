"""Numbers that are not finite are an error, never a full-scale action."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.openvla.tiny import OFT_PROPRIO, random_openvla, tiny_inputs
from vla_pruner.errors import CheckpointError, ObservationError
from vla_pruner.models.openvla import network
from vla_pruner.models.openvla.finite import check_inputs, most_likely

KINDS: dict[str, dict[str, Any]] = {
    "openvla": {},
    "l1": {"oft": True},
    "diffusion": {"oft": True, "head": "diffusion", "denoising_steps": 2},
    "discrete": {"oft": True, "head": None},
}
WRONG = [float("nan"), float("inf"), float("-inf")]


@pytest.fixture(params=KINDS)
def policy(request) -> Any:
    return random_openvla(**KINDS[request.param])


def last_matrix(policy):
    """Return the weights whose outputs the action is read from."""
    head = getattr(policy, "action_head", None)
    if head is None:
        return policy.language_model.lm_head
    return head.model.fc2 if hasattr(head, "model") else head.noise_predictor.mlp_resnet.fc2


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_images_are_named(policy, wrong):
    inputs = tiny_inputs(policy)
    inputs["pixel_values"][0, 2, 100, 50] = wrong
    with pytest.raises(ObservationError, match="pixel_values holds numbers that are not finite"):
        policy.predict_action(**inputs)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_raw_colours_are_no_pixel_values(policy, dtype):
    inputs = tiny_inputs(policy)
    raw = {**inputs, "pixel_values": (inputs["pixel_values"].abs() * 100).to(dtype)}
    with pytest.raises(ObservationError, match=rf"{dtype}, but .* floating point: .*processor\.pixel_values\(\[image"):
        policy.predict_action(**raw)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_states_are_named(wrong):
    policy = random_openvla(oft=True)
    inputs = tiny_inputs(policy)
    images = {camera: np.zeros((224, 224, 3), np.uint8) for camera in policy.cameras}
    state = OFT_PROPRIO.copy()
    state[3] = wrong
    with pytest.raises(ObservationError, match="proprio holds numbers that are not finite"):
        policy.predict_action(**{**inputs, "proprio": state})
    with pytest.raises(ObservationError, match="proprio holds numbers that are not finite"):
        policy.act(images, "go", state)


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_noise_is_named(wrong):
    policy = random_openvla(**KINDS["diffusion"])
    noise = torch.zeros(1, 8, 7)
    noise[0, 7, 6] = wrong
    with pytest.raises(ObservationError, match="noise holds numbers that are not finite"):
        policy.predict_action(**tiny_inputs(policy), noise=noise)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (torch.float32, "not finite .* in float32, though its inputs are finite, so there is no action. If weights"),
        (torch.float16, "in float16, .*overflows .* dtype=torch.bfloat16 or torch.float32"),
    ],
)
def test_a_network_that_overflows_is_told_with_its_dtype(policy, dtype, message):
    inputs = tiny_inputs(policy)
    policy.to(dtype)
    expected = policy.predict_action(**inputs)
    assert np.isfinite(expected).all()
    matrix = last_matrix(policy)
    with torch.no_grad():
        matrix.weight[5] = torch.finfo(dtype).max
    with pytest.raises(CheckpointError, match=message):
        policy.predict_action(**inputs)


def test_one_bad_row_of_a_batch_is_enough(policy):
    inputs = tiny_inputs(policy)
    pixels = inputs["pixel_values"].repeat(3, 1, 1, 1)
    pixels[1, 0, 0, 0] = float("nan")
    batch = {"input_ids": inputs["input_ids"].repeat(3, 1), "pixel_values": pixels}
    if "proprio" in inputs:
        batch["proprio"] = np.tile(OFT_PROPRIO, (3, 1))
    with pytest.raises(ObservationError, match="pixel_values holds"):
        policy.predict_action(**batch)


def test_only_a_later_token_is_wrong():
    policy = random_openvla()
    inputs = tiny_inputs(policy)
    calls = []

    def spoil(module, args, output):
        calls.append(module)
        if len(calls) == 5:
            output.logits[0, -1, 7] = float("nan")

    policy.language_model.register_forward_hook(spoil)
    with pytest.raises(CheckpointError, match="not finite"):
        policy.predict_action(**inputs)
    assert len(calls) == 7  # no wait for the tokens in between


def test_the_first_of_equals_is_taken_as_argmax_takes_it():
    logits = torch.tensor([[1.0, 3.0, 3.0], [float("-inf"), 0.0, 0.0], [float("-inf")] * 3, [0.0, float("nan"), 9.0]])
    tokens, found = most_likely(logits)
    assert tokens.tolist() == logits.argmax(dim=-1).tolist()
    assert found.tolist() == [1, 1, -1, -1]


def test_inputs_on_a_device_are_looked_at_when_the_action_comes(policy, monkeypatch):
    # Stands for a tensor on a GPU: the check beforehand, which would wait there, sees nothing.
    monkeypatch.setattr(network, "check_inputs", lambda **inputs: None)
    inputs = tiny_inputs(policy)
    inputs["pixel_values"][0, 2, 100, 50] = float("nan")
    with pytest.raises(ObservationError, match="pixel_values holds numbers that are not finite"):
        policy.predict_action(**inputs)
    with pytest.raises(ObservationError, match="pixel_values holds"):
        check_inputs(everywhere=True, proprio=None, pixel_values=inputs["pixel_values"])


def test_a_pruned_policy_goes_on_after_a_wrong_image(policy):
    inputs = tiny_inputs(policy)
    bad = {**inputs, "pixel_values": inputs["pixel_values"] * float("nan")}
    found = []
    for wrong in (True, False):
        torch.manual_seed(0)
        with vp.VLAPruner(keep=0.5, window=1, preset="paper").attach(policy) as session:
            policy.predict_action(**inputs)
            if wrong:
                with pytest.raises(ObservationError, match="pixel_values holds"):
                    policy.predict_action(**bad)
            found.append(policy.predict_action(**inputs))
            assert session.kept is not None  # the history is full, so the wrong image met a choice
    np.testing.assert_array_equal(*found)
