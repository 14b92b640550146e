"""The two formulations of the greedy filter pick the same tokens, bit for bit, ties and all."""

from __future__ import annotations

import pytest
import torch

from vla_pruner.methods.selection import (
    distances,
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


def test_a_graph_takes_the_tensors(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    distance = distances(torch.randn(ROWS, M, D, generator=generator))
    candidates = some_candidates(20, generator)
    expected = max_min_order(distance, candidates, 6)
    monkeypatch.setattr("vla_pruner.methods.selection.max_min_order_in_arrays", None)
    compiled = torch.compile(lambda d, c: max_min_order(d, c, 6), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(distance, candidates), expected)
    with pytest.raises(TypeError):
        max_min_order(distance, candidates, 6)
