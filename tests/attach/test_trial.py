"""`only_if_faster`: a user's own control steps decide whether pruning stays. Clocks are the test's own."""

from __future__ import annotations

import logging

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import VISUAL, prompt, tiny_lm
from tests.families import cases, matrix
from tests.families.compiled import record
from tests.state import whole_state
from vla_pruner.attach.attached import session_on
from vla_pruner.attach.compiled import compiled_on
from vla_pruner.attach.trial import PASSED_OVER, STEPS, UNTIMED

METHOD = vp.VLAPruner(keep=0.25, layer=1, window=2, preset="paper")
# Importing the compiler raises a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")


class Clock:
    """A clock by which control steps take given milliseconds, depending on whether the last step was pruned."""

    def __init__(self, session, pruned, unpruned):
        self.session, self.pruned, self.unpruned, self.now, self.running = session, pruned, unpruned, 0.0, False

    def __call__(self):
        if self.running:
            self.now += 1e-3 * (self.unpruned if self.session.kept is None else self.pruned)
        self.running = not self.running
        return self.now


def attach(model, pruned, unpruned, method=METHOD, **options):
    session = method.attach(model, only_if_faster=True, **options)
    session._runner.trial.clock = Clock(session, pruned, unpruned)
    return session


def kinds(case, model, session, steps):
    found = []
    for scene in range(steps):
        case.step(model, scene, matrix.BOTH)
        found.append(session.kept is not None)
    return found


NEEDED = 2 * (PASSED_OVER + STEPS)


def test_steps_of_both_kinds_take_turns_behind_the_warm_up():
    case = cases.small_reference()
    model = case.build()
    with attach(model, 2.0, 3.0) as session:
        found = kinds(case, model, session, 2 + NEEDED + 3)
        assert session.attached
        assert (session.verdict.pruned_ms, session.verdict.unpruned_ms) == (pytest.approx(2.0), pytest.approx(3.0))
        assert session.verdict.faster
    assert found == [False, False] + [True, False] * (NEEDED // 2) + [True] * 3


def test_where_pruning_is_not_faster_the_session_detaches_itself_and_says_so(caplog):
    case = cases.small_reference()
    model = case.build()
    untouched, before = case.step(model, 9, matrix.BOTH), whole_state(model)
    session = attach(model, 3.04, 3.0)
    with caplog.at_level(logging.INFO, "vla_pruner"):
        kinds(case, model, session, 2 + NEEDED)
    assert not session.attached
    assert whole_state(model) == before
    assert torch.equal(case.step(model, 9, matrix.BOTH), untouched)
    assert [record.getMessage() for record in caplog.records] == [
        "VLAPruner is detached, since pruning is not faster here: a pruned control step of 2 robots took 3.0 ms and an "
        "unpruned one 3.0 ms (medians of 10 each, in turns)."
    ]
    assert not session.verdict.faster
    assert "detached; a pruned control step" in repr(session)
    session.detach()


def test_equal_medians_are_no_gain_and_outliers_none():
    case = cases.small_reference()
    model = case.build()
    session = attach(model, 3.0, 3.0)
    kinds(case, model, session, 2 + NEEDED)
    assert not session.attached
    with attach(model, 2.0, 3.0) as session:
        clock = session._runner.trial.clock
        for scene in range(2 + NEEDED):
            clock.pruned = 500.0 if scene in (2, 4, 12) else 2.0  # two of them compile, and one is disturbed
            case.step(model, scene, matrix.BOTH)
        assert session.attached
        assert session.verdict.pruned_ms == pytest.approx(2.0)


def test_an_unpruned_step_is_to_the_memory_what_a_refresh_is():
    """The same steps with a schedule that prunes every other one leave the same memories."""
    case = cases.small_reference()
    model = case.build()
    found = []
    for every in (None, 2):
        method = vp.VLAPruner(keep=0.25, layer=1, window=1, refresh_every=every, preset="paper")
        # With a refresh at steps 0 and 2 the pruned steps are 1 and 3, as in turns after a warm-up of one.
        session = method.attach(model) if every else attach(model, 2.0, 3.0, method)
        with session:
            found.append([record(session, case.step(model, scene, matrix.BOTH)) for scene in range(4)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.output, other.output)
        assert (one.kept is None) == (other.kept is None)
        for name, value in one.memory.state_dict().items():
            assert torch.equal(value, other.memory.state_dict()[name]), name


def test_episodes_are_respected_and_failed_steps_count_for_nothing():
    case = cases.small_reference()
    model = case.build()
    with attach(model, 2.0, 3.0) as session:
        found = kinds(case, model, session, 4)
        session.reset()
        with pytest.raises(RuntimeError, match="fell over"):
            handle = model.language_model.model.norm.register_forward_pre_hook(fail)
            try:
                case.step(model, 0, matrix.BOTH)
            finally:
                handle.remove()
                session._runner.trial.clock.running = False
        found += kinds(case, model, session, 5)
        assert session._runner.trial._taken == {2: {True: [pytest.approx(2e-3)] * 3, False: [pytest.approx(3e-3)] * 2}}
    assert found == [False, False, True, False, False, False, True, False, True]


def fail(*_):
    raise RuntimeError("the robot fell over")


def test_batches_of_other_sizes_are_timed_apart():
    case = cases.small_reference()
    model = case.build()
    with attach(model, 2.0, 3.0, vp.FastV(keep=0.25, layer=1)) as session:
        for rows in (slice(0, 1), matrix.BOTH, slice(0, 1)):
            session.reset()
            case.step(model, 0, rows)
        assert {rows: (len(one[True]), len(one[False])) for rows, one in session._runner.trial._taken.items()} == {
            1: (1, 1),
            2: (1, 0),
        }


def test_steps_that_nobody_times_leave_nothing_behind():
    """Steps after the verdict, and those of a model that is called by hand, are not kept."""
    case = cases.small_reference()
    model = case.build()
    with attach(model, 2.0, 3.0) as session:
        trial = session._runner.trial
        kinds(case, model, session, 2 + NEEDED)
        held = len(trial._opened)
        kinds(case, model, session, 5)
        assert len(trial._opened) == held
    language_model = tiny_lm()
    with vp.FastV(keep=0.25).attach(language_model, visual=VISUAL, only_if_faster=True) as session:
        for _ in range(3):
            language_model(inputs_embeds=prompt(1)[0])
            assert session.kept is not None
        assert not session._runner.trial._opened


def test_a_compiled_policy_stays_compiled_until_it_is_detached():
    case = cases.small_reference()
    model = case.build()
    untouched, before = case.step(model, 9, matrix.BOTH), whole_state(model)
    with METHOD.attach(model) as session:
        session.compile("eager")
        session.detach_unless_faster()
        session._runner.trial.clock = Clock(session, 3.0, 2.0)
        kinds(case, model, session, 2 + NEEDED)
        assert session_on(model.language_model.model) is None
        assert compiled_on(model.language_model.model) is not None
        torch.testing.assert_close(case.step(model, 9, matrix.BOTH), untouched, rtol=1e-4, atol=1e-4)
    assert compiled_on(model.language_model.model) is None
    assert whole_state(model) == before


def test_what_cannot_be_timed_is_refused():
    decoder = tiny_lm().model
    before = whole_state(decoder)
    with pytest.raises(vp.UnsupportedModelError, match="no call that is a whole control step"):
        METHOD.attach(decoder, only_if_faster=True, visual=VISUAL)
    with pytest.raises(vp.OptionError, match="only_if_faster='yes'"):
        METHOD.attach(decoder, only_if_faster="yes", visual=VISUAL)
    assert whole_state(decoder) == before
    session = METHOD.attach(decoder, visual=VISUAL)
    assert session.verdict is None
    session.detach()
    with pytest.raises(vp.SessionError, match="detached"):
        session.detach_unless_faster()


def test_control_steps_outside_of_the_timed_calls_are_reported_once(caplog):
    model = tiny_lm()
    with vp.FastV(keep=0.25).attach(model, visual=VISUAL, only_if_faster=True) as session, torch.inference_mode():
        with caplog.at_level(logging.WARNING, "vla_pruner"):
            for _ in range(UNTIMED - 1):
                model(inputs_embeds=prompt(1)[0])
            assert not caplog.records
            for _ in range(UNTIMED + 2):
                model(inputs_embeds=prompt(1)[0])
        assert session.attached
        assert session.verdict is None
    (record,) = caplog.records
    assert (
        f"{UNTIMED} control steps in a row were not timed, since none ran within generate(...)" in record.getMessage()
    )
