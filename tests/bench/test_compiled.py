"""Compiled arms: shared weights, graphs that are made once, and a report that names its blind spots."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import vla_pruner as vp
from tests.bench.conftest import CPU, MODELS, subject_of
from tests.state import whole_state
from vla_pruner.benching.arms import BASELINE, Turns, arms_of
from vla_pruner.benching.compiling import CompiledTurns, twin
from vla_pruner.benching.measure import reachable_share_by_flops, time_steps
from vla_pruner.benching.policies import build
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.benching.table import notes, rows, to_markdown
from vla_pruner.errors import OptionError, SessionError, UnsupportedModelError
from vla_pruner.policies.base import module_of
from vla_pruner.policies.compiled_copies import sharing_copy

SMALL = "llama:32,2,4,48,100"

# torch says the first while it imports its own compiler, and looks at .grad of every tensor that it traces.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture
def small() -> Any:
    return subject_of(BenchSettings(SMALL, layer=(1,), decode_tokens=2, compile="eager"))


def test_the_report_says_what_was_compiled(quick: None) -> None:
    told: list[str] = []
    report = vp.bench(
        SMALL,
        layer=(1,),
        decode_tokens=2,
        refresh_every=3,
        batch=2,
        iters=2,
        compile="eager",
        progress=lambda what, *_: told.append(what),
    )
    base, arm = report.arms
    assert told.index(f"compiling {arm.name}") < told.index("timing steps")
    stored = report.to_json()
    assert (stored["compile_backend"], stored["settings"]["compile"]) == ("eager", "eager")
    assert base.compiling is not None
    assert arm.compiling is not None
    assert base.compiling.graphs == 2  # prompt and decoding
    assert arm.compiling.graphs == 4  # the same, unpruned and pruned
    assert arm.compiling.seconds > 0
    assert stored["arms"][1]["compiling"] == {"graphs": 4, "seconds": arm.compiling.seconds}
    assert arm.refresh is not None
    assert (base.kept, arm.kept) == (256, 64)
    assert base.flops.agree
    assert arm.flops.agree
    assert arm.flops.counted["pruning"] > 0  # counted if nothing is compiled
    assert arm.robots_per_second == pytest.approx(2e3 / arm.milliseconds["p50"])

    table = dict(rows(report))
    assert table["graphs"] == ["2", "4"]
    assert "  pruning, outside of graphs" in table
    assert "  pruning" not in table
    assert table["robots/s"][1] == f"{arm.robots_per_second:.4g}"
    assert any('it is part of "prefill" and "decode"' in note for note in notes(report))
    assert len(to_markdown(report).splitlines()) == 4


def test_where_prompt_and_decoding_are_one_graph_they_are_one_stage(quick: None) -> None:
    report = vp.bench("reference", size="tiny", layer=(1,), batch=2, iters=2, compile="eager")
    base, arm = report.arms
    assert base.compiling is not None
    assert arm.compiling is not None
    assert base.compiling.graphs == 2  # the prompt's, and that of all that follows
    assert arm.compiling.graphs == 3  # the second of them unpruned and pruned
    assert report.to_json()["one_graph"] is True
    for one in report.arms:
        assert one.stages["vision"] > 0
        assert one.stages["prefill"] > 0
        assert one.stages["decode"] == 0
        assert one.stages["other"] < one.stages["total"] / 2
    assert arm.ceiling is not None
    table = dict(rows(report))
    assert "  prefill and decode" in table
    assert "  decode" not in table
    assert any('it is part of "prefill and decode";' in note for note in notes(report))
    head, _, first, _ = to_markdown(report).splitlines()
    assert "vision / prefill and decode / pruning / other, ms" in head
    assert first.split("|")[9].count("/") == 3


def test_arms_keep_their_graphs_and_share_their_weights(small: Any) -> None:
    before = whole_state(small.module)
    arms = arms_of(small.settings)
    with CompiledTurns(small, arms, "eager") as turns:
        assert "forward" not in vars(small.family.decoder)  # each arm runs on a copy
        assert turns.kept == Turns(small, arms).kept
        copies = [turns.subject_of(arm) for arm in arms]
        weights = {parameter.data_ptr() for parameter in small.module.parameters()}
        for subject in copies:
            assert subject.policy is not small.policy
            assert {parameter.data_ptr() for parameter in subject.module.parameters()} == weights
        assert torch.equal(copies[0].step(), small.step())
        with pytest.raises(SessionError, match="another"), turns.open(arms[1]) as session:
            session.clock = lambda _: nullcontext()
            raise SessionError("another")
        assert session.clock is None
        timings = time_steps(turns, rounds=1)
        assert set(timings.steps) == {BASELINE, arms[1].name}
        with (
            torch.inference_mode(),
            pytest.raises(SessionError, match="1 graphs of unpruned were compiled anew"),
            turns.open(arms[0]),
        ):
            copies[0].policy.model(inputs_embeds=torch.randn(1, 11, 32), use_cache=False)
    assert all("forward" not in vars(copy.family.decoder) for copy in copies)
    assert whole_state(small.module) == before
    with pytest.raises(SessionError, match="detached"):
        session.compile()


def test_a_failure_leaves_nothing_compiled(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[Any] = []
    monkeypatch.setattr(
        "vla_pruner.benching.compiling.twin", lambda subject: copies.append(twin(subject)) or copies[-1]
    )
    monkeypatch.setattr("vla_pruner.benching.compiling.warm", lambda *_: 1 / 0)
    monkeypatch.setattr("vla_pruner.benching.compiling.SETTLED", 0)
    with pytest.raises(ZeroDivisionError):
        CompiledTurns(small, arms_of(small.settings), "eager")
    assert len(copies) == 2
    assert all("forward" not in vars(copy.family.decoder) for copy in copies)


def test_a_family_that_cannot_be_compiled_says_so(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of another distribution, for instance."""
    monkeypatch.setattr(type(small.family), "compilable", False)
    with pytest.raises(UnsupportedModelError, match="in a loop of its own, outside of any call"):
        CompiledTurns(small, arms_of(small.settings), "eager")
    with pytest.raises(UnsupportedModelError, match=f"--compile does not go with {small.settings.model}"):
        replace(small.settings, compile=True)


@pytest.mark.parametrize("name", list(MODELS))
def test_a_copy_takes_no_memory_for_weights(name: str) -> None:
    policy = build(MODELS[name], CPU, torch.float32)
    module = module_of(policy)
    copied = sharing_copy(policy)
    assert copied is not policy
    assert type(copied) is type(policy)
    inner = module_of(copied)
    assert inner is not module

    def held(of: nn.Module) -> dict[str, int]:
        return {key: id(tensor) for key, tensor in (*of.named_parameters(), *of.named_buffers())}

    assert held(inner) == held(module)
    parts = {id(part) for part in module.modules()}
    assert not any(id(part) in parts for part in inner.modules())
    before = _elements()
    again = sharing_copy(policy)
    assert _elements() - before < 0.05 * sum(parameter.numel() for parameter in module.parameters())
    del again


def _elements() -> int:
    """Return the number of elements of all tensors that are alive, those that share memory counted once."""
    gc.collect()
    found = [item for item in gc.get_objects() if type(item) in (torch.Tensor, nn.Parameter)]
    return sum({item.untyped_storage().data_ptr(): item.untyped_storage().nbytes() // 4 for item in found}.values())


def test_a_policy_whose_copy_has_its_own_weights_is_refused() -> None:
    class Stubborn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(3))

        def __deepcopy__(self, memo: Any) -> Stubborn:
            return Stubborn()

    with pytest.raises(UnsupportedModelError, match="a copy of it makes weight anew"):
        sharing_copy(Stubborn())


def test_the_backend_is_chosen() -> None:
    assert [BenchSettings(SMALL, layer=(1,), compile=given).backend for given in (False, True, "eager")] == [
        None,
        "inductor",
        "eager",
    ]
    with pytest.raises(OptionError, match=r"'warp' was given as what compiles; torch has .*inductor"):
        BenchSettings(SMALL, layer=(1,), compile="warp")


def test_the_reach_of_pruning_by_flops(small: Any) -> None:
    """Two layers of one size and a small head: the second is half of the prompt."""
    share = reachable_share_by_flops(small, 1, {"prefill": 30.0, "total": 40.0})
    assert share == pytest.approx(0.75 / 2, rel=1e-2)
    assert reachable_share_by_flops(small, 0, {"prefill": 40.0, "total": 40.0}) is None
    both = reachable_share_by_flops(small, 1, {"prefill": 30.0, "total": 40.0}, {"prefill": 2.0, "decode": 1.0})
    assert both == pytest.approx(share * 2 / 3)
