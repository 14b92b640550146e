"""The arms that the demo compares."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from vla_pruner.method_names import attached
from vla_pruner.methods import Method, RandomKeep, VLAPruner

BASELINE = "unpruned"


@dataclass(frozen=True)
class Arm:
    """One way to run the policy.

    Attributes:
        key: short name, used in files.
        title: what reports call it.
        short: the same in up to 10 columns a line, for the terminal.
        method: what is attached; None runs the untouched model.
    """

    key: str
    title: str
    short: str
    method: Method | None

    def attach(self, policy: Any, episode_seed: int) -> AbstractContextManager[Any]:
        """A context manager that gives a session, or None for the untouched model.

        A method that draws at random gets a seed of its own for each episode, so that no draw repeats.
        """
        return attached(self.method, policy, episode_seed)


def default_arms(keep: float) -> tuple[Arm, ...]:
    """Unpruned; VLA-Pruner at `keep` dropped and frozen, at half of it frozen; a random choice at `keep` dropped."""
    full, half = f"{keep:g}", f"{keep / 2:g}"
    return (
        Arm(BASELINE, "unpruned", "unpruned", None),
        Arm("drop", f"VLA-Pruner {full} drop", f"drop\n{full}", VLAPruner(keep=keep, pruned="drop")),
        Arm("freeze", f"VLA-Pruner {full} freeze", f"freeze\n{full}", VLAPruner(keep=keep, pruned="freeze")),
        Arm("freeze-half", f"VLA-Pruner {half} freeze", f"freeze\n{half}", VLAPruner(keep=keep / 2, pruned="freeze")),
        Arm("random", f"random {full} drop", f"random\n{full}", RandomKeep(keep=keep, pruned="drop")),
    )
