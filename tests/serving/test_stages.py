"""Times in replies if parts of the control step are compiled as one."""

from __future__ import annotations

from typing import Any

import pytest

import vla_pruner as vp
from tests.serving.robots import seen
from tests.state import whole_state
from vla_pruner.families import family_of
from vla_pruner.serving.stages import StepTimer

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


def test_a_compiled_step_is_timed_from_outside_of_its_graphs(policy: Any) -> None:
    """This holds even if its graphs are made while the timer is open, as in a server."""
    given = seen(policy)
    before = whole_state(policy)
    with vp.VLAPruner(keep=0.25, layer=1, window=1, preset="paper").attach(policy) as session:
        session.compile("eager")
        with StepTimer(policy, family_of(policy)) as timer:
            session.clock = timer.stage
            for _ in range(3):
                with timer.step():
                    policy.act(given.images, given.instruction, given.proprio)
                found = timer.timing()
                assert found["vision_ms"] > 0
                assert found["prefill_ms"] > 0
                assert found["prune_ms"] > 0
                assert found["action_ms"] == 0
                assert sum(found[name] for name in ("vision_ms", "prefill_ms", "prune_ms")) < found["infer_ms"]
    assert whole_state(policy) == before
