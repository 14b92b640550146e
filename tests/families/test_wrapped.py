"""Models inside of third-party wrappers: the session attaches to the model inside, and the wrapper's calls run it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vla_pruner as vp
from tests.adapters import CHANGES, change_adapters
from tests.attach.tiny import VISUAL, decode, make_cache, prompt, tiny_lm
from tests.state import whole_state
from vla_pruner.families import family_of

STEPS = 3


class PeftModel(nn.Module):
    """Looks like PEFT's: the adapted model two floors below, attributes found through."""

    def __init__(self, model: nn.Module, **config: Any) -> None:
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        kind = type("LoraConfig", (), {"is_prompt_learning": False, **config})
        self.peft_config = {"default": kind()}

    def get_base_model(self) -> nn.Module:
        return self.base_model.model  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model").model, name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.get_base_model()(*args, **kwargs)


class PeftMixedModel(PeftModel):
    """Adapters of several kinds; it has no get_base_model."""

    get_base_model = None  # type: ignore[assignment]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model.model(*args, **kwargs)  # type: ignore[operator]


class DistributedDataParallel(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class FullyShardedDataParallel(DistributedDataParallel):
    pass


def both(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(PeftModel(model))


WRAPPERS = [PeftModel, PeftMixedModel, DistributedDataParallel, FullyShardedDataParallel, both]


def steps(model: Any, lm: Any, method: vp.Method) -> tuple[torch.Tensor, list[Any]]:
    """Return the logits of the last control step, and the ids kept in each; `model` is attached to and called."""
    kept = []
    with method.attach(model, visual=VISUAL) as session:
        for scene in range(STEPS):
            embeds = prompt(seed=scene)[0]
            logits = decode(lm, embeds, None, make_cache("dynamic", model), 3)[1]
            kept.append(session.kept)
    return logits, kept


@pytest.mark.parametrize("wrap", WRAPPERS)
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_a_wrapped_language_model_is_pruned_as_itself(wrap: Any, pruned: str) -> None:
    method = vp.VLAPruner(keep=0.25, window=1, pruned=pruned, preset="paper")
    alone = tiny_lm()
    expected, kept = steps(alone, alone, method)
    wrapped = wrap(tiny_lm())
    wrapped.config = alone.config
    before = whole_state(wrapped)
    found, also = steps(wrapped, wrapped, method)
    assert torch.equal(found, expected)
    for one, other in zip(kept, also, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert kept[-1] is not None
    assert whole_state(wrapped) == before


@pytest.mark.parametrize("wrap", [PeftModel, lambda policy: torch.compile(policy, backend="eager")])
def test_a_wrapped_policy_acts_and_resets_as_itself(wrap: Any) -> None:
    images = {"image": np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)}
    method = vp.VLAPruner(keep=0.25, window=1, preset="paper")

    def act(policy: Any) -> tuple[np.ndarray, Any]:
        with method.attach(policy) as session:
            actions = [policy.act(images, "open the door") for _ in range(2)]
            kept = session.kept
            policy.reset()
            assert session.memory is None
        return actions[-1], kept

    expected, kept = act(vp.random_policy("openvla"))
    found, also = act(wrap(vp.random_policy("openvla")))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(kept, also)


def test_an_adapted_language_model_inside_of_a_policy() -> None:
    policy: Any = vp.random_policy("openvla")
    images = {"image": np.zeros((224, 224, 3), np.uint8)}
    inner = policy.language_model
    policy.language_model = PeftModel(inner)
    assert family_of(policy).decoder is inner.model
    with vp.FastV(keep=64).attach(policy) as session:
        policy.act(images, "open the door")
        assert session.kept is not None


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("attached", [True, False])
def test_compiled_calls_follow_adapters_that_are_changed(attached: bool) -> None:
    """Also those that are put into the model, and taken out of it, after it was compiled."""
    model: Any = tiny_lm()

    def run() -> list[torch.Tensor]:
        found = []
        for change in (None, *CHANGES):
            change_adapters(model.model.layers, change)
            with torch.no_grad():
                found.append(decode(model, prompt()[0], None, make_cache("dynamic", model), 1)[1])
        return found

    method = vp.FastV(keep=0.25) if attached else vp.Unpruned()
    with method.attach(model, visual=VISUAL):
        expected = run()
    assert min((expected[place] - expected[place + 1]).abs().max() for place in range(5)) > 1e-2
    if attached:
        with method.attach(model, visual=VISUAL) as session:
            session.compile("eager")
            found = run()
    else:
        with vp.compiled(model, "eager", visual=VISUAL):
            found = run()
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < 1e-4


def test_a_compiled_language_model_is_refused() -> None:
    with pytest.raises(vp.UnsupportedModelError, match="_orig_mod"):
        vp.FastV(keep=4).attach(torch.compile(tiny_lm(), backend="eager"), visual=VISUAL)


@pytest.mark.parametrize(
    ("config", "does"),
    [
        ({"is_prompt_learning": True}, "tokens of its own into the prompt"),
        ({"is_adaption_prompt": True}, "tokens of its own into the prompt"),
        ({"alora_invocation_tokens": [5, 6]}, "acts from a place in the sequence on"),
        ({"peft_type": "XLORA"}, "runs the model twice"),
    ],
)
def test_adapters_that_do_more_than_change_weights_are_refused(config: dict[str, Any], does: str) -> None:
    with pytest.raises(vp.UnsupportedModelError, match=f"'default' .LoraConfig., which .*{does}"):
        vp.FastV(keep=4).attach(PeftModel(tiny_lm(), **config), visual=VISUAL)


def test_shards_within_are_refused() -> None:
    model: Any = tiny_lm()
    model.model.layers[1] = FullyShardedDataParallel(model.model.layers[1])
    with pytest.raises(vp.UnsupportedModelError, match="not sharded"):
        vp.FastV(keep=4).attach(FullyShardedDataParallel(model), visual=VISUAL)


def test_other_wrappers_name_what_to_attach_to() -> None:
    with pytest.raises(vp.UnsupportedModelError, match=r"its \.module"):
        vp.FastV(keep=4).attach(nn.DataParallel(tiny_lm()), visual=VISUAL)
