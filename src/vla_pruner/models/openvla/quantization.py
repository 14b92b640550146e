"""Weights of the language model in 8 or 4 bits, through bitsandbytes or torchao if one is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from vla_pruner.errors import UnsupportedModelError

KEPT = ("vision_backbone", "projector", "lm_head", "language_model.lm_head")
"""The modules that stay as they are: they are small, and rounding matters most for features and logits."""
INSTALL = {
    "accelerate": "pip install accelerate",
    "int8": "pip install accelerate bitsandbytes (or torchao in its place)",
    "int4": "pip install accelerate bitsandbytes",
}


def quantization_config(quantization: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Return a quantization config of transformers.

    Args:
        quantization: "int8" or "int4", or such a config, which is returned as it is. Eight bits are bitsandbytes' on
            CUDA and torchao's elsewhere, or the other's if one is absent. Four bits are bitsandbytes' (nf4), or
            torchao's if mslk, which holds its kernels, is installed too.
        device: the policy's device.
        dtype: the dtype of the computation.

    Raises:
        UnsupportedModelError: the name is another one, or no package for it is installed.
    """
    if not isinstance(quantization, str):
        return quantization
    if quantization not in ("int8", "int4"):
        raise UnsupportedModelError(
            f"quantization={quantization!r} was given; it is 'int8', 'int4' or a quantization config of transformers."
        )
    has = {name: find_spec(name) is not None for name in ("bitsandbytes", "torchao", "mslk", "accelerate")}
    if quantization == "int4":
        has["torchao"] = has["torchao"] and has["mslk"]
    if not has["bitsandbytes"] and not has["torchao"]:
        raise UnsupportedModelError(
            f"quantization={quantization!r} needs a package that is not installed. Run: {INSTALL[quantization]}"
        )
    if not has["accelerate"]:
        raise UnsupportedModelError(f"Quantized weights need accelerate. Run: {INSTALL['accelerate']}")
    torchao_first = quantization == "int8" and device.type != "cuda"
    if has["torchao"] and (torchao_first or not has["bitsandbytes"]):
        return _torchao(quantization)
    return _bitsandbytes(quantization, dtype)


def _bitsandbytes(bits: str, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype, llm_int8_skip_modules=list(KEPT)
    )


def _torchao(bits: str) -> Any:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports] optional
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )
    from transformers import TorchAoConfig

    scheme = Int8WeightOnlyConfig() if bits == "int8" else Int4WeightOnlyConfig()
    return TorchAoConfig(scheme, modules_to_not_convert=list(KEPT))
