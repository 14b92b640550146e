"""Contrasts of the study: differences between two methods, or two fates, over all budgets at once.

    python -m benchmarks.study_contrasts [PHASE]        reads results/study/PHASE (grid, if none is named), writes
                                                        contrasts.json and contrasts.md there

An episode's figure is the mean over the settings (keep and fate) that both sides have; their differences are averaged
over the episodes, with Student's interval within tasks. All intervals that are shown hold together, by Bonferroni. Each
is widened by two imaginary episodes, in one of which either side solves one setting more: if hardly any episode tells
the sides apart, the observed episodes say little about how many would.
"""

from __future__ import annotations

import argparse
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.study import RESULTS, layer_of, named
from vla_pruner import markdown
from vla_pruner.statistics import MeanDifference, paired_mean_difference

LEVEL = 0.05
KEEPS = ("", "0.5 ", "0.25 ", "0.125 ")
_HEADS = {"all": "all budgets", "0.5": ".5", "0.25": ".25", "0.125": ".125"}

Unit = tuple[str, int]
"""Task and initial state."""
Outcomes = Mapping[str, Mapping[str, Mapping[Unit, bool]]]
"""Method -> setting, such as "0.25 drop" -> episode -> solved."""


@dataclass(frozen=True)
class Contrast:
    """A question, and the two sides whose difference answers it.

    Attributes:
        arm, base: methods as the study's tables name them, or fates.
    """

    question: str
    arm: str
    base: str


CONTRASTS = (
    Contrast("is choosing better than drawing?", "vla-pruner", "random"),
    Contrast("does the filter help the two scores?", "vla-pruner", "score-fusion"),
    Contrast("are two scores better than reading alone?", "vla-pruner", "semantic-only"),
    Contrast("are two scores better than acting alone?", "vla-pruner", "action-only"),
    Contrast("is the last prompt row a better reader than all rows?", "vla-pruner semantic_queries=last", "vla-pruner"),
    Contrast("is action history better than drawing?", "action-only", "random"),
    Contrast("is action history better than reading?", "action-only", "semantic-only"),
    Contrast("is diversity better than drawing?", "max-min-diversity metric=euclidean", "random"),
    Contrast("does action history help diversity?", "action-and-diversity", "max-min-diversity metric=euclidean"),
    Contrast("does diversity help action history?", "action-and-diversity", "action-only"),
    Contrast("is the mixture better than the published rule?", "action-and-diversity", "vla-pruner"),
    Contrast("is diversity better at layer K than before the decoder?", "max-min-diversity", "divprune"),
    Contrast("is freezing better than dropping?", "freeze", "drop"),
)
"""Of the autoregressive policy."""
CHUNK_CONTRASTS = (
    Contrast("is choosing better than drawing?", "vla-pruner", "random"),
    Contrast("is the last prompt row a better reader than all rows?", "vla-pruner semantic_queries=last", "vla-pruner"),
    Contrast("are two scores better than acting alone?", "vla-pruner semantic_queries=last", "action-only"),
    Contrast("is action history better than drawing?", "action-only", "random"),
    Contrast("does diversity help action history?", "action-and-diversity", "action-only"),
    Contrast("is the last row alone better than drawing?", "fastv", "random"),
    Contrast("is diversity better than drawing?", "max-min-diversity", "random"),
    Contrast("is freezing better than dropping?", "freeze", "drop"),
)
"""Of the two-camera policies."""
VENDOR_CONTRASTS = (
    Contrast("is VLA-Pruner better than drawing?", "vla-pruner semantic_queries=last", "random"),
    Contrast("is DART better than drawing?", "dart", "random"),
    Contrast("is CDPruner better than drawing?", "cdpruner", "random"),
    Contrast("is DART better than VLA-Pruner?", "dart", "vla-pruner semantic_queries=last"),
    Contrast("is CDPruner better than VLA-Pruner?", "cdpruner", "vla-pruner semantic_queries=last"),
    Contrast("is freezing better than dropping?", "freeze", "drop"),
)
"""Of what vendors ship, on the two-camera policies."""
OF_PHASE = {
    "grid": CONTRASTS,
    "chunk-grid": CHUNK_CONTRASTS,
    "libero-grid": CHUNK_CONTRASTS,
    "chunk-vendors": VENDOR_CONTRASTS,
    "libero-vendors": VENDOR_CONTRASTS,
}


def outcomes(folder: Path, layer: str = "3") -> dict[str, dict[str, dict[Unit, bool]]]:
    """Return the episodes that each method solved, of a published phase; crashed ones are left out."""
    arms = json.loads((folder / "summary.json").read_text())["summary"]["arms"]
    of_arm = {arm["key"]: named(arm["title"], layer) for arm in arms if arm["kind"] in ("method", "random")}
    found: dict[str, dict[str, dict[Unit, bool]]] = {}
    with gzip.open(folder / "episodes.jsonl.gz", "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            if record["arm"] in of_arm and record["success"] is not None:
                method, keep, fate = of_arm[record["arm"]]
                episode = record["task"], record["initial_state"]
                found.setdefault(method, {}).setdefault(f"{keep} {fate}", {})[episode] = record["success"]
    return found


def difference(one: Contrast, found: Outcomes, confidence: float, keep: str = "") -> MeanDifference | None:
    """Return the share of episodes that `arm` solved minus that of `base`; None if nothing pairs.

    Args:
        keep: only settings of this budget; "": of all.
    """
    if one.arm in found:
        sides = found[one.arm], found[one.base]
    else:
        sides = _of_fate(found, one.arm), _of_fate(found, one.base)
    settings = [setting for setting in sides[0] if setting in sides[1] and setting.startswith(keep)]
    if not settings:
        return None
    episodes = set.intersection(*(set(side[setting]) for side in sides for setting in settings))
    ordered = sorted(episodes)
    arm, base = ([fmean(side[setting][episode] for setting in settings) for episode in ordered] for side in sides)
    tasks: list[Any] = [task for task, _ in ordered]
    seen = paired_mean_difference(base, arm, tasks, confidence)
    least = 1 / len(settings)
    wide = paired_mean_difference([*base, 0.0, least], [*arm, least, 0.0], [*tasks, None, None], confidence)
    if seen is None or wide is None:
        return None
    return MeanDifference(seen.value, wide.low, wide.high, seen.pairs)


def _of_fate(found: Outcomes, fate: str) -> dict[str, Mapping[Unit, bool]]:
    """Every method and budget of one fate, by names in which the fate does not stand."""
    return {
        f"{setting.removesuffix(f' {fate}')} {method}": episodes
        for method, settings in found.items()
        if method != "random"
        for setting, episodes in settings.items()
        if setting.endswith(f" {fate}")
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the contrasts as a Markdown table, in percentage points."""
    columns = [name for name in _HEADS if any(name in row for row in rows)]
    heads = ("question", "difference", *(_HEADS[name] for name in columns))
    lines = (
        (row["question"], f"{row['arm']} - {row['base']}", *(_cell(row[name]) for name in columns)) for row in rows
    )
    return markdown.table(heads, lines) + "\n"


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Computes, writes and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study_contrasts")
    parser.add_argument("phase", nargs="?", choices=tuple(OF_PHASE), default="grid", help="default: %(default)s")
    phase = parser.parse_args(arguments).phase
    folder = RESULTS / phase
    found, rows = outcomes(folder, layer_of(phase)), []
    asked = OF_PHASE[phase]
    settings = {setting for method in found.values() for setting in method}
    keeps = [keep for keep in KEEPS if any(setting.startswith(keep) for setting in settings)]
    confidence = 1 - LEVEL / (len(asked) * len(keeps))
    for one in asked:
        values = {keep.strip() or "all": difference(one, found, confidence, keep) for keep in keeps}
        cells = {name: None if value is None else asdict(value) for name, value in values.items()}
        rows.append({**asdict(one), **cells})
    (folder / "contrasts.json").write_text(json.dumps({"confidence": confidence, "contrasts": rows}, indent=1) + "\n")
    (folder / "contrasts.md").write_text(table(rows))
    print(table(rows), end="")


if __name__ == "__main__":
    main()
