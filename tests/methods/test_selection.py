"""The pure functions against slow, literal readings of the paper."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.method_names import Named, methods_of
from vla_pruner.methods.base import Evidence, resolve_keep
from vla_pruner.methods.scores import attention_probabilities, mean_over_rows, temporal_estimate
from vla_pruner.methods.selection import (
    distances,
    max_min_order,
    max_min_order_in_arrays,
    max_min_order_in_tensors,
    order_by_score,
    top_mask,
)

M, D, ROWS = 20, 6, 3


def literal_max_min(distance, candidates, k):
    """The paper's greedy rule in plain Python; ties go to the smaller id."""
    candidates = sorted(candidates)
    first = max(candidates, key=lambda i: (min(distance[i][j] for j in candidates if j != i), -i)) if k else None
    chosen = [first]
    while len(chosen) < k:
        rest = [i for i in candidates if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(distance[i][j] for j in chosen), -i)))
    return chosen


def random_evidence(seed=0, valid=None, window=3, pushed=5):
    g = torch.Generator().manual_seed(seed)
    memory = vp.Memory.empty(ROWS, window, M)
    for _ in range(pushed):
        memory = memory.push(torch.rand(ROWS, M, generator=g), torch.rand(ROWS, M, generator=g) > 0.3)
    return Evidence(
        valid=torch.ones(ROWS, M, dtype=torch.bool) if valid is None else valid,
        memory=memory,
        semantic=torch.rand(ROWS, M, generator=g),
        features=torch.randn(ROWS, M, D, generator=g),
    )


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [2, 7, 12])
def test_max_min_is_the_literal_rule(metric, k):
    g = torch.Generator().manual_seed(k)
    features = torch.randn(ROWS, M, D, generator=g)
    candidates = torch.zeros(ROWS, M, dtype=torch.bool)
    for row in range(ROWS):
        candidates[row, torch.randperm(M, generator=g)[: 12 + row]] = True
    distance = distances(features, metric)
    order = max_min_order(distance, candidates, k)
    for row in range(ROWS):
        ids = candidates[row].nonzero().flatten().tolist()
        assert order[row].tolist() == literal_max_min(distance[row].tolist(), ids, k)


def test_ties_go_to_the_smaller_id():
    features = torch.ones(1, 6, 2)
    candidates = torch.tensor([[False, True, True, True, False, True]])
    assert max_min_order(distances(features), candidates, 3).tolist() == [[1, 2, 3]]
    scores = torch.tensor([[0.5, 0.7, 0.7, 0.5, 0.7, 0.1]])
    assert order_by_score(scores, torch.ones_like(scores, dtype=torch.bool)).tolist() == [[1, 2, 4, 0, 3, 5]]


def test_select_is_union_then_filter():
    evidence = random_evidence()
    method, k = vp.VLAPruner(keep=6, preset="paper"), 6
    estimate = method.action_estimate(evidence)
    selected = method.select(evidence, k)
    for row in range(ROWS):
        top = lambda scores, row=row: set(np.argsort(-scores[row].numpy(), kind="stable")[:k].tolist())  # noqa: E731
        union = top(evidence.semantic) | top(estimate)
        assert k <= len(union) <= 2 * k
        distance = distances(evidence.features)[row].tolist()
        assert selected[row].tolist() == sorted(literal_max_min(distance, union, k))


def test_estimate_is_the_decayed_mean_newest_first():
    memory = vp.Memory.empty(1, 3, 2)
    for value in (1.0, 2.0, 3.0, 5.0):
        memory = memory.push(torch.tensor([[value, 0.0]]))
    weights = [0.8, 0.8**2, 0.8**3]
    expected = (weights[0] * 5 + weights[1] * 3 + weights[2] * 2) / sum(weights)
    assert temporal_estimate(memory, 0.8)[0, 0].item() == pytest.approx(expected)
    backwards = (5 * 0.8**2 + 3 * 0.8 + 2) / (1 + 0.8 + 0.64)
    assert temporal_estimate(memory, 0.8, newest_weighs_most=False)[0, 0].item() == pytest.approx(backwards)


def test_estimate_with_less_history_than_the_window():
    memory = vp.Memory.empty(1, 3, 1).push(torch.tensor([[4.0]]))
    assert temporal_estimate(memory, 0.8)[0, 0].item() == pytest.approx(4.0)
    assert temporal_estimate(vp.Memory.empty(1, 3, 1), 0.8).tolist() == [[0.0]]


def test_a_refresh_begins_the_history_anew():
    memory = vp.Memory.empty(1, 3, 1)
    for value in (1.0, 2.0, 3.0, 5.0, 7.0):  # control steps 0 to 4, of which 0 and 4 are refreshes if n is 4
        memory = memory.push(torch.tensor([[value]]))
    assert temporal_estimate(memory, 0.8, refresh_every=4).item() == pytest.approx(7.0)
    assert temporal_estimate(memory, 0.8, refresh_every=3).item() == pytest.approx((0.8 * 7 + 0.64 * 5) / 1.44)
    assert temporal_estimate(memory, 0.8, refresh_every=8).item() == temporal_estimate(memory, 0.8).item()


def test_unseen_tokens_count_zero_or_their_last_score_decayed():
    seen = lambda *flags: torch.tensor([flags])  # noqa: E731
    memory = vp.Memory.empty(1, 2, 2)
    memory = memory.push(torch.tensor([[0.6, 0.4]]), seen(True, True))
    memory = memory.push(torch.tensor([[0.9, 0.0]]), seen(True, False))
    memory = memory.push(torch.tensor([[0.7, 0.0]]), seen(True, False))
    zero, carry = temporal_estimate(memory, 0.5, "zero")[0], temporal_estimate(memory, 0.5, "carry")[0]
    assert zero[0] == carry[0]
    assert zero[1] == 0
    # One step ago it had been unseen for two steps, two steps ago for one.
    assert carry[1].item() == pytest.approx((0.5 * 0.4 * 0.25 + 0.25 * 0.4 * 0.5) / 0.75)


def test_a_token_that_comes_back_does_not_change_its_past():
    memory = vp.Memory.empty(1, 2, 1)
    for score, seen in ((0.4, True), (0.0, False), (0.9, True)):
        memory = memory.push(torch.tensor([[score]]), torch.tensor([[seen]]))
    assert temporal_estimate(memory, 0.5, "zero").item() == pytest.approx(0.5 * 0.9 / 0.75)
    assert temporal_estimate(memory, 0.5, "carry").item() == pytest.approx((0.5 * 0.9 + 0.25 * 0.4 * 0.5) / 0.75)


def test_absent_tokens_are_taken_only_when_there_are_too_few_others():
    valid = torch.zeros(ROWS, M, dtype=torch.bool)
    valid[:, 4:9] = True
    evidence = random_evidence(valid=valid)
    for method in (vp.VLAPruner(keep=4, preset="paper"), vp.RandomKeep(keep=4)):
        assert ((method.select(evidence, 4) >= 4) & (method.select(evidence, 4) < 9)).all()
        more = method.select(evidence, 7)
        assert more.shape == (ROWS, 7)
        assert all(set(range(4, 9)) <= set(row) for row in more.tolist())
        assert all(len(set(row)) == 7 for row in more.tolist())


def test_warm_up_by_semantic_attention_alone():
    evidence = random_evidence(pushed=2)
    k, method = 5, vp.VLAPruner(keep=5, warmup="semantic", preset="paper")
    assert method.prunes(evidence.memory)
    assert not vp.VLAPruner(keep=5, preset="paper").prunes(evidence.memory)
    expected = order_by_score(evidence.semantic, evidence.valid)[:, :k].sort(dim=1).values
    assert torch.equal(method.select(evidence, k), expected)


def test_refresh_runs_every_nth_step_unpruned():
    method = vp.VLAPruner(keep=5, warmup="semantic", refresh_every=3, preset="paper")
    memory, pruned = vp.Memory.empty(1, 3, M), []
    for _ in range(7):
        pruned.append(method.prunes(memory))
        memory = memory.push(torch.rand(1, M))
    assert pruned == [False, True, True, False, True, True, False]


def test_random_keep_is_a_function_of_seed_episode_and_step():
    evidence = random_evidence(pushed=4)
    assert torch.equal(vp.RandomKeep(5, seed=1).select(evidence, 5), vp.RandomKeep(5, seed=1).select(evidence, 5))
    assert not torch.equal(vp.RandomKeep(5, seed=1).select(evidence, 5), vp.RandomKeep(5, seed=2).select(evidence, 5))
    later = Evidence(valid=evidence.valid, memory=evidence.memory.push(None))
    assert not torch.equal(vp.RandomKeep(5).select(evidence, 5), vp.RandomKeep(5).select(later, 5))
    next_episode = Evidence(valid=evidence.valid, memory=evidence.memory.reset([0, 1, 2]))
    first_episode = Evidence(valid=evidence.valid, memory=vp.Memory.empty(ROWS, 3, M))
    assert not torch.equal(vp.RandomKeep(5).select(next_episode, 5), vp.RandomKeep(5).select(first_episode, 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_rows_are_those_of_a_full_softmax(dtype):
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=g).to(dtype), torch.randn(2, 2, 9, 8, generator=g).to(dtype)
    visible = torch.rand(2, 1, 5, 9, generator=g) > 0.2
    visible[..., 0] = True
    expanded = key.float().repeat_interleave(2, dim=1)
    logits = (query.float() @ expanded.transpose(-1, -2)) * 0.3
    expected = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    found = attention_probabilities(query, key, visible, 0.3)
    assert found.dtype == torch.float32
    assert torch.allclose(found, expected, atol=1e-6)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(dtype).min).to(dtype)
    assert torch.allclose(attention_probabilities(query, key, additive, 0.3), expected, atol=1e-6)
    weights = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    means = mean_over_rows(expected, weights)
    assert torch.allclose(means[0], expected[0][:, [0, 2]].mean((0, 1)))
    assert torch.allclose(means[1], expected[1][:, 4].mean(0))


def test_select_compiles_into_one_graph():
    evidence, method = random_evidence(), vp.VLAPruner(keep=4, warmup="semantic", preset="paper")

    def select(valid, memory, semantic, features):
        return method.select(Evidence(valid=valid, memory=memory, semantic=semantic, features=features), 4)

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    given = (evidence.valid, evidence.memory, evidence.semantic, evidence.features)
    assert torch.equal(compiled(*given), select(*given))
    other = random_evidence(seed=3)
    torch._dynamo.config.error_on_recompile = True
    try:
        given = (other.valid, other.memory, other.semantic, other.features)
        assert torch.equal(compiled(*given), select(*given))
    finally:
        torch._dynamo.config.error_on_recompile = False


def test_top_mask_and_budget():
    scores = torch.tensor([[0.1, 0.9, 0.5, 0.5]])
    assert top_mask(scores, torch.ones(1, 4, dtype=torch.bool), 2).tolist() == [[False, True, True, False]]
    assert [resolve_keep(keep, 256) for keep in (1.0, 0.5, 0.25, 0.125, 0.001, 7)] == [256, 128, 64, 32, 1, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep=0 "),
        ({"keep": 0.0}, r"keep=0\.0"),
        ({"keep": 2.0}, r"keep=2\.0"),
        ({"keep": True}, "keep=True"),
        ({"keep": float("nan")}, "keep=nan"),
        ({"layer": 0}, "layer=0"),
        ({"pruned": "hide"}, "'drop', 'freeze'"),
        ({"window": 0}, "window=0"),
        ({"window": True}, "window=True"),
        ({"decay": "x"}, "decay='x'"),
        ({"refresh_every": 2.5}, r"refresh_every=2\.5"),
        ({"decay": 1.5}, "decay=1.5"),
        ({"preset": "mine"}, "'paper', 'official'"),
        ({"warmup": "none"}, "'full', 'semantic'"),
        ({"semantic_queries": "first"}, "'all', 'text', 'last'"),
        ({"unseen": "guess"}, "'zero', 'carry'"),
        ({"refresh_every": 1}, "refresh_every=1"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(vp.OptionError, match=message):
        vp.VLAPruner(**options)


@pytest.mark.parametrize("ids", [(), (1, 1), (-1, 2), 5, (1.7, 2.2)])
def test_fixed_ids_must_make_sense(ids):
    with pytest.raises(vp.BudgetError, match=r"ids=.* was given"):
        vp.KeepFixed(ids)


def test_methods_are_values():
    assert vp.VLAPruner(keep=0.25, preset="paper") == vp.VLAPruner(0.25, preset="paper")
    assert vp.KeepFixed((3, 1)) == vp.KeepFixed((1, 3))
    assert hash(vp.RandomKeep(0.5, seed=3)) == hash(vp.RandomKeep(0.5, 3))
    with pytest.raises(AttributeError):
        vp.VLAPruner(keep=0.25, preset="paper").keep = 0.5  # type: ignore[misc]


def test_memory_rows_can_be_taken_and_put_back():
    memory = random_evidence().memory
    one = memory.take([1])
    assert one.rows == 1
    moved = memory.reset([0, 1]).put([0], one)
    assert torch.equal(moved.action[0], memory.action[1])
    assert moved.steps.tolist() == [5, 0, 5]
    assert torch.equal(memory.steps, torch.tensor([5, 5, 5])), "the original is a value and stays as it was"


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_there_is_a_choice_among_numbers_that_are_none(metric):
    """A network that overflowed reports that itself; choosing must neither fail nor take a token twice."""
    features = torch.randn(2, 12, 4)
    features[0] = torch.nan
    features[1, 3] = torch.inf
    scores = torch.full((2, 12), torch.nan)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[1, :5] = False
    mask = top_mask(scores, valid, 6)
    assert mask.sum(1).tolist() == [6, 6]
    assert not mask[1, :5].any()
    for form in (max_min_order_in_arrays, max_min_order_in_tensors):
        order = form(distances(features, metric), mask, 5)
        assert all(len(set(row)) == 5 for row in order.tolist())


def test_a_layer_left_out_is_that_of_the_preset():
    assert vp.VLAPruner(preset="paper").layer == vp.VLAPruner(preset="official").layer == 3
    assert vp.VLAPruner(preset="official-chunk").layer == 4
    assert replace(vp.VLAPruner(preset="paper"), preset="official-chunk").layer == 4
    assert replace(vp.VLAPruner(layer=2, preset="paper"), preset="official-chunk").layer == 2
    assert vp.VLAPruner(preset="official", keep=0.5).fitted(one_pass=True) == vp.VLAPruner(
        preset="official-chunk", keep=0.5, layer=4
    )
    assert vp.VLAPruner(preset="official", layer=2).fitted(one_pass=True).layer == 2
    assert vp.VLAPruner(preset="paper").fitted(one_pass=True) == vp.VLAPruner(preset="paper")
    assert vp.VLAPruner(preset="official").fitted(one_pass=False) == vp.VLAPruner(preset="official")


def test_each_camera_on_its_own():
    names = ("image", "wrist_image")
    assert vp.VLAPruner(keep=0.25, preset="paper").for_cameras(names) is None
    apart = vp.VLAPruner(keep=0.25, per_camera=True, preset="paper")
    assert apart.for_cameras(names) == (apart, apart)
    assert vp.VLAPruner(keep=0.25, preset="official-chunk").for_cameras(names) is not None
    given = vp.VLAPruner(keep={"image": 4, "wrist_image": 0.5}, per_camera=True, preset="paper").for_cameras(names)
    assert given is not None
    assert [method.keep for method in given] == [4, 0.5]
    with pytest.raises(vp.BudgetError, match="does not name its cameras"):
        apart.for_cameras(())
    with pytest.raises(vp.OptionError, match="per_camera=1"):
        vp.VLAPruner(per_camera=1, preset="paper")  # type: ignore[arg-type]


def test_the_estimate_is_rounded_as_the_preset_says():
    memory = vp.Memory.empty(1, 3, 4)
    for step in range(3):
        memory = memory.push(torch.tensor([[0.1, 0.2, 0.3, 0.7]]) * (step + 1))
    scores = {1: 1.0, 2: 0.8, 3: 0.8**2}
    mean = sum(weight * (4 - ago) for ago, weight in scores.items()) / sum(scores.values())
    token = torch.tensor([[0.1, 0.2, 0.3, 0.7]])

    def estimate(preset: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        features = torch.zeros(1, 4, 2, dtype=dtype)
        evidence = Evidence(torch.ones(1, 4, dtype=torch.bool), memory, features=features)
        return vp.VLAPruner(preset=preset).action_estimate(evidence)

    torch.testing.assert_close(estimate("paper"), token * mean)
    torch.testing.assert_close(estimate("official-chunk"), token * mean)
    assert torch.equal(estimate("official-chunk", torch.bfloat16), (token * mean).bfloat16().float())
    for preset in ("official", "official-2026-02"):
        assert torch.equal(estimate(preset), (token / token.sum()).bfloat16().float())
    uneven = memory.push(torch.tensor([[5.0, 0.0, 0.0, 0.0]]))
    found = {}
    for preset in ("official", "official-2026-02"):
        evidence = Evidence(torch.ones(1, 4, dtype=torch.bool), uneven, features=torch.zeros(1, 4, 2))
        found[preset] = vp.VLAPruner(preset=preset).action_estimate(evidence)[0, 0]
    assert found["official"] > found["official-2026-02"], "the newest step weighs most, or least"


def test_a_table_names_the_layer_that_runs():
    """Tables are titled before there is a model, so the layer that they name is the one that is used."""
    named = Named.of(vp.VLAPruner(keep=0.25, preset="official"))
    assert "K=3" in named.title
    assert named.method.fitted(one_pass=True).layer == 3
    assert Named.of(vp.VLAPruner(preset="official", layer=4)).method.fitted(one_pass=True).layer == 4


@pytest.mark.parametrize(
    ("method", "title"),
    [
        (vp.VLAPruner(), "vla-pruner 0.25 freeze K=3 semantic_queries=last"),
        (vp.VLAPruner(semantic_queries="last"), "vla-pruner 0.25 freeze K=3 semantic_queries=last"),
        (vp.VLAPruner(semantic_queries="all"), "vla-pruner 0.25 freeze K=3 semantic_queries=all"),
        (vp.VLAPruner(pruned="drop"), "vla-pruner 0.25 drop K=3 semantic_queries=last"),
        (vp.VLAPruner(preset="paper"), "vla-pruner 0.25 drop K=3 preset=paper"),
        (vp.VLAPruner(preset="official", layer=4), "vla-pruner 0.25 drop K=4 preset=official"),
    ],
)
def test_a_title_tells_what_a_preset_decides(method: vp.VLAPruner, title: str):
    """It does as an object and by its name; titles without rows or a preset are of records from before."""
    named = Named.of(method)
    assert named.title == title
    (again,) = methods_of([":".join([named.name, *named.options])], [0.25], [int(method.layer)], [method.pruned])
    assert (again.title, again.method) == (title, method)


def test_a_preset_brings_what_was_not_given():
    recommended = vp.VLAPruner(keep=64)
    assert (recommended.pruned, recommended.semantic_queries, recommended.layer) == ("freeze", "last", 3)
    for same in (pickle.loads(pickle.dumps(recommended)), copy.deepcopy(recommended), recommended):
        assert replace(same, preset="paper") == vp.VLAPruner(keep=64, preset="paper")
    assert (vp.VLAPruner(preset="paper").pruned, vp.VLAPruner(preset="paper").semantic_queries) == ("drop", "all")
    given = replace(vp.VLAPruner(pruned="freeze", semantic_queries="text"), preset="paper")
    assert (given.pruned, given.semantic_queries) == ("freeze", "text"), "what was given stays"
    fitted: Any = recommended.fitted(one_pass=True)
    assert fitted == recommended
    assert (type(fitted.pruned), type(fitted.semantic_queries), type(fitted.layer)) == (str, str, int)


BY_FEATURES = [
    vp.DART(6),
    vp.DART(6, pivots=2),
    vp.CDPruner(6),
    vp.CDPruner(6, theta=0.5),
    vp.MaxMinDiversity(6),
    vp.MaxMinDiversity(6, metric="euclidean"),
    vp.DivPrune(6),
    vp.ActionAndDiversity(6),
    vp.VLAPruner(6),
    vp.VLAPruner(6, preset="paper"),
]


def by_features(**changes):
    relevance = torch.randn(ROWS, M, generator=torch.Generator().manual_seed(1))
    return replace(random_evidence(seed=7), relevance=relevance, **changes)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("method", BY_FEATURES, ids=repr)
def test_tokens_without_finite_features_are_the_last_that_are_kept(method, value):
    valid = torch.ones(ROWS, M, dtype=torch.bool)
    valid[:, 11] = False
    clean = by_features(valid=valid)
    broken = torch.zeros(ROWS, M, dtype=torch.bool)
    broken[:, [0, 4, 12]] = True
    broken[2, 2:9] = True
    features, relevance = clean.features.clone(), clean.relevance.clone()
    features[..., 3][broken] = value
    relevance[broken] = torch.nan  # a cosine with what is not finite
    found = method.select(replace(clean, features=features, relevance=relevance), 6)
    # What is not seen is neither kept nor measured against, so that the others are chosen as if it were absent.
    assert torch.equal(found, method.select(replace(clean, valid=valid & ~broken), 6))
    assert not broken.gather(1, found).any()

    broken[:, 3:] = True
    broken[:, [13, 17]] = False
    features[..., 3][broken] = value
    found = method.select(replace(clean, features=features, relevance=relevance), 6)
    usable = [[token for token in range(M) if valid[row, token] and not broken[row, token]] for row in range(ROWS)]
    assert [len(ids) for ids in usable] == [4, 4, 3]
    for row, ids in zip(found.tolist(), usable, strict=True):
        assert set(ids) <= set(row)
        assert 11 not in row, "absent tokens come after those that are there"
        assert len(set(row)) == 6
