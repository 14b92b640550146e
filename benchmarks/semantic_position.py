"""Does the semantic score of the reference policy rank visual tokens by their position?

    python -m benchmarks.semantic_position   # prints a table, writes benchmarks/results/semantic_position.json

Observations are those of unpruned episodes of Meta-World tasks: the first `STEPS` control steps from initial states of
which none was trained on. The score is read at layer 2, for pruning at layer 3, with each choice of rows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import vla_pruner as vp
from vla_pruner.auditing.position import rank_by_position
from vla_pruner.conditions import machine_conditions
from vla_pruner.observations import Observation
from vla_pruner.simulators import find_suite

OUT = Path(__file__).parent / "results" / "semantic_position.json"
TASKS = ("reach", "push")
STATES = (0, 1, 2)
STEPS = 8
QUERIES = ("all", "text", "last")
SIDE = 14
ROWS = 4
"""Rows of the image from above, whose share of the best quarter is counted; by chance it is 4 of 14."""


def observations(policy: Any, task: str) -> list[Observation]:
    """Return the observations of the unpruned policy's first control steps."""
    suite = find_suite("metaworld:mt8")
    convention, environment, found = suite.convention(policy), suite.make(task), []
    for state in STATES:
        policy.reset()
        seen, _ = environment.reset(initial_state=state)
        for _ in range(STEPS):
            shown = convention.observe(seen)
            found.append(shown)
            chunk = policy.act(shown.images, shown.instruction, shown.proprio)
            ended = False
            for action in convention.plan(chunk):
                seen, _, terminated, truncated, _ = environment.step(action)
                ended = terminated or truncated
                if ended:
                    break
            if ended:
                break
    environment.close()
    return found


def measure(policy: Any, seen: list[Any], queries: str) -> dict[str, Any]:
    """Spearman's correlation with the index, and the share of the best quarter in the top rows; means and extremes."""
    correlations, shares = [], []
    with vp.SemanticOnly(keep=1.0, semantic_queries=queries).attach(policy) as session:
        for observation in seen:
            policy.act(observation.images, observation.instruction, observation.proprio)
            score = session.scores["semantic"][0].numpy()
            correlations.append(rank_by_position(score))
            best = np.argsort(-score, kind="stable")[: len(score) // 4]
            shares.append(float(np.mean(best < ROWS * SIDE)))
    return {
        "observations": len(seen),
        "spearman": {"mean": np.mean(correlations), "least": min(correlations), "most": max(correlations)},
        "share_of_best_quarter_in_top_rows": np.mean(shares),
    }


def main() -> None:
    policy = vp.load_policy("reference:autoregressive")
    found = {task: observations(policy, task) for task in TASKS}
    results = {task: {rows: measure(policy, seen, rows) for rows in QUERIES} for task, seen in found.items()}
    content = {
        "conditions": machine_conditions(("vla-pruner", "torch", "transformers", "numpy", "metaworld", "mujoco")),
        "layer": 2,
        "initial_states": STATES,
        "steps": STEPS,
        "top_rows": [ROWS, SIDE],
        "results": results,
    }
    OUT.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for task, rows in results.items():
        for name, result in rows.items():
            one = result["spearman"]
            share = result["share_of_best_quarter_in_top_rows"]
            print(f"{task:8} {name:5} {one['mean']:+.2f} ({one['least']:+.2f} to {one['most']:+.2f})  {share:.2f}")


if __name__ == "__main__":
    main()
