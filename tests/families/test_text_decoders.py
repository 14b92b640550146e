"""Text decoders of vision-language models before their first layer, and their special cases."""

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


@pytest.mark.parametrize("kind", text_decoders.KINDS)
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_static_caches(kind: str, pruned: str) -> None:
    case = text_decoders.text_decoder(kind, static=True)
    matrix.check_keep_all(case, pruned)
    matrix.check_reference(case, 0.5, pruned)


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


IMAGE = 60
TEXT_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 5,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def vlm(kind: str) -> Any:
    """A whole vision-language model of Qwen's, with two images of 24 x 16 pixels, six tokens each."""
    import transformers

    rope: dict[str, Any] = {"mrope_section": [2, 1, 1], "rope_type": "default", "rope_theta": 1e6}
    text: dict[str, Any] = {**TEXT_CONFIG, "rope_parameters": rope}
    vision: dict[str, Any] = {"depth": 4, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3}
    vision["temporal_patch_size"] = 2
    if kind == "Qwen2VL":
        vision |= {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64}
    if kind == "Qwen3VL":
        rope["mrope_interleaved"], text["head_dim"] = True, 8
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1, 2]}
    elif kind == "Qwen2_5_VL":
        vision |= {"window_size": 16, "fullatt_block_indexes": [2], "tokens_per_second": 2}
    special = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 63}
    config = getattr(transformers, f"{kind}Config")(text_config=text, vision_config=vision, **special)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen2_5_VL", "Qwen3VL"])
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_a_vision_language_model_generates_pruned(kind: str, pruned: str) -> None:
    model = vlm(kind)
    image = [62, *[IMAGE] * 6, 63]
    ids = torch.tensor([[1, *image, *image, 10, 11, 12, 13]])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(48, 3 * 2 * 16, generator=torch.Generator().manual_seed(1)),
        "image_grid_thw": torch.tensor([[1, 6, 4]] * 2),
        "mm_token_type_ids": (ids == IMAGE).int(),
    }
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "output_logits": True}

    def generate() -> torch.Tensor:
        return torch.stack(model.generate(**given, **options, return_dict_in_generate=True).logits, dim=1)

    decoder, cameras = model.model.language_model, {"left": slice(2, 8), "right": slice(10, 16)}
    untouched = generate()
    with vp.VLAPruner(keep=1.0, warmup="semantic", preset="paper").attach(decoder, visual=cameras):
        assert torch.equal(generate(), untouched)
    with vp.FastV(keep=4, layer=1, pruned=pruned).attach(decoder, visual=cameras) as session:
        actual = generate()
        kept, layout = session.kept, session.step.layout  # type: ignore[union-attr]
    with FullLength(decoder, layout, kept, layer=1, pruned=pruned, visual=cameras):
        expected = generate()
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - untouched).abs().max() > 1e-2, "pruning must show, or this test could not fail"
