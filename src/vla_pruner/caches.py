"""What transformers calls a model's key-value cache: "past_key_values" up to 5.23, and "cache" from 5.24 on, where the
old name warns. This file alone knows it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from vla_pruner.errors import UnsupportedModelError

NAMES = ("cache", "past_key_values")
"""As an argument and as an attribute of what is returned, the newest first."""


def cache_name(module: nn.Module) -> str:
    """What `module`, or a layer of a decoder, calls its cache.

    Raises:
        UnsupportedModelError: its `forward` takes none by a known name.
    """
    for kind in type(module).__mro__:
        # What accelerate or a session puts on the instance need not show the arguments.
        known = inspect.signature(vars(kind)["forward"]).parameters if "forward" in vars(kind) else ()
        for name in NAMES:
            if name in known:
                return name
    raise UnsupportedModelError(
        f"{type(module).__name__}.forward takes no key-value cache by the name of {' or '.join(NAMES)}, so what is "
        "attached could not find it; supported are the decoders of transformers as they are."
    )


def cache_in(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a call, by whichever name the caller used; None where there is none."""
    for name in NAMES:
        if arguments.get(name) is not None:
            return arguments[name]
    return None


def cache_of(output: Any) -> Any:
    """The cache that a decoder's call returned; None where it returned none."""
    for name in NAMES:
        # The first name that is there: asked for the old one, an output that has the new one warns.
        if hasattr(output, name):
            return getattr(output, name)
    return None
