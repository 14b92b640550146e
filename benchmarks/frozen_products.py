"""Keys and values of frozen tokens, one product a layer or one for all: `python -m benchmarks.frozen_products`.

Frozen tokens enter all later layers with the same hidden states, so with each norm's weight folded into them the key
and value matrices of all layers can be stacked. FLOPs are the same; the stack is a second copy of these weights.
Prints one Markdown row a shape; the two ways take turns.
"""

from __future__ import annotations

import argparse
import statistics
from time import perf_counter

import torch

SHAPES = {
    "reference, keep .25": (128, 128, 5, 147),
    "llama:1024,16, keep .125": (1024, 1024, 13, 224),
    "pi0's PaliGemma, keep .25": (2048, 256, 15, 576),
}
"""Width, width of the keys, layers from the pruning layer on, frozen tokens."""

ROUNDS = 31


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description="Frozen keys and values: a product a layer against one for all.")
    parser.add_argument("--threads", type=int, default=1)
    torch.set_num_threads(parser.parse_args().threads)
    print("| shape | GFLOPs | weights, MB | ms, one a layer | ms, one for all | ratio |\n|---|---|---|---|---|---|")
    for name, (width, keys, layers, tokens) in SHAPES.items():
        hidden = torch.randn(tokens, width)
        norms = torch.rand(layers, width) + 0.5
        weights = torch.randn(layers, 2, keys, width) / width**0.5
        stacked = (weights * norms[:, None, None]).flatten(0, 2).contiguous()

        def unit(states: torch.Tensor) -> torch.Tensor:
            return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)

        def by_layer(hidden=hidden, norms=norms, weights=weights):
            for norm, (key, value) in zip(norms, weights, strict=True):
                normed = unit(hidden) * norm
                yield normed @ key.T
                yield normed @ value.T

        def at_once(hidden=hidden, stacked=stacked):
            return unit(hidden) @ stacked.T

        apart = torch.cat(list(by_layer()), dim=1) - at_once()
        assert apart.abs().max() < 1e-3
        taken: dict[str, list[float]] = {"layer": [], "once": []}
        for turn in range(ROUNDS):
            for kind, call in (("layer", lambda f=by_layer: list(f())), ("once", at_once)):
                start = perf_counter()
                call()
                if turn:
                    taken[kind].append(1e3 * (perf_counter() - start))
        layer, once = (statistics.median(taken[kind]) for kind in ("layer", "once"))
        ratio = statistics.median(one / other for one, other in zip(*taken.values(), strict=True))
        flops = 2 * tokens * width * 2 * keys * layers / 1e9
        size = 4 * stacked.numel() / 1e6
        print(f"| {name} | {flops:.3g} | {size:.3g} | {layer:.2f} | {once:.2f} | {ratio:.2f}x |")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
