"""Does the semantic score rank visual tokens by what they show, or by their place in the sequence?"""

from __future__ import annotations

import numpy as np

from vla_pruner.auditing.report import Check
from vla_pruner.auditing.subject import Subject
from vla_pruner.methods.base import Method

SCENES = 3
STRONG = 0.9
"""The correlation from which on position explains the order nearly alone."""


def position(subject: Subject) -> Check:
    """The rank correlation of the semantic score with the token's index is a figure only: it fails nothing."""
    name = "position"
    method = subject.method
    if "semantic" not in method.needs:
        return Check(name, None, "", f"{type(method).__name__} reads no semantic score.")
    if subject.steps is None:
        return Check(name, None, "", f"{type(method).__name__} pruned none of the first control steps.")
    found = []
    for number in range(SCENES):
        with subject.attach() as session:
            subject.run(session, [number] * subject.steps)
            score = session.scores.get("semantic")
        if score is not None:
            found.append(rank_by_position(score[0].float().cpu().numpy()))
    ranked = [value for value in found if value is not None]
    if not ranked:
        return Check(name, None, "", "All visual tokens have the same semantic score, so there is no order.")
    value = float(np.mean(ranked))
    rows = _rows(method)
    figure = f"Spearman {value:+.2f} of the semantic score{rows} with the token's index"
    detail = f"Mean of {len(ranked)} scenes. Near 0 it does not follow position; at -1 the first tokens score most."
    if abs(value) >= STRONG:
        detail += " This score ranks the visual tokens by where they stand, hardly by what they show."
        if method.queries == "all":
            detail += " Under causal attention more rows see an early token, and a mean over all rows rewards that."
        others = [repr(queries) for queries in ("text", "last") if queries != method.queries]
        detail += f" Compare semantic_queries={' and '.join(others)}." if rows else ""
    return Check(name, True, figure, detail)


def rank_by_position(score: np.ndarray) -> float | None:
    """Return Spearman's correlation of a score (M,) with the index, equal scores sharing their mean rank; None if all
    are equal.
    """
    _, places, counts = np.unique(score, return_inverse=True, return_counts=True)
    if len(counts) < 2:
        return None
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
    return float(np.corrcoef(ranks, np.arange(len(score)))[0, 1])


def _rows(method: Method) -> str:
    queries = getattr(method, "semantic_queries", None)
    return "" if queries is None else f" over {queries!r} rows"
