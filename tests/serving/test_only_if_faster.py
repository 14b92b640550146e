"""`--only-if-faster`: the policy is served unpruned if pruning is not faster. The clock is the test's own."""

from __future__ import annotations

from typing import Any

import pytest

import vla_pruner as vp
from tests.attach.test_trial import Clock
from tests.serving.robots import seen
from tests.state import whole_state
from vla_pruner.attach.session import Session
from vla_pruner.methods import Unpruned
from vla_pruner.serving.engine import Answer, Engine, Job, Robot
from vla_pruner.serving.observations import reader_of
from vla_pruner.serving.settings import ServerSettings

METHOD = vp.VLAPruner(keep=0.25, window=1, preset="paper")


@pytest.mark.parametrize("pruned_ms", [2.0, 3.0])
def test_steps_are_timed_before_anybody_is_served(
    policy: Any, monkeypatch: pytest.MonkeyPatch, pruned_ms: float
) -> None:
    begin = Session.detach_unless_faster

    def begin_with_clock(session: Session) -> None:
        begin(session)
        trial = session._runner.trial
        assert trial is not None
        trial.clock = Clock(session, pruned_ms, 2.5)

    monkeypatch.setattr(Session, "detach_unless_faster", begin_with_clock)
    before = whole_state(policy)
    engine = Engine(policy, METHOD, reader_of(policy), ServerSettings(max_batch=2, only_if_faster=True))
    engine.open()
    try:
        session, robot, kept = engine._session, Robot(1), []
        assert session is not None
        assert session.attached
        assert (engine.method is METHOD) == (pruned_ms < 2.5)
        assert isinstance(session.method, Unpruned) == (pruned_ms > 2.5)
        for step in range(3):
            (answer,) = engine.run([Job(robot, seen(policy, 1, step))])
            assert isinstance(answer, Answer)
            kept.append(answer.timing["kept_tokens"] < answer.timing["total_tokens"])
        assert kept == ([False, True, True] if pruned_ms < 2.5 else [False] * 3)
        assert robot.step == 3
    finally:
        engine.close()
    assert whole_state(policy) == before
