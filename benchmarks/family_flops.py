"""The largest saving of pruning in each family, counted: FLOPs and bytes of one control step at the published sizes.

    python -m benchmarks.family_flops      # prints a table, writes benchmarks/results/family_flops.{json,md}

Nothing is run or timed here. FLOPs are the cost of a compute-bound pass (a long prompt, a batch); bytes are the weights
that every pass must read once, the cost of a pass of few tokens at batch 1 (decoding, denoising). Sizes are
those of the published configs: openvla/openvla-7b, moojink/openvla-7b-oft-finetuned-libero-*, lerobot/pi0_base,
lerobot/pi05_base, lerobot/pi0_fast_base, lerobot/smolvla_base. MolmoAct2, EO-1, GR00T and VLA-JEPA have two views and
LeRobot's defaults, with Qwen3-4B for MolmoAct2's text (according to third parties), Qwen2.5-VL-3B for EO-1, and
Qwen3-VL-2B for the last two. Vision-language models with an action head of one's own, whose cost is not counted, are
llava-hf/llava-1.5-7b-hf, google/paligemma-3b-pt-224, Qwen/Qwen3-VL-2B-Instruct and
HuggingFaceTB/SmolVLM2-500M-Video-Instruct, with two images (of 448 x 448 pixels for Qwen) and 24 words.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vla_pruner import markdown
from vla_pruner.cost import ContextExpert, ControlStep, DecoderShape, Expert, FeatureExpert, Tower

OUT = Path(__file__).parent / "results" / "family_flops.json"
LAYER = 3
KEEPS = (0.5, 0.25, 0.125)
BYTES = 2  # of a weight in bfloat16
TITLES = (
    "family",
    "TFLOPs: vision / prompt / rest",
    "FLOPs left at keep .5 / .25 / .125, dropped",
    "the same, frozen",
    "weights read, GB: vision / prompt / rest",
    "which means",
)

DINO = DecoderShape(layers=23, hidden=1024, heads=16, kv_heads=16, head_dim=64, feed_forward=4096, matrices=2)
SIGLIP = DecoderShape(layers=27, hidden=1152, heads=16, kv_heads=16, head_dim=72, feed_forward=4304, matrices=2)
LLAMA = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, feed_forward=11008, vocabulary=32064)
GEMMA = DecoderShape(layers=18, hidden=2048, heads=8, kv_heads=1, head_dim=256, feed_forward=16384)
GEMMA_HEADED = replace(GEMMA, vocabulary=257152)
PI0_FAST_TOKENS = 60  # per chunk; the real number depends on the motion
GEMMA_EXPERT = DecoderShape(layers=18, hidden=1024, heads=8, kv_heads=1, head_dim=256, feed_forward=4096)
QWEN3_4B = DecoderShape(layers=36, hidden=2560, heads=32, kv_heads=8, head_dim=128, feed_forward=9728)
MOLMO_EXPERT = DecoderShape(layers=36, hidden=1024, heads=16, kv_heads=16, head_dim=64, feed_forward=2816)
# Per token: it attends to its 2 x 2 patches, whose features of two layers are 2304 wide, and goes through a gated MLP.
MOLMO_PROJECTOR = 2.0 * (2304 * 1152 + 4 * 2 * 2304 * 1152 + 1152 * 1152 + 2 * 1152 * 9728 + 9728 * 2560)
QWEN_VISION = DecoderShape(layers=32, hidden=1280, heads=16, kv_heads=16, head_dim=80, feed_forward=3420)
QWEN25_3B = DecoderShape(layers=36, hidden=2048, heads=16, kv_heads=2, head_dim=128, feed_forward=11008)
GROOT_SELF = DecoderShape(layers=4, hidden=2048, heads=32, kv_heads=32, head_dim=64, feed_forward=8192, matrices=2)
GROOT_DIT = DecoderShape(layers=32, hidden=1536, heads=32, kv_heads=32, head_dim=48, feed_forward=6144, matrices=2)
SMOL_VISION = DecoderShape(layers=12, hidden=768, heads=12, kv_heads=12, head_dim=64, feed_forward=3072, matrices=2)
SMOL = DecoderShape(layers=16, hidden=960, heads=15, kv_heads=5, head_dim=64, feed_forward=2560)
CLIP = DecoderShape(layers=24, hidden=1024, heads=16, kv_heads=16, head_dim=64, feed_forward=4096, matrices=2)
QWEN3 = DecoderShape(layers=28, hidden=2048, heads=16, kv_heads=8, head_dim=128, feed_forward=6144)
QWEN3_VISION = DecoderShape(layers=24, hidden=1024, heads=16, kv_heads=16, head_dim=64, feed_forward=4096, matrices=2)
QWEN3_MERGER = 2.0 * (4096 * 4096 + 4096 * 2048)
"""FLOPs of one merger per token; three more mergers make DeepStack's features."""
SMOL_EXPERT = DecoderShape(layers=16, hidden=720, heads=15, kv_heads=5, head_dim=64, feed_forward=2048)


@dataclass(frozen=True)
class Family:
    """A family: one control step of it, where that leaves a user, and whether tokens can be frozen in it."""

    step: ControlStep
    remark: str = ""
    freezes: bool = True


OPENVLA_TOWERS = (Tower(DINO, 261, 23), Tower(SIGLIP, 256, 26))
FAMILIES = {
    "OpenVLA": Family(
        ControlStep(LLAMA, visual=256, other=25, towers=OPENVLA_TOWERS, decoded=6),
        remark="six decoding passes read all weights again, pruned or not: a small gain for one robot, more in batches",
    ),
    "OpenVLA-OFT": Family(
        ControlStep(LLAMA, visual=512, other=25 + 1 + 57, towers=OPENVLA_TOWERS, cameras=2),
        remark="one pass, nearly all of it visual tokens: where pruning pays most",
    ),
    "pi0": Family(
        ControlStep(
            GEMMA,
            visual=768,
            other=48,
            towers=(Tower(SIGLIP, 256, 27),),
            cameras=3,
            expert=Expert(GEMMA_EXPERT, 51, 10),
        ),
        remark="the prompt shrinks; the vision tower and ten passes of the expert remain",
    ),
    "pi0.5": Family(
        ControlStep(
            GEMMA,
            visual=768,
            other=200,
            towers=(Tower(SIGLIP, 256, 27),),
            cameras=3,
            expert=Expert(GEMMA_EXPERT, 50, 10),
        ),
        remark="as pi0; its long text remains too",
    ),
    "pi0-FAST": Family(
        ControlStep(
            GEMMA_HEADED,
            visual=768,
            other=201,
            towers=(Tower(SIGLIP, 256, 27),),
            cameras=3,
            decoded=PI0_FAST_TOKENS - 1,
        ),
        remark="each decoded token reads all weights again, pruned or not: expect a few percent for one robot",
    ),
    "MolmoAct2": Family(
        ControlStep(
            QWEN3_4B,
            visual=2 * 196,
            other=1 + 2 * 16 + 100,
            towers=(Tower(SIGLIP, 729, 25),),
            cameras=2,
            projector=MOLMO_PROJECTOR,
            expert=ContextExpert(MOLMO_EXPERT, 30, 10, context=8 * 128),
        ),
        remark="a prompt of a 4B model, most of it visual tokens; the vision tower, whose images are larger, remains",
    ),
    "EO-1": Family(
        ControlStep(
            QWEN25_3B,
            visual=2 * 121,
            other=60,
            # Windows are 8 x 8 patches, in all layers but four.
            towers=(Tower(QWEN_VISION, 484, 28, window=64), Tower(QWEN_VISION, 484, 4)),
            cameras=2,
            projector=2.0 * (5120 * 5120 + 5120 * 2048),
            expert=Expert(QWEN25_3B, 8, 10),
        ),
        remark="the vision tower remains, and ten passes over eight rows read the 3B weights again",
    ),
    "GR00T N1.7": Family(
        ControlStep(
            replace(QWEN3, layers=16),
            visual=2 * 64,
            other=2 * 2 + 28,
            towers=(Tower(QWEN3_VISION, 256, 24),),
            cameras=2,
            projector=4 * QWEN3_MERGER,
            expert=FeatureExpert(GROOT_DIT, 41, 4, last=15, context=2048, before=GROOT_SELF),
        ),
        remark="64 tokens a view: passes as small as these wait for launches rather than FLOPs; expect little",
        freezes=False,
    ),
    "VLA-JEPA": Family(
        ControlStep(
            QWEN3,
            visual=2 * 64,
            other=2 * 2 + 120,
            towers=(Tower(QWEN3_VISION, 256, 24),),
            cameras=2,
            projector=4 * QWEN3_MERGER,
        ),
        remark="as GR00T; its action head, which reads 32 rows, is left out here",
    ),
    "SmolVLA": Family(
        ControlStep(
            SMOL,
            visual=192,
            other=49,
            towers=(Tower(SMOL_VISION, 1024, 12),),
            cameras=3,
            expert=Expert(SMOL_EXPERT, 50, 10),
        ),
        remark="the vision tower is most of it, and it is behind that tower that tokens are dropped: nothing to gain",
    ),
    "LLaVA-1.5-7B, own head": Family(
        ControlStep(
            replace(LLAMA, vocabulary=0),
            visual=2 * 576,
            other=25,
            towers=(Tower(CLIP, 577, 24),),
            cameras=2,
            projector=2.0 * (1024 * 4096 + 4096 * 4096),
        ),
        remark="one pass, nearly all of it visual tokens: as OpenVLA-OFT",
    ),
    "PaliGemma-3B-224, own head": Family(
        ControlStep(
            GEMMA, visual=512, other=25, towers=(Tower(SIGLIP, 256, 27),), cameras=2, projector=2.0 * 1152 * 2048
        ),
        remark="one pass; the vision tower remains",
    ),
    "Qwen3-VL-2B, own head": Family(
        ControlStep(
            QWEN3,
            visual=2 * 196,
            other=29,
            towers=(Tower(QWEN3_VISION, 784, 24),),
            cameras=2,
            projector=4 * QWEN3_MERGER,
        ),
        remark="four patches make one token, so that the vision tower is as much as the prompt",
    ),
    "SmolVLM2-500M, own head": Family(
        ControlStep(
            replace(SMOL, layers=32),
            visual=2 * 64,
            other=29,
            towers=(Tower(SMOL_VISION, 1024, 12),),
            cameras=2,
            projector=2.0 * 16 * 768 * 960,
        ),
        remark="as SmolVLA: the vision tower is most of it",
    ),
}


def parts(step: ControlStep, keep: float | None, pruned: str = "drop") -> dict[str, float]:
    """FLOPs of the parts of one control step, `keep` of the visual tokens staying from layer 3 on (None: all)."""
    return step.flops(None if keep is None else max(1, round(keep * step.visual)), LAYER, pruned)


def weights(shape: DecoderShape, layers: int) -> float:
    """Bytes that one pass through `layers` layers reads, in bfloat16."""
    return BYTES * layers * shape.layer(1, 0).linear / 2


def bytes_read(step: ControlStep) -> dict[str, float]:
    """Bytes of weights read in one control step: pruning changes none of these."""
    shape = step.decoder
    head = BYTES * shape.hidden * shape.vocabulary
    after = step.decoded * (weights(shape, shape.layers) + head)
    if step.expert is not None:
        after += step.expert.passes * BYTES * step.expert.weights()
    return {
        "vision": sum(weights(tower.shape, tower.layers) for tower in step.towers),
        "prompt": weights(shape, shape.layers) + head,
        "decoding or denoising": after,
    }


def result(family: Family) -> dict[str, Any]:
    """Everything of one family, ready for JSON."""
    step = family.step
    untouched = parts(step, None)
    total = sum(untouched.values())

    def left(pruned: str) -> dict[str, float]:
        return {str(keep): round(sum(parts(step, keep, pruned).values()) / total, 3) for keep in KEEPS}

    return {
        "gflops": {name: round(value / 1e9, 1) for name, value in untouched.items()},
        "total_gflops": round(total / 1e9, 1),
        "weights_read_gb": {name: round(value / 1e9, 2) for name, value in bytes_read(step).items()},
        "flops_left": left("drop"),
        "flops_left_frozen": left("freeze") if family.freezes else None,
        "prompt_flops_left": {str(keep): round(_prompt(step, keep) / _prompt(step, None), 3) for keep in KEEPS},
    }


def _prompt(step: ControlStep, keep: float | None) -> float:
    return sum(value for name, value in parts(step, keep).items() if name.startswith("prompt"))


def table(results: dict[str, dict[str, Any]]) -> str:
    """The same as Markdown."""
    rows = []
    for name, found in results.items():
        vision, before, pruned, after = (value / 1e3 for value in found["gflops"].values())
        fates = [found["flops_left"], found["flops_left_frozen"]]
        left = [
            "cannot freeze" if shares is None else " / ".join(f"{100 * value:.0f} %" for value in shares.values())
            for shares in fates
        ]
        read = " / ".join(f"{value:.1f}" for value in found["weights_read_gb"].values())
        flops = f"{vision:.2f} / {before + pruned:.2f} / {after:.2f}"
        rows.append((name, flops, *left, read, FAMILIES[name].remark))
    return markdown.table(TITLES, rows)


def main() -> None:
    """Write the results and print the table."""
    results = {name: result(family) for name, family in FAMILIES.items()}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps({"layer": LAYER, "dtype": "bfloat16", "families": results}, indent=2) + "\n")
    OUT.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
