"""The audit reports if the semantic score ranks visual tokens by position. It is a figure, and fails nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import vla_pruner as vp
from vla_pruner.auditing.position import position, rank_by_position
from vla_pruner.auditing.subject import Subject

ROOT = Path(__file__).parents[2]


def figure(method: vp.Method) -> float:
    check = position(Subject(vp.reference_policy("autoregressive"), method))
    assert check.passed
    return float(check.figure.split()[1])


def test_all_rows_rank_by_position_on_the_shipped_policy_and_others_do_not() -> None:
    assert figure(vp.VLAPruner(preset="paper")) < -0.95
    assert figure(vp.SemanticOnly(semantic_queries="all")) < -0.95
    for rows in ("text", "last"):
        assert abs(figure(vp.SemanticOnly(semantic_queries=rows))) < 0.6, rows


def test_what_it_says() -> None:
    found = position(Subject(vp.reference_policy("autoregressive"), vp.VLAPruner(preset="paper")))
    assert re.fullmatch(
        r"Spearman -(0\.9\d|1\.00) of the semantic score over 'all' rows with the token's index", found.figure
    )
    assert "Compare semantic_queries='text' and 'last'" in found.detail
    assert "a mean over all rows rewards that" in found.detail
    weak = position(Subject(vp.reference_policy("autoregressive"), vp.FastV()))
    assert "hardly by what they show" not in weak.detail


@pytest.mark.parametrize(
    ("method", "advice"),
    [
        (vp.VLAPruner(window=1), "by what they show. Compare semantic_queries='text'."),
        (vp.FastV(semantic_queries="text"), "by what they show. Compare semantic_queries='last'."),
        (vp.SparseVLM(), "by what they show."),
    ],
    ids=str,
)
def test_a_score_of_few_rows_is_not_told_of_a_mean_over_all(
    method: vp.Method, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vla_pruner.auditing.position.STRONG", 0.0)
    assert position(Subject(vp.random_policy("reference"), method)).detail.endswith(advice)


@pytest.mark.parametrize("method", [vp.RandomKeep(keep=0.5), vp.ActionOnly(), vp.DivPrune()])
def test_it_cannot_be_asked_of_methods_that_do_not_read(method: vp.Method) -> None:
    check = position(Subject(vp.random_policy("reference"), method))
    assert check.passed is None
    assert "reads no semantic score" in check.detail


@pytest.mark.parametrize("family", ["openvla", "openvla-oft", "pi0"])
def test_it_is_asked_of_every_family(family: str) -> None:
    check = position(Subject(vp.random_policy(family), vp.VLAPruner(window=1, preset="paper")))
    assert check.passed
    assert -1 <= float(check.figure.split()[1]) <= 1


def test_ranks_by_hand() -> None:
    assert rank_by_position(np.array([0.1, 0.2, 0.9])) == pytest.approx(1.0)
    assert rank_by_position(np.array([3.0, 2.0, 1.0, 0.0])) == pytest.approx(-1.0)
    # Ranks 1.5 1.5 3 against 0 1 2: covariance 1.5, over the root of 1.5 x 2.
    assert rank_by_position(np.array([1.0, 1.0, 2.0])) == pytest.approx(1.5 / np.sqrt(1.5 * 2))
    assert rank_by_position(np.array([2.0, 2.0])) is None


def test_the_document_has_what_was_measured() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "semantic_position.json").read_text(encoding="utf-8"))
    said = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for rows in ("all", "text", "last"):
        cells = []
        for task in ("reach", "push"):
            result = measured["results"][task][rows]
            share = f"{result['share_of_best_quarter_in_top_rows']:.2f}".removeprefix("0")
            cells.append(f"{result['spearman']['mean']:.2f}, {share}")
        assert f'| `"{rows}"` | {cells[0]} | {cells[1]} |' in said
    counted = sum(result["all"]["observations"] for result in measured["results"].values())
    assert f"over {counted} rendered observations" in said
