"""No pair of conditions is lost when cases stand for all products."""

from __future__ import annotations

from itertools import product

from tests.attach import test_layer_zero, test_parity
from tests.attach.tiny import TYPES
from tests.pairwise import pairs_of, pairwise

FACTORS = TYPES, ("sdpa", "eager"), ("dynamic", "static"), (None, "right", "left")


def test_every_pair_of_a_possible_case_is_there() -> None:
    whole = [case for case in product("abc", "xy", (1, 2, 3), (True, False)) if case[:2] != ("a", "y")]
    found = pairwise("abc", "xy", (1, 2, 3), (True, False), possible=lambda one, two, *_: (one, two) != ("a", "y"))
    assert set(found) <= set(whole)
    assert len(found) < len(whole) / 2
    assert set().union(*map(pairs_of, found)) == set().union(*map(pairs_of, whole))


def test_pairs_of_the_decoders() -> None:
    for cases, others in (
        (test_parity.ALL_KEPT, test_parity.NOTHING_DROPPED),
        (test_parity.PRUNED, ("drop", "freeze")),
        (test_layer_zero.PRUNED, ("drop", "freeze")),
    ):
        whole = [case for case in product(*FACTORS, others) if case[:2] != ("gemma2", "sdpa")]
        assert set().union(*map(pairs_of, cases)) == set().union(*map(pairs_of, whole))
