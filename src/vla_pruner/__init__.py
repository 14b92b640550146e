"""Faster vision-language-action policies: compute only the visual tokens that a control step needs (arXiv 2511.16449).

```python
import vla_pruner as vp

with vp.VLAPruner(keep=0.25).attach(policy) as session:
    session.reset()  # a new episode
    policy.predict_action(...)  # the model's own call, unchanged
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from vla_pruner.errors import (
    BudgetError,
    CheckpointError,
    ObservationError,
    OptionError,
    PluginError,
    SessionError,
    UnsupportedModelError,
    VLAPrunerError,
)

if TYPE_CHECKING:
    from vla_pruner.attach.attached import detach
    from vla_pruner.attach.session import Session
    from vla_pruner.auditing import audit
    from vla_pruner.benching import bench
    from vla_pruner.benching.explain import explain
    from vla_pruner.front import compiled
    from vla_pruner.methods import (
        DART,
        ActionAndDiversity,
        ActionOnly,
        CDPruner,
        DivPrune,
        EncoderReuse,
        Evidence,
        FastV,
        KeepFixed,
        MaxMinDiversity,
        Memory,
        Method,
        RandomKeep,
        Scored,
        ScoreFusion,
        SemanticOnly,
        SparseVLM,
        TextQuery,
        Unpruned,
        VLACache,
        VLAPruner,
    )
    from vla_pruner.policies.loading import load_policy
    from vla_pruner.policies.random import random_policy
    from vla_pruner.policies.reference import reference_policy

__version__ = "0.1.0"

__all__ = [
    "DART",
    "ActionAndDiversity",
    "ActionOnly",
    "BudgetError",
    "CDPruner",
    "CheckpointError",
    "DivPrune",
    "EncoderReuse",
    "Evidence",
    "FastV",
    "KeepFixed",
    "MaxMinDiversity",
    "Memory",
    "Method",
    "ObservationError",
    "OptionError",
    "PluginError",
    "RandomKeep",
    "ScoreFusion",
    "Scored",
    "SemanticOnly",
    "Session",
    "SessionError",
    "SparseVLM",
    "TextQuery",
    "Unpruned",
    "UnsupportedModelError",
    "VLACache",
    "VLAPruner",
    "VLAPrunerError",
    "audit",
    "bench",
    "compiled",
    "detach",
    "explain",
    "load_policy",
    "random_policy",
    "reference_policy",
]

# The names are imported when they are asked for: users of `vla_pruner.client` alone need no torch, and those who only
# attach need no simulator and no checkpoint's libraries.
_LAZY = {
    **dict.fromkeys(
        (
            "ActionAndDiversity",
            "ActionOnly",
            "CDPruner",
            "DART",
            "DivPrune",
            "EncoderReuse",
            "Evidence",
            "FastV",
            "KeepFixed",
            "MaxMinDiversity",
            "Memory",
            "Method",
            "RandomKeep",
            "ScoreFusion",
            "Scored",
            "SemanticOnly",
            "SparseVLM",
            "TextQuery",
            "Unpruned",
            "VLACache",
            "VLAPruner",
        ),
        "vla_pruner.methods",
    ),
    "Session": "vla_pruner.attach.session",
    "audit": "vla_pruner.auditing",
    "bench": "vla_pruner.benching",
    "compiled": "vla_pruner.front",
    "detach": "vla_pruner.attach.attached",
    "explain": "vla_pruner.benching.explain",
    "load_policy": "vla_pruner.policies.loading",
    "random_policy": "vla_pruner.policies.random",
    "reference_policy": "vla_pruner.policies.reference",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'vla_pruner' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
