"""Mistakes in a method of a user's own are sentences that name it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import TOKENS, VISUAL, decode, make_cache, prompt, tiny_lm


@dataclass(frozen=True)
class Own(vp.Method):
    """Keeps the ids that it was made with."""

    answer: Any = None
    told: Any = 4
    needs = frozenset({"features"})

    def budget(self, tokens: int) -> int:
        return self.told

    def select(self, evidence: vp.Evidence, k: int) -> torch.Tensor:
        return self.answer(evidence)


@dataclass(frozen=True)
class Ranks(vp.Scored):
    """Scores as it was made to."""

    answer: Any = None
    needs = frozenset({"features"})

    def score(self, evidence: vp.Evidence) -> torch.Tensor:
        return self.answer(evidence)


def run(method: vp.Method) -> Any:
    model = tiny_lm()
    with method.attach(model, visual=VISUAL) as session:
        decode(model, prompt()[0], None, make_cache("dynamic", model), 1)
        return session.kept


def ids(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda _: None, "Own.select returned NoneType; it returns ids"),
        (lambda _: ids([0, 1, 2], [0, 1, 2]), r"Own.select returned \(2, 3\) of torch.int64; .* shape \(2, 4\)"),
        (lambda e: e.valid, r"returned \(2, 24\) of torch.bool"),
        (lambda _: ids([0, 1, 2, 3], [0, 1, 2, 24]), "ids that are not from 0 to 23"),
        (lambda _: ids([0, 1, 2, 3], [-1, 1, 2, 3]), "ids that are not from 0 to 23"),
        (lambda _: ids([0, 0, 0, 0], [0, 1, 2, 3]), "not in rising order, each once"),
        (lambda _: ids([3, 2, 1, 0], [0, 1, 2, 3]), "not in rising order, each once"),
    ],
)
def test_ids_that_are_none(answer: Any, said: str) -> None:
    with pytest.raises(vp.VLAPrunerError, match=said):
        run(Own(answer=answer))


def test_ids_that_are_some() -> None:
    kept = run(Own(answer=lambda _: ids([0, 1, 2, 3], [4, 5, 6, 23])))
    assert kept.tolist() == [[0, 1, 2, 3], [4, 5, 6, 23]]


@pytest.mark.parametrize("told", [0, -3, 2.5, None, True])
def test_a_budget_that_is_none(told: Any) -> None:
    with pytest.raises(vp.BudgetError, match=r"Own.budget\(24\) returned .*; it returns how many"):
        run(Own(answer=lambda _: ids([0] * 4), told=told))


def test_a_budget_beyond_all_tokens_keeps_all() -> None:
    assert run(Own(answer=lambda _: ids([0] * 4), told=TOKENS + 10)) is None


@pytest.mark.parametrize(
    "answer", [lambda _: None, lambda e: e.features, lambda e: e.features[:, 1:, 0], lambda e: e.features[0, :, 0] * 1j]
)
def test_scores_that_are_none(answer: Any) -> None:
    with pytest.raises(vp.OptionError, match=r"Ranks.score returned .*; it returns numbers of shape \(2, 24\)"):
        run(Ranks(keep=4, answer=answer))


@pytest.mark.parametrize(
    ("needs", "said"),
    [
        ("semantic", "needs is 'semantic'; it is a frozenset of names"),
        (frozenset({"semantc"}), "needs has 'semantc'; it may have semantic, action"),
        (frozenset({"similarity"}), "needs has 'similarity', which is there for methods that reuse"),
        (lambda self: frozenset(), "it is a frozenset of names"),
    ],
)
def test_needs_that_no_session_meets(needs: Any, said: str) -> None:
    with pytest.raises(vp.OptionError, match=said):
        type("Wants", (Own,), {"needs": needs})(answer=lambda _: None).attach(tiny_lm(), visual=VISUAL)
