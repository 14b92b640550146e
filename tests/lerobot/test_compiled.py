"""Compiled sessions of LeRobot's policies."""

from __future__ import annotations

import pytest
from torch._dynamo.utils import counters

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.families.compiled import check_family
from tests.lerobot.test_matrix import case, pi0_fast

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


@pytest.mark.parametrize(("kind", "pruned"), [("pi0", "drop"), ("pi05", "freeze")])
def test_same_as_uncompiled_and_no_graph_after_the_first_episode(kind, pruned):
    check_family(case(kind), vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=pruned))


def test_tokens_that_are_decoded():
    check_family(pi0_fast(), vp.VLAPruner(keep=0.25, layer=1, window=1))


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_smolvla_is_same_as_uncompiled_and_makes_no_graph_after_the_first_episode(pruned):
    check_family(case("smolvla"), vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=pruned))


def test_programs_of_a_control_step_of_smolvla():
    """There are programs for the vision encoder, the prefix and all denoising steps; pruned steps add the last two."""
    one = case("smolvla")
    policy = one.build()
    counters.clear()
    with vp.VLAPruner(keep=0.25, layer=1, window=1).attach(policy) as session:
        session.compile("eager")
        found = []
        for scene in range(4):
            one.step(policy, scene, slice(0, 2))
            assert session._runner.compiled is not None
            found.append((session._runner.compiled.programs, counters["stats"]["unique_graphs"]))
    assert found == [(3, 3), (5, 5), (5, 5), (5, 5)]
    assert not counters["graph_break"]
    with vp.compiled(policy, "eager") as compiled:
        one.step(policy, 0, slice(0, 2))
        assert compiled.programs == 3
