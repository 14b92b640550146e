"""Quantized language models and models placed by accelerate: the tests of `make test-quantization`."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from tests.openvla.tiny import load_openvla, random_openvla, tiny_inputs, write_checkpoint
from vla_pruner.errors import UnsupportedModelError
from vla_pruner.models.openvla.quantization import quantization_config

needs_accelerate = pytest.mark.skipif(find_spec("accelerate") is None, reason="accelerate is not installed")


def test_quantization_needs_a_package(monkeypatch):
    arguments = (torch.device("cpu"), torch.float32)
    config = object()
    assert quantization_config(config, *arguments) is config
    with pytest.raises(UnsupportedModelError, match="'int8', 'int4' or"):
        quantization_config("fp8", *arguments)
    monkeypatch.setattr("vla_pruner.models.openvla.quantization.find_spec", lambda name: None)
    for bits in ("int8", "int4"):
        with pytest.raises(UnsupportedModelError, match="pip install accelerate bitsandbytes"):
            quantization_config(bits, *arguments)
    found = {"bitsandbytes": True}
    monkeypatch.setattr("vla_pruner.models.openvla.quantization.find_spec", lambda name: found.get(name))
    with pytest.raises(UnsupportedModelError, match="need accelerate"):
        quantization_config("int8", *arguments)


@needs_accelerate
@pytest.mark.parametrize(
    "device_map", ["cpu", {"": "cpu"}, {"vision_backbone": "cpu", "projector": "cpu", "language_model": "cpu"}]
)
def test_device_map(tmp_path, device_map):
    plain = random_openvla()
    policy = load_openvla(write_checkpoint(tmp_path / "model", plain), device_map=device_map, dtype=torch.float32)
    inputs = tiny_inputs(plain)
    np.testing.assert_array_equal(policy.predict_action(**inputs), plain.predict_action(**inputs))


@needs_accelerate
@pytest.mark.filterwarnings("ignore")  # of packages that are not pinned here
@pytest.mark.parametrize(
    ("bits", "package", "limit"),
    [("int8", "torchao", 0.05), ("int8", "bitsandbytes", 0.1), ("int4", "bitsandbytes", 0.6)],
)
def test_quantized_language_model(tmp_path, monkeypatch, bits, package, limit):
    pytest.importorskip(package)
    exact = random_openvla(hidden_size=128, intermediate_size=256)
    folder = write_checkpoint(tmp_path / "model", exact)
    installed = {package, "accelerate"}
    monkeypatch.setattr("vla_pruner.models.openvla.quantization.find_spec", lambda name: name in installed or None)
    policy = load_openvla(folder, quantization=bits)
    layer, reference = (p.language_model.model.layers[0].mlp.up_proj for p in (policy, exact))
    assert type(layer.weight) is not type(reference.weight)
    for module in (policy.vision_towers[0].blocks[0].mlp.fc1, policy.projector.fc1, policy.language_model.lm_head):
        assert type(module.weight) is torch.nn.Parameter
        assert type(module) is torch.nn.Linear
    inputs = tiny_inputs(exact)
    with torch.no_grad():
        expected, found = (p(**inputs).logits[0, -1].float() for p in (exact, policy))
    assert 0 < (found - expected).abs().max() < limit * expected.abs().max()
    assert policy.predict_action(**inputs).shape == (7,)
