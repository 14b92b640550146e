"""The full-length reference against layers run by hand and against stored outputs of the official code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import CACHE, VISUAL, K, make_cache, positions_of, prompt, reference_hidden, tiny_lm
from tests.state import whole_state
from vla_pruner.attach.layout import Layout
from vla_pruner.auditing import FullLength
from vla_pruner.policies.pi0 import load_pi0

KEPT = torch.tensor([[0, 3, 9, 20], [1, 2, 5, 23]])


def layout_of(mask):
    visual = torch.arange(VISUAL.start, VISUAL.stop).expand(len(mask), -1)
    return Layout(visual=visual, valid=torch.ones_like(visual).bool(), prompt=mask.bool(), cameras=(visual.shape[1],))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_agrees_with_layers_run_by_hand(backend, padding, pruned):
    model = tiny_lm(backend=backend)
    embeds, mask = prompt(padding=padding)
    layout = layout_of(mask)
    gone = torch.zeros_like(layout.prompt).scatter(1, layout.visual, True)
    gone = gone.scatter(1, layout.visual.gather(1, KEPT), False)
    given = mask if padding else None

    def run():
        with torch.no_grad():
            ids = positions_of(mask)
            return model.model(inputs_embeds=embeds, attention_mask=given, position_ids=ids).last_hidden_state

    untouched, before = run(), whole_state(model)
    with FullLength(model, layout, KEPT, layer=K, pruned=pruned, visual=VISUAL):
        actual = run()
    assert whole_state(model) == before
    with torch.no_grad():
        expected = reference_hidden(model.model, embeds, mask, gone, K, frozen=pruned == "freeze")
    rows = layout.prompt & ~gone
    assert (actual - expected)[rows].abs().max() < 1e-5
    assert (actual - untouched)[rows].abs().max() > 1e-2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_decoded_tokens_do_not_see_what_is_gone(cache, pruned):
    """A token after the prompt sees the same tokens as the last one of a longer prompt."""
    model = tiny_lm()
    embeds, mask = prompt()
    layout = layout_of(mask)
    extra = torch.randn(2, 1, embeds.shape[2])
    longer = torch.cat([mask, mask[:, :1]], dim=1)
    with torch.no_grad():
        with FullLength(model, layout, KEPT, layer=K, pruned=pruned, visual=VISUAL):
            past = make_cache(cache, model)
            model.model(inputs_embeds=embeds, attention_mask=mask, **{CACHE: past}, use_cache=True)
            decoded = model.model(inputs_embeds=extra, attention_mask=longer, **{CACHE: past}).last_hidden_state
        whole = torch.cat([embeds, extra], dim=1)
        with FullLength(model, layout_of(longer), KEPT, layer=K, pruned=pruned, visual=VISUAL):
            expected = model.model(inputs_embeds=whole, attention_mask=longer).last_hidden_state[:, -1:]
        untouched = model.model(inputs_embeds=whole, attention_mask=longer).last_hidden_state[:, -1:]
    assert (decoded - expected).abs().max() < 1e-5
    assert (untouched - expected).abs().max() > 1e-2


def test_agrees_with_stored_outputs_of_pi0(golden):
    """pruned.npz holds outputs of transformers' own code, masked at full length by other means."""
    folder = golden / "transformers_pi0_tiny"
    model = load_pi0(folder).module
    inputs, pruned = np.load(folder / "inputs.npz"), np.load(folder / "pruned.npz")
    names = ("state", "input_ids", "pixel_values", "noise", "attention_mask", "pixel_attention_mask")
    batch = {name: torch.tensor(inputs[name]) for name in names}
    visual = torch.arange(512).expand(2, -1)
    real = torch.ones(2, 528, dtype=torch.bool)
    layout = Layout(visual=visual, valid=real[:, :512], prompt=real, cameras=(256, 256))
    kept = torch.tensor(pruned["kept_visual"])
    with FullLength(model, layout, kept, layer=int(pruned["K"])):
        actions = model.sample_actions(**batch)
    np.testing.assert_allclose(actions, pruned["actions"], rtol=0, atol=1e-4)
    assert np.abs(model.sample_actions(**batch).numpy() - pruned["actions"]).max() > 1e-3


def test_refuses_another_rule():
    model = tiny_lm()
    with pytest.raises(vp.OptionError, match="'melt'"):
        FullLength(model, layout_of(prompt()[1]), KEPT, layer=K, pruned="melt", visual=VISUAL)
