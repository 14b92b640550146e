"""OpenVLA folders from strangers: one that lies, is incomplete or could cost hours is one error that names the file."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import vla_pruner as vp
from tests.openvla.tiny import random_openvla, write_checkpoint
from vla_pruner.errors import CheckpointError, UnsupportedModelError, VLAPrunerError
from vla_pruner.models.openvla import OpenVLAForActionPrediction, OpenVLAOFT
from vla_pruner.models.openvla.tokenizer import StandInTokenizer

HEAD, PROJECTOR = "action_head--5_checkpoint.pt", "proprio_projector--5_checkpoint.pt"
NAN = float("nan")
JSON = {
    "endless": b"[" * 100_000,
    "deep": b'{"a":' * 300 + b"1" + b"}" * 300,
    "list": b"[]",
    "null": b"null",
    "latin": b'"\xe9"',
    "large": b" " * 2**26,
}
WRONG = [[NAN] * 7, [float("inf")] * 7, ["1"] * 7, [True] * 7, [[1]] * 7, [0] * 9, [], "x", None]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("oft") / "model", random_openvla(oft=True))


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def refused(folder, match, kind=CheckpointError, **options):
    with pytest.raises(kind, match=match) as refusal:
        vp.load_policy(folder, **options)
    assert str(folder) in str(refusal.value)
    assert len(str(refusal.value)) < 5000


def test_an_oft_folder_without_its_head_or_its_projector_has_to_be_named(folder):
    (folder / HEAD).rename(folder / "aside")
    refused(folder, r"proprio_projector--5_checkpoint\.pt, but no action_head--\*_checkpoint\.pt.*family='openvla_oft'")
    policy: Any = vp.load_policy(folder, family="openvla_oft")
    assert isinstance(policy, OpenVLAOFT)
    assert policy.action_head is None
    (folder / "aside").rename(folder / HEAD)
    (folder / PROJECTOR).unlink()
    refused(folder, r"action_head--5_checkpoint\.pt, but no proprio_projector--\*_checkpoint\.pt.*family='openvla_oft'")
    policy = vp.load_policy(folder, family="openvla_oft")
    assert policy.proprio_size is None


@pytest.mark.parametrize("sign", ["statistics", "code"])
def test_a_folder_without_heads_that_was_ofts_has_to_be_named(folder, sign):
    for file in (HEAD, PROJECTOR):
        (folder / file).unlink()
    if sign == "statistics":
        statistics = json.loads((folder / "dataset_statistics.json").read_text())
        (folder / "dataset_statistics.json").write_text(json.dumps({"libero_goal_no_noops": statistics["libero_tiny"]}))
    else:
        (folder / "modeling_prismatic.py").write_text("from constants import NUM_ACTIONS_CHUNK\nraise SystemExit\n")
    found = "statistics are of libero_goal_no_noops" if sign == "statistics" else r"modeling_prismatic\.py"
    refused(folder, rf"no action head and no proprio projector, as OpenVLA, but its {found}.*family='openvla'")
    assert type(vp.load_policy(folder, family="openvla")) is OpenVLAForActionPrediction
    assert type(vp.load_policy(folder, family="openvla_oft")) is OpenVLAOFT
    # OpenVLA itself is fine-tuned on LIBERO, too: its own code in the folder says so.
    (folder / "modeling_prismatic.py").write_text("class OpenVLAForActionPrediction: ...\n")
    assert type(vp.load_policy(folder)) is OpenVLAForActionPrediction


@pytest.mark.parametrize(
    "name",
    ["config.json", "model.safetensors", HEAD, "dataset_statistics.json", "tokenizer.json", "preprocessor_config.json"],
)
def test_pointers_of_git_lfs_are_known_in_every_file(folder, name):
    (folder / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(folder, rf"{name} is damaged \(it is a pointer of git LFS.*Run `git lfs pull`")


def test_a_peft_adapter_is_named_as_one(folder):
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "openvla/openvla-7b"}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    refused(folder, r"adapter_config\.json says .* PEFT adapter of openvla/openvla-7b.*merge_and_unload")
    (folder / "adapter_config.json").write_text("[" * 100_000)
    refused(folder, "PEFT adapter, not a whole")


@pytest.mark.parametrize("name", ["config.json", "dataset_statistics.json", "preprocessor_config.json"])
@pytest.mark.parametrize("content", JSON)
def test_json_that_is_none(folder, name, content):
    (folder / name).write_bytes(JSON[content])
    refused(folder, name)


def test_pipes_and_folders_in_place_of_files(folder):
    for name in ("preprocessor_config.json", HEAD, "model.safetensors", "config.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        refused(folder, name)
        (folder / name).unlink()
        (folder / name).mkdir()
        refused(folder, name)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_hidden_layers", 10**6),
        ("num_hidden_layers", -1),
        ("hidden_size", 2**31),
        ("hidden_size", "32"),
        ("intermediate_size", 2**23),
        ("vocab_size", 2**40),
        ("num_attention_heads", 0),
        ("num_key_value_heads", 7),
        ("head_dim", 0),
        ("hidden_act", "__import__('os')"),
        ("rope_theta", "x"),
        ("rope_scaling", {"type": "strange"}),
        ("rms_norm_eps", None),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
    ],
)
def test_a_language_model_that_cannot_be(folder, monkeypatch, name, value):
    built = []
    monkeypatch.setattr("vla_pruner.models.openvla.loading._read_weights", lambda *_: built.append(1))
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", text_config={**text, name: value})
    refused(folder, r"config\.json")
    assert not built


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_action_bins", -1),
        ("n_action_bins", 2**20),
        ("pad_to_multiple_of", 10**9),
        ("pad_token_id", "0"),
        ("text_config", [1]),
        ("timm_model_ids", {"a": 1}),
        ("image_sizes", ["x", "y"]),
        ("tiny_timm_args", {"tiny_dinov2": {"depth": 10**6}, "tiny_siglip": {}}),
        ("quantization_config", {"quant_method": "strange"}),
    ],
)
def test_settings_that_cannot_be(folder, name, value):
    change(folder / "config.json", **{name: value})
    refused(folder, r"config\.json")


def test_what_a_policy_does_not_read_changes_nothing(folder):
    """Kernels, code and labels that transformers would fetch, run, or make by the hundred million."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    change(
        folder / "config.json",
        num_labels=10**8,
        auto_map={"AutoConfig": "evil.C"},
        attn_implementation="kernels-community/evil",
        to_dict=1,
        text_config={**text, "_attn_implementation": "evil/evil:fn", "num_labels": 10**8, "tie_word_embeddings": True},
    )
    policy: Any = vp.load_policy(folder)
    assert policy.config.text_config._attn_implementation == "sdpa"
    assert len(policy.config.id2label) == 2
    lm_head, embedding = policy.language_model.lm_head.weight, policy.get_input_embeddings().weight
    assert lm_head.data_ptr() != embedding.data_ptr()


def spoilt(state, name, value):
    return {key: value(tensor) if name in key else tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda tensor: tensor.to("meta"), "device 'meta'"),
        (lambda tensor: tensor.to_sparse(), "sparse"),
        (lambda tensor: tensor.to(torch.int8), r"of torch\.int8"),
        (lambda tensor: tensor * NAN, "not finite"),
        (lambda tensor: torch.zeros(1, 1).expand(10**6, 10**6), "larger than what is stored"),
    ],
)
def test_heads_whose_tensors_are_no_weights(folder, value, found):
    state = torch.load(folder / HEAD, weights_only=True)
    torch.save(spoilt(state, "model.fc1.weight", value), folder / HEAD)
    refused(folder, rf"{HEAD} holds no usable weights: module\.model\.fc1\.weight .*{found}")


def test_heads_that_are_compressed_or_have_numbers_for_names(folder):
    torch.save({1: torch.ones(1)}, folder / HEAD)
    refused(folder, f"{HEAD} holds no weights by name")
    with zipfile.ZipFile(folder / HEAD, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    refused(folder, f"{HEAD} is damaged .*compressed")


class Command:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_a_pickle_is_not_run_and_nobody_is_told_to(folder, monkeypatch):
    monkeypatch.chdir(folder)
    torch.save({"module.model.fc1.weight": Command()}, folder / HEAD)
    with pytest.raises(CheckpointError, match=f"{HEAD} is damaged or holds more than weights, which") as refusal:
        vp.load_policy(folder)
    assert "weights_only" not in str(refusal.value)
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_weights_that_are_not_finite_are_refused_by_file(folder, value):
    weights = load_file(folder / "model.safetensors")
    weights["language_model.model.layers.2.self_attn.q_proj.weight"][1, 2] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"model\.safetensors hold numbers that are not finite.*layers\.2\.self_attn\.q_proj\.weight\.")


def test_weights_of_integers_are_no_weights(folder):
    weights = load_file(folder / "model.safetensors")
    weights["projector.fc1.weight"] = weights["projector.fc1.weight"].to(torch.int8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    refused(folder, r"projector\.fc1\.weight is not of floating point")


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a\0b", "a" * 5000, "", 1, None, "evil.bin", "model-2.safetensors"]
)
def test_an_index_that_leads_elsewhere(tmp_path, name):
    folder = write_checkpoint(tmp_path / "model", random_openvla(), shards=2)
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    first = next(iter(files))
    index.write_text(json.dumps({"weight_map": {**files, first: name}}))
    refused(folder, r"model\.safetensors\.index\.json")


def test_an_index_whose_metadata_is_none(tmp_path):
    folder = write_checkpoint(tmp_path / "model", random_openvla(), shards=2)
    change(folder / "model.safetensors.index.json", metadata=1.5)
    refused(folder, r"index\.json is damaged \(its metadata is 1\.5\)")


def test_an_index_that_mixes_up_its_files(tmp_path):
    folder = write_checkpoint(tmp_path / "model", random_openvla(), shards=2)
    index = folder / "model.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"]
    other = {"model-00001-of-00002.safetensors": "model-00002-of-00002.safetensors"}
    first = next(name for name, file in files.items() if file in other)
    index.write_text(json.dumps({"weight_map": {**files, first: other[files[first]]}}))
    refused(folder, r"index\.json is damaged \(it does not say where these weights are: ")


@pytest.mark.parametrize("part", ["action", "proprio"])
@pytest.mark.parametrize("value", WRONG)
def test_statistics_that_scale_nothing(folder, part, value):
    file = folder / "dataset_statistics.json"
    statistics = json.loads(file.read_text())
    statistics["libero_tiny"][part]["q01"] = value
    file.write_text(json.dumps(statistics))
    refused(folder, rf"dataset_statistics\.json has .*the {part} of 'libero_tiny'")


def test_no_statistics_and_statistics_without_a_name(tmp_path):
    folder = write_checkpoint(tmp_path / "model", random_openvla())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "norm_stats": {}}))
    refused(folder, r"has no statistics, .* dataset_statistics\.json is missing, which fine-tuning writes")
    (folder / "dataset_statistics.json").write_text(json.dumps(config["norm_stats"]["random"]))
    refused(
        folder, r"dataset_statistics\.json holds the statistics of one dataset without its name \(action, proprio\)"
    )
    policy: Any = random_openvla()
    policy.norm_stats = {}
    with pytest.raises(CheckpointError, match=r"policy has no statistics, .* dataset_statistics\.json is missing"):
        policy.act({"image": np.zeros((224, 224, 3), np.uint8)}, "go")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tvf_normalize_params", [{"mean": [0, 0, NAN], "std": [1, 1, 1]}] * 2),
        ("tvf_normalize_params", [{"mean": [0, 0, 0], "std": [0, 0, 0]}] * 2),
        ("tvf_normalize_params", "x"),
        ("tvf_resize_params", [1]),
        ("input_sizes", [[3, 10**9, 10**9]] * 2),
        ("input_sizes", 3),
    ],
)
def test_images_that_cannot_be_prepared(folder, name, value):
    change(folder / "preprocessor_config.json", **{name: value})
    with pytest.raises(VLAPrunerError):
        vp.load_policy(folder)
    if name == "input_sizes" and value != 3:
        resize = [{"size": value[0][1:]}] * 2
        change(folder / "preprocessor_config.json", tvf_resize_params=resize, tvf_crop_params=None)
        with pytest.raises(UnsupportedModelError, match=r"1000000000.*vision towers take 224 x 224"):
            vp.load_policy(folder)


def test_a_tokenizer_of_another_model(folder):
    policy: Any = vp.load_policy(folder)
    policy.processor.tokenizer = StandInTokenizer(300)
    policy.processor.tokenizer.bos_token_id = 40_000
    with pytest.raises(CheckpointError, match="tokenizer gives the id 40000, and the model has 32064 tokens"):
        policy.processor.tokenize(["go"])


@pytest.mark.parametrize("name", ["a" * 300 + "/b", "a\0/b", "~nobody-here/x", "a" * 5000, "../x", "https://evil/x"])
def test_names_that_are_none(name):
    with pytest.raises(CheckpointError, match="is no folder"):
        vp.load_policy(name)
