"""DART and CDPruner against slow, literal readings of their papers."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.methods.base import Evidence
from vla_pruner.methods.determinant import determinant_order

M, D, ROWS = 24, 16, 3


def evidence(seed=0, valid=None, tokens=M, dims=D, relevance=True):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(ROWS, tokens, dims, generator=generator)
    return Evidence(
        valid=torch.ones(ROWS, tokens, dtype=torch.bool) if valid is None else valid,
        memory=vp.Memory.empty(ROWS, 0, tokens),
        features=features,
        relevance=torch.randn(ROWS, tokens, generator=generator) if relevance else None,
    )


def cosine(one, other):
    return float(one @ other) / math.sqrt(float(one @ one) * float(other @ other))


def literal_dart(features, present, k, pivots):
    """The paper's rule in plain Python."""
    ids = [token for token in range(len(features)) if present[token]]
    chosen = sorted(ids, key=lambda token: (-float(features[token].abs().sum()), token))[: min(pivots, k)]
    kept, quotas = set(chosen), [(k - len(chosen)) // len(chosen)] * len(chosen)
    for number in range((k - len(chosen)) % len(chosen)):
        quotas[number] += 1
    for pivot, quota in zip(chosen, quotas, strict=True):
        others = [token for token in ids if token not in kept]
        kept |= set(sorted(others, key=lambda token: (cosine(features[pivot], features[token]), token))[:quota])
    return sorted(kept)


@pytest.mark.parametrize("pivots", [1, 3, 8])
@pytest.mark.parametrize("k", [1, 2, 7, 12, 23])
def test_dart_is_the_papers_rule(k, pivots):
    seen = evidence()
    found = vp.DART(keep=k, pivots=pivots).select(seen, k)
    for row in range(ROWS):
        assert found[row].tolist() == literal_dart(seen.features[row], [True] * M, k, pivots)


def test_dart_keeps_no_duplicates_of_its_pivot():
    """Two groups of equal directions: one pivot keeps the other group."""
    features = torch.zeros(1, 8, 4)
    features[0, :4, 0], features[0, 4:, 1] = torch.tensor([9.0, 1, 1, 1]), torch.ones(4)
    seen = Evidence(torch.ones(1, 8, dtype=torch.bool), vp.Memory.empty(1, 0, 8), features=features)
    assert vp.DART(keep=4, pivots=1).select(seen, 4).tolist() == [[0, 4, 5, 6]], "ties go to the smaller id"


def literal_cdpruner(features, relevance, present, k, theta=None):
    """The greedy rule with determinants computed anew for every candidate."""
    ids = [token for token in range(len(features)) if present[token]]
    given = np.array([float(relevance[token]) for token in range(len(features))])
    low, high = given[ids].min(), given[ids].max()
    weight = (given - low + 1e-6) / (high - low + 1e-6)
    if theta is not None:
        weight = np.exp(theta / (2 * (1 - theta)) * weight)
    unit = features.double().numpy() / np.linalg.norm(features.double().numpy(), axis=1, keepdims=True)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, 1.0)
    kernel = np.diag(weight) @ similarity @ np.diag(weight)
    order = []
    for _ in range(k):
        dets = {token: np.linalg.det(kernel[np.ix_([*order, token], [*order, token])]) for token in ids}
        order.append(max((token for token in ids if token not in order), key=lambda token: (dets[token], -token)))
    return order


@pytest.mark.parametrize("theta", [None, 0, 0.5])
@pytest.mark.parametrize("k", [1, 2, 7])
def test_cdpruner_is_the_papers_rule(k, theta):
    seen = evidence()
    method = vp.CDPruner(keep=k, theta=theta)
    for row, found in enumerate(method.pick_order(seen, k).tolist()):
        assert found == literal_cdpruner(seen.features[row], seen.relevance[row], [True] * M, k, theta)
        if theta is None:
            assert found[0] == int(seen.relevance[row].argmax())
    assert torch.equal(method.select(seen, k), method.pick_order(seen, k).sort(dim=1).values)


def determinant(kernel, ids):
    return float(torch.linalg.det(kernel[list(ids)][:, list(ids)]))


def test_the_greedy_choice_is_near_the_best_determinant():
    """The greedy set of three is among the best tenth of all such sets here, and never better than the best."""
    seen = evidence(tokens=10)
    unit = torch.nn.functional.normalize(seen.features, dim=-1)
    kernel = unit @ unit.transpose(1, 2)
    order = determinant_order(kernel, seen.valid, 3)
    for row in range(ROWS):
        dets = sorted(determinant(kernel[row], ids) for ids in itertools.combinations(range(10), 3))
        mine = determinant(kernel[row], order[row].tolist())
        assert dets[-len(dets) // 10] <= mine <= dets[-1] + 1e-6


def test_what_spans_nothing_more_follows_by_relevance():
    seen = evidence(dims=2)
    relevance = seen.relevance
    method = vp.CDPruner(keep=6)
    for row, order in enumerate(method.pick_order(seen, 6).tolist()):
        rest = [token for token in relevance[row].argsort(descending=True).tolist() if token not in order[:2]]
        assert order[2:] == rest[:4]


def test_relevance_is_the_mean_cosine_with_the_text():
    generator = torch.Generator().manual_seed(3)
    prompt = torch.randn(ROWS, 12, D, generator=generator)
    visual = prompt[:, 1:6]
    text = torch.zeros(ROWS, 12, dtype=torch.bool)
    text[:, 7:11] = True
    text[1, 10] = False
    found = vp.CDPruner().text_relevance(visual, prompt, text)
    for row in range(ROWS):
        words = prompt[row][text[row]]
        expected = [sum(cosine(token, word) for word in words) / len(words) for token in visual[row]]
        torch.testing.assert_close(found[row], torch.tensor(expected))


METHODS = [vp.DART(keep=8), vp.CDPruner(keep=8), vp.CDPruner(keep=8, theta=0.5)]


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_absent_cameras_are_chosen_last(method):
    valid = torch.ones(ROWS, M, dtype=torch.bool)
    valid[0, 10:] = False
    valid[1, 5:] = False
    seen = evidence(valid=valid)
    found = method.select(seen, 8)
    assert (found[0] < 10).all()
    assert set(range(5)) <= set(found[1].tolist())
    assert all(len(set(row)) == 8 and row == sorted(row) for row in found.tolist())
    if isinstance(method, vp.DART):
        assert found[0].tolist() == literal_dart(seen.features[0], valid[0], 8, 8)
    else:
        order = literal_cdpruner(seen.features[0], seen.relevance[0], valid[0], 8, method.theta)
        assert found[0].tolist() == sorted(order)


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_rows_are_independent_and_odd_numbers_still_choose(method):
    seen = evidence()
    together = method.select(seen, 8)
    for row in range(ROWS):
        one = slice(row, row + 1)
        alone = Evidence(
            seen.valid[one],
            vp.Memory.empty(1, 0, M),
            features=seen.features[one],
            relevance=seen.relevance[one],
        )
        assert torch.equal(method.select(alone, 8)[0], together[row])
    seen.features[:, 3] = torch.nan
    seen.features[:, 4] = 0
    seen.relevance[:, 5] = torch.nan
    found = method.select(seen, 8)
    assert all(len(set(row)) == 8 for row in found.tolist())


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_a_compiler_is_given_the_same_choice(method):
    seen = evidence()
    chosen = torch.compile(lambda given: method.select(given, 8), backend="eager", fullgraph=True)(seen)
    assert torch.equal(chosen, method.select(seen, 8))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vp.DART(pivots=0), "pivots=0"),
        (lambda: vp.DART(pivots=True), "pivots=True"),
        (lambda: vp.CDPruner(theta=1.0), r"theta=1\.0"),
        (lambda: vp.CDPruner(theta=True), "theta=True"),
        (lambda: vp.CDPruner(theta="a"), "theta='a'"),  # type: ignore[arg-type]
    ],
)
def test_options_out_of_range_are_refused(make, message):
    with pytest.raises(vp.OptionError, match=message):
        make()
