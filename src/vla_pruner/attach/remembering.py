"""Which memory fits a session: an empty one for its method, and what is refused as another method's."""

from __future__ import annotations

from typing import Any

import torch

from vla_pruner.attach.layout import Layout
from vla_pruner.errors import SessionError
from vla_pruner.methods.base import Method
from vla_pruner.methods.memory import Memory
from vla_pruner.wording import a_type


def empty_memory(method: Method, layout: Layout, device: torch.device) -> Memory:
    """The memory of `method` at the start of the first episode of `layout`'s rows."""
    return Memory.empty(
        layout.rows,
        method.history,
        layout.tokens,
        device,
        semantic=method.remembers_semantic,
        motion=method.motion,
    )


def check_memory(memory: Any, method: Method) -> None:
    """Raise SessionError unless `memory`, which somebody set, is one of `method`."""
    if not isinstance(memory, Memory):
        raise SessionError(f"session.memory was set to {a_type(memory)}; set a Memory, or None.")
    if memory.holds_semantic != method.remembers_semantic:
        raise SessionError(
            "session.memory was set to one of a method that prunes at another layer: with layer=0 a memory holds "
            "semantic scores too, with others it does not."
        )
    if memory.window != method.history:
        raise SessionError(
            f"session.memory was set to one that holds {memory.window} control steps of scores, but this method's "
            f"holds {method.history}; it is another method's memory."
        )
    if memory.motion.shape[1] != method.motion:
        raise SessionError(
            f"session.memory was set to one that holds the motion of {memory.motion.shape[1]} control steps, but this "
            f"method reads that of {method.motion}; it is another method's memory."
        )
