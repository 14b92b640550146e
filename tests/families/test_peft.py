"""Models inside of PEFT's own wrappers, with adapters of several kinds, against the full-length reference.

`make test-quantization` installs PEFT and runs this file.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("peft", reason="peft is not installed; make test-quantization installs it")

import peft

import vla_pruner as vp
from tests.attach.tiny import VISUAL, decode, make_cache, prompt, tiny_lm
from tests.families import vlms
from tests.state import whole_state
from vla_pruner.auditing.reference import FullLength

# PEFT asks transformers by a name that is going away, and has advice of its own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

Step = Callable[[Any, int], Tensor]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]
each_pruned = pytest.mark.parametrize("pruned", ["drop", "freeze"])


def lora(**options: Any) -> Any:
    """Return the configuration of an adapter that changes what the model computes."""
    return peft.LoraConfig(r=4, **{"target_modules": PROJECTIONS, "init_lora_weights": False, **options})


def adapted(model: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model, config).eval()


def words(model: Any, scene: int) -> Tensor:
    return decode(model, prompt(seed=scene)[0], None, make_cache("dynamic", model), 2)[1]


def hidden(model: Any, scene: int) -> Tensor:
    embeds, mask = prompt(seed=scene)
    return model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state[:, -2:]


def seeing(kind: str) -> Step:
    return lambda model, scene: vlms.logits(model, vlms.inputs(kind, scene), 2)


def several() -> Any:
    """Two adapters, of which both are active."""
    model = adapted(tiny_lm(), lora())
    model.add_adapter("other", lora(target_modules=["k_proj", "up_proj"]))
    model.base_model.set_adapter(["default", "other"])
    return model.eval()


def merged() -> Any:
    model = adapted(tiny_lm(), lora())
    model.merge_adapter()
    return model


def around_the_decoder(kind: str) -> Any:
    model = vlms.vlm(kind)
    model.model.language_model = adapted(model.model.language_model, lora())
    return model


IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
CASES: dict[str, tuple[Callable[[], Any], Step, dict[str, Any]]] = {
    "LoRA": (lambda: adapted(tiny_lm(), lora(task_type="CAUSAL_LM")), words, {"visual": VISUAL}),
    "DoRA": (lambda: adapted(tiny_lm(), lora(use_dora=True)), words, {"visual": VISUAL}),
    "merged": (merged, words, {"visual": VISUAL}),
    "two at once": (several, words, {"visual": VISUAL}),
    "IA3": (lambda: adapted(tiny_lm(), peft.IA3Config(**IA3, init_ia3_weights=False)), words, {"visual": VISUAL}),
    "saved modules": (lambda: adapted(tiny_lm(), lora(modules_to_save=["norm"])), words, {"visual": VISUAL}),
    "mixed": (lambda: peft.PeftMixedModel(tiny_lm(), lora()).eval(), words, {"visual": VISUAL}),
    "decoder alone": (lambda: adapted(tiny_lm().model, lora()), hidden, {"visual": VISUAL}),
    "vision too": (lambda: adapted(vlms.vlm("llava"), lora(target_modules="all-linear")), seeing("llava"), {}),
    "DeepStack": (lambda: adapted(vlms.vlm("qwen3_vl"), lora()), seeing("qwen3_vl"), {}),
    "in a VLM": (lambda: around_the_decoder("paligemma"), seeing("paligemma"), {}),
}


@pytest.mark.parametrize("name", CASES)
@each_pruned
def test_an_adapted_model_agrees_with_the_full_length_reference(name: str, pruned: str) -> None:
    build, step, options = CASES[name]
    model = build()
    with torch.no_grad():
        untouched = step(model, 1)
        before = whole_state(model)
        with vp.VLAPruner(keep=1.0, pruned=pruned, warmup="semantic", preset="paper").attach(model, **options):
            assert torch.equal(step(model, 1), untouched)
        with vp.VLAPruner(keep=0.25, window=1, pruned=pruned, preset="paper").attach(model, **options) as session:
            actual = [step(model, scene) for scene in range(2)][-1]
            kept, layout = session.kept, session.step.layout  # type: ignore[union-attr]
        assert whole_state(model) == before
        assert kept is not None
        with FullLength(model, layout, kept, layer=3, pruned=pruned, **options):
            expected = step(model, 1)
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - untouched).abs().max() > 1e-2, "pruning must show, or this test could not fail"


@each_pruned
def test_an_adapter_may_be_turned_off_and_changed_while_a_session_is_attached(pruned: str) -> None:
    """What a step computes is that of the adapters that are active in it, frozen tokens included."""
    model = adapted(tiny_lm(), lora())
    model.add_adapter("other", lora())
    method = vp.FastV(keep=0.25, pruned=pruned)
    found = []
    with torch.no_grad(), method.attach(model, visual=VISUAL):
        for name, context in (("default", nullcontext()), ("other", nullcontext()), ("other", model.disable_adapter())):
            model.set_adapter(name)
            with context:
                found.append(words(model, 0))
    assert min((found[0] - found[1]).abs().max(), (found[1] - found[2]).abs().max()) > 1e-2
    alone = tiny_lm()
    with torch.no_grad(), method.attach(alone, visual=VISUAL):
        assert torch.equal(words(alone, 0), found[2])
    for name, expected in zip(("default", "other"), found, strict=False):
        model.set_adapter(name)
        with torch.no_grad(), method.attach(model, visual=VISUAL):
            assert torch.equal(words(model, 0), expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@each_pruned
def test_compiled_calls_follow_the_adapters(pruned: str) -> None:
    model = adapted(tiny_lm(), lora())
    model.add_adapter("other", lora())
    method = vp.FastV(keep=0.25, pruned=pruned)

    def run() -> list[Tensor]:
        found = []
        for name in ("default", "other"):
            model.set_adapter(name)
            found.append(words(model, 0))
        with model.disable_adapter():
            found.append(words(model, 0))
        model.merge_adapter()
        found.append(words(model, 0))
        model.unmerge_adapter()
        layers = [module for module in model.modules() if hasattr(module, "set_scale")]
        for factor in (3.0, 1.0):
            for layer in layers:
                layer.set_scale("other", factor)
            found.append(words(model, 0))
        return found

    with torch.no_grad(), method.attach(model, visual=VISUAL) as session:
        expected = run()
        session.compile("eager")
        for found, wanted in zip(run(), expected, strict=True):
            assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("merge", [False, True])
@each_pruned
def test_an_adapted_policy_acts_as_the_one_inside(merge: bool, pruned: str) -> None:
    images = {"image": np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)}
    wrapped = adapted(vp.random_policy("openvla"), lora(target_modules=["q_proj", "k_proj", "v_proj", "qkv"]))
    if merge:
        wrapped.merge_adapter()
    found = []
    for target in (wrapped, wrapped.get_base_model()):
        with vp.VLAPruner(keep=0.25, window=1, pruned=pruned, preset="paper").attach(target) as session:
            actions = [wrapped.act(images, "open the door") for _ in range(2)]
            found.append((actions[-1], session.kept))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        lambda: peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=2),
        lambda: lora(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]),
    ],
)
def test_adapters_that_do_more_than_change_weights_are_refused(config: Callable[[], Any]) -> None:
    model = adapted(tiny_lm(), config())
    with pytest.raises(vp.UnsupportedModelError, match="has the adapter 'default'"):
        vp.FastV(keep=4).attach(model, visual=VISUAL)
