"""The conditions of a benchmark."""

from __future__ import annotations

import subprocess
from typing import Any

import torch

from vla_pruner.accelerators import is_accelerator, name_of
from vla_pruner.anatomy import norm_of
from vla_pruner.benching.measure import STEPS_A_TURN, WARM_UP_ROUNDS
from vla_pruner.benching.subject import Subject
from vla_pruner.conditions import machine_conditions

_PACKAGES = ("vla-pruner", "torch", "transformers", "numpy", "lerobot", "triton")


def conditions_of(subject: Subject) -> dict[str, Any]:
    """Machine, device, driver, versions, dtype and attention backend; plain JSON values."""
    device, found = subject.device, machine_conditions(_PACKAGES)
    weight = norm_of(subject.family.decoder).weight
    found |= {
        "device": str(device),
        "device_name": found["processor"],
        "dtype": str(weight.dtype).removeprefix("torch."),
        "attention": subject.family.backend,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "steps_a_turn": STEPS_A_TURN,
        "warm_up_rounds": WARM_UP_ROUNDS,
    }
    if is_accelerator(device):
        found["device_name"] = name_of(device) or str(device)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device_memory": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": _driver(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return found


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0]
