"""Scores that the text rates: raters and logits through a session agree with the model itself."""

from __future__ import annotations

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import vla_pruner as vp
from tests.attach.tiny import LENGTH, VISUAL, K, decode, make_cache, positions_of, prompt, tiny_lm

ROWS = 2
PADDINGS = [None, "right", "left"]


def run(method, padding, model=None):
    """The semantic score (B, M) and the kept ids of one control step, and its positions (B, M) and text rows (B, N)."""
    model = tiny_lm() if model is None else model
    embeds, mask = prompt(padding=padding)
    side = "left" if padding == "left" else "right"
    with method.attach(model, visual=VISUAL, padding_side=side) as session:
        decode(model, embeds, mask, make_cache("dynamic", model), 1)
    shift = torch.tensor([[row + 1 if padding == "left" else 0] for row in range(ROWS)])
    visual = torch.arange(VISUAL.start, VISUAL.stop)[None] + shift
    text = mask.bool() & (torch.arange(LENGTH)[None] > visual[:, -1:])
    return session, visual, text


def layer_inputs(padding, layer):
    """An eager model's hidden states (B, N, D) as they enter a layer, and that layer's attention (B, H, N, N)."""
    model = tiny_lm(backend="eager")
    embeds, mask = prompt(padding=padding)
    with torch.no_grad():
        ids = positions_of(mask)
        out = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=ids,
            output_attentions=True,
            output_hidden_states=True,
        )
    return model, out.hidden_states[layer], out.attentions[layer], ids


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_sparsevlm_reads_the_raters_rows(padding, preset):
    session, visual, text = run(vp.SparseVLM(keep=6, layer=K, preset=preset), padding)
    embeds = prompt(padding=padding)[0]
    _, _, attention, _ = layer_inputs(padding, K - 1)
    for row in range(ROWS):
        candidates = text[row].nonzero().flatten()
        candidates = candidates[1:-1] if preset == "official" else candidates
        relevance = (embeds[row, visual[row]] @ embeds[row, candidates].T).softmax(1).mean(0)
        raters = candidates[relevance >= relevance.mean()]
        assert 0 < len(raters) < len(candidates), "raters must be some of the text, or this test could not fail"
        expected = attention[row][:, raters].mean((0, 1))[visual[row]]
        assert (session.scores["semantic"][row] - expected).abs().max() < 1e-5
        assert session.kept is not None
        assert session.kept[row].tolist() == sorted(expected.argsort(descending=True)[:6].tolist())


@pytest.mark.parametrize("padding", PADDINGS)
def test_the_last_row_is_the_last_real_one(padding):
    session, visual, text = run(vp.VLAPruner(keep=6, layer=K, window=1, warmup="semantic"), padding)
    _, _, attention, _ = layer_inputs(padding, K - 1)
    for row in range(ROWS):
        last = int(text[row].nonzero().max())
        assert (last < LENGTH - 1) == (padding == "right"), "or this test could not fail"
        expected = attention[row][:, last].mean(0)[visual[row]]
        assert (session.scores["semantic"][row] - expected).abs().max() < 1e-5


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layer", [1, K])
def test_text_query_reads_logits(padding, layer):
    session, visual, text = run(vp.TextQuery(keep=6, layer=layer), padding)
    model, hidden, _, ids = layer_inputs(padding, layer - 1)
    block = model.model.layers[layer - 1]
    with torch.no_grad():
        normed = block.input_layernorm(hidden)
        heads = lambda states: states.view(ROWS, LENGTH, -1, 8).transpose(1, 2)  # noqa: E731
        query, key = heads(block.self_attn.q_proj(normed)), heads(block.self_attn.k_proj(normed))
        query, key = apply_rotary_pos_emb(query, key, *model.model.rotary_emb(hidden, ids))
        logits = query @ key.repeat_interleave(2, dim=1).transpose(-1, -2) * 8**-0.5
    for row in range(ROWS):
        expected = logits[row][:, text[row]].mean((0, 1))[visual[row]]
        assert (session.scores["semantic"][row] - expected).abs().max() < 1e-5
        assert session.kept is not None
        assert session.kept[row].tolist() == sorted(expected.argsort(descending=True)[:6].tolist())


def test_one_rows_logits_are_its_log_probabilities():
    """Up to a constant of the row and head, which the mean over heads makes one of the row."""

    class LastQuery(vp.TextQuery):
        @property
        def queries(self):
            return "last"

    session, visual, _ = run(LastQuery(keep=6, layer=K), "right")
    _, mask = prompt(padding="right")
    last = (mask * torch.arange(LENGTH)).argmax(-1)
    _, _, attention, _ = layer_inputs("right", K - 1)
    expected = attention[torch.arange(ROWS), :, last].log().mean(1).gather(1, visual)
    difference = session.scores["semantic"] - expected
    assert (difference - difference.mean(1, keepdim=True)).abs().max() < 1e-4


def test_static_cache_gives_the_same_scores():
    model = tiny_lm()
    embeds = prompt()[0]
    for method in (vp.SparseVLM(keep=6, layer=K), vp.TextQuery(keep=6, layer=K)):
        found = []
        for cache in ("dynamic", "static"):
            with method.attach(model, visual=VISUAL) as session:
                decode(model, embeds, None, make_cache(cache, model), 1)
                found.append(session.scores["semantic"])
        assert (found[0] - found[1]).abs().max() < 1e-6
