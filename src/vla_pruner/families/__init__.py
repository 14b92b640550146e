"""One file per model family: where things are. Nothing here knows a method.

A family is found by looking at the model; no library is imported for a family that is not in use.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from torch import nn

from vla_pruner.attach.family import Family
from vla_pruner.errors import BudgetError, UnsupportedModelError

FAMILIES = (
    ("vla_pruner.families.chunk", "Chunk"),
    ("vla_pruner.families.reference", "Reference"),
    ("vla_pruner.families.openvla", "OpenVLAOFT"),
    ("vla_pruner.families.openvla", "OpenVLA"),
    ("vla_pruner.families.pi0", "PI0"),
    ("vla_pruner.families.lerobot_pi", "LeRobotPi"),
    ("vla_pruner.families.smolvla", "SmolVLA"),
    ("vla_pruner.families.decoder_lm", "DecoderLM"),
)
"""Module and class of every family, the more special ones first."""


def family_of(model: Any, **options: Any) -> Family:
    """The family adapter for `model`: a module, or a policy whose `module` is one.

    Raises:
        UnsupportedModelError: no family knows this model, or this version or attention backend of it.
        BudgetError: the options are not those of the family.
    """
    named: Any = None
    if not isinstance(model, nn.Module) and isinstance(getattr(model, "module", None), nn.Module):
        model, named = model.module, getattr(model, "cameras", None)
    for module, name in FAMILIES:
        family: Any = getattr(import_module(module), name)
        if family.matches(model):
            known = list(inspect.signature(family.__init__).parameters)[2:]
            unknown = [option for option in options if option not in known]
            if unknown:
                raise BudgetError(
                    f"attach was given {', '.join(unknown)}; for {type(model).__name__} it takes "
                    f"{', '.join(known) or 'no options'}."
                )
            if named is not None and "cameras" in known:
                options = {"cameras": named, **options}
            return family(model, **options)
    raise UnsupportedModelError(
        f"{type(model).__module__}.{type(model).__name__} was given; supported are OpenVLA and OpenVLA-OFT as "
        "vla_pruner.load_policy loads them, PI0ForConditionalGeneration of transformers, LeRobot's PI0Policy, "
        "PI05Policy and SmolVLAPolicy, vla_pruner.reference_policy(), and transformers' decoder-only language models. "
        "A policy inside of DataParallel or torch.compile is attached to itself (its .module), before it is compiled. "
        "See CONTRIBUTING.md on how a family is added."
    )
