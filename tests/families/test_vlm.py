"""Sessions on whole vision-language models: every class, through `generate`, and its special cases."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GenerationConfig

import vla_pruner as vp
from tests.attach.tiny import CACHE, VISUAL, prompt, tiny_lm
from tests.families import vlms
from tests.families.test_wrapped import PeftModel
from tests.state import whole_state
from vla_pruner.auditing.reference import FullLength
from vla_pruner.caches import cache_of
from vla_pruner.families import family_of
from vla_pruner.families.vlm import GLUED, KINDS, SEPARATE, TILED, VLM

TWO = {"front": 0.5, "wrist": 1}
NAMES = ("front", "wrist")
CACHES: dict[str, Any] = {"dynamic": {}, "static": {"cache_implementation": "static", "disable_compile": True}}


def state(model: nn.Module) -> dict[str, Any]:
    """Return the whole state of a model, except what Qwen's models keep of the last prompt."""
    return {place: value for place, value in whole_state(model).items() if not place.endswith("rope_deltas")}


def check_reference(model: Any, given: dict[str, Any], method: Any, *, untouched: Tensor, **options: Any) -> None:
    """Assert that a pruned step agrees with the model at full length and differs from the untouched model."""
    with method.attach(model) as session:
        actual = vlms.logits(model, given, **options)
        kept, layout = session.kept, session.step.layout
    with FullLength(model, layout, kept, layer=method.layer, pruned=method.pruned):
        expected = vlms.logits(model, given, **options)
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - untouched).abs().max() > 1e-2, "pruning must show, or this test could not fail"


@pytest.mark.parametrize("kind", vlms.CLASSES)
def test_every_class_generates_pruned(kind: str) -> None:
    model, given = vlms.vlm(kind), vlms.inputs(kind)
    assert type(family_of(model)) is VLM
    untouched = vlms.logits(model, given)
    before = state(model)
    with vp.VLAPruner(keep=1.0, warmup="semantic", preset="paper").attach(model) as session:
        assert torch.equal(vlms.logits(model, given), untouched)
        assert session.memory.steps.tolist() == [1, 1]  # type: ignore[union-attr]
        visual = session.step.layout.visual  # type: ignore[union-attr]
    assert torch.equal(given["input_ids"].gather(1, visual), torch.full((2, 2 * vlms.each(kind)), vlms.IMAGE))
    for pruned in ("drop", "freeze"):
        check_reference(model, given, vp.FastV(keep=0.5, pruned=pruned), untouched=untouched)
    assert state(model) == before
    assert torch.equal(vlms.logits(model, given), untouched)


@pytest.mark.parametrize(
    ("kind", "backend", "cache", "layer"),
    [
        ("llava", "eager", "static", 1),
        ("paligemma", "sdpa", "static", 2),
        ("gemma3", "eager", "dynamic", 2),
        ("gemma3", "sdpa", "static", 4),
        ("smolvlm", "eager", "dynamic", 1),
        ("internvl", "sdpa", "static", 3),
        ("qwen2_5_vl", "eager", "static", 1),
        ("qwen3_vl", "sdpa", "dynamic", 1),
        ("qwen3_vl", "eager", "static", 2),
    ],
)
def test_backends_caches_and_layers(kind: str, backend: str, cache: str, layer: int) -> None:
    model, given = vlms.vlm(kind, backend), vlms.inputs(kind)
    options = CACHES[cache]
    untouched = vlms.logits(model, given, **options)
    with vp.VLAPruner(keep=1.0, warmup="semantic", layer=layer, preset="paper").attach(model):
        assert torch.equal(vlms.logits(model, given, **options), untouched)
    pruned = "freeze" if layer % 2 else "drop"
    check_reference(model, given, vp.FastV(keep=0.5, layer=layer, pruned=pruned), untouched=untouched, **options)


@pytest.mark.parametrize("kind", ["paligemma", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_pruned_before_the_decoder(kind: str, cache: str) -> None:
    model, given = vlms.vlm(kind), vlms.inputs(kind)
    untouched = vlms.logits(model, given, **CACHES[cache])
    check_reference(model, given, vp.DivPrune(keep=0.5, layer=0), untouched=untouched, **CACHES[cache])


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_cameras(kind: str) -> None:
    """Names are enough for models whose prompts tell images apart; the others need the tokens of each image."""
    model, given = vlms.vlm(kind), vlms.inputs(kind)
    each = vlms.each(kind)
    method = vp.FastV(keep=TWO)
    cameras: Any = NAMES if kind in (*SEPARATE, *GLUED) else dict.fromkeys(NAMES, each)
    with method.attach(model, cameras=cameras) as session:
        vlms.logits(model, given, 1)
        layout, kept = session.step.layout, session.kept  # type: ignore[union-attr]
    assert layout.cameras == (each, each)
    assert kept is not None
    assert ((kept < each).sum(dim=1) == round(0.5 * each)).all()
    assert kept.shape == (2, round(0.5 * each) + 1)
    with vp.VLAPruner(keep=0.5, per_camera=True, warmup="semantic", preset="paper").attach(
        model, cameras=cameras
    ) as session:
        vlms.logits(model, given, 1)
        kept = session.kept
    assert kept is not None
    assert ((kept < each).sum(dim=1) == round(0.5 * each)).all()
    with pytest.raises(vp.BudgetError, match="does not name its cameras"):
        method.attach(model)


@pytest.mark.parametrize("kind", ["llava", "paligemma"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_no_choice(kind: str, side: str) -> None:
    """The last row of the prompt is the last real one."""
    model, padding = vlms.vlm(kind), vlms.PADDING[1]
    both = vlms.inputs(kind)
    words = [name for name, given in both.items() if given.shape == both["input_ids"].shape]
    alone = {**vlms.inputs(kind, rows=slice(1, 2)), **{name: both[name][1:, padding:] for name in words}}
    if side == "right":
        both |= {name: torch.stack([both[name][0], both[name][1].roll(-padding)]) for name in words}
    found = []
    for given in (alone, both):
        with torch.no_grad(), vp.VLAPruner(keep=0.5, window=1, warmup="semantic").attach(model) as session:
            model(**given)
            assert session.kept is not None
            found.append((session.scores["semantic"][-1], session.kept[-1]))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-5)
    assert torch.equal(found[1][1], found[0][1])


def test_cameras_that_cannot_be_are_refused() -> None:
    for kind in TILED:
        with pytest.raises(vp.OptionError, match="cuts images into tiles"):
            vp.FastV().attach(vlms.vlm(kind), cameras=NAMES)
    for cameras in ("front", (), ("front", "front"), {"front": 0}, {1: 4}, {}, 3):
        with pytest.raises(vp.OptionError, match="cameras="):
            vp.FastV().attach(vlms.vlm("llava"), cameras=cameras)
    with pytest.raises(vp.BudgetError, match="12 visual tokens"):
        vp.FastV(keep=13).attach(vlms.vlm("llava"), cameras={"front": 4, "wrist": 8})
    for kind, cameras, told in (
        ("llava", ("front",), None),
        ("llava", ("a", "b", "c"), "2 separate images"),
        ("paligemma", ("a", "b", "c"), "2 separate images"),
        ("smolvlm", {"front": 4, "wrist": 5}, "has 8 image tokens"),
    ):
        model = vlms.vlm(kind)
        with vp.FastV().attach(model, cameras=cameras) as session:
            if told is None:
                vlms.logits(model, vlms.inputs(kind), 1)
                assert session.step.layout.cameras == (18,)  # type: ignore[union-attr]
            else:
                with pytest.raises(vp.SessionError, match=told):
                    vlms.logits(model, vlms.inputs(kind), 1)


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl", "smolvlm"])
def test_the_model_inside_is_attached_to_as_itself(kind: str) -> None:
    """The inner model's hidden states have the prompt's own length, and so do the logits of a model around it."""
    whole = vlms.vlm(kind)
    given = vlms.inputs(kind)
    inner = whole.model
    shape = given["input_ids"].shape
    with torch.no_grad():
        expected = inner(**given).last_hidden_state
        with vp.FastV(keep=0.5).attach(inner) as session:
            hidden = inner(**given).last_hidden_state
            kept: Any = session.kept
            layout = session.step.layout  # type: ignore[union-attr]
            assert whole(**given).logits.shape[:2] == shape
            assert whole(**given, logits_to_keep=1).logits.shape[:2] == (2, 1)
        with FullLength(inner, layout, kept, layer=3):
            reference = inner(**given).last_hidden_state
    assert hidden.shape == expected.shape
    assert (hidden[:, -1] - reference[:, -1]).abs().max() < 1e-4
    assert (hidden[:, -1] - expected[:, -1]).abs().max() > 1e-2
    alone = vlms.vlm(kind, inner=True)
    with vp.FastV(keep=0.5).attach(alone) as session, torch.no_grad():
        assert alone(**given).last_hidden_state.shape[:2] == shape
        assert session.kept is not None


@pytest.mark.parametrize("kind", ["llava", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("failed", [False, True])
def test_calls_without_an_image_run_untouched(kind: str, failed: bool) -> None:
    """Such calls leave the control steps around them unchanged, including one that failed."""
    model, given = vlms.vlm(kind), vlms.inputs(kind)
    words = {"input_ids": torch.tensor([[1, 10, 11, 12]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    untouched = vlms.logits(model, words)
    method = vp.VLAPruner(keep=0.5, window=1, preset="paper")

    def fail(*_: Any) -> None:
        raise RuntimeError("robot fell over")

    with method.attach(model) as session:
        assert torch.equal(vlms.logits(model, words), untouched)
        assert session.step is None
        vlms.logits(model, given)
        first = session.memory
        if failed:
            handle = model.model.language_model.layers[4].mlp.register_forward_pre_hook(fail)
            with pytest.raises(RuntimeError, match="fell over"):
                vlms.logits(model, vlms.inputs(kind, 1))
            handle.remove()
        assert torch.equal(vlms.logits(model, words), untouched)
        assert torch.equal(session.memory.action, first.action)  # type: ignore[union-attr]
        assert session.memory.steps.tolist() == [1, 1]  # type: ignore[union-attr]
        interrupted = vlms.logits(model, vlms.inputs(kind, 1))
        kept: Any = session.kept
        session.reset()
        vlms.logits(model, given)
        assert torch.equal(vlms.logits(model, vlms.inputs(kind, 1)), interrupted)
        assert torch.equal(kept, session.kept)  # type: ignore[arg-type]


def test_an_image_token_that_is_decoded_is_a_word() -> None:
    model, given = vlms.vlm("llava"), vlms.inputs("llava")
    with torch.no_grad():
        model.lm_head.weight[vlms.IMAGE] = 40 * model.lm_head.weight[vlms.IMAGE]
        model.lm_head.bias = nn.Parameter(torch.zeros(64).scatter(0, torch.tensor([vlms.IMAGE]), 1000.0))
    with vp.FastV(keep=0.5).attach(model) as session:
        made = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
        assert (made[:, -3:] == vlms.IMAGE).all()
        assert session.memory.steps.tolist() == [1, 1]  # type: ignore[union-attr]


def test_what_cannot_be_pruned_is_refused_in_a_sentence() -> None:
    model, given = vlms.vlm("qwen2_5_vl"), vlms.inputs("qwen2_5_vl")
    before = state(model)
    decoder = model.model.language_model
    ids = given["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    three, one = vlms.prompt_ids("llava", 3)[:1], vlms.prompt_ids("llava", 1)[1:]
    unequal = {"pixel_values": vlms.inputs("llava")["pixel_values"]}
    unequal["input_ids"] = torch.cat([three, nn.functional.pad(one, (three.shape[1] - one.shape[1], 0))])
    with vp.FastV().attach(model), torch.no_grad():
        with pytest.raises(vp.SessionError, match="give input_ids, not inputs_embeds"):
            model(inputs_embeds=embeds)
        with pytest.raises(vp.SessionError, match="give images"):
            model(**given, pixel_values_videos=given["pixel_values"])
        with pytest.raises(vp.SessionError, match="called past the model"):
            decoder(inputs_embeds=embeds)
        with pytest.raises(vp.SessionError, match="speculative"):
            model.generate(**given, prompt_lookup_num_tokens=2)
        model.generate(**given, max_new_tokens=2)
    assert state(model) == before
    llava = vlms.vlm("llava")
    with vp.FastV().attach(llava), pytest.raises(vp.SessionError, match="27, 9 image tokens"):
        llava.generate(**unequal, max_new_tokens=1)
    with pytest.raises(vp.UnsupportedModelError, match="give layer=2"):
        vp.FastV(layer=1).attach(vlms.vlm("gemma3"))
    narrow = vlms.vlm("gemma3", sliding_window=16)
    with vp.FastV().attach(narrow), pytest.raises(vp.UnsupportedModelError, match="sliding window is 16"):
        narrow.generate(**vlms.inputs("gemma3"), max_new_tokens=1)
    other = nn.Module()
    other.language_model = nn.Module()
    other.config = SimpleNamespace(model_type="moondream", image_token_id=3)  # type: ignore[assignment]
    with pytest.raises(vp.UnsupportedModelError, match=r"'moondream'; supported are llava, .*visual=slice"):
        vp.FastV().attach(other)
    with pytest.raises(vp.OptionError, match="it takes cameras"):
        vp.FastV().attach(vlms.vlm("llava"), visual=slice(1, 10))


@pytest.mark.parametrize("said", ["call", "config", "model"])
def test_decoding_without_a_cache_would_be_a_control_step_for_each_token(said: str) -> None:
    model, given = vlms.vlm("llava"), vlms.inputs("llava")
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False}
    if said == "model":
        model.generation_config.use_cache = False
    elif said == "config":
        options["generation_config"] = GenerationConfig(use_cache=False)
    else:
        options["use_cache"] = False
    with vp.VLAPruner(keep=0.5, window=1, preset="paper").attach(model) as session:
        with pytest.raises(vp.SessionError, match="use_cache=False"):
            model.generate(**given, **options)
        assert session.memory is None
        model.generate(**given, **{**options, "max_new_tokens": 1})
        assert session.memory.steps.tolist() == [1, 1]  # type: ignore[union-attr]
    decoder: Any = tiny_lm()
    with vp.FastV(keep=0.5).attach(decoder, visual=VISUAL), pytest.raises(vp.SessionError, match="use_cache=False"):
        decoder.generate(inputs_embeds=prompt(1)[0], max_new_tokens=2, use_cache=False)


@pytest.mark.parametrize("ids", [[[1, 60, 60]], "ids", 3])
def test_ids_that_are_no_tensor_are_refused(ids: Any) -> None:
    model = vlms.vlm("llava")
    with vp.FastV(keep=0.5).attach(model), pytest.raises(vp.SessionError, match="give a tensor"):
        model(input_ids=ids)


def test_an_adapted_model_is_pruned_as_itself() -> None:
    model, given = vlms.vlm("llava"), vlms.inputs("llava")
    with vp.FastV(keep=0.5).attach(model) as session:
        expected = vlms.logits(model, given)
        kept: Any = session.kept
    wrapped = PeftModel(model)
    with vp.FastV(keep=0.5).attach(wrapped) as session:
        assert torch.equal(vlms.logits(wrapped, given), expected)
        assert torch.equal(kept, session.kept)  # type: ignore[arg-type]


def test_beams() -> None:
    """The prompt has one image: before transformers 5.6 or so, beams of a prompt with several get the wrong ones."""
    model, given = vlms.vlm("llava"), vlms.inputs("llava", images=1)
    untouched = vlms.logits(model, given, num_beams=2)
    with vp.VLAPruner(keep=1.0, warmup="semantic", preset="paper").attach(model):
        assert torch.equal(vlms.logits(model, given, num_beams=2), untouched)
    check_reference(model, given, vp.FastV(keep=0.5), untouched=untouched, num_beams=2)


@pytest.mark.parametrize("kind", ["paligemma", "qwen3_vl"])
def test_a_token_without_a_position_is_refused_over_a_short_cache(kind: str) -> None:
    model, given = vlms.vlm(kind), vlms.inputs(kind, rows=slice(0, 1))
    del given["attention_mask"]
    for layer in (1, 0):
        with vp.DivPrune(keep=0.5, layer=layer).attach(model), torch.no_grad():
            out = model(**given, use_cache=True)
            token = {"input_ids": torch.ones(1, 1, dtype=torch.int64), CACHE: cache_of(out)}
            if layer:
                model(**token)
            else:
                with pytest.raises(vp.SessionError, match="Give position_ids"):
                    model(**token)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_compiled_calls_agree() -> None:
    """Calls with words alone do not run in the graphs of the control steps."""
    model, given = vlms.vlm("llava"), vlms.inputs("llava")
    words = {"input_ids": torch.tensor([[1, 10, 11, 12]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    untouched = vlms.logits(model, words, 2)
    method = vp.FastV(keep=0.5)
    with method.attach(model):
        expected = vlms.logits(model, given, 2)
    with method.attach(model) as session:
        session.compile("eager")
        assert (vlms.logits(model, given, 2) - expected).abs().max() < 1e-5
        assert torch.equal(vlms.logits(model, words, 2), untouched)
        assert (vlms.logits(model, given, 2) - expected).abs().max() < 1e-5


def test_a_policy_that_holds_a_supported_model_is_told_where():
    class MyPolicy(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    vlm = vp.random_policy("llava").module
    with pytest.raises(
        vp.UnsupportedModelError, match=r"holds a LlavaForConditionalGeneration.*attach\(policy\.inner\) "
    ):
        vp.FastV().attach(MyPolicy(vlm))
    with pytest.raises(vp.UnsupportedModelError, match=r"attach\(policy\.inner\.inner\) "):
        vp.FastV().attach(MyPolicy(MyPolicy(vlm)))
    with pytest.raises(vp.UnsupportedModelError, match=r"attach\(policy\.get_submodule\('0\.inner'\)\) "):
        vp.FastV().attach(nn.Sequential(MyPolicy(vlm)))
    decoder = vlm.model.language_model
    with pytest.raises(vp.UnsupportedModelError, match=r"attach\(policy\.inner, visual=slice\(start, stop\)\)"):
        vp.FastV().attach(MyPolicy(decoder))
    for other in (torch.nn.Linear(2, 2), vp.random_policy("pi0").module.model):
        with pytest.raises(vp.UnsupportedModelError) as refused:
            vp.FastV().attach(other)
        assert "holds" not in str(refused.value), "the parts of pi0 are not called as models of their own"


def test_a_policy_around_a_model_may_be_a_module_itself():
    class MyPolicy(nn.Module):
        cameras = NAMES

        def __init__(self, module):
            super().__init__()
            self.module, self.episodes = module, 0

        def act(self, given):
            return vlms.logits(self.module, given)

        def reset(self):
            self.episodes += 1

    policy = MyPolicy(vp.random_policy("llava").module).eval()
    before = state(policy)
    with vp.VLAPruner(keep=TWO, warmup="semantic", preset="paper").attach(policy) as session:
        assert session.family.cameras == NAMES
        policy.reset()
        assert policy.episodes == 1
        with pytest.raises(vp.SessionError, match="has a session already"):
            vp.FastV().attach(policy.module)
    policy.episodes = 0
    assert state(policy) == before

    class FullyShardedDataParallel(nn.Module):
        """As torch's: it hands out what the module inside has."""

        def __init__(self, module):
            super().__init__()
            self.module = module

        def __getattr__(self, name):
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self._modules["module"], name)

    with vp.FastV(keep=0.5).attach(FullyShardedDataParallel(policy)) as session:
        assert session.policy is policy
        assert session.family.cameras == NAMES
    policy.module.head = FullyShardedDataParallel(nn.Linear(1, 1))
    with pytest.raises(vp.UnsupportedModelError, match="not sharded"):
        vp.FastV(keep=0.5).attach(FullyShardedDataParallel(policy))
