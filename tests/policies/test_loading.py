"""load_policy finds out the kind of a folder, and names the fault of one that it cannot load."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.models.chunk import save_chunk_policy
from vla_pruner.models.reference import save_policy
from vla_pruner.policies import reference
from vla_pruner.policies.base import Policy, module_of
from vla_pruner.policies.reference import policy_folder
from vla_pruner.policies.reference_names import NAMES


def saved_chunk(folder):
    """The folder, with a small two-camera policy in it."""
    save_chunk_policy(vp.random_policy("reference-chunk", seed=3), folder)  # type: ignore[arg-type]
    return folder


def write_config(folder, **values):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_the_name_reference_is_the_default_policy():
    assert reference.DEFAULT in reference.NAMES
    default, named = (vp.load_policy(text) for text in ("reference", f"reference:{reference.DEFAULT}"))
    assert type(default) is type(named) is type(vp.reference_policy())
    for one, other in zip(module_of(default).parameters(), module_of(named).parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_default_is_one_constant(monkeypatch, tmp_path):
    folder = saved_chunk(tmp_path / "weights" / "metaworld")
    monkeypatch.setattr("vla_pruner.models.chunk.loading.SHIPPED_WEIGHTS", folder.parent)
    monkeypatch.setattr(reference, "DEFAULT", "metaworld")
    policies = [vp.reference_policy(), vp.reference_policy("metaworld"), vp.load_policy("reference")]
    assert {type(policy).__name__ for policy in policies} == {"ChunkPolicy"}
    assert type(vp.load_policy("reference:autoregressive")).__name__ == "ReferencePolicy"


def test_the_autoregressive_policy_by_its_name():
    policy = vp.load_policy("reference:autoregressive", dtype=torch.float64)
    assert isinstance(policy, Policy)
    assert module_of(policy) is policy
    assert next(policy.parameters()).dtype == torch.float64  # type: ignore[attr-defined]
    assert policy.cameras == ("image",)
    assert policy.proprio_size == 4
    assert policy.vision_towers == (policy.vision,)  # type: ignore[attr-defined]


def test_a_saved_reference_policy(tmp_path):
    policy = vp.random_policy("reference", seed=3)
    save_policy(policy, tmp_path)  # type: ignore[arg-type]
    loaded = vp.load_policy(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    one, other = (p.act({"image": image}, p.instructions[0], np.zeros(4)) for p in (policy, loaded))  # type: ignore[attr-defined]
    np.testing.assert_array_equal(one, other)


def test_a_saved_two_camera_policy(tmp_path):
    policy: Any = vp.load_policy(saved_chunk(tmp_path))
    assert isinstance(policy, Policy)
    assert (policy.cameras, policy.proprio_size) == (("image", "wrist_image"), 4)
    assert type(vp.reference_policy(tmp_path)) is type(policy)
    draws = np.random.default_rng(0)
    images = {name: draws.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in policy.cameras}
    chunks = [
        one.act(images, policy.instructions[0], np.zeros(4)) for one in (policy, vp.reference_policy(str(tmp_path)))
    ]
    assert chunks[0].shape == (8, 4)
    np.testing.assert_array_equal(*chunks)


def test_reference_policies_that_are_not_there(tmp_path):
    assert all(policy_folder(name).is_dir() for name in NAMES)
    with pytest.raises(vp.CheckpointError, match="no reference policy 'libero'; give reference:metaworld or"):
        vp.load_policy("reference:libero")
    with pytest.raises(vp.CheckpointError, match="no reference policy ''; give"):
        vp.load_policy("reference:")
    with pytest.raises(vp.CheckpointError, match="no reference policy 'meta', and no folder of that name; give one of"):
        vp.reference_policy("meta")
    for nothing in (3, ""):
        with pytest.raises(vp.CheckpointError, match="reference_policy was given"):
            vp.reference_policy(nothing)  # type: ignore[arg-type]
    with pytest.raises(vp.UnsupportedModelError, match="not that of a reference policy"):
        vp.reference_policy(write_config(tmp_path, model_type="openvla"))


@pytest.mark.parametrize("kind", ["autoregressive", "chunk"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, kind, wrong):
    policy: Any = vp.random_policy("reference" if kind == "autoregressive" else "reference-chunk")
    with torch.no_grad():
        policy.projector[0].weight[0, 0] = wrong
    (save_policy if kind == "autoregressive" else save_chunk_policy)(policy, tmp_path)
    with pytest.raises(vp.CheckpointError, match=r"hold numbers that are not finite .*projector\.0\.weight"):
        vp.load_policy(tmp_path)


@pytest.mark.parametrize(
    "damage", ["cut", "missing", "config", "unknown", "type", "size", "cameras", "executed", "mismatch"]
)
def test_damaged_two_camera_policies(tmp_path, damage):
    tensors, config = saved_chunk(tmp_path) / "model.safetensors", tmp_path / "config.json"
    values = json.loads(config.read_text())
    bad = config
    if damage in ("cut", "missing", "mismatch"):
        bad = tensors
    if damage == "cut":
        tensors.write_bytes(tensors.read_bytes()[:1000])
    elif damage == "missing":
        tensors.unlink()
    elif damage == "config":
        config.write_text("{")
    else:
        change = {"unknown": {"colour": "red"}, "type": {"num_layers": "six"}, "size": {"patch_size": 16}}
        change |= {"cameras": {"cameras": ["image", "image"]}, "executed": {"executed": 9}}
        config.write_text(json.dumps({**values, **change.get(damage, {"intermediate_size": 96})}))
    with pytest.raises(vp.CheckpointError) as error:
        vp.load_policy(tmp_path)
    assert bad.name in str(error.value)
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", ["openvla_tiny", "openvla_oft_tiny", "transformers_pi0_tiny"])
def test_published_folders(golden, name):
    policy = vp.load_policy(golden / name)
    kind = {"openvla_tiny": "OpenVLAForActionPrediction", "openvla_oft_tiny": "OpenVLAOFT"}.get(name, "TransformersPI0")
    assert type(policy).__name__ == kind
    assert isinstance(policy, Policy)
    with vp.VLAPruner(keep=0.5, preset="paper").attach(policy):
        pass


def test_options_reach_the_family(golden):
    policy = vp.load_policy(golden / "transformers_pi0_tiny", cameras=("left", "right"), attn_implementation="eager")
    assert policy.cameras == ("left", "right")
    assert module_of(policy).config._attn_implementation == "eager"
    with pytest.raises(vp.OptionError, match=r"given turbo; for pi0 of transformers it takes cameras, attn_impl"):
        vp.load_policy(golden / "transformers_pi0_tiny", turbo=True)
    with pytest.raises(vp.OptionError, match=r"for OpenVLA it takes .*unnorm_key"):
        vp.load_policy(golden / "openvla_tiny", turbo=True)
    with pytest.raises(vp.OptionError, match="for the reference policy it takes no options"):
        vp.load_policy("reference", turbo=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "foo"}, "device='foo' was given, which torch cannot use here .*; there is 'cpu'"),
        ({"device": "cuda:99"}, "device='cuda:99' was given, which torch cannot use here"),
        ({"device": None}, "device='None' was given"),
        ({"dtype": "bf16"}, "dtype='bf16' was given; weights are one of 'float32', 'bfloat16', 'float16'"),
        ({"dtype": torch.int8}, "dtype=torch.int8 was given; weights are one of"),
    ],
)
@pytest.mark.parametrize("make", [vp.load_policy, vp.reference_policy, vp.random_policy])
def test_devices_and_dtypes_that_cannot_be(options, message, make):
    name = "metaworld" if make is vp.reference_policy else "reference"
    with pytest.raises(vp.OptionError, match=message):
        make(name, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none():
    with pytest.raises(vp.OptionError, match=r"device='cuda' was given, which torch cannot use here .*there is 'cpu'"):
        vp.load_policy("reference", device="cuda")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes_by_name(dtype):
    makes = (vp.load_policy, "reference:autoregressive"), (vp.reference_policy, "autoregressive")
    for make, name in (*makes, (vp.random_policy, "reference-chunk")):
        assert next(module_of(make(name, dtype=dtype)).parameters()).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("nothing", [None, "", 3])
def test_no_checkpoint_at_all(nothing):
    with pytest.raises(vp.CheckpointError, match="in place of a checkpoint; give its folder"):
        vp.load_policy(nothing)


@pytest.mark.parametrize("kind", ["pi0", "pi05", "smolvla"])
def test_lerobot_folders_go_to_lerobot(tmp_path, monkeypatch, kind):
    seen = []

    def load_lerobot(path, device="cpu", dtype=None):
        seen.append((path, device, dtype))

    monkeypatch.setattr("vla_pruner.policies.lerobot.load_lerobot", load_lerobot)
    vp.load_policy(write_config(tmp_path, type=kind), device="cpu", dtype=torch.bfloat16)
    assert seen == [(tmp_path, "cpu", torch.bfloat16)]


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ({"model_type": "whisper"}, "is of a model of type 'whisper'"),
        ({"type": "act"}, "is of a LeRobot policy of type 'act'"),
        ({"colour": "blue"}, "names no model"),
    ],
)
def test_other_folders_are_refused(tmp_path, values, found):
    with pytest.raises(vp.UnsupportedModelError, match=found) as refusal:
        vp.load_policy(write_config(tmp_path, **values))
    for family in ("OpenVLA-OFT", "pi0 of transformers", "'smolvla'", "'reference'"):
        assert family in str(refusal.value)


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "paligemma"])
def test_vision_language_models_have_no_act(tmp_path, kind):
    with pytest.raises(vp.UnsupportedModelError, match=f"type '{kind}', which has no act.*AutoModelForImageTextToText"):
        vp.load_policy(write_config(tmp_path, model_type=kind))


def test_damaged_folders(tmp_path):
    with pytest.raises(vp.CheckpointError, match=r"has no config\.json"):
        vp.load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(vp.CheckpointError, match="damaged"):
        vp.load_policy(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(vp.CheckpointError, match="no settings by name"):
        vp.load_policy(tmp_path)
    write_config(tmp_path, **vp.random_policy("reference").config.to_dict())
    with pytest.raises(vp.CheckpointError, match=r"model\.safetensors is missing"):
        vp.load_policy(tmp_path)
    with pytest.raises(vp.CheckpointError, match="no folder"):
        vp.load_policy(tmp_path / "nothing")


def test_lazy_names_stay_light():
    code = (
        "import sys, vla_pruner as vp; assert 'transformers' not in sys.modules; "
        "import vla_pruner.auditing.reference; assert callable(vp.audit); "
        "assert vp.load_policy and vp.random_policy and vp.reference_policy; vp.nothing"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert "has no attribute 'nothing'" in done.stderr, done.stderr
