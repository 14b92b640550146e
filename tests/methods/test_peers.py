"""The peers: each rule by hand on a small case, its ties, absent cameras, batch rows, and compilation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.methods.test_selection import ROWS, M, literal_max_min, random_evidence
from vla_pruner.methods.base import Evidence
from vla_pruner.methods.scores import attention_probabilities, mean_logits, temporal_estimate, text_raters
from vla_pruner.methods.selection import distances, max_min_order, present_or_enough, top_ids

K = 6
BY_SCORE = [vp.FastV, vp.SemanticOnly, vp.SparseVLM, vp.TextQuery]
BY_HISTORY = [vp.ActionOnly, vp.ScoreFusion]
MIXTURE = vp.ActionAndDiversity(K)
BY_DIVERSITY = [vp.DivPrune, vp.MaxMinDiversity]
PEERS = BY_SCORE + BY_HISTORY + BY_DIVERSITY
EUCLIDEAN = vp.MaxMinDiversity(K, metric="euclidean")
METHODS = [peer(K) for peer in PEERS] + [EUCLIDEAN, MIXTURE]


def name(method):
    return type(method).__name__ if isinstance(method, vp.Method) else method.__name__


def top(scores, k):
    return sorted(np.argsort(-np.asarray(scores), kind="stable")[:k].tolist())


def evidence_of(semantic, action=None, valid=None):
    """One row; `action` is the score of each of the last steps, oldest first."""
    tokens = len(semantic)
    memory = vp.Memory.empty(1, len(action or []), tokens)
    for scores in action or []:
        memory = memory.push(torch.tensor([scores]))
    return Evidence(
        valid=torch.ones(1, tokens, dtype=torch.bool) if valid is None else torch.tensor([valid]),
        memory=memory,
        semantic=torch.tensor([semantic]),
    )


@pytest.mark.parametrize("peer", BY_SCORE, ids=name)
def test_the_highest_semantic_scores_stay(peer):
    assert peer(2).select(evidence_of([0.1, 0.4, 0.3, 0.4]), 2).tolist() == [[1, 3]]
    assert peer(2).select(evidence_of([0.1, 0.4, 0.4, 0.4]), 2).tolist() == [[1, 2]], "ties: the smaller id"
    absent = evidence_of([0.1, 0.4, 0.3, 0.9], valid=[True, True, True, False])
    assert peer(2).select(absent, 2).tolist() == [[1, 2]]


def test_what_each_score_is_read_from():
    assert vp.FastV().queries == "last"
    assert vp.FastV(semantic_queries="all") != vp.SemanticOnly()
    assert vp.SemanticOnly().queries == vp.ScoreFusion().queries == "all"
    assert vp.SparseVLM().queries == "raters"
    assert (vp.TextQuery().queries, vp.TextQuery().attention, vp.TextQuery().layer) == ("text", "logits", 1)
    assert vp.DivPrune().needs == {"embeddings"}
    assert vp.MaxMinDiversity().needs == {"features"}
    for method in METHODS:
        assert method.history == (3 if "action" in method.needs else 0)


def test_action_only_is_the_top_of_the_decayed_mean():
    steps = [[0.0, 0.9, 0.0, 0.2], [0.0, 0.0, 0.6, 0.2], [0.5, 0.0, 0.1, 0.2]]
    weights = [0.8**3, 0.8**2, 0.8]
    expected = [sum(w * step[i] for w, step in zip(weights, steps, strict=True)) for i in range(4)]
    evidence = evidence_of([0.0] * 4, steps)
    assert vp.ActionOnly(2).select(evidence, 2).tolist() == [top(expected, 2)]
    assert vp.ActionOnly(2, decay=0.1).select(evidence, 2).tolist() == [[0, 3]], "the newest step decides"


def test_score_fusion_weighs_shares():
    semantic, action = [4.0, 3.0, 2.0, 1.0], [0.01, 0.02, 0.03, 0.06]
    evidence = evidence_of(semantic, [action])
    for weight, kept in ((1.0, [0, 1]), (0.0, [2, 3]), (0.5, None)):
        method = vp.ScoreFusion(2, weight=weight, window=1)
        shares = [weight * s / 10 + (1 - weight) * a / 0.12 for s, a in zip(semantic, action, strict=True)]
        assert method.select(evidence, 2).tolist() == [kept or top(shares, 2)]
    tied = evidence_of([1.0, 1.0, 1.0, 1.0], [[1.0, 1.0, 1.0, 1.0]])
    assert vp.ScoreFusion(2, window=1).select(tied, 2).tolist() == [[0, 1]]


def test_score_fusion_gives_absent_tokens_no_share():
    # With the absent token's score in the sum, the semantic shares would shrink and action would decide.
    valid = [True, True, True, False]
    evidence = evidence_of([3.0, 2.0, 1.0, 94.0], [[1.0, 1.5, 1.7, 0.0]], valid)
    assert vp.ScoreFusion(1, window=1).select(evidence, 1).tolist() == [[0]]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("peer", BY_DIVERSITY, ids=name)
def test_diversity_is_the_literal_rule_on_all_present_tokens(peer, metric):
    valid = torch.ones(ROWS, M, dtype=torch.bool)
    valid[1, 5:11] = False
    evidence = random_evidence(valid=valid)
    assert evidence.features is not None
    distance = distances(evidence.features, metric).tolist()
    order = peer(K, metric=metric).pick_order(evidence, K)
    for row in range(ROWS):
        present = valid[row].nonzero().flatten().tolist()
        assert order[row].tolist() == literal_max_min(distance[row], present, K)
    assert torch.equal(peer(K, metric=metric).select(evidence, K), order.sort(dim=1).values)


def test_the_metrics_differ_where_norms_do():
    features = torch.tensor([[[1.0, 0.0], [9.0, 0.0], [0.0, 1.0]]])
    evidence = replace(evidence_of([0.0] * 3), features=features)
    assert vp.MaxMinDiversity(2).select(evidence, 2).tolist() == [[0, 2]]
    assert vp.MaxMinDiversity(2, metric="euclidean").select(evidence, 2).tolist() == [[1, 2]]
    same = replace(evidence, features=torch.ones(1, 3, 2))
    assert vp.MaxMinDiversity(2).select(same, 2).tolist() == [[0, 1]], "ties: the smaller id"


def test_the_mixture_is_action_first_then_what_is_far_apart_among_the_others():
    torch.manual_seed(0)
    action = torch.rand(9).tolist()
    evidence = replace(evidence_of([0.0] * 9, [action]), features=torch.randn(1, 9, 4))
    for k, by_action in ((4, 2), (5, 2), (6, 3), (1, 0)):
        acting = top(action, by_action)
        outside = torch.ones(1, 9, dtype=torch.bool)
        outside[0, acting] = False
        others = max_min_order(distances(evidence.features, "euclidean"), outside, k - by_action)
        method = vp.ActionAndDiversity(k, window=1)
        assert method.select(evidence, k).tolist() == [sorted(acting + others[0].tolist())], (k, by_action)
    whole = vp.ActionAndDiversity(4, share=1.0, window=1)
    assert whole.select(evidence, 4).tolist() == vp.ActionOnly(4, window=1).select(evidence, 4).tolist()
    none = vp.ActionAndDiversity(4, share=0.0, window=1)
    assert none.select(evidence, 4).tolist() == EUCLIDEAN.select(evidence, 4).tolist()
    absent = replace(evidence, valid=torch.arange(9)[None] < 3)
    assert vp.ActionAndDiversity(4, window=1).select(absent, 4).tolist() == [[0, 1, 2, 3]], "the first absent one fills"
    with pytest.raises(vp.OptionError, match="share"):
        vp.ActionAndDiversity(4, share=1.5)


def test_raters_are_the_text_that_resembles_the_image():
    visual = torch.tensor([[[2.0, 0.0], [1.0, 0.0], [0.0, 50.0]]])
    valid = torch.tensor([[True, True, False]])
    words = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.9, 0.0]]])
    prompt = torch.cat([torch.full((1, 1, 2), 9.0), visual, words], dim=1)
    text = torch.arange(8)[None] >= 4
    relevance = np.zeros(4)
    for h in (np.array([2.0, 0.0]), np.array([1.0, 0.0])):
        logits = np.exp(words[0].numpy() @ h)
        relevance += logits / logits.sum() / 2
    expected = [False] * 4 + (relevance >= relevance.mean()).tolist()
    assert text_raters(visual, valid, prompt, text).tolist() == [expected]
    assert expected == [False] * 4 + [True, False, False, True]


def test_a_text_of_equals_rates_whole():
    for count in range(1, 9):
        text = torch.arange(13)[None] >= 13 - count
        found = text_raters(torch.randn(1, 5, 4), torch.ones(1, 5, dtype=torch.bool), torch.ones(1, 13, 4), text)
        assert torch.equal(found, text)


def test_official_raters_leave_out_both_ends_of_each_row():
    text = torch.tensor([[0, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 1, 1, 0, 0]], dtype=torch.bool)
    visual, valid = torch.randn(3, 1, 4), torch.ones(3, 1, dtype=torch.bool)
    prompt = torch.ones(3, 5, 4)
    found = vp.SparseVLM(preset="official").raters(visual, valid, prompt, text)
    assert found.int().tolist() == [[0, 0, 1, 1, 0], [0, 0, 1, 1, 0], [0, 1, 0, 0, 0]]
    assert torch.equal(vp.SparseVLM().raters(visual, valid, prompt, text), text)


def test_mean_logits_are_the_products_averaged():
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=g), torch.randn(2, 2, 9, 8, generator=g)
    weights = torch.tensor([[0, 1, 0, 1, 1], [0, 0, 0, 0, 1]])
    products = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 0.3
    found = mean_logits(query, key, weights, 0.3)
    assert torch.allclose(found[0], products[0][:, [1, 3, 4]].mean((0, 1)), atol=1e-6)
    assert torch.allclose(found[1], products[1][:, 4].mean(0), atol=1e-6)
    # One row's logits order the keys as its probabilities do, in each head.
    probabilities = attention_probabilities(query[:, :1], key[:, :1], None, 0.3)[1, 0, 4]
    assert probabilities.argsort().tolist() == mean_logits(query[:, :1], key[:, :1], weights, 0.3)[1].argsort().tolist()


@pytest.mark.parametrize("method", [*METHODS, vp.RandomKeep(K)], ids=name)
def test_absent_tokens_are_taken_only_when_there_are_too_few_others(method):
    valid = torch.zeros(ROWS, M, dtype=torch.bool)
    valid[:, 4:9] = True
    evidence = random_evidence(valid=valid)
    few = method.select(evidence, 4)
    assert ((few >= 4) & (few < 9)).all()
    more = method.select(evidence, 7)
    assert more.shape == (ROWS, 7)
    assert all(set(range(4, 9)) <= set(row) and len(set(row)) == 7 for row in more.tolist())


def test_present_or_enough():
    valid = torch.tensor([[False, True, False, True, True], [False, False, False, True, False]])
    assert present_or_enough(valid, 2).int().tolist() == [[0, 1, 0, 1, 1], [1, 0, 0, 1, 0]]
    assert top_ids(torch.tensor([[0.1, 0.3, 0.3, 0.0]]), torch.ones(1, 4, dtype=torch.bool), 2).tolist() == [[1, 2]]


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_rows_are_independent(method):
    evidence = random_evidence()
    together = method.select(evidence, K)
    assert together.dtype == torch.int64
    assert (together.diff(dim=1) > 0).all(), "sorted and distinct"
    for row in range(ROWS):
        assert evidence.semantic is not None
        assert evidence.features is not None
        alone = Evidence(
            valid=evidence.valid[[row]],
            memory=evidence.memory.take([row]),
            semantic=evidence.semantic[[row]],
            features=evidence.features[[row]],
        )
        assert torch.equal(method.select(alone, K), together[[row]])


@pytest.mark.parametrize("method", METHODS, ids=name)
def test_select_compiles_into_one_graph(method):
    def select(valid, memory, semantic, features):
        return method.select(Evidence(valid=valid, memory=memory, semantic=semantic, features=features), K)

    torch._dynamo.reset()
    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    first, second = random_evidence(), random_evidence(seed=3)
    for evidence in (first, second):
        given = (evidence.valid, evidence.memory, evidence.semantic, evidence.features)
        with torch._dynamo.config.patch(error_on_recompile=evidence is second):
            assert torch.equal(compiled(*given), select(*given))


@pytest.mark.parametrize("peer", [*PEERS, vp.RandomKeep], ids=name)
def test_warm_up_steps_are_not_pruned(peer):
    least = 3 if peer in BY_HISTORY else 0
    for steps in (0, 2, 5):
        method = peer(K, warmup_steps=steps)
        memory, pruned = vp.Memory.empty(2, method.history, M), []
        for _ in range(7):
            pruned.append(method.prunes(memory))
            memory = memory.push(torch.rand(2, M))
        assert pruned == [step >= max(steps, least) for step in range(7)]
        if steps:
            assert not method.prunes(memory.reset([1])), "one row's warm-up is every row's"


@pytest.mark.parametrize("peer", [*PEERS, vp.RandomKeep], ids=name)
def test_keep_is_a_fraction_a_number_or_per_camera(peer):
    assert [peer(keep).budget(M) for keep in (1.0, 0.5, 7)] == [M, M // 2, 7]
    front, wrist = peer({"front": 0.5, "wrist": 3}, warmup_steps=2).for_cameras(("front", "wrist"))
    assert (front.keep, wrist.keep, front.warmup_steps) == (0.5, 3, 2)
    assert type(front) is peer
    with pytest.raises(vp.OptionError, match="'front', but the policy's cameras"):
        peer({"front": 0.5}).for_cameras(("front", "wrist"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vp.FastV(keep=0), "keep=0 "),
        (lambda: vp.FastV(warmup_steps=-1), "warmup_steps=-1"),
        (lambda: vp.RandomKeep(warmup_steps=True), "warmup_steps=True"),
        (lambda: vp.FastV(semantic_queries="first"), "'all', 'text', 'last'"),
        (lambda: vp.ScoreFusion(semantic_queries="raters"), "'all', 'text', 'last'"),
        (lambda: vp.ScoreFusion(weight=1.5), r"weight=1\.5"),
        (lambda: vp.ScoreFusion(weight=True), "weight=True"),
        (lambda: vp.ActionOnly(window=0), "window=0"),
        (lambda: vp.ActionOnly(decay=0), "decay=0"),
        (lambda: vp.ActionOnly(unseen="guess"), "'zero', 'carry'"),
        (lambda: vp.SparseVLM(preset="mine"), "'paper', 'official'"),
        (lambda: vp.DivPrune(metric="angle"), "'cosine', 'euclidean'"),
        (lambda: vp.TextQuery(layer=0), "layer=0"),
    ],
)
def test_options_out_of_range_are_refused(build, message):
    with pytest.raises(vp.OptionError, match=message):
        build()


def test_a_ranking_method_is_a_score():
    @dataclass(frozen=True)
    class Latest(vp.Scored):
        def score(self, evidence):
            return torch.arange(evidence.valid.shape[1]).expand_as(evidence.valid).float()

    valid = torch.tensor([[True] * 6, [True, True, True, True, False, False]])
    evidence = Evidence(valid=valid, memory=vp.Memory.empty(2, 0, 6))
    assert Latest(keep=2).select(evidence, Latest(keep=2).budget(6)).tolist() == [[4, 5], [2, 3]]
    with pytest.raises(vp.BudgetError, match="keep=0"):
        Latest(keep=0)
    with pytest.raises(NotImplementedError, match=r"Scored does not rank the tokens: define score\(evidence\)"):
        vp.Scored().select(evidence, 2)


def test_a_method_that_names_raters_must_choose_them():
    with pytest.raises(NotImplementedError, match="define raters"):
        vp.FastV().raters(*[torch.zeros(1, 1)] * 4)


def test_action_estimate_is_vla_pruners():
    evidence = random_evidence()
    for unseen in ("zero", "carry"):
        expected = temporal_estimate(evidence.memory, 0.7, unseen)
        assert torch.equal(vp.ActionOnly(decay=0.7, unseen=unseen).action_estimate(evidence), expected)


@pytest.mark.parametrize("method", [*METHODS, vp.VLAPruner(K, preset="paper")], ids=name)
def test_no_choice_reads_the_counters_of_the_host(method):
    """On a GPU they lie on the CPU, and a graph that reads them there would be split."""
    evidence = random_evidence(pushed=2)
    elsewhere = torch.full_like(evidence.memory.steps, 99)
    memory = replace(
        evidence.memory, steps=elsewhere, episode=elsewhere, streak=elsewhere, motion=evidence.memory.motion + 99
    )
    blind = replace(evidence, memory=memory)
    assert blind.steps is evidence.steps
    assert torch.equal(method.select(blind, K), method.select(evidence, K))


def test_the_document_has_every_method():
    text = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
    exported = [getattr(vp, name) for name in vp.__all__ if isinstance(getattr(vp, name), type)]
    methods = [cls for cls in exported if issubclass(cls, vp.Method) and cls not in (vp.Method, vp.Scored)]
    assert len(methods) == 16
    for cls in methods:
        assert f"| `{cls.__name__}`" in text or f"`{cls.__name__}`" in text.split("controls")[0], cls
        assert cls.__doc__ is not None
        ours = (vp.ActionAndDiversity, vp.MaxMinDiversity, vp.RandomKeep, vp.KeepFixed, vp.Unpruned)
        assert "Paper:" in cls.__doc__ or cls in ours
