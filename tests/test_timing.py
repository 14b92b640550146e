"""The stage timer against a policy that sleeps, and that it leaves nothing behind."""

from __future__ import annotations

from time import sleep

import pytest
import torch
from torch import nn

from vla_pruner.errors import UnsupportedModelError
from vla_pruner.timing import STAGES, StageTimer


class _Sleeper(nn.Module):
    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.seconds = milliseconds / 1e3

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        sleep(self.seconds if inputs_embeds.shape[1] > 1 else self.seconds / 10)
        return inputs_embeds


class _Policy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vision, self.projector, self.language_model = _Sleeper(20), _Sleeper(10), _Sleeper(50)

    def act(self, timer: StageTimer) -> None:
        tokens = torch.zeros(1, 8, 2)
        self.projector(self.vision(tokens))
        with timer.stage("pruning"):
            pass
        self.language_model(inputs_embeds=tokens)
        for _ in range(2):
            self.language_model(tokens[:, :1])
        sleep(0.005)


def _state(module: nn.Module) -> list[object]:
    return [
        (name, len(part._forward_hooks), len(part._forward_pre_hooks), sorted(vars(part)))
        for name, part in module.named_modules()
    ]


def test_stages_are_told_apart_and_add_up() -> None:
    policy = _Policy()
    with StageTimer(policy) as timer:
        for _ in range(2):
            with timer.step():
                policy.act(timer)
    assert len(timer.steps) == 2
    step = timer.steps[1]
    assert step.total == pytest.approx(sum(getattr(step, stage) for stage in STAGES))
    # A loaded machine sleeps longer than it is told, never shorter.
    assert 30 <= step.vision < step.total
    assert step.prefill >= 50
    assert 10 <= step.decode < step.prefill
    assert step.other >= 5
    assert step.pruning < step.prefill


def test_pruning_is_taken_out_of_the_prefill() -> None:
    policy = _Policy()
    with StageTimer(policy) as timer:

        def prune(*_: object) -> None:
            with timer.stage("pruning"):
                sleep(0.03)

        handle = policy.language_model.register_forward_pre_hook(prune)
        with timer.step():
            policy.language_model(torch.zeros(1, 8, 2))
        handle.remove()
    assert timer.steps[0].pruning >= 30
    assert timer.steps[0].prefill >= 50
    assert timer.steps[0].other < timer.steps[0].prefill


def test_pruning_inside_decode_and_inside_itself_counts_once() -> None:
    policy = _Policy()
    with StageTimer(policy) as timer:

        def record(*_: object) -> None:
            with timer.stage("pruning"), timer.stage("pruning"):
                sleep(0.03)

        handle = policy.language_model.register_forward_pre_hook(record)
        with timer.step():
            policy.language_model(torch.zeros(1, 1, 2))
        handle.remove()
    step = timer.steps[0]
    assert 30 <= step.pruning < step.total
    assert 5 <= step.decode < step.pruning
    assert step.other >= 0
    assert step.prefill == 0
    assert step.total == pytest.approx(sum(getattr(step, stage) for stage in STAGES))


def test_it_leaves_no_trace_even_after_an_error() -> None:
    policy = _Policy()
    before = _state(policy)
    with pytest.raises(RuntimeError, match="broken"), StageTimer(policy) as timer, timer.step():
        assert _state(policy) != before
        raise RuntimeError("broken")
    assert _state(policy) == before
    assert timer.steps == []


def test_other_models_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no submodule vision, projector, language_model"):
        StageTimer(nn.Linear(1, 1))
