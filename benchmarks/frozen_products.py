"""Keys and values of frozen tokens, one product a layer or one for all, the two taking turns.

    python -m benchmarks.frozen_products [--threads 1] [--rounds 30] [--json FILE]      # prints a table

Frozen tokens enter all later layers with the same hidden states, so with each norm's weight folded into them the key
and value matrices of all layers can be stacked. FLOPs are the same; the stack is a second copy of these weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from vla_pruner import markdown
from vla_pruner.conditions import machine_conditions
from vla_pruner.outputs import check_file
from vla_pruner.statistics import median_interval

TITLES = ("shape", "GFLOPs", "weights, MB", "ms, one a layer", "ms, one for all", "ratio")
SHAPES = {
    "reference, keep .25": (128, 128, 5, 147),
    "llama:1024,16, keep .125": (1024, 1024, 13, 224),
    "pi0's PaliGemma, keep .25": (2048, 256, 15, 576),
}
"""Width, width of the keys, layers from the pruning layer on, frozen tokens."""


def ways(width: int, keys: int, layers: int, tokens: int) -> tuple[Callable[[], list[Tensor]], Callable[[], Tensor]]:
    """The products as functions: those of each layer, and the one for all."""
    hidden = torch.randn(tokens, width)
    norms = torch.rand(layers, width) + 0.5
    weights = torch.randn(layers, 2, keys, width) / width**0.5
    stacked = (weights * norms[:, None, None]).flatten(0, 2).contiguous()

    def unit(states: Tensor) -> Tensor:
        return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)

    def by_layer() -> list[Tensor]:
        found = []
        for norm, (key, value) in zip(norms, weights, strict=True):
            normed = unit(hidden) * norm
            found += [normed @ key.T, normed @ value.T]
        return found

    def at_once() -> Tensor:
        return unit(hidden) @ stacked.T

    return by_layer, at_once


def measure(width: int, keys: int, layers: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of both ways in every round but one before, which does not count, and what follows from them."""
    by_layer, at_once = ways(width, keys, layers, tokens)
    apart = torch.cat(by_layer(), dim=1) - at_once()
    assert apart.abs().max() < 1e-3, "the two ways must give the same before they are timed"
    taken: dict[str, list[float]] = {"one_a_layer": [], "one_for_all": []}
    for turn in range(1 + rounds):
        for kind, call in zip(taken, (by_layer, at_once), strict=True):
            start = perf_counter()
            call()
            if turn:
                taken[kind].append(1e3 * (perf_counter() - start))
    ratios = [one / other for one, other in zip(*taken.values(), strict=True)]
    return {
        "gflops": 2 * tokens * width * 2 * keys * layers / 1e9,
        "stacked_weights_mb": 4 * 2 * keys * layers * width / 1e6,
        "median_ms": {kind: statistics.median(values) for kind, values in taken.items()},
        "ratio": statistics.median(ratios),
        "ratio_interval": median_interval(ratios),
        "ms": taken,
    }


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Time, print, and write the file that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", help="file for every figure and the conditions")
    given = parser.parse_args(arguments)
    if given.json:
        check_file(given.json)
    torch.set_num_threads(given.threads)
    conditions = machine_conditions(["torch"])
    results = []
    print(markdown.head(TITLES))
    for name, (width, keys, layers, tokens) in SHAPES.items():
        found = measure(width, keys, layers, tokens, given.rounds)
        shape = {"shape": name, "width": width, "keys": keys, "layers": layers, "tokens": tokens}
        results.append({**shape, **found})
        layer, once = found["median_ms"].values()
        sizes = f"{found['gflops']:.3g}", f"{found['stacked_weights_mb']:.3g}"
        print(markdown.row((name, *sizes, f"{layer:.2f}", f"{once:.2f}", f"{found['ratio']:.2f}x")))
    if given.json:
        record = {"conditions": conditions, "rounds": given.rounds, "dtype": "float32", "results": results}
        Path(given.json).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
