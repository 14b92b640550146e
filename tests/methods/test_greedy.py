"""The formulations of the greedy filter pick the same tokens, bit for bit, ties and all."""

from __future__ import annotations

import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import greedy
from vla_pruner.methods import selection
from vla_pruner.methods.selection import (
    distances,
    fused_form,
    max_min_order,
    max_min_order_in_arrays,
    max_min_order_in_tensors,
)

ROWS, M, D = 3, 40, 8


def some_candidates(count, generator):
    candidates = torch.zeros(ROWS, M, dtype=torch.bool)
    for row in range(ROWS):
        candidates[row, torch.randperm(M, generator=generator)[: count + row]] = True
    return candidates


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (12, 5), (12, 12), (38, 1), (38, 20)])
def test_arrays_and_tensors_pick_the_same(metric, count, k):
    generator = torch.Generator().manual_seed(count)
    candidates = some_candidates(count, generator)
    distance = distances(torch.randn(ROWS, M, D, generator=generator), metric)
    before = distance.clone()
    plain = max_min_order_in_tensors(distance, candidates, k)
    assert torch.equal(max_min_order_in_arrays(distance, candidates, k), plain)
    assert torch.equal(max_min_order(distance, candidates, k), plain)
    assert torch.equal(distance, before), "what was handed in stays as it was"


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_they_agree_on_ties(levels):
    generator = torch.Generator().manual_seed(levels)
    distance = torch.randint(levels, (ROWS, M, M), generator=generator).float()
    candidates = some_candidates(15, generator)
    plain = max_min_order_in_tensors(distance, candidates, 9)
    assert torch.equal(max_min_order_in_arrays(distance, candidates, 9), plain)
    assert all(len(set(row)) == 9 for row in plain.tolist())


def traced(function, *given, dynamic=None):
    """Return the result of `function` compiled as one graph, and the operations of all graphs made of it."""
    operations = []

    def backend(graph, inputs):
        operations.append([node.target for node in graph.graph.nodes if node.op == "call_function"])
        return graph

    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic), operations


def test_it_is_one_operation_of_a_graph():
    generator = torch.Generator().manual_seed(0)
    distance = distances(torch.randn(ROWS, M, D, generator=generator))
    candidates = some_candidates(20, generator)
    compiled, operations = traced(lambda d, c: max_min_order(d, c, 6))
    assert torch.equal(compiled(distance, candidates), max_min_order(distance, candidates, 6))
    assert operations == [[torch.ops.vla_pruner.max_min_order]]


def test_one_graph_serves_every_budget_and_number_of_tokens():
    generator = torch.Generator().manual_seed(1)
    compiled, operations = traced(max_min_order, dynamic=True)
    for tokens, k in ((M, 6), (M - 1, 7), (M - 7, 9)):
        distance = distances(torch.randn(ROWS, tokens, D, generator=generator))
        candidates = torch.ones(ROWS, tokens, dtype=torch.bool)
        assert torch.equal(compiled(distance, candidates, k), max_min_order(distance, candidates, k))
    assert len(operations) == 1


def test_the_operator_keeps_the_rules_of_operators():
    generator = torch.Generator().manual_seed(2)
    distance = distances(torch.randn(ROWS, M, D, generator=generator))
    operator = torch.ops.vla_pruner.max_min_order.default
    torch.library.opcheck(operator, (distance, some_candidates(20, generator), 6))
    # A graph that holds it may become a CUDA graph.
    assert torch.Tag.cudagraph_unsafe not in operator.tags
    with FakeTensorMode():
        order = operator(torch.empty(2, 9, 9, device="cuda"), torch.empty(2, 9, dtype=torch.bool, device="cuda"), 4)
    assert (order.device.type, order.dtype, order.shape) == ("cuda", torch.int64, (2, 4))


def test_a_triton_that_does_not_run_is_told_once_and_done_without(monkeypatch):
    """Here it fails for want of a GPU; elsewhere it may for want of a compiler."""
    monkeypatch.setattr(selection, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "vla_pruner.methods.greedy_triton", None)
    fused_form.cache_clear()
    try:
        with pytest.warns(UserWarning, match="does not run on cuda:7"):
            assert fused_form(torch.device("cuda:7")) is None
        assert fused_form(torch.device("cuda:7")) is None
    finally:
        fused_form.cache_clear()


def test_without_triton_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(selection, "find_spec", lambda name: None)
    fused_form.cache_clear()
    assert fused_form(torch.device("cuda:7")) is None
    fused_form.cache_clear()


def test_what_registers_cannot_hold_is_not_fused(monkeypatch):
    monkeypatch.setattr(selection, "fused_form", lambda device: lambda *given: "fused")
    monkeypatch.setattr(selection, "LARGEST_FUSED", M)
    for tokens, fused in ((M, True), (M + 1, False)):
        distance = torch.empty(1, tokens, tokens, device="meta")
        candidates = torch.empty(1, tokens, dtype=torch.bool, device="meta")
        assert (max_min_order(distance, candidates, 3) == "fused") is fused


def test_the_benchmark_times_every_form_in_every_round():
    cpu = torch.device("cpu")
    forms = greedy.forms_on(*greedy.problem(2, 24, 6, cpu), 6)
    assert list(forms) == ["tensors", "arrays"]
    found = greedy.summary(greedy.time_forms(forms, 2, cpu))
    assert all(len(of["ms"]) == 2 and min(of["ms"]) > 0 for of in found.values())
    assert found["tensors"]["times_faster"] == 1


def test_the_benchmark_refuses_forms_that_disagree(monkeypatch):
    monkeypatch.setattr(greedy, "max_min_order_in_arrays", lambda distance, candidates, k: torch.zeros(1, k))
    with pytest.raises(SystemExit, match="arrays picked other tokens"):
        greedy.forms_on(*greedy.problem(1, 24, 6, torch.device("cpu")), 6)
