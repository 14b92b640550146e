"""keep = 1.0 changes nothing, and keep < 1 agrees with the same model at full length with the tokens masked or
frozen.
"""

from __future__ import annotations

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import LENGTH, TOKENS, TYPES, VISUAL, K, decode, make_cache, prompt, reference_hidden, tiny_lm
from tests.pairwise import pairwise

KEPT = (0, 3, 4, 9, 15, 22)
STEPS = 4


def possible(kind: str, backend: str, *_: object) -> bool:
    return (kind, backend) != ("gemma2", "sdpa")


FACTORS = TYPES, ("sdpa", "eager"), ("dynamic", "static"), (None, "right", "left")
NOTHING_DROPPED = vp.VLAPruner(keep=1.0, preset="paper"), vp.RandomKeep(keep=1.0), vp.Unpruned()
ALL_KEPT = pairwise(*FACTORS, NOTHING_DROPPED, possible=possible)
PRUNED = pairwise(*FACTORS, ("drop", "freeze"), possible=possible)


def options(padding):
    return {"visual": VISUAL, "padding_side": "left" if padding == "left" else "right"}


def run(model, padding, cache, seed=1):
    embeds, mask = prompt(padding=padding, seed=seed)
    given = None if padding is None else mask
    return (*decode(model, embeds, given, make_cache(cache, model), STEPS), embeds, mask)


@pytest.mark.parametrize(
    ("kind", "backend", "cache", "padding", "method"),
    ALL_KEPT,
    ids=lambda value: str(value) if isinstance(value, str | None) else type(value).__name__,
)
def test_keep_all_is_bit_identical(kind, backend, cache, padding, method):
    model = tiny_lm(kind, backend)
    tokens, logits, *_ = run(model, padding, cache)
    with method.attach(model, **options(padding)) as session:
        for _ in range(5):
            again_tokens, again, *_ = run(model, padding, cache)
            assert torch.equal(again, logits)
            assert torch.equal(again_tokens, tokens)
            assert session.kept is None


@pytest.mark.parametrize(("kind", "backend", "cache", "padding", "pruned"), PRUNED)
def test_pruned_agrees_with_full_length_reference(kind, backend, cache, padding, pruned):
    model = tiny_lm(kind, backend)
    _, unpruned, *_ = run(model, padding, cache)
    with vp.KeepFixed(KEPT, layer=K, pruned=pruned).attach(model, **options(padding)):
        tokens, logits, embeds, mask = run(model, padding, cache)
    assert (logits - unpruned).abs().max() > 1e-2, "pruning must show, or this test could not fail"

    rows = embeds.shape[0]
    start = torch.tensor([VISUAL.start + (row + 1 if padding == "left" else 0) for row in range(rows)])
    gone = torch.zeros(rows, LENGTH + STEPS, dtype=torch.bool)
    for row in range(rows):
        dropped = [i for i in range(TOKENS) if i not in KEPT]
        gone[row, (start[row] + torch.tensor(dropped)).clamp_max(LENGTH - 1)] = True
    decoded = model.get_input_embeddings()(tokens[:, :STEPS])
    full_mask = torch.cat([mask, torch.ones(rows, STEPS, dtype=mask.dtype)], dim=1)
    with torch.no_grad():
        hidden = reference_hidden(
            model.model, torch.cat([embeds, decoded], dim=1), full_mask, gone, K, frozen=pruned == "freeze"
        )
        expected = model.lm_head(hidden)
        cap = getattr(model.config, "final_logit_softcapping", None)
        expected = torch.tanh(expected / cap) * cap if cap else expected
    last = (mask * torch.arange(LENGTH)).argmax(-1)
    first = expected[torch.arange(rows), last][:, None]
    expected = torch.cat([first, expected[:, LENGTH:]], dim=1)
    assert (expected - logits).abs().max() < 1e-4
