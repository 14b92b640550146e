"""The environment of the policy, and combinations that are known not to work."""

from __future__ import annotations

import importlib
import platform
from importlib import metadata
from typing import Any

import torch

from vla_pruner.auditing.report import Check
from vla_pruner.auditing.share import describe_device
from vla_pruner.auditing.subject import Subject
from vla_pruner.versions import transformers_problem

PACKAGES = ("vla-pruner", "torch", "transformers", "tokenizers", "numpy", "torchvision", "lerobot")


def settings(subject: Subject) -> dict[str, Any]:
    """Return the settings on which the figures of this audit depend."""
    return {
        "python": platform.python_version(),
        **{name: version for name in PACKAGES if (version := installed(name)) is not None},
        "device": describe_device(subject.device),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "attention": subject.family.backend,
        "layers": subject.family.depth,
        "parameters": sum(parameter.numel() for parameter in subject.module.parameters()),
        "cameras": list(subject.policy.cameras),
        "seed": subject.seed,
    }


def environment(subject: Subject) -> Check:
    """No installed combination is known not to work."""
    problems = known_problems()
    shown = ("python", "torch", "transformers", "lerobot", "device", "dtype", "attention")
    found = settings(subject)
    figure = ", ".join(f"{name} {found[name]}" if name[0] != "d" else found[name] for name in shown if name in found)
    detail = "Versions, device, dtype and attention backend."
    if subject.family.backend == "eager":
        detail = (
            "Attention is eager: right, but slower than sdpa, pruned or not. Load with attn_implementation='sdpa' "
            "where the policy's library leaves the choice (LeRobot's does not)."
        )
    return Check("environment", not problems, figure, " ".join(problems) or detail)


def known_problems() -> list[str]:
    """Return a sentence with the fix for each known-bad combination that is installed."""
    problems = []
    untested = transformers_problem(installed("transformers") or "(of an unknown version)")
    if untested is not None:
        problems.append(f"{untested}.")
    vision = installed("torchvision")
    if vision is not None:
        try:
            importlib.import_module("torchvision")
        except (ImportError, RuntimeError, OSError) as error:
            problems.append(
                f"torchvision {vision} is installed but cannot be imported beside torch {torch.__version__} "
                f"({str(error).splitlines()[0]}), and transformers fails where it tries to. Nothing here needs it. "
                "Run: pip uninstall torchvision, or install the build that belongs to this torch."
            )
    return problems


def installed(name: str) -> str | None:
    """Return the version of an installed distribution."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
