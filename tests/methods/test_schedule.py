"""The schedule: one type decides for every method which control steps are pruned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vla_pruner as vp
from vla_pruner.methods.schedule import Schedule


def memory(steps: list[int], motion: int = 0) -> vp.Memory:
    empty = vp.Memory.empty(len(steps), 0, 4, motion=motion)
    return replace(empty, steps=torch.tensor(steps))


def pruned(schedule: Schedule, steps: int = 8) -> list[int]:
    return [step for step in range(steps) if schedule.prunes(memory([step]))]


def test_warm_up_and_refresh():
    assert pruned(Schedule()) == list(range(8))
    assert pruned(Schedule(warm_up=3)) == [3, 4, 5, 6, 7]
    assert pruned(Schedule(refresh_every=3)) == [1, 2, 4, 5, 7]
    assert pruned(Schedule(warm_up=2, refresh_every=4)) == [2, 3, 5, 6, 7]
    assert pruned(Schedule(warm_up=None)) == []


def test_one_row_speaks_for_all():
    assert not Schedule(warm_up=3).prunes(memory([9, 2]))
    assert not Schedule(refresh_every=4).prunes(memory([5, 8]))
    assert Schedule(warm_up=3, refresh_every=4).prunes(memory([5, 3]))


def test_a_gate_asks_the_motion():
    gated, told = Schedule(gate=2), memory([5], motion=2)
    assert gated.prunes(replace(told, motion=torch.tensor([[1.0, 2.0]])))
    assert not gated.prunes(replace(told, motion=torch.tensor([[2.0, 1.0]])))
    with pytest.raises(vp.SessionError, match="not told after every control step"):
        gated.prunes(told)
    assert not gated.prunes(memory([1], motion=2)), "the first two steps are whole, whatever the arm did"


@pytest.mark.parametrize("options", [{"refresh_every": 1}, {"refresh_every": True}, {"gate": 1}, {"gate": 2.0}])
def test_what_is_out_of_range_is_refused(options):
    with pytest.raises(vp.OptionError, match=f"{next(iter(options))}="):
        Schedule(**options)


METHODS = {
    "as published": (vp.VLAPruner(preset="paper"), Schedule(3)),
    "semantic warm-up": (vp.VLAPruner(warmup="semantic", refresh_every=4, preset="paper"), Schedule(0, 4)),
    "smoothed": (vp.ActionOnly(window=2), Schedule(2)),
    "longer warm-up": (vp.ScoreFusion(window=2, warmup_steps=5), Schedule(5)),
    "without a history": (vp.FastV(warmup_steps=2), Schedule(2)),
    "random": (vp.RandomKeep(warmup_steps=1, refresh_every=3), Schedule(1, 3)),
    "reusing": (vp.VLACache(refresh_every=5), Schedule(1, 5)),
    "gated": (vp.TextQuery(gate=3), Schedule(gate=3)),
    "never": (vp.Unpruned(), Schedule(warm_up=None)),
    "fixed": (vp.KeepFixed((1,)), Schedule()),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_its_schedule(name):
    method, schedule = METHODS[name]
    assert method.schedule == schedule
    assert type(method).prunes is vp.Method.prunes
    assert method.motion == (schedule.gate or 0)
