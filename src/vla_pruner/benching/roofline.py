"""The device at its best, measured beside the benchmark, and the least time that a control step can take."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from vla_pruner.accelerators import is_accelerator, name_of, now
from vla_pruner.benching.subject import Subject
from vla_pruner.fate import Fate
from vla_pruner.methods import EncoderReuse

DATA_SHEETS: dict[str, tuple[float, float]] = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H100": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100": (312e12, 1.555e12),
    "L40S": (362e12, 0.864e12),
    "RTX 4090": (165e12, 1.008e12),
}
"""NVIDIA's figures by a part of the GPU's name, the more special first: dense bfloat16 FLOP/s, bytes of memory/s."""


@dataclass(frozen=True)
class Peaks:
    """The device at its best.

    Attributes:
        flops: FLOP/s of a large square matrix product in the benchmark's dtype.
        bandwidth: bytes/s read and written by a copy that fits into no cache.
        data_sheet: the vendor's figures (bfloat16, dense); None if they are not known.
    """

    flops: float
    bandwidth: float
    data_sheet: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`."""
        sheet = None
        if self.data_sheet is not None:
            sheet = {"bfloat16_flops": self.data_sheet[0], "bandwidth": self.data_sheet[1]}
        return {"measured_flops": self.flops, "measured_bandwidth": self.bandwidth, "data_sheet": sheet}


def measure_peaks(device: torch.device, dtype: torch.dtype) -> Peaks:
    """Run a short product and a short copy on the device, and take the best of several."""
    on_gpu = is_accelerator(device)
    side, size, repeats = (8192, 1 << 30, 10) if on_gpu else (1024, 1 << 27, 5)
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    seconds = _best(lambda: torch.mm(matrix, matrix), device, repeats)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copied = _best(lambda: target.copy_(source), device, repeats)
    sheet = data_sheet(name_of(device) or "") if on_gpu else None
    return Peaks(2 * side**3 / seconds, 2 * size / copied, sheet)


def data_sheet(name: str) -> tuple[float, float] | None:
    """Return the vendor's figures for a GPU of this name; None if they are not known."""
    return next((figures for part, figures in DATA_SHEETS.items() if part in name), None)


def _best(call: Any, device: torch.device, repeats: int) -> float:
    """Return the seconds of the fastest of several calls."""
    call()
    taken = []
    for _ in range(repeats):
        start = now(device)
        call()
        taken.append(now(device) - start)
    return min(taken)


@dataclass(frozen=True)
class Work:
    """The least work of a control step.

    Attributes:
        flops: by stage, of all rows.
        bytes: by stage, weights and cache.
    """

    flops: dict[str, float]
    bytes: dict[str, float]

    def milliseconds(self, peaks: Peaks) -> dict[str, float]:
        """Return the least time of each stage: computing or reading, whichever takes longer."""
        return {
            stage: 1e3 * max(flops / peaks.flops, self.bytes.get(stage, 0.0) / peaks.bandwidth)
            for stage, flops in self.flops.items()
        }

    def bound_by_reading(self, stage: str, peaks: Peaks) -> bool:
        """Return True if the stage waits for memory."""
        return self.bytes.get(stage, 0.0) / peaks.bandwidth > self.flops[stage] / peaks.flops


def least_work(
    subject: Subject,
    kept: int | None,
    layer: int,
    pruned: str,
    counted_vision: float | None = None,
    encoder: EncoderReuse | None = None,
) -> Work:
    """Return the least work of one control step, by the formulas of `cost`.

    Args:
        subject: the one that runs.
        kept: visual tokens kept; None: all.
        layer, pruned: of the arm.
        counted_vision: FLOPs of the vision encoder if no formula has it.
        encoder: of the arm.
    """
    step, rows = subject.control_step, subject.rows
    parts = step.flops(kept, layer, pruned, encoded=subject.encoded(encoder))
    cache = step.cache_elements(kept, layer, pruned)
    vision = rows * parts["vision"]
    if not subject.vision_by_formula and counted_vision is not None:
        vision = counted_vision
    freezing = 0.0
    if Fate.of(pruned).projects and kept is not None:
        deep = step.decoder.layers - layer
        freezing = rows * step.prompt_passes * deep * step.decoder.layer(0, 0, step.visual - kept).total
    flops = {
        "vision": vision,
        "prefill": rows * (parts["prompt, layers before"] + parts["prompt, layers pruned"]) - freezing,
        # A session computes the keys and values of frozen tokens, so its clock has them.
        "pruning": freezing,
        "decode": rows * parts["decoding or denoising"],
    }
    moved = subject.weight_bytes()
    size = rows * subject.element_bytes
    moved["prefill"] += size * cache["written"]
    moved["decode"] += size * cache["read"]
    return Work(flops, moved)
