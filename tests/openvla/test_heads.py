"""OFT's heads against the official outputs, and faulty head files."""

import shutil

import numpy as np
import pytest
import torch

from vla_pruner.errors import CheckpointError, OptionError
from vla_pruner.models.openvla import heads

OFT, DIFFUSION = "openvla_oft_tiny", "openvla_oft_tiny_diffusion"


def small_head():
    torch.manual_seed(0)
    return heads.L1ActionHead(input_dim=6, hidden_dim=10, action_dim=3)


def test_the_l1_head_gives_the_official_actions(golden):
    expected = np.load(golden / OFT / "golden.npz")
    head = heads.action_head_from_state(heads.read_head(heads.find_heads(golden / OFT)["action_head"]))
    assert isinstance(head, heads.L1ActionHead)
    assert (head.input_dim, head.action_dim) == (24, 7)
    with torch.no_grad():
        found = head(torch.from_numpy(expected["action_hidden_states"]))
    np.testing.assert_allclose(found, expected["normalized_actions"], rtol=0, atol=1e-5)


def test_the_proprio_projector_gives_the_official_token(golden):
    expected = np.load(golden / OFT / "golden.npz")
    path = heads.find_heads(golden / OFT)["proprio_projector"]
    projector = heads.ProprioProjector.from_state(heads.read_head(path))
    assert projector.proprio_dim == 8
    with torch.no_grad():
        found = projector(torch.from_numpy(expected["proprio_normalized"]).float())
    np.testing.assert_allclose(found, expected["proprio_features"], rtol=0, atol=1e-5)


def test_the_diffusion_head_gives_the_official_noise(golden):
    expected = np.load(golden / DIFFUSION / "golden.npz")
    head = heads.action_head_from_state(heads.read_head(heads.find_heads(golden / DIFFUSION)["action_head"]))
    assert isinstance(head, heads.DiffusionActionHead)
    with torch.no_grad():
        found = head.predict_noise(torch.from_numpy(expected["action_hidden_last_step"])[None])
    np.testing.assert_allclose(found[0], expected["noise_pred_per_step"][-1], rtol=0, atol=1e-5)


def test_ddim_turns_the_official_noise_into_the_official_actions(golden):
    expected = np.load(golden / DIFFUSION / "golden.npz")
    sampler = heads.DDIM(int(expected["num_train_steps"]), int(expected["num_inference_steps"]))
    np.testing.assert_array_equal(sampler.timesteps, expected["timesteps"])
    np.testing.assert_allclose(sampler.alphas_cumprod, expected["alphas_cumprod"], rtol=0, atol=1e-7)
    sample = torch.from_numpy(expected["noise"])
    for noise, timestep in zip(expected["noise_pred_per_step"], sampler.timesteps, strict=True):
        sample = sampler.step(torch.from_numpy(noise)[None], timestep, sample)
    np.testing.assert_allclose(sample[0], expected["normalized_actions"], rtol=0, atol=1e-6)


def test_the_tokens_of_timestep_and_noisy_actions_are_the_official_ones(golden):
    expected = np.load(golden / DIFFUSION / "golden.npz")
    paths = heads.find_heads(golden / DIFFUSION)
    head = heads.action_head_from_state(heads.read_head(paths["action_head"]))
    projector = heads.NoisyActionProjector.from_state(heads.read_head(paths["noisy_action_projector"]))
    assert isinstance(head, heads.DiffusionActionHead)
    embeds = expected["inputs_embeds_last_step"]
    np.testing.assert_allclose(head.time_encoding(0)[0], embeds[514], rtol=0, atol=1e-6)
    # The last step's noisy actions are not stored: they follow from all steps but one.
    sampler, sample = heads.DDIM(50, 10), torch.from_numpy(expected["noise"])
    for noise, timestep in zip(expected["noise_pred_per_step"][:-1], sampler.timesteps[:-1], strict=True):
        sample = sampler.step(torch.from_numpy(noise)[None], timestep, sample)
    with torch.no_grad():
        found = projector(sample.reshape(1, -1, 1))
    np.testing.assert_allclose(found[0], embeds[-57:-1], rtol=0, atol=1e-5)


def test_the_time_encoding_is_sines_then_cosines():
    head = heads.DiffusionActionHead(input_dim=6, hidden_dim=10, action_dim=3)
    found = head.time_encoding(torch.tensor([0, 45]))
    angles = 45.0 * np.array([1.0, 0.01, 0.0001])  # 10000 ** -(0, 1/2, 1)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found[0], [0, 0, 0, 1, 1, 1], atol=1e-7)
    np.testing.assert_allclose(found[1], np.concatenate([np.sin(angles), np.cos(angles)]), atol=1e-5)


def test_ddim_keeps_the_predicted_noise_where_the_clean_sample_was_clipped():
    sampler = heads.DDIM(50, 10)
    alpha, alpha_next = sampler.alphas_cumprod[20].item(), sampler.alphas_cumprod[15].item()
    sample, noise = torch.tensor([[[8.0]]]), torch.tensor([[[0.5]]])
    assert (8.0 - (1 - alpha) ** 0.5 * 0.5) / alpha**0.5 > 1.0
    found = sampler.step(noise, 20, sample).item()
    assert found == pytest.approx(alpha_next**0.5 + (1 - alpha_next) ** 0.5 * 0.5, abs=1e-6)
    assert sampler.step(noise, 0, torch.tensor([[[0.3]]])).abs() <= 1.0
    assert sampler.step(noise.bfloat16(), 20, sample.bfloat16()).dtype == torch.bfloat16


def test_ddim_takes_no_more_steps_than_it_was_trained_with():
    assert heads.DDIM(50, 50).timesteps.tolist() == list(range(49, -1, -1))
    assert heads.DDIM(50, 20).timesteps.tolist() == list(range(38, -1, -2))
    for steps in (0, 51):
        with pytest.raises(OptionError, match=f"from 1 to 50 inference steps .*; found {steps}"):
            heads.DDIM(50, steps)


def test_heads_put_the_hidden_states_of_one_action_side_by_side():
    head = small_head()
    hidden = torch.randn(2, 12, 6)
    found = head(hidden)
    assert found.shape == (2, 4, 3)
    torch.testing.assert_close(found[1, 2], head.model(hidden[1, 6:9].flatten()))


@pytest.mark.parametrize("shape", [(12, 6), (1, 11, 6), (1, 12, 7)])
def test_hidden_states_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"takes hidden states of shape \(B, chunk \* 3, 6\); found"):
        small_head()(torch.zeros(shape))


@pytest.mark.parametrize("kind", [heads.L1ActionHead, heads.DiffusionActionHead])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_sizes_and_kind_come_from_the_weights(tmp_path, kind, prefix):
    torch.manual_seed(0)
    head = kind(input_dim=5, hidden_dim=9, action_dim=4, blocks=3).bfloat16()
    path = tmp_path / "action_head--7_checkpoint.pt"
    torch.save({prefix + name: tensor for name, tensor in head.state_dict().items()}, path)
    found = heads.action_head_from_state(heads.read_head(path))
    assert type(found) is kind
    assert (found.input_dim, found.action_dim) == (5, 4)
    for name, tensor in head.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)
        assert found.state_dict()[name].dtype == torch.bfloat16


def test_missing_unexpected_and_misshapen_weights_are_listed():
    state = dict(small_head().state_dict())
    del state["model.fc2.bias"]
    state["model.layer_norm2.weight"] = torch.zeros(11)
    state["model.film.scale"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="do not make a L1ActionHead") as error:
        heads.action_head_from_state(state)
    message = str(error.value)
    assert "missing: model.fc2.bias" in message
    assert "unexpected: model.film.scale" in message
    assert "of another size: model.layer_norm2.weight (11,) instead of (10,)" in message


def test_a_head_of_another_kind_is_refused():
    with pytest.raises(
        CheckpointError, match=r"unknown kind: its weights are transformer\.w.*Supported are OFT's L1 head"
    ):
        heads.action_head_from_state({"transformer.w": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"lack the matrix fc1\.weight; they are none"):
        heads.ProprioProjector.from_state({})
    state = dict(small_head().state_dict())
    state["model.fc2.weight"] = torch.zeros(4, 10)
    with pytest.raises(CheckpointError, match="reads 18 numbers for an action of 4; it must be a multiple"):
        heads.L1ActionHead.from_state(state)


def test_files_that_are_no_heads_are_one_sentence(tmp_path):
    path = tmp_path / "action_head--1_checkpoint.pt"
    with pytest.raises(CheckpointError, match=r"action_head--1_checkpoint\.pt is missing"):
        heads.read_head(path)
    torch.save(small_head().state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", b"no weights", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged or holds more than weights") as error:
            heads.read_head(path)
        assert "\n" not in str(error.value)
    torch.save({"step": 3}, path)
    with pytest.raises(CheckpointError, match="holds no weights by name but dict"):
        heads.read_head(path)
    torch.save({"model": heads.L1ActionHead(2, 2, 1)}, path)
    with pytest.raises(CheckpointError, match="is damaged or holds more than weights"):
        heads.read_head(path)


def test_the_folder_names_its_heads_and_two_of_a_kind_are_refused(tmp_path, golden):
    assert set(heads.find_heads(golden / OFT)) == {"action_head", "proprio_projector"}
    assert set(heads.find_heads(golden / DIFFUSION)) == {"action_head", "noisy_action_projector"}
    assert heads.find_heads(tmp_path) == {}
    source = heads.find_heads(golden / OFT)["action_head"]
    for step in ("100", "latest"):
        shutil.copy(source, tmp_path / f"action_head--{step}_checkpoint.pt")
    with pytest.raises(
        CheckpointError, match=r"2 files for the action_head: .*--100_checkpoint\.pt, .*--latest_checkpoint"
    ):
        heads.find_heads(tmp_path)
