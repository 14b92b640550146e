"""Copies of a policy that share its weights, each compiled by itself: what tools need that compare compiled arms.

Compiled code lives as long as its session, so arms that take turns cannot share one policy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.front import compiled
from vla_pruner.methods import Method
from vla_pruner.policies.base import module_of
from vla_pruner.wording import a_type


def sharing_copy(policy: Any) -> Any:
    """Return a copy of a policy whose parameters and buffers are the original's own.

    Raises:
        UnsupportedModelError: some of them are made anew when the policy is copied.
    """
    module: nn.Module = module_of(policy)
    shared = {id(tensor): tensor for tensor in chain(module.parameters(), module.buffers())}
    copied = copy.deepcopy(module, dict(shared))  # objects in the memo are not copied
    held = chain(copied.named_parameters(), copied.named_buffers())
    own = [name for name, tensor in held if id(tensor) not in shared]
    if own:
        raise UnsupportedModelError(
            f"Each compiled arm needs {a_type(module)} of its own with the same weights, but a copy of it "
            f"makes {', '.join(own[:3])} anew; leave compile out."
        )
    if policy is module:
        return copied
    around = copy.copy(policy)
    around.module = copied
    return around


@contextmanager
def compiled_with(method: Method | None, policy: Any, backend: str, **family_options: Any) -> Iterator[Any]:
    """Compile a policy in place, with a method attached or as it is, until the block ends; yield its session, or None.

    Args:
        method: the method that is attached; None: none.
        policy: usually a `sharing_copy`.
        backend: as in `torch.compile`.
        **family_options: as in `Method.attach`.

    Raises:
        UnsupportedModelError: the policy, or the method's work in it, cannot be compiled.
        OptionError: torch has no such backend.
    """
    if method is None:
        with compiled(policy, backend, **family_options):
            yield None
        return
    with method.attach(policy, **family_options) as session:
        session.compile(backend)
        yield session


def graphs() -> int:
    """Return the number of graphs that torch compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
