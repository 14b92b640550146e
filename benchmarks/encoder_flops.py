"""The largest saving of reuse in the vision encoder, counted: FLOPs of one control step at the published sizes.

    python -m benchmarks.encoder_flops      # prints a table, writes benchmarks/results/encoder_flops.{json,md}

Nothing is run or timed here, and choosing costs nothing. Sizes are those of `benchmarks.family_flops`. "Left" is the
part of the unpruned control step's FLOPs, of a step that reuses patches and as a mean over a cycle in which one step of
`REFRESH_EVERY` encodes all of them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.family_flops import FAMILIES, LAYER
from vla_pruner import markdown
from vla_pruner.cost import ControlStep
from vla_pruner.methods import EncoderReuse

OUT = Path(__file__).parent / "results" / "encoder_flops.json"
NAMES = ("SmolVLA", "pi0", "pi0.5", "pi0-FAST")
KEEP = 0.25
ENCODED = (1.0, 0.5, 0.25)
REFRESH_EVERY = 8
TITLES = (
    "family",
    "the encoder's share of a step",
    "decoder at keep .25 alone",
    "encoder at .5 / .25 alone",
    "both, encoder at .5 / .25",
    "both, over a cycle of 8 steps",
)


def left(step: ControlStep, keep: float, encoded: float) -> dict[str, float]:
    """Return the parts of the unpruned control step's FLOPs that are left.

    Args:
        step: the control step.
        keep: visual tokens that the decoder keeps, as a fraction.
        encoded: patches that the vision encoder encodes, as a fraction.
    """
    kept = None if keep == 1.0 else round(keep * step.visual)
    patches = EncoderReuse(keep=encoded).budget(step.towers[0].tokens)
    total = sum(step.flops().values())
    whole = sum(step.flops(kept, LAYER).values()) / total
    reusing = sum(step.flops(kept, LAYER, encoded=patches).values()) / total
    cycle = whole if encoded == 1.0 else ((REFRESH_EVERY - 1) * reusing + whole) / REFRESH_EVERY
    return {"step": round(reusing, 4), "cycle": round(cycle, 4)}


def result(step: ControlStep) -> dict[str, Any]:
    """Return everything of one family, ready for JSON."""
    parts = step.flops()
    return {
        "vision_share": round(parts["vision"] / sum(parts.values()), 4),
        "left": {str(keep): {str(encoded): left(step, keep, encoded) for encoded in ENCODED} for keep in (1.0, KEEP)},
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Return the same as Markdown."""
    rows = []
    for name, found in results.items():
        whole, pruned = found["left"]["1.0"], found["left"][str(KEEP)]

        def speed(left: dict[str, Any], which: str) -> str:
            return " / ".join(f"{1 / left[str(encoded)][which]:.2f}x" for encoded in ENCODED[1:])

        cells = (
            name,
            f"{100 * found['vision_share']:.0f} %",
            f"{1 / pruned['1.0']['step']:.2f}x",
            speed(whole, "step"),
            speed(pruned, "step"),
            speed(pruned, "cycle"),
        )
        rows.append(cells)
    return markdown.table(TITLES, rows)


def main() -> None:
    """Write the results and print the table."""
    results = {name: result(FAMILIES[name].step) for name in NAMES}
    content = {"layer": LAYER, "keep": KEEP, "refresh_every": REFRESH_EVERY, "families": results}
    OUT.write_text(json.dumps(content, indent=2) + "\n")
    OUT.with_suffix(".md").write_text(table(results) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
