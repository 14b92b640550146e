"""Compiled sessions of LeRobot's policies."""

from __future__ import annotations

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.families.compiled import check_family
from tests.lerobot.test_matrix import case, pi0_fast
from tests.state import whole_state

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.parametrize(("kind", "pruned"), [("pi0", "drop"), ("pi05", "freeze")])
def test_same_as_uncompiled_and_no_graph_after_the_first_episode(kind, pruned):
    check_family(case(kind), vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=pruned))


def test_tokens_that_are_decoded():
    check_family(pi0_fast(), vp.VLAPruner(keep=0.25, layer=1, window=1))


def test_smolvla_is_refused_and_left_as_it_was():
    policy = case("smolvla").build()
    before = whole_state(policy.module)
    with pytest.raises(vp.UnsupportedModelError, match="loop of its own"):
        vp.VLAPruner(keep=0.25).attach(policy, compile=True)
    with pytest.raises(vp.UnsupportedModelError, match="loop of its own"):
        vp.compiled(policy)
    assert whole_state(policy.module) == before
    vp.VLAPruner(keep=0.25).attach(policy).detach()
