"""What pruning can save in each family, counted: FLOPs and bytes of one control step at the published sizes.

    python -m benchmarks.family_flops      # prints a table, writes benchmarks/results/family_flops.{json,md}

Nothing is run or timed here. FLOPs say what a compute-bound pass costs (a long prompt, a batch); bytes are the weights
that every pass must read once, which is what a pass of few tokens costs at batch 1 (decoding, denoising). Sizes are
those of the published configs: openvla/openvla-7b, moojink/openvla-7b-oft-finetuned-libero-*, lerobot/pi0_base,
lerobot/pi05_base, lerobot/smolvla_base.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_pruner.cost import DecoderShape, Flops

OUT = Path(__file__).parent / "results" / "family_flops.json"
LAYER = 3
KEEPS = (0.5, 0.25, 0.125)
BYTES = 2  # of a weight in bfloat16

DINO = DecoderShape(layers=23, hidden=1024, heads=16, kv_heads=16, head_dim=64, feed_forward=4096, matrices=2)
SIGLIP = DecoderShape(layers=27, hidden=1152, heads=16, kv_heads=16, head_dim=72, feed_forward=4304, matrices=2)
LLAMA = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, feed_forward=11008, vocabulary=32064)
GEMMA = DecoderShape(layers=18, hidden=2048, heads=8, kv_heads=1, head_dim=256, feed_forward=16384)
GEMMA_EXPERT = DecoderShape(layers=18, hidden=1024, heads=8, kv_heads=1, head_dim=256, feed_forward=4096)
SMOL_VISION = DecoderShape(layers=12, hidden=768, heads=12, kv_heads=12, head_dim=64, feed_forward=3072, matrices=2)
SMOL = DecoderShape(layers=16, hidden=960, heads=15, kv_heads=5, head_dim=64, feed_forward=2560)
SMOL_EXPERT = DecoderShape(layers=16, hidden=720, heads=15, kv_heads=5, head_dim=64, feed_forward=2048)


@dataclass(frozen=True)
class Family:
    """One control step of a family.

    Attributes:
        towers: vision encoders with the tokens of one image and the layers that run.
        cameras: images.
        visual: visual tokens of all cameras.
        other: other tokens of the prompt.
        decoder: whose layers are shortened.
        decoded: tokens decoded after the prompt, one pass each.
        expert: an expert that reads the prompt's keys and values, with the tokens of one pass and the passes.
        remark: where that leaves a user.
    """

    towers: tuple[tuple[DecoderShape, int, int], ...]
    cameras: int
    visual: int
    other: int
    decoder: DecoderShape
    decoded: int = 0
    expert: tuple[DecoderShape, int, int] | None = None
    remark: str = ""


FAMILIES = {
    "OpenVLA": Family(
        towers=((DINO, 261, 23), (SIGLIP, 256, 26)),
        cameras=1,
        visual=256,
        other=25,
        decoder=LLAMA,
        decoded=6,
        remark="six decoding passes read all weights again, pruned or not: a small gain for one robot, more in batches",
    ),
    "OpenVLA-OFT": Family(
        towers=((DINO, 261, 23), (SIGLIP, 256, 26)),
        cameras=2,
        visual=512,
        other=25 + 1 + 57,
        decoder=LLAMA,
        remark="one pass, nearly all of it visual tokens: where pruning pays most",
    ),
    "pi0": Family(
        towers=((SIGLIP, 256, 27),),
        cameras=3,
        visual=768,
        other=48,
        decoder=GEMMA,
        expert=(GEMMA_EXPERT, 51, 10),
        remark="the prompt shrinks; the vision tower and ten passes of the expert remain",
    ),
    "pi0.5": Family(
        towers=((SIGLIP, 256, 27),),
        cameras=3,
        visual=768,
        other=200,
        decoder=GEMMA,
        expert=(GEMMA_EXPERT, 50, 10),
        remark="as pi0; its long text remains too",
    ),
    "SmolVLA": Family(
        towers=((SMOL_VISION, 1024, 12),),
        cameras=3,
        visual=192,
        other=49,
        decoder=SMOL,
        expert=(SMOL_EXPERT, 50, 10),
        remark="the vision tower is most of it, and it is behind that tower that tokens are dropped: nothing to gain",
    ),
}


def parts(family: Family, keep: float | None) -> dict[str, float]:
    """FLOPs of the parts of one control step, `keep` of the visual tokens staying from layer 3 on (None: all)."""
    shape, full = family.decoder, family.visual + family.other
    short = full if keep is None else family.other + max(1, round(keep * family.visual))
    vision = Flops()
    for tower, tokens, layers in family.towers:
        vision += family.cameras * layers * tower.layer(tokens, tokens)
    after = Flops()
    for index in range(shape.layers):
        length = full if index < LAYER else short
        for position in range(1, family.decoded + 1):
            after += shape.layer(1, length + position)
        if family.expert is not None:
            expert, tokens, passes = family.expert
            after += passes * expert.layer(tokens, length + tokens)
    head = 2 * shape.hidden * shape.vocabulary
    return {
        "vision": vision.total,
        "prompt, layers before": (LAYER * shape.layer(full, full)).total,
        "prompt, layers pruned": ((shape.layers - LAYER) * shape.layer(short, short)).total + head,
        "decoding or denoising": after.total + family.decoded * head,
    }


def weights(shape: DecoderShape, layers: int) -> float:
    """Bytes that one pass through `layers` layers reads, in bfloat16."""
    return BYTES * layers * shape.layer(1, 0).linear / 2


def bytes_read(family: Family) -> dict[str, float]:
    """Bytes of weights read in one control step: pruning changes none of these."""
    shape = family.decoder
    head = BYTES * shape.hidden * shape.vocabulary
    after = family.decoded * (weights(shape, shape.layers) + head)
    if family.expert is not None:
        expert, _, passes = family.expert
        after += passes * weights(expert, expert.layers)
    return {
        "vision": sum(weights(tower, layers) for tower, _, layers in family.towers),
        "prompt": weights(shape, shape.layers) + head,
        "decoding or denoising": after,
    }


def result(family: Family) -> dict[str, Any]:
    """Everything of one family, ready for JSON."""
    untouched = parts(family, None)
    total = sum(untouched.values())
    return {
        "gflops": {name: round(value / 1e9, 1) for name, value in untouched.items()},
        "total_gflops": round(total / 1e9, 1),
        "weights_read_gb": {name: round(value / 1e9, 2) for name, value in bytes_read(family).items()},
        "flops_left": {str(keep): round(sum(parts(family, keep).values()) / total, 3) for keep in KEEPS},
        "prompt_flops_left": {str(keep): round(_prompt(family, keep) / _prompt(family, None), 3) for keep in KEEPS},
    }


def _prompt(family: Family, keep: float | None) -> float:
    return sum(value for name, value in parts(family, keep).items() if name.startswith("prompt"))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The same as Markdown."""
    lines = [
        "| family | TFLOPs: vision / prompt / rest | FLOPs left at keep .5 / .25 / .125 "
        "| weights read, GB: vision / prompt / rest | which means |",
        "|---|---|---|---|---|",
    ]
    for name, found in results.items():
        vision, before, pruned, after = (value / 1e3 for value in found["gflops"].values())
        left = " / ".join(f"{100 * value:.0f} %" for value in found["flops_left"].values())
        read = " / ".join(f"{value:.1f}" for value in found["weights_read_gb"].values())
        flops = f"{vision:.2f} / {before + pruned:.2f} / {after:.2f}"
        lines.append(f"| {name} | {flops} | {left} | {read} | {FAMILIES[name].remark} |")
    return "\n".join(lines)


def main() -> None:
    """Write the results and print the table."""
    results = {name: result(family) for name, family in FAMILIES.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"layer": LAYER, "dtype": "bfloat16", "families": results}, indent=2) + "\n")
    OUT.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
