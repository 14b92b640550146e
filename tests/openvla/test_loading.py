"""Checkpoint folders: every published layout loads, and every fault is one error that names it."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

from tests.openvla.tiny import load_openvla, random_openvla, tiny_inputs, weights_of, write_checkpoint
from vla_pruner.errors import CheckpointError, OptionError, UnsupportedModelError
from vla_pruner.models.openvla import (
    OpenVLAConfig,
    OpenVLAForActionPrediction,
    OpenVLAOFT,
)
from vla_pruner.models.openvla.configuration import DINO, SIGLIP, tower_sizes
from vla_pruner.models.openvla.heads import L1ActionHead, ProprioProjector


@pytest.fixture(scope="module")
def plain():
    return random_openvla()


@pytest.fixture(scope="module")
def oft():
    return random_openvla(oft=True)


def assert_same(policy, other, **options):
    inputs = {**tiny_inputs(other), **options}
    np.testing.assert_array_equal(policy.predict_action(**inputs), other.predict_action(**inputs))


@pytest.mark.parametrize("shards", [1, 3])
def test_one_file_and_shards_load_alike(plain, tmp_path, shards):
    policy = load_openvla(write_checkpoint(tmp_path / "model", plain, shards=shards))
    assert type(policy) is type(plain)
    assert not policy.training
    assert_same(policy, plain)
    assert policy.norm_stats == plain.norm_stats


def test_what_nobody_uses_is_not_loaded(plain, tmp_path):
    policy = load_openvla(write_checkpoint(tmp_path / "model", plain))
    assert set(policy.state_dict()) == set(plain.state_dict())
    assert [len(tower.blocks) for tower in policy.vision_towers] == [2, 2]


def test_save_pretrained_can_be_loaded_again(plain, tmp_path):
    folder = write_checkpoint(tmp_path / "model", plain)
    load_openvla(folder).save_pretrained(folder)
    assert_same(load_openvla(folder), plain)


def test_grouped_keys_and_values(tmp_path):
    grouped = random_openvla(num_key_value_heads=2)
    policy = load_openvla(write_checkpoint(tmp_path / "model", grouped))
    assert policy.language_model.model.layers[0].self_attn.k_proj.weight.shape == (16, 32)
    assert_same(policy, grouped)


@pytest.mark.parametrize("head", ["l1", "diffusion"])
@pytest.mark.parametrize("prefix", ["module.", ""])
def test_heads_with_and_without_the_prefix(tmp_path, head, prefix):
    original = random_openvla(oft=True, head=head, denoising_steps=2)
    folder = write_checkpoint(tmp_path / "model", original, prefix=prefix)
    policy = load_openvla(folder, **({"denoising_steps": 2} if head == "diffusion" else {}))
    assert isinstance(policy, OpenVLAOFT)
    assert (policy.chunk, policy.action_dim, policy.bounds) == (8, 7, "q99")
    assert policy.cameras == ("image", "wrist_image")
    # dataset_statistics.json replaces what config.json holds
    assert list(policy.norm_stats) == ["libero_tiny"]
    noise = {"noise": torch.zeros(1, 8, 7)} if head == "diffusion" else {}
    assert_same(policy, original, **noise)


def test_discrete_oft_is_named(tmp_path):
    original = random_openvla(oft=True, head=None, cameras=("image",))
    original.proprio_projector = None
    folder = write_checkpoint(tmp_path / "model", original)
    policy = load_openvla(folder, family="openvla_oft")
    assert isinstance(policy, OpenVLAOFT)
    assert_same(policy, original, proprio=None)
    assert not isinstance(load_openvla(folder), OpenVLAOFT)


def test_options_of_the_loader(oft, tmp_path):
    folder = write_checkpoint(tmp_path / "model", oft)
    policy = load_openvla(folder, cameras=("front",), chunk=3, unnorm_key="libero_tiny", dtype=torch.bfloat16)
    assert (policy.cameras, policy.chunk, policy.unnorm_key) == (("front",), 3, "libero_tiny")
    assert {weight.dtype for weight in policy.parameters()} == {torch.bfloat16}
    policy.processor = oft.processor
    assert policy.act({"front": np.zeros((224, 224, 3), np.uint8)}, "go", np.zeros(8)).shape == (3, 7)
    with pytest.raises(ValueError, match="unnorm_key='bridge' was given"):
        load_openvla(folder, unnorm_key="bridge")
    for cameras in ("front", (), ("a", "a"), ("a", "b", "c", "d")):
        with pytest.raises(CheckpointError, match="one to three different names"):
            load_openvla(folder, cameras=cameras)
    with pytest.raises(OptionError, match=r"denoising_steps=4 was given, .* no diffusion head"):
        load_openvla(folder, denoising_steps=4)
    for chunk in (0, -1, 2.5, True, "8"):
        with pytest.raises(OptionError, match=f"chunk={chunk!r} was given; .* int of 1 or more"):
            load_openvla(folder, chunk=chunk)
    with pytest.raises(UnsupportedModelError, match="'flash_attention_2' was given; 'sdpa' and 'eager' are supported"):
        load_openvla(folder, attn_implementation="flash_attention_2")
    with pytest.raises(UnsupportedModelError, match="'openvla' or 'openvla_oft'"):
        load_openvla(folder, family="pi0")
    other = write_checkpoint(tmp_path / "plain", random_openvla())
    with pytest.raises(OptionError, match="OpenVLA denoises nothing"):
        load_openvla(other, denoising_steps=4)
    for options in ({"chunk": 8}, {"cameras": ("a", "b")}):
        with pytest.raises(CheckpointError, match="so it is OpenVLA: one camera"):
            load_openvla(other, **options)
    with pytest.raises(CheckpointError, match="leave family out"):
        load_openvla(folder, family="openvla")


def test_denoising_steps(tmp_path):
    folder = write_checkpoint(tmp_path / "model", random_openvla(oft=True, head="diffusion"))
    assert len(load_openvla(folder).ddim.timesteps) == 50
    assert len(load_openvla(folder, denoising_steps=5).ddim.timesteps) == 5
    for wrong in (0, 51, 2.5):
        with pytest.raises(OptionError, match=f"from 1 to 50 inference steps .*; found {wrong}"):
            load_openvla(folder, denoising_steps=wrong)


def test_a_device_map_needs_accelerate(plain, tmp_path, monkeypatch):
    monkeypatch.setattr("vla_pruner.models.openvla.loading.find_spec", lambda name: None)
    with pytest.raises(
        UnsupportedModelError, match=r"device_map='auto' needs accelerate\. Run: pip install accelerate"
    ):
        load_openvla(write_checkpoint(tmp_path / "model", plain), device_map="auto")


def resized(policy, actions, proprio):
    """Return a policy whose heads have other sizes."""
    policy.action_head = L1ActionHead(policy.llm_dim, policy.llm_dim, actions)
    policy.proprio_projector = ProprioProjector(proprio, policy.llm_dim)
    return policy


@pytest.mark.parametrize(
    ("actions", "proprio", "chunk", "bounds", "cameras"),
    [(7, 8, 8, "q99", 2), (14, 14, 25, "minmax", 3), (7, 7, 5, "q99", 1)],
)
def test_official_platforms_are_known_by_their_sizes(tmp_path, actions, proprio, chunk, bounds, cameras):
    policy = load_openvla(write_checkpoint(tmp_path / "m", resized(random_openvla(oft=True), actions, proprio)))
    assert (policy.chunk, policy.action_dim, policy.bounds) == (chunk, actions, bounds)
    assert policy.num_images_in_input == cameras


def test_another_platform_needs_the_chunk(tmp_path):
    folder = write_checkpoint(tmp_path / "m", resized(random_openvla(oft=True), 9, 8))
    with pytest.raises(CheckpointError, match=r"actions of 9 numbers, states of 8 .* load_policy\(..., chunk=8\)"):
        load_openvla(folder)
    policy = load_openvla(folder, chunk=4)
    assert (policy.chunk, policy.action_dim, policy.cameras) == (4, 9, ("image",))


def test_missing_and_unexpected_weights_are_listed(plain, tmp_path):
    weights = weights_of(plain)
    for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
        for layer in range(6):
            del weights[f"language_model.model.layers.{layer}.self_attn.{part}.weight"]
    weights["vision_backbone.featurizer.blocks.0.ls1.gamma"] = torch.ones(48)
    with pytest.raises(CheckpointError) as caught:
        load_openvla(write_checkpoint(tmp_path / "model", plain, weights))
    message = str(caught.value)
    assert "24 missing: language_model.model.layers.0.self_attn.k_proj.weight" in message
    assert message.count("_proj.weight") == 20
    assert "and 4 more" in message
    assert "1 unexpected: vision_backbone.featurizer.blocks.0.ls1.gamma" in message


@pytest.mark.parametrize("name", ["projector.fc3.bias", "vision_backbone.fused_featurizer.pos_embed"])
def test_one_missing_weight_is_an_error(plain, tmp_path, name):
    weights = weights_of(plain)
    del weights[name]
    with pytest.raises(CheckpointError, match=f"1 missing: {name}. Download"):
        load_openvla(write_checkpoint(tmp_path / "model", plain, weights))


def test_weights_of_another_size_are_listed(plain, tmp_path):
    weights = weights_of(plain)
    weights["projector.fc3.weight"] = torch.ones(32, 31)
    with pytest.raises(CheckpointError, match=r"1 of another size: projector.fc3.weight \(32x31 instead of 32x32\)"):
        load_openvla(write_checkpoint(tmp_path / "model", plain, weights))


def test_film_is_recognised(plain, oft, tmp_path):
    weights = weights_of(plain)
    weights["vision_backbone.vision_backbone.featurizer.blocks.0.scale.weight"] = torch.ones(48, 32)
    with pytest.raises(UnsupportedModelError, match="trained with FiLM"):
        load_openvla(write_checkpoint(tmp_path / "keys", plain, weights))
    folder = write_checkpoint(tmp_path / "file", oft)
    torch.save({}, folder / "vision_backbone--5_checkpoint.pt")
    with pytest.raises(UnsupportedModelError, match=r"trained with FiLM.*vision_backbone--5_checkpoint.pt"):
        load_openvla(folder)


def test_damaged_files(oft, tmp_path):
    folder = write_checkpoint(tmp_path / "model", oft)
    head = folder / "action_head--5_checkpoint.pt"
    state = head.read_bytes()
    head.write_bytes(state[:1000])
    with pytest.raises(CheckpointError, match=r"action_head--5_checkpoint\.pt is damaged"):
        load_openvla(folder)
    head.write_bytes(state)
    torch.save({"module.fc1.weight": torch.ones(16, 8)}, folder / "proprio_projector--5_checkpoint.pt")
    with pytest.raises(CheckpointError, match="missing: "):
        load_openvla(folder)
    torch.save(ProprioProjector(8, 16).state_dict(), folder / "proprio_projector--5_checkpoint.pt")
    with pytest.raises(CheckpointError, match="language model of width 16; this one's is 32"):
        load_openvla(folder)
    (folder / "proprio_projector--5_checkpoint.pt").unlink()


def test_a_single_file_is_damaged_or_missing(plain, tmp_path):
    folder = write_checkpoint(tmp_path / "model", plain)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for end in (0, 4, 5000, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged \(.*\)\. Download"):
            load_openvla(folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged \(it is a pointer of git LFS"):
        load_openvla(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safetensors\.index\.json, so"):
        load_openvla(folder)


def test_shards_and_their_index(plain, tmp_path):
    folder = write_checkpoint(tmp_path / "model", plain, shards=3)
    shard, index = folder / "model-00002-of-00003.safetensors", folder / "model.safetensors.index.json"
    content, names = shard.read_bytes(), index.read_text()
    shard.write_bytes(content[:-100])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors is damaged"):
        load_openvla(folder)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"index\.json names files that are missing: model-00002-of-00003\.safe"):
        load_openvla(folder)
    shard.write_bytes(content)
    extra = folder / "model-00004-of-00004.safetensors"
    extra.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"does not name: model-00004-of-00004\.safetensors\. They"):
        load_openvla(folder)
    extra.rename(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"has both model\.safetensors and model\.safetensors\.index\.json"):
        load_openvla(folder)
    (folder / "model.safetensors").unlink()
    for damaged in ("{", "{}", "[]", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'):
        index.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json is damaged"):
            load_openvla(folder)
    index.unlink()
    with pytest.raises(CheckpointError, match=r"has model-00001.*, but model\.safetensors\.index\.json is miss"):
        load_openvla(folder)
    index.write_text(names)
    assert_same(load_openvla(folder), plain)


def test_a_vocabulary_of_another_size(plain, tmp_path):
    folder = write_checkpoint(tmp_path / "model", plain)
    config = json.loads((folder / "config.json").read_text())
    for size, message in (
        (32128, r"2 of another size: .*lm_head\.weight \(32064x32 instead of 32128x32\), .*embed_tokens\.weight"),
        (32000, r"config\.json has a vocabulary of 32000 tokens and pad_token_id 32000, which is none of them"),
    ):
        config["text_config"]["vocab_size"] = size
        (folder / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message):
            load_openvla(folder)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_a_half_precision_checkpoint_as_float32(tmp_path, kind):
    half = random_openvla(oft=True, dtype=kind)
    policy = load_openvla(write_checkpoint(tmp_path / "model", half), dtype=torch.float32)
    assert {weight.dtype for weight in policy.parameters()} == {torch.float32}
    for name, weight in half.state_dict().items():
        torch.testing.assert_close(policy.state_dict()[name], weight.float(), rtol=0, atol=0)
    expected = half.to(torch.float32)
    assert_same(policy, expected)


def test_heads_that_do_not_belong_together(tmp_path):
    folder = write_checkpoint(tmp_path / "model", random_openvla(oft=True, head="diffusion"))
    noisy = folder / "noisy_action_projector--5_checkpoint.pt"
    noisy.rename(folder / "aside.pt")
    with pytest.raises(CheckpointError, match="no noisy_action_projector"):
        load_openvla(folder)
    (folder / "aside.pt").rename(noisy)
    (folder / "action_head--5_checkpoint.pt").unlink()
    with pytest.raises(CheckpointError, match="no action_head of the diffusion kind"):
        load_openvla(folder)


def test_folders_that_are_none(plain, tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match="is no folder, nor a name on the Hugging Face hub"):
        load_openvla(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        load_openvla(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnsupportedModelError, match="type 'llama'; this loads 'openvla'"):
        load_openvla(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is damaged"):
        load_openvla(tmp_path)

    def offline(name, **_):
        raise LocalEntryNotFoundError("Cannot reach the hub\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        CheckpointError, match=r"could not be fetched .*\(Cannot reach the hub\). .*hf download open/vla"
    ):
        load_openvla("open/vla")
    folder = write_checkpoint(tmp_path / "fetched", plain)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: str(folder))
    assert_same(load_openvla("open/vla"), plain)


def test_without_a_tokenizer_only_act_fails(plain, tmp_path):
    policy = load_openvla(write_checkpoint(tmp_path / "model", plain))
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json .*pixel_values=policy\.processor\.pixel_values\(\["):
        policy.act({"image": np.zeros((224, 224, 3), np.uint8)}, "go")


def test_published_sizes():
    dino, siglip = tower_sizes(OpenVLAConfig())
    assert (dino.width + siglip.width, dino.patches, siglip.patches) == (2176, 256, 256)
    with torch.device("meta"):
        policy: Any = OpenVLAForActionPrediction(OpenVLAConfig())
    found = sum(weight.numel() for weight in policy.parameters())
    unused = sum(weight.numel() for tower in policy.vision_towers for weight in tower.blocks[0].parameters())
    unused += 2 * (dino.width + siglip.width)  # final norms
    width, hidden = siglip.width, siglip.mlp_width
    pool = [width, 4 * width**2, 4 * width, 2 * width, 2 * width * hidden, hidden + width]
    # The figure in the index of openvla/openvla-7b: 15082474368 bytes of bfloat16.
    assert 2 * (found + unused + sum(pool)) == 15082474368
    config = OpenVLAConfig(text_config={"model_type": "llama", "vocab_size": 32064, "pad_token_id": 32000})
    assert config.text_config.rms_norm_eps == 1e-6
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (32, 4096)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"timm_model_ids": [SIGLIP], "use_fused_vision_backbone": False}, "DINOv2 and SigLIP together"),
        ({"timm_model_ids": [DINO, "vit_so400m_patch14_siglip_384"]}, "'vit_so400m_patch14_siglip_384' is not known"),
        ({"image_sizes": [384, 384]}, r"images of \[384, 384\]"),
        ({"timm_override_act_layers": ["quick_gelu", None]}, "activations"),
        ({"text_config": {"model_type": "phi"}}, "'phi'; only 'llama'"),
    ],
)
def test_other_variants_are_refused(change, message):
    with pytest.raises(UnsupportedModelError, match=message):
        tower_sizes(OpenVLAConfig(**change))


def test_random_weights_have_the_published_names(plain, oft, golden):
    index = json.loads((golden / "openvla_oft_tiny" / "model.safetensors.index.json").read_text())
    assert set(weights_of(plain)) <= set(index["weight_map"])
    with pytest.raises(UnsupportedModelError, match="'tiny' or 'full'"):
        random_openvla(size="huge")
    with pytest.raises(UnsupportedModelError, match="'l1', 'diffusion' or None"):
        random_openvla(oft=True, head="flow")
    assert_same(random_openvla(oft=True), oft)
