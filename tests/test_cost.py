"""The formulas against figures worked out by hand, against the paper's, and against torch's counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vla_pruner.caches import cache_name, cache_of
from vla_pruner.cost import (
    ControlStep,
    DecoderShape,
    Flops,
    StepShape,
    Tower,
    count_flops,
    decoder_flops,
)

LLAMA_7B = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, feed_forward=11008)
GEMMA_2B = DecoderShape(layers=18, hidden=2048, heads=8, kv_heads=1, head_dim=256, feed_forward=16384)
SMALL = DecoderShape(layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, feed_forward=48, vocabulary=40)


def test_one_layer_by_hand() -> None:
    flops = DecoderShape(1, hidden=4, heads=2, kv_heads=1, head_dim=3, feed_forward=5).layer(live=2, keys=7, frozen=3)
    live = 2 * (2 * 4 * 6 + 2 * 4 * 3 + 3 * 4 * 5)
    assert flops.linear == 2 * live + 3 * (2 * 2 * 4 * 3)
    assert flops.quadratic == 4 * 2 * 7 * 6


def test_flops_add_and_scale() -> None:
    total = 2 * Flops(1, 2) + Flops(3, 4)
    assert (total.linear, total.quadratic, total.total) == (5, 8, 13)


def test_keeping_everything_is_the_unpruned_cost() -> None:
    step = StepShape(visual=16, other=5, actions=4)
    for pruned in ("drop", "freeze"):
        assert decoder_flops(SMALL, step, kept=16, layer=1, pruned=pruned) == decoder_flops(SMALL, step)
    assert decoder_flops(SMALL, step, kept=2, layer=3) == decoder_flops(SMALL, step)


def test_dropping_costs_less_than_freezing_and_both_less_than_nothing() -> None:
    step = StepShape(visual=16, other=5, actions=4)
    dropped, frozen = (decoder_flops(SMALL, step, 4, 1, pruned).total for pruned in ("drop", "freeze"))
    assert dropped < frozen < decoder_flops(SMALL, step).total


def test_a_frozen_token_costs_what_the_method_says() -> None:
    """17 % of a live token's linear cost in Llama-2 7B (multi-head), 1 % in PaliGemma's Gemma 2B (one kv head)."""
    for decoder, share in ((LLAMA_7B, 0.17), (GEMMA_2B, 0.01)):
        live, frozen = decoder.layer(1, 0).linear, decoder.layer(0, 0, frozen=1).linear
        assert frozen / live == pytest.approx(share, abs=0.005)


@pytest.mark.parametrize(("keep", "published"), [(0.5, 1.139), (0.25, 0.758), (0.125, 0.571)])
def test_the_paper_s_teraflops_are_in_reach(keep: float, published: float) -> None:
    """OpenVLA in arXiv 2511.16449: 1.906 TFLOPs unpruned. Its own counting is not stated, so only the share of the
    prompt's layers is held.
    """
    prompt = StepShape(visual=256, other=24, actions=1)
    share = decoder_flops(LLAMA_7B, prompt, int(256 * keep), layer=3).total / decoder_flops(LLAMA_7B, prompt).total
    assert share == pytest.approx(published / 1.906, abs=0.04)


@pytest.mark.parametrize(("kept", "layer"), [(0, 1), (17, 1), (4, -1), (4, 4)])
def test_impossible_requests_are_refused(kept: int, layer: int) -> None:
    with pytest.raises(ValueError, match="must lie between"):
        decoder_flops(SMALL, StepShape(16, 5, 4), kept, layer)


def test_shape_of_a_configuration() -> None:
    config = SimpleNamespace(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, intermediate_size=96, vocab_size=10
    )
    assert DecoderShape.of(config) == DecoderShape(2, 64, 4, 4, 16, 96, 10)
    config.num_key_value_heads, config.head_dim = 2, 32
    assert DecoderShape.of(config) == DecoderShape(2, 64, 4, 2, 32, 96, 10)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_formula_agrees_with_what_torch_counts(attention: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config._attn_implementation = attention
    model = LlamaForCausalLM(config).eval()
    prompt = torch.randn(1, 21, 32)

    @torch.no_grad()
    def step() -> None:
        output = model(inputs_embeds=prompt, use_cache=True, logits_to_keep=1)
        for _ in range(3):
            output = model(inputs_embeds=torch.randn(1, 1, 32), **{cache_name(model): cache_of(output)}, use_cache=True)

    expected = decoder_flops(DecoderShape.of(config), StepShape(visual=16, other=5, actions=4)).total
    assert count_flops(step) == pytest.approx(expected, rel=0.005)  # rotary angles are counted as a product


def test_a_tower_that_reuses_patches() -> None:
    tower = Tower(SMALL, tokens=16, layers=2, patching=100.0)
    step = ControlStep(SMALL, visual=16, other=5, towers=(tower,), cameras=3, projector=7.0)
    whole, reusing = step.flops(), step.flops(encoded=4)
    assert whole["vision"] == step.flops(encoded=16)["vision"]
    layer = SMALL.layer(4, 16)
    assert reusing["vision"] == 16 * 7.0 + 3 * (100.0 + 2 * layer.total)
    assert {**whole, "vision": 0} == {**reusing, "vision": 0}
    for wrong in (0, 17):
        with pytest.raises(ValueError, match="between 1 and the 16 tokens of a tower"):
            step.flops(encoded=wrong)


def test_counting_a_product() -> None:
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    assert count_flops(lambda: a @ b) == 2 * 3 * 4 * 5


@pytest.mark.parametrize("pruned", ["drop", "freeze", "reuse"])
@pytest.mark.parametrize("then", [(), ((2, 3),)])
def test_a_control_step_is_its_decoder_where_nothing_else_runs(pruned: Any, then: tuple[tuple[int, int], ...]) -> None:
    """Several pruning layers and tokens that are reused included."""
    whole = ControlStep(SMALL, visual=16, other=5, decoded=3)
    parts = whole.flops(6, 1, pruned, then)
    expected = decoder_flops(SMALL, StepShape(16, 5, 4), 6, 1, pruned, then).total
    assert sum(parts.values()) == expected
    lengths = [21, *([11, 8 if then else 11] if pruned == "drop" else [21, 21])]
    width = 2 * SMALL.kv_heads * SMALL.head_dim
    assert whole.cache_elements(6, 1, pruned, then)["written"] == width * sum(lengths)
