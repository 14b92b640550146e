"""VLA-ADP's gate: reports of the arm's motion, the refused ones, and the steps that are pruned for it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import TOKENS, VISUAL, decode, make_cache, prompt, tiny_lm

GATED = vp.TextQuery(keep=0.25, gate=3)


def step(model, rows=1, seed=1):
    return decode(model, prompt(rows, seed=seed)[0], None, make_cache("dynamic", model), 2)[1]


def drive(session, model, paths):
    """Return for each control step whether it was pruned; the arms move `paths[i]` in step i."""
    pruned = []
    for seed, path in enumerate(paths):
        step(model, rows=1 if isinstance(path, float) else len(path), seed=seed)
        pruned.append(session.kept is not None)
        session.moved(path)
    return pruned


def by_the_paper(paths, tau):
    """Step i is pruned unless the path before it is at most the smallest of the tau, or three in a row were."""
    pruned = []
    for i in range(len(paths)):
        recent = paths[max(0, i - tau) : i]
        far = i >= 2 and not recent[-1] <= min(recent[:-1])
        pruned.append(far and not (i >= 3 and all(pruned[i - 3 : i])))
    return pruned


@pytest.mark.parametrize("tau", [2, 3, 5])
def test_a_step_is_pruned_unless_the_arm_moved_least(tau):
    paths = np.random.default_rng(tau).uniform(0, 1, 25).round(1).tolist()
    assert len(set(paths)) < len(paths), "ties close the gate, or this test could not tell"
    expected = by_the_paper(paths, tau)
    assert {True, False} == set(expected[2:])
    model = tiny_lm()
    with vp.TextQuery(keep=0.25, gate=tau).attach(model, visual=VISUAL) as session:
        assert drive(session, model, paths) == expected
        session.reset()
        assert drive(session, model, paths[:9]) == expected[:9], "an episode knows nothing of the one before"


def test_the_step_after_three_pruned_in_a_row_is_whole():
    model = tiny_lm()
    with GATED.attach(model, visual=VISUAL) as session:
        pruned = drive(session, model, [float(i) for i in range(1, 12)])
        assert pruned == [False] * 2 + [True, True, True, False] * 2 + [True]


def test_an_open_gate_is_no_gate():
    model = tiny_lm()
    with vp.TextQuery(keep=0.25).attach(model, visual=VISUAL):
        expected = step(model, seed=2)
    with GATED.attach(model, visual=VISUAL) as session:
        drive(session, model, [1.0, 2.0])
        assert torch.equal(step(model, seed=2), expected)


def test_one_row_s_closed_gate_is_every_row_s():
    model = tiny_lm()
    near, far = torch.tensor([3.0, 1.0]), torch.tensor([4.0, 5.0])
    with GATED.attach(model, visual=VISUAL) as session:
        assert drive(session, model, [torch.tensor([1.0, 2.0]), near, far, far]) == [False, False, False, True]


def test_a_row_that_was_reset_starts_anew():
    model = tiny_lm()
    with GATED.attach(model, visual=VISUAL) as session:
        drive(session, model, [torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])])
        step(model, rows=2)
        assert session.kept is not None
        session.reset(rows=[1])
        session.moved(torch.tensor([3.0, 4.0]))
        memory = session.memory
        assert memory is not None
        assert memory.motion[0].tolist() == [1, 2, 3]
        assert memory.motion[1].isnan().all(), "what the arm did belongs to the episode before"
        assert memory.streak.tolist() == [1, 0]
        with pytest.raises(vp.SessionError, match="twice"):
            session.moved(torch.tensor([3.0, 4.0]))
        assert drive(session, model, [torch.tensor([9.0, 1.0]), torch.tensor([9.5, 2.0])]) == [False, False]
        step(model, rows=2)
        assert session.kept is not None


def test_memory_carries_the_gate(tmp_path):
    model = tiny_lm()
    paths = [1.0, 2.0, 3.0, 4.0, 5.0]
    with GATED.attach(model, visual=VISUAL) as session:
        assert drive(session, model, paths) == [False, False, True, True, True]
        torch.save(session.memory.state_dict(), tmp_path / "memory.pt")  # type: ignore[union-attr]
        session.reset()
        step(model)
        session.memory = vp.Memory(**torch.load(tmp_path / "memory.pt"))
        step(model)
        assert session.kept is None, "three in a row were pruned"
        two = vp.Memory.empty(2, 0, TOKENS, motion=3).put([1], session.memory)
        assert two.motion.isnan().tolist() == [[True] * 3, [False, False, True]]
        assert two.take([1]).motion[0, :2].tolist() == [4, 5]
        assert two.streak.tolist() == [0, 0]
        with pytest.raises(vp.SessionError, match="motion of 2 control steps"):
            session.memory = vp.Memory.empty(1, 0, TOKENS, motion=2)


def test_what_was_left_untold_is_refused_when_it_counts():
    model = tiny_lm()
    with GATED.attach(model, visual=VISUAL) as session:
        step(model)
        step(model)
        session.moved(1.0)
        with pytest.raises(vp.SessionError, match="not told after every control step"):
            step(model)
        session.reset()
        step(model)
        assert session.kept is None


@pytest.mark.parametrize("wrong", [-0.1, math.nan, math.inf, [1.0], torch.ones(3), "far", None, torch.ones(2, 1)])
def test_what_is_no_distance_of_each_row_is_refused(wrong):
    model = tiny_lm()
    with GATED.attach(model, visual=VISUAL) as session:
        step(model, rows=2)
        with pytest.raises(vp.SessionError, match=r"moved\("):
            session.moved(wrong)
        with pytest.raises(vp.SessionError, match="2 rows"):
            session.moved(1.0)
        session.moved(np.array([1.0, 2.0]))  # type: ignore[arg-type]
        assert session.memory.motion[:, -1].tolist() == [1, 2]  # type: ignore[union-attr]
        with pytest.raises(vp.SessionError, match="twice"):
            session.moved(torch.ones(2))


def test_nobody_moves_before_the_first_step_or_for_another_method():
    model = tiny_lm()
    with GATED.attach(model, visual=VISUAL) as session:
        with pytest.raises(vp.SessionError, match="before the first control step"):
            session.moved(1.0)
        step(model)
        session.reset(rows=[0])
        with pytest.raises(vp.SessionError, match="before the first control step"):
            session.moved(1.0)
    with vp.TextQuery(keep=0.25).attach(model, visual=VISUAL) as session:
        step(model)
        with pytest.raises(vp.SessionError, match="TextQuery as it was made prunes whatever the arm does"):
            session.moved(1.0)


@pytest.mark.parametrize("gate", [1, 0, True, 2.5])
def test_a_gate_of_fewer_than_two_steps_is_refused(gate):
    with pytest.raises(vp.OptionError, match="gate="):
        vp.TextQuery(gate=gate)
