"""The arms that the demo compares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vla_pruner.method_names import attached, method_name
from vla_pruner.methods import Method, RandomKeep, VLAPruner

BASELINE, RECOMMENDED_ARM = "unpruned", "recommended"

RECOMMENDED: Any = VLAPruner(keep=0.25, layer=2)
"""The setting that the documents recommend. The prompt's last row costs less to read than all of them, and the mean of
all ranks by place rather than by content: with causal attention more rows see an early patch (docs/methods.md).
"""

PAPER = VLAPruner(keep=0.25, layer=2, preset="paper")
"""VLA-Pruner as published, at the layer of `RECOMMENDED`."""


@dataclass(frozen=True)
class Arm:
    """One way to run the policy.

    Attributes:
        key: short name, used in files.
        title: its name in reports.
        short: the same in up to 12 columns a line, for the terminal.
        method: the method that is attached; None runs the untouched model.
    """

    key: str
    title: str
    short: str
    method: Method | None

    def attach(self, policy: Any, episode_seed: int) -> AbstractContextManager[Any]:
        """Return a context manager that gives a session, or None for the untouched model.

        A method that draws at random gets a seed of its own for each episode, so that no draw repeats.
        """
        return attached(self.method, policy, episode_seed)


class UncompiledArms:
    """Arms as they are, attached to the one policy for an episode each.

    Args:
        policy: what the arms are attached to.
    """

    def __init__(self, policy: Any) -> None:
        self._policy = policy

    @contextmanager
    def open(self, arm: Arm, episode_seed: int) -> Iterator[tuple[Any, Any]]:
        """Begin an episode of an arm: yield the policy and the arm's session, None for the untouched model."""
        with arm.attach(self._policy, episode_seed) as session:
            if session is not None:
                session.reset()
            yield self._policy, session


def default_arms(keep: float | None = None) -> tuple[Arm, ...]:
    """Return unpruned, the recommended setting, the paper's, and a random choice that is otherwise the paper's.

    Args:
        keep: in place of the settings' own.
    """
    recommended, paper = (method if keep is None else replace(method, keep=keep) for method in (RECOMMENDED, PAPER))
    random = RandomKeep(keep=paper.keep, layer=paper.layer, pruned=paper.pruned)
    return (
        Arm(BASELINE, "unpruned", "unpruned", None),
        _arm(RECOMMENDED_ARM, RECOMMENDED_ARM, recommended),
        _arm("paper", "the paper's", paper),
        _arm("random", "random", random),
    )


def _arm(key: str, name: str, method: Any) -> Arm:
    setting = f"{method.keep:g} {method.pruned}"
    queries = getattr(method, "semantic_queries", "all")
    rows = "" if queries == "all" else f", {queries} row" if queries == "last" else f", {queries} rows"
    detail = f"{setting}, layer {method.layer}{rows}"
    if method_name(type(method)) not in ("vla-pruner", "random"):
        detail = f"{type(method).__name__} {detail}"
    return Arm(key, f"{name} ({detail})", f"{name.removeprefix('the ')}\n{setting}", method)
