"""Every form of the greedy max-min filter on one device, in milliseconds: paired, the forms taking turns in each round.

    python -m benchmarks.greedy [--device cuda] [--rounds 30] [--rows 1] [--json FILE]      # prints a table

The forms must pick the same tokens before anything is timed. "graph" forms are replayed CUDA graphs, as in a model
compiled with mode="reduce-overhead": what the device itself takes, without launching.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_pruner import markdown
from vla_pruner.accelerators import now
from vla_pruner.auditing.share import describe_device
from vla_pruner.conditions import machine_conditions
from vla_pruner.methods.selection import (
    distances,
    fused_form,
    max_min_order_in_arrays,
    max_min_order_in_tensors,
)
from vla_pruner.outputs import check_file
from vla_pruner.statistics import median_interval

SIZES = ((256, 64), (512, 128), (768, 192))  # M, k: one, two and three cameras at keep .25
BASE = "tensors"
TITLES = ("M, k", "form", "ms", "95 % interval", f"times faster than {BASE}")
WARM_UP_ROUNDS = 2
CALLS = 10  # in a row, so that reading the clock weighs little

Form = Callable[[Tensor, Tensor, int], Tensor]


def problem(rows: int, tokens: int, k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Distances of random features, and candidates as a union of two top k that overlap by a third has them."""
    generator = torch.Generator().manual_seed(tokens)
    distance = distances(torch.randn(rows, tokens, 64, generator=generator))
    order = torch.rand(rows, tokens, generator=generator).argsort(dim=1)
    candidates = torch.zeros(rows, tokens, dtype=torch.bool).scatter(1, order[:, : 5 * k // 3], True)
    return distance.to(device), candidates.to(device)


def replayed(form: Form, distance: Tensor, candidates: Tensor, k: int) -> Callable[[], Tensor]:
    """`form` on these tensors as a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        order = form(distance, candidates, k)

    def replay() -> Tensor:
        graph.replay()
        return order

    return replay


def forms_on(distance: Tensor, candidates: Tensor, k: int) -> dict[str, Callable[[], Tensor]]:
    """Return the forms on the tensors' device, by name, each called once and found to pick the same."""
    given, fused = (distance, candidates, k), fused_form(distance.device)
    forms: dict[str, Callable[[], Tensor]] = {BASE: lambda: max_min_order_in_tensors(*given)}
    if distance.device.type == "cpu":
        forms["arrays"] = lambda: max_min_order_in_arrays(*given)
    if fused is not None:
        forms["Triton"] = lambda: fused(*given)
    expected = forms[BASE]()
    for form in list(forms.values()):
        form()
    if distance.device.type == "cuda":
        forms["tensors, graph"] = replayed(max_min_order_in_tensors, *given)
        if fused is not None:
            forms["Triton, graph"] = replayed(fused, *given)
    for name, form in forms.items():
        if not torch.equal(form(), expected):
            raise SystemExit(f"{name} picked other tokens than {BASE}; nothing was timed.")
    return forms


@torch.inference_mode()
def time_forms(forms: dict[str, Callable[[], Tensor]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of a call by form, one figure a round, each round beginning with another form."""
    names, taken = list(forms), {name: [] for name in forms}
    for number in range(WARM_UP_ROUNDS + rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            began = now(device)
            for _ in range(CALLS):
                forms[name]()
            if number >= WARM_UP_ROUNDS:
                taken[name].append((now(device) - began) * 1e3 / CALLS)
    return taken


def summary(taken: dict[str, list[float]]) -> dict[str, Any]:
    """By form: the median, its 95 % interval, and how many times faster than the base, over the rounds."""
    found = {}
    for name, values in taken.items():
        faster = [base / value for base, value in zip(taken[BASE], values, strict=True)]
        found[name] = {
            "median_ms": statistics.median(values),
            "median_ms_interval": median_interval(values),
            "times_faster": statistics.median(faster),
            "times_faster_interval": median_interval(faster),
            "ms": values,
        }
    return found


def main() -> None:
    """Time, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=1, help="rows (robots) of a batch")
    parser.add_argument("--json", help="file for every figure and the conditions")
    given = parser.parse_args()
    if given.json:
        check_file(given.json)
    device = torch.device(given.device)
    conditions = machine_conditions(["torch", "numpy", "triton"]) | {"device": describe_device(device)}
    results = []
    print(f"{conditions['device']}, {given.rows} row(s), median of {given.rounds} rounds of {CALLS} calls")
    print(markdown.head(TITLES))
    for tokens, k in SIZES:
        forms = forms_on(*problem(given.rows, tokens, k, device), k)
        found = summary(time_forms(forms, given.rounds, device))
        results.append({"tokens": tokens, "k": k, "rows": given.rows, "forms": found})
        for name, of in found.items():
            interval = of["median_ms_interval"]
            within = f"{interval[0]:.4f} to {interval[1]:.4f}" if interval else "too few rounds"
            figures = f"{of['median_ms']:.4f}", within, f"{of['times_faster']:.2f}"
            print(markdown.row((f"{tokens}, {k}", name, *figures)))
    if given.json:
        record = {"conditions": conditions, "rounds": given.rounds, "calls": CALLS, "results": results}
        Path(given.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
