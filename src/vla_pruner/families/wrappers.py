"""Third-party wrappers (PEFT, data parallelism, torch.compile): sessions attach to the model inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from vla_pruner.errors import UnsupportedModelError

_PARALLEL = ("DistributedDataParallel", "FullyShardedDataParallel")
_ADAPTED = ("PeftModel", "PeftMixedModel")
_TOKENS = "puts tokens of its own into the prompt, so that visual tokens are not where the model's family says"
_PLACES = (
    "acts from a place in the sequence on, counted from its end, which is another place once visual tokens are gone"
)
_TWICE = "runs the model twice for each call, and its first run would be a control step of its own"


def unwrapped(model: Any) -> Any:
    """The model inside of a PeftModel, DistributedDataParallel, FullyShardedDataParallel or compiled module, or of
    several of these; anything else as it is. The wrapper's own calls then run the attached session.

    Raises:
        UnsupportedModelError: hooks on the model inside would not run, or not see the prompt that the wrapper makes;
            the message names the module to attach to instead.
    """
    while isinstance(model, nn.Module):
        inner = _inside(model)
        if inner is None:
            break
        model = inner
    return model


def is_compiled(model: Any) -> bool:
    """Return True if one of the wrappers around the model inside is a module that torch.compile made."""
    while isinstance(model, nn.Module):
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            return True
        inner = _inside(model)
        if inner is None:
            break
        model = inner
    return False


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the module inside one wrapper; None: it is no wrapper."""
    names = [kind.__name__ for kind in type(model).__mro__]
    if "OptimizedModule" in names:
        return getattr(model, "_orig_mod", None)
    if any(name in _ADAPTED for name in names):
        return _adapted(model)
    if any(name in _PARALLEL for name in names):
        inner: Any = model.module
        parts = [type(part).__name__ for part in inner.modules()] if isinstance(inner, nn.Module) else []
        if _PARALLEL[1] in parts:
            raise UnsupportedModelError(
                f"{type(model).__name__} holds parts that are sharded one by one, whose weights are there only while "
                "each runs; wrap the model as a whole, or attach to a copy that is not sharded."
            )
        return inner
    return None


def _adapted(model: Any) -> nn.Module | None:
    """Return the base model of a PeftModel or a PeftMixedModel; None: it has the name alone.

    Raises:
        UnsupportedModelError: the adapter does more than change weights in the same layers.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        does = _more_than_weights(config)
        if does is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} has the adapter {name!r} ({type(config).__name__}), which {does}. Supported "
                "are adapters of weights, such as LoRA; for the model without this one load the base model by itself."
            )
    inner = getattr(getattr(model, "base_model", None), "model", None)
    return inner if isinstance(inner, nn.Module) else None


def _more_than_weights(config: Any) -> str | None:
    """Return what an adapter does besides changing weights; None: nothing."""
    if getattr(config, "is_prompt_learning", False) or getattr(config, "is_adaption_prompt", False):
        return _TOKENS
    if getattr(config, "alora_invocation_tokens", None):
        return _PLACES
    return _TWICE if getattr(config, "peft_type", None) == "XLORA" else None
