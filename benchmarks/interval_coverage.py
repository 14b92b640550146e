"""How often the interval of a paired difference misses the truth, tasks as strata: `Pairs.limits` under simulation.

python -m benchmarks.interval_coverage [--runs 20000] [--out benchmarks/results/interval_coverage.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vla_pruner.statistics import Pairs

Cell = tuple[float, float, float, float]

DIFFERING = [(0, 0), (0, 0), (0, 0.01), (0.01, 0.01), (0, 0.3), (0, 0.05), (0.02, 0.02), (0, 0), (0.01, 0), (0.05, 0.1)]
EXTREME = [(0, 0), (0, 0.9), (0, 0), (0.6, 0.01), (0, 0), (0, 0)]
"""Shares of pairs that only the arm, only the baseline solves, of each task; 2 % are solved by neither."""

SCENARIOS: dict[str, list[Cell]] = {
    "alike, no loss, 4 % discordant": [(0.95, 0.02, 0.02, 0.01)] * 8,
    "alike, 2 points lost, 4 % discordant": [(0.93, 0.01, 0.03, 0.03)] * 8,
    "alike, 5 points lost, none gained": [(0.93, 0.0, 0.05, 0.02)] * 8,
    "alike, a policy that solves a quarter": [(0.1, 0.05, 0.15, 0.7)] * 8,
    "alike, no loss, 20 % discordant": [(0.6, 0.1, 0.1, 0.2)] * 8,
    "tasks that differ": [(0.98 - gained - lost, gained, lost, 0.02) for gained, lost in DIFFERING],
    "tasks that differ as much as they can": [(0.98 - gained - lost, gained, lost, 0.02) for gained, lost in EXTREME],
    "one task of eight is lost": [(0.98, 0.01, 0.01, 0.0)] * 7 + [(0.2, 0.0, 0.8, 0.0)],
}
"""Shares of pairs that both, only the arm, only the baseline and neither solves, of each task."""

EPISODES = (3, 6, 10, 20, 50, 150)


def simulate(cells: list[Cell], episodes: int, runs: int, seed: int) -> dict[str, float]:
    """Return how often the truth is below or above the 95 % interval, and the width of it with and without strata."""
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.multinomial(episodes, cell, runs) for cell in cells], axis=1)
    truth = sum(cell[1] - cell[2] for cell in cells) / len(cells)
    below = above = 0
    width = whole_width = 0.0
    for run in drawn.tolist():
        pairs = Pairs(tuple(tuple(counts) for counts in run))
        low, high = pairs.limits()
        below, above = below + (truth < low), above + (truth > high)
        width += high - low
        whole = Pairs((pairs.total,)).limits()
        whole_width += whole[1] - whole[0]
    return {
        "truth": round(truth, 4),
        "truth_below_percent": round(100 * below / runs, 2),
        "truth_above_percent": round(100 * above / runs, 2),
        "width_points": round(100 * width / runs, 2),
        "width_points_without_strata": round(100 * whole_width / runs, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/interval_coverage.json"))
    options = parser.parse_args()
    found = []
    for name, cells in SCENARIOS.items():
        for episodes in EPISODES:
            result = simulate(cells, episodes, options.runs, len(found))
            found.append({"scenario": name, "tasks": len(cells), "episodes_a_task": episodes, **result})
            print(json.dumps(found[-1]), flush=True)
    worst = {side: max(one[f"truth_{side}_percent"] for one in found) for side in ("below", "above")}
    options.out.write_text(
        json.dumps({"runs": options.runs, "worst_percent": worst, "scenarios": found}, indent=1) + "\n"
    )
    print(worst)


if __name__ == "__main__":
    main()
