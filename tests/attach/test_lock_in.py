"""Tokens that action history alone dropped cannot come back by themselves, and the ways out."""

from __future__ import annotations

from typing import Any

import pytest

from tests.attach.tiny import VISUAL, decode, make_cache, prompt, tiny_lm
from vla_pruner import methods
from vla_pruner.errors import BudgetError, OptionError

STEPS = 16


def kept_sets(method: Any) -> list[tuple[int, ...] | None]:
    """Return the ids kept in each control step of an episode, in each of which the image is another one."""
    model = tiny_lm("llama", "sdpa")
    found = []
    with method.attach(model, visual=VISUAL) as session:
        for step in range(STEPS):
            embeds, _ = prompt(seed=step)
            decode(model, embeds[:1], None, make_cache("dynamic", model), 3)
            found.append(None if session.kept is None else tuple(session.kept[0].tolist()))
    return found


@pytest.mark.parametrize("kind", [methods.ActionOnly, methods.ScoreFusion])
def test_refreshing_renews_the_first_kept_set(kind: Any) -> None:
    options = {"weight": 0.0} if kind is methods.ScoreFusion else {}
    locked = kept_sets(kind(keep=0.25, layer=1, **options))
    assert locked[:3] == [None] * 3
    assert len(set(locked[3:])) == 1, "the published rule stays with its first choice"
    refreshed = kept_sets(kind(keep=0.25, layer=1, refresh_every=4, **options))
    assert [step for step, ids in enumerate(refreshed) if ids is None] == [0, 1, 2, 4, 8, 12]
    assert len({refreshed[step] for step in (3, 5, 9, 13)}) == 4
    frozen = kept_sets(kind(keep=0.25, layer=1, pruned="freeze", **options))
    assert len(set(frozen[3:])) > 1


@pytest.mark.parametrize("unseen", ["zero", "carry"])
def test_refreshing_renews_what_is_kept_before_the_decoder(unseen: str) -> None:
    kept = kept_sets(methods.VLAPruner(keep=0.25, layer=0, refresh_every=4, unseen=unseen, preset="paper"))
    assert len({kept[step] for step in (3, 5, 9, 13)}) == 4


def test_a_part_by_diversity_follows_the_image() -> None:
    assert len(set(kept_sets(methods.ActionAndDiversity(keep=0.25, layer=1))[3:])) > 1


@pytest.mark.parametrize("kind", [methods.ActionOnly, methods.ActionAndDiversity])
def test_before_the_decoder_memory_alone_is_refused(kind: Any) -> None:
    with pytest.raises(BudgetError, match="layer=0 was given without refresh_every"):
        kind(layer=0)
    kind(layer=0, refresh_every=4)
    with pytest.raises(OptionError, match="refresh_every=1 was given"):
        kind(refresh_every=1)
