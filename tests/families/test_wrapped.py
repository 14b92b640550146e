"""Models inside of third-party wrappers: the session attaches to the model inside, and the wrapper's calls run it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import vla_pruner as vp
from tests.attach.tiny import VISUAL, decode, make_cache, prompt, tiny_lm
from tests.state import whole_state
from vla_pruner.families import family_of

STEPS = 3


class PeftModel(nn.Module):
    """Looks like PEFT's: the adapted model two floors below, attributes found through."""

    def __init__(self, model: nn.Module, **config: bool) -> None:
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


WRAPPERS = [PeftModel, DistributedDataParallel, FullyShardedDataParallel, both]


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
    method = vp.VLAPruner(keep=0.25, window=1, pruned=pruned)
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
    method = vp.VLAPruner(keep=0.25, window=1)

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


def test_a_compiled_language_model_is_refused() -> None:
    with pytest.raises(vp.UnsupportedModelError, match="_orig_mod"):
        vp.FastV(keep=4).attach(torch.compile(tiny_lm(), backend="eager"), visual=VISUAL)


@pytest.mark.parametrize("kind", ["is_prompt_learning", "is_adaption_prompt"])
def test_adapters_that_add_tokens_are_refused(kind: str) -> None:
    with pytest.raises(vp.UnsupportedModelError, match="get_base_model"):
        vp.FastV(keep=4).attach(PeftModel(tiny_lm(), **{kind: True}), visual=VISUAL)


def test_shards_within_are_refused() -> None:
    model: Any = tiny_lm()
    model.model.layers[1] = FullyShardedDataParallel(model.model.layers[1])
    with pytest.raises(vp.UnsupportedModelError, match="not sharded"):
        vp.FastV(keep=4).attach(FullyShardedDataParallel(model), visual=VISUAL)


def test_other_wrappers_name_what_to_attach_to() -> None:
    with pytest.raises(vp.UnsupportedModelError, match=r"its \.module"):
        vp.FastV(keep=4).attach(nn.DataParallel(tiny_lm()), visual=VISUAL)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_lora_of_peft(merged: bool, pruned: str) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    images = {"image": np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    wrapped = peft.get_peft_model(vp.random_policy("openvla"), config).eval()
    if merged:
        wrapped.merge_adapter()
    found = []
    for target in (wrapped, wrapped.get_base_model()):
        with vp.VLAPruner(keep=0.25, window=1, pruned=pruned).attach(target) as session:
            actions = [wrapped.act(images, "open the door") for _ in range(2)]
            found.append((actions[-1], session.kept))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=0, atol=1e-5)
    assert torch.equal(found[0][1], found[1][1])
