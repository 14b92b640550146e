"""Text decoders of vision-language models before their first layer, and what is special to them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vla_pruner as vp
from tests.families import matrix, text_decoders
from vla_pruner.auditing.reference import FullLength

METHODS = [vp.CDPruner, vp.DART, vp.DivPrune]


@pytest.mark.parametrize("kind", text_decoders.KINDS)
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
@pytest.mark.parametrize("make", METHODS)
def test_pruned_before_the_decoder(kind: str, pruned: str, make: Any) -> None:
    case = text_decoders.text_decoder(kind)
    model = case.build()
    untouched = case.step(model, 1, matrix.BOTH)
    with make(keep=0.5, layer=0, pruned=pruned).attach(model, **case.options) as session:
        actual = case.step(model, 1, matrix.BOTH)
        kept, layout = session.kept, session.step.layout  # type: ignore[union-attr]
    with FullLength(model, layout, kept, layer=0, pruned=pruned, **case.options):
        expected = case.step(model, 1, matrix.BOTH)
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - untouched).abs().max() > 1e-1, "pruning must show, or this test could not fail"


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_deepstack_adds_to_the_tokens_that_are_live(layer: int) -> None:
    """Behind all levels, hidden states are those of the whole prompt with the dropped tokens masked; the decoder is
    left as it was.
    """
    case = text_decoders.text_decoder("qwen3_vl_text")
    model = case.build()
    before = dict(vars(model.model))
    seen: list[torch.Tensor] = []
    with vp.KeepFixed((0, 5, 13, 20), layer=layer).attach(model, **case.options) as session:
        assert "_deepstack_process" in vars(model.model)
        hook = model.model.layers[3].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        case.step(model, 1, matrix.BOTH)
        hook.remove()
        layout = session.step.layout  # type: ignore[union-attr]
        live = session.step.shortening.kept  # type: ignore[union-attr]
    assert dict(vars(model.model)) == before
    with FullLength(model, layout, torch.tensor([0, 5, 13, 20]), layer=layer, **case.options):
        hook = model.model.layers[3].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        case.step(model, 1, matrix.BOTH)
        hook.remove()
    short, whole = seen[0], next(hidden for hidden in seen if hidden.shape[1] == text_decoders.LENGTH)
    real = layout.prompt.gather(1, live)
    expected = whole.gather(1, live[..., None].expand(-1, -1, whole.shape[2]))
    assert short.shape[1] == text_decoders.LENGTH - 20
    assert (short - expected)[real].abs().max() < 1e-4


def test_gemma3_is_pruned_behind_its_first_full_layer() -> None:
    case = text_decoders.text_decoder("gemma3_text")
    with pytest.raises(vp.UnsupportedModelError, match="give layer=2"):
        vp.FastV(keep=4, layer=1).attach(case.build(), **case.options)
