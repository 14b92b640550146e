"""The whole state of a model: everything that a leftover could hide in."""

from __future__ import annotations

from typing import Any

from torch import nn


def whole_state(model: nn.Module) -> dict[str, Any]:
    """Return attributes, hooks, configs and registries of every module; two results are equal if nothing was left
    behind.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state: dict[str, Any] = {"attention functions": sorted(ALL_ATTENTION_FUNCTIONS)}
    shown: dict[int, str] = {}  # one config is held by many modules
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if key == "rope_deltas":
                continue  # kept by Qwen-VL itself, of the last prompt
            plain = dict(value) if isinstance(value, dict) else value
            state[f"{name}.{key}"] = (id(value), repr(plain) if "hook" in key else None)
        if hasattr(module, "config"):
            if id(module.config) not in shown:
                shown[id(module.config)] = repr(sorted(vars(module.config).items(), key=lambda item: item[0]))
            state[f"{name}.config values"] = shown[id(module.config)]
    return state
