"""Weights of the language model in 8 or 4 bits, through bitsandbytes or torchao where one is installed."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch

from vla_pruner.errors import UnsupportedModelError

KEPT = ("vision_backbone", "projector", "lm_head")
"""Modules that stay as they are: they are small, and features and logits are where rounding tells."""


def quantization_config(quantization: Any, device: torch.device) -> Any:
    """A quantization config of transformers.

    Args:
        quantization: "int8" or "int4", or such a config, which is returned as it is.
        device: bitsandbytes is preferred on CUDA, torchao elsewhere; the other one is taken where one is absent.

    Raises:
        UnsupportedModelError: the name is another one, or neither package is installed.
    """
    if not isinstance(quantization, str):
        return quantization
    if quantization not in ("int8", "int4"):
        raise UnsupportedModelError(
            f"quantization={quantization!r} was given; it is 'int8', 'int4' or a quantization config of transformers."
        )
    makers = {"bitsandbytes": _bitsandbytes, "torchao": _torchao}
    order = ("bitsandbytes", "torchao") if device.type == "cuda" else ("torchao", "bitsandbytes")
    for package in order:
        if find_spec(package) is not None:
            if find_spec("accelerate") is None:
                raise UnsupportedModelError("Quantized weights need accelerate. Run: pip install accelerate")
            return makers[package](quantization)
    raise UnsupportedModelError(
        f"quantization={quantization!r} needs bitsandbytes or torchao, and neither is installed. "
        "Run: pip install accelerate bitsandbytes (or torchao in its place)"
    )


def _bitsandbytes(bits: str) -> Any:
    from transformers import BitsAndBytesConfig

    if bits == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(KEPT))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=list(KEPT),
    )


def _torchao(bits: str) -> Any:
    from torchao.quantization import (  # pyright: ignore[reportMissingImports] optional
        Int4WeightOnlyConfig,
        Int8WeightOnlyConfig,
    )
    from transformers import TorchAoConfig

    scheme = Int8WeightOnlyConfig() if bits == "int8" else Int4WeightOnlyConfig()
    return TorchAoConfig(scheme, modules_to_not_convert=list(KEPT))
