"""The rate at which the bootstrap interval of `vla-pruner calibrate` misses the truth, for few episodes.

    python -m benchmarks.bootstrap_coverage        writes benchmarks/results/bootstrap_coverage.json (2 minutes)

Each run draws one figure an episode from a known distribution and notes on which side of the interval the true mean
lies.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from vla_pruner.bootstrap import mean_estimate

RUNS = 2000
EPISODES = (6, 12, 30)
RESULT = Path(__file__).parent / "results" / "bootstrap_coverage.json"
DISTRIBUTIONS: dict[str, tuple[Callable[[np.random.Generator, int], np.ndarray], float]] = {
    "normal": (lambda generator, count: generator.normal(5.0, 1.0, count), 5.0),
    "gamma, shape 2": (lambda generator, count: generator.gamma(2.0, 1.0, count), 2.0),
    "lognormal, sigma 0.5": (lambda generator, count: generator.lognormal(0.0, 0.5, count), float(np.exp(0.125))),
}


def main() -> None:
    """Simulate and write the result."""
    generator, rows = np.random.default_rng(0), []
    for name, (draw, mean) in DISTRIBUTIONS.items():
        for episodes in EPISODES:
            above = below = 0
            for _ in range(RUNS):
                found = mean_estimate(draw(generator, episodes).tolist())
                assert found.low is not None
                assert found.high is not None
                above += found.high < mean
                below += found.low > mean
            row = {"distribution": name, "episodes": episodes, "truth_above": above / RUNS, "truth_below": below / RUNS}
            rows.append(row)
            print(row, flush=True)
    RESULT.write_text(json.dumps({"runs": RUNS, "nominal": 0.025, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
