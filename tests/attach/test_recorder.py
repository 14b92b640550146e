"""The attention that the recorder reads beside sdpa is the one that an eager model reports."""

from __future__ import annotations

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import CACHE, LAYERS, LENGTH, TOKENS, VISUAL, K, make_cache, positions_of, prompt, tiny_lm
from vla_pruner.caches import cache_of

DECODED = 3


def attentions(kind, padding):
    """(prefill maps, decode maps) of an eager model: per layer (B, H, Q, S), and the tokens it decodes."""
    model = tiny_lm(kind, "eager")
    embeds, mask = prompt(padding=padding)
    rows = torch.arange(2)
    with torch.no_grad():
        out = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions_of(mask),
            **{CACHE: make_cache("dynamic", model)},
            output_attentions=True,
        )
        last = (mask * torch.arange(LENGTH)).argmax(-1)
        maps, decoded = out.attentions, []
        token = out.logits[rows, last].argmax(-1, keepdim=True)
        for _ in range(DECODED):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            out = model(
                input_ids=token,
                attention_mask=mask,
                position_ids=positions_of(mask)[:, -1:],
                **{CACHE: cache_of(out)},
                output_attentions=True,
            )
            decoded.append(out.attentions)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
    return maps, decoded, last


@pytest.mark.parametrize("kind", ["llama", "gemma2", "qwen3"])
@pytest.mark.parametrize("padding", [None, "right", "left"])
@pytest.mark.parametrize("queries", ["all", "text", "last"])
def test_scores_are_the_models_own_attention(kind, padding, queries):
    maps, decoded, last = attentions(kind, padding)
    embeds, mask = prompt(padding=padding)
    shift = torch.tensor([row + 1 if padding == "left" else 0 for row in range(2)])
    visual = torch.arange(VISUAL.start, VISUAL.stop)[None] + shift[:, None]
    visual = visual.clamp_max(LENGTH - 1)
    semantic, action = torch.zeros(2, TOKENS), torch.zeros(2, TOKENS)
    for row in range(2):
        wanted = {
            "all": mask[row].bool(),
            "text": mask[row].bool() & (torch.arange(LENGTH) > visual[row].max()),
            "last": torch.arange(LENGTH) == last[row],
        }[queries]
        semantic[row] = maps[K - 1][row][:, wanted].mean((0, 1))[visual[row]]
        for layer in range(LAYERS // 2, LAYERS):
            emitting = [maps[layer][row, :, last[row]], *(step[layer][row, :, 0] for step in decoded)]
            action[row] += sum(m.mean(0)[visual[row]] for m in emitting) / len(emitting)
    action /= LAYERS - LAYERS // 2

    from tests.attach.tiny import decode

    model = tiny_lm(kind, "eager" if kind == "gemma2" else "sdpa")
    method = vp.VLAPruner(keep=0.5, layer=K, semantic_queries=queries, preset="paper")
    with method.attach(model, visual=VISUAL, padding_side="left" if padding == "left" else "right") as session:
        decode(model, embeds, mask, make_cache("dynamic", model), DECODED)
        scores = session.scores
    assert scores["semantic"].dtype == scores["action"].dtype == torch.float32
    assert (scores["semantic"] - semantic).abs().max() < 1e-5
    assert (scores["action"] - action).abs().max() < 1e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_pruned_steps_score_kept_tokens_and_frozen_ones_too(cache):
    from tests.attach.tiny import decode

    model = tiny_lm()
    embeds = prompt()[0]
    for pruned, seen in (("drop", 6), ("freeze", TOKENS)):
        method = vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", pruned=pruned, preset="paper")
        with method.attach(model, visual=VISUAL) as session:
            decode(model, embeds, None, make_cache(cache, model), DECODED)
            assert ((session.scores["action"] > 0).sum(1) == seen).all()
            assert (session.scores["action"].gather(1, session.kept) > 0).all()  # type: ignore[arg-type]
            unseen = session.memory.age[:, -1] > 0  # type: ignore[union-attr]
            assert (unseen.sum(1) == TOKENS - seen).all()


def test_only_the_layers_that_a_method_needs_are_tapped():
    model = tiny_lm()
    untouched = model.model.layers[0].self_attn.config
    with vp.VLAPruner(keep=0.5, layer=2, preset="paper").attach(model, visual=VISUAL):
        tapped = [layer.self_attn.config is not untouched for layer in model.model.layers]
        assert tapped == [False, True, False, True, True, True]
        assert model.config._attn_implementation == model.model.config._attn_implementation == "sdpa"
    with vp.RandomKeep(keep=0.5).attach(model, visual=VISUAL):
        assert all(layer.self_attn.config is untouched for layer in model.model.layers)


def test_a_layer_may_be_read_for_both_scores():
    """In a shallow decoder the layer before pruning is also one whose action attention counts."""
    from tests.attach.tiny import decode

    model = tiny_lm()
    embeds = prompt()[0]
    untouched = decode(model, embeds, None, make_cache("dynamic", model), DECODED)[1]
    with vp.VLAPruner(keep=1.0, layer=5, preset="paper").attach(model, visual=VISUAL) as session:
        again = decode(model, embeds, None, make_cache("dynamic", model), DECODED)[1]
        full = session.scores
    with vp.VLAPruner(keep=0.5, layer=2, preset="paper").attach(model, visual=VISUAL) as session:
        decode(model, embeds, None, make_cache("dynamic", model), DECODED)
        assert torch.allclose(session.scores["action"], full["action"], atol=1e-7)
    assert torch.equal(again, untouched)
    with vp.VLAPruner(keep=0.5, layer=5, warmup="semantic", preset="paper").attach(model, visual=VISUAL) as session:
        decode(model, embeds, None, make_cache("dynamic", model), DECODED)
        # Two of the three layers that are read still see every token.
        assert (session.scores["action"] > 0).all()
