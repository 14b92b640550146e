"""A model family from outside of the package: found by its entry point, or given to attach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import VISUAL, K, tiny_lm
from tests.plugins.distributions import install
from tests.state import whole_state
from vla_pruner import plugins
from vla_pruner.benching.feeds import feed
from vla_pruner.benching.policies import build
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.families import family_of
from vla_pruner.families.chunk import Chunk
from vla_pruner.families.decoder_lm import DecoderLM
from vla_pruner.method_names import methods_of
from vla_pruner.registry import row_named, row_of
from vla_pruner.simulators.libero_conventions import libero_convention

TOKENS = 16


def toy() -> Any:
    from vla_pruner_example.toy import ToyPolicy  # pyright: ignore[reportMissingImports]

    return ToyPolicy(tiny_lm().model, TOKENS)


def scene() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, TOKENS, 32, generator=generator), torch.randn(2, 5, 32, generator=generator)


def test_a_model_of_a_foreign_family_is_pruned_and_left_as_it_was(example: Path) -> None:
    policy = toy()
    plain, before = policy.act(*scene()), whole_state(policy)
    (named,) = methods_of(["brightest:layer=3:keep=0.25"])
    with named.method.attach(policy) as session:
        pruned = policy.act(*scene())
        assert session.kept is not None
        assert session.kept.shape == (2, TOKENS // 4)
    assert not torch.equal(pruned, plain)
    assert whole_state(policy) == before
    with vp.FastV(keep=1.0, layer=K).attach(policy):
        assert torch.equal(policy.act(*scene()), plain)
    assert type(family_of(policy)).__name__ == "Toy"


def test_a_foreign_family_is_asked_before_those_of_the_package(site: Path) -> None:
    (site / "special.py").write_text(
        "from vla_pruner.families.decoder_lm import DecoderLM\n"
        "class Special(DecoderLM):\n"
        "    def __init__(self, model):\n"
        "        super().__init__(model, visual=slice(2, 9))\n"
    )
    model = tiny_lm()
    assert type(family_of(model, visual=VISUAL)) is DecoderLM
    install(site, "special-one", "1", {plugins.FAMILIES: {"special": "special:Special"}})
    plugins._plugins.cache_clear()
    assert family_of(model).camera_tokens == (7,)
    with pytest.raises(vp.OptionError, match="attach was given visual; for LlamaForCausalLM it takes no options"):
        family_of(model, visual=VISUAL)
    assert family_of(model, family=DecoderLM, visual=VISUAL).camera_tokens == (24,)

    install(site, "another-one", "2", {plugins.FAMILIES: {"special": "vla_pruner.families.decoder_lm:DecoderLM"}})
    plugins._plugins.cache_clear()
    with pytest.raises(vp.UnsupportedModelError, match=r"another-one 2 and to .*special-one 1; uninstall one, or say"):
        family_of(model)


def test_the_row_of_a_foreign_family_is_used_as_those_of_the_package(example: Path, tmp_path: Path) -> None:
    from vla_pruner_example.toy import ToyPolicy  # pyright: ignore[reportMissingImports]

    policy: Any = vp.random_policy("toy", seed=3)
    assert type(policy) is ToyPolicy
    assert row_of(policy) == row_named("toy") == type(family_of(policy)).row  # type: ignore[attr-defined]
    (tmp_path / "config.json").write_text('{"model_type": "toy", "tokens": 3}')
    loaded: Any = vp.load_policy(tmp_path)
    assert torch.equal(loaded.act(*scene()), policy.act(*scene()))
    with pytest.raises(vp.VLAPrunerError, match="load_policy was given cameras; for the toy policy it takes no option"):
        vp.load_policy(tmp_path, cameras=("image",))
    assert libero_convention(policy).horizon == 3
    settings = BenchSettings("toy")
    assert (settings.kind, build(settings, torch.device("cpu"), torch.float32).brain.config.num_hidden_layers) == (
        "toy",
        8,
    )
    with pytest.raises(vp.VLAPrunerError, match="--cameras does not apply to toy"):
        BenchSettings("toy", cameras=2)
    fed = feed(policy, settings, torch.device("cpu"))
    assert (fed.visual, fed.step().shape) == (TOKENS, (1, 32))


ROWS = {
    "no-row": ("row = 3", "its `row` is no vla_pruner.registry.Row"),
    "other-name": (
        "row = vla_pruner.registry.Row('x', 'X', 'a:B', 'a:C')",
        "its row has the name 'x'; give both one name",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_row_that_is_none_is_refused_by_name_and_costs_no_other(example: Path, name: str) -> None:
    text, told = ROWS[name]
    (example / "strange.py").write_text(
        f"import vla_pruner.registry\nclass Other(vla_pruner.attach.family.Family):\n    {text}\n"
        "    @classmethod\n    def matches(cls, model): return False\n"
    )
    install(example, "broken-one", "7.1", {plugins.FAMILIES: {name: "strange:Other"}})
    with pytest.raises(vp.PluginError, match=told):
        vp.random_policy(name)
    with pytest.warns(RuntimeWarning, match=f"distribution broken-one 7.1 .*{told}"):
        assert row_of(toy()) == row_named("toy")


BROKEN = {
    "missing": ("no_such_module:Mine", "no_such_module cannot be imported"),
    "number": ("strange:number", "is a int and no class"),
    "other": ("strange:Other", "is no family: it does not extend vla_pruner.attach.family.Family"),
    "bare": ("strange:Bare", "fails: NotImplementedError"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_family_is_named_and_costs_no_other_model(example: Path, name: str) -> None:
    path, told = BROKEN[name]
    (example / "strange.py").write_text(
        "from vla_pruner.attach.family import Family\nnumber = 3\nclass Other: pass\nclass Bare(Family): pass\n"
    )
    install(example, "broken-one", "7.1", {plugins.FAMILIES: {name: path}})
    with pytest.warns(RuntimeWarning, match=f"distribution broken-one 7.1 .*{told}.* are used without it") as warned:
        assert type(family_of(tiny_lm(), visual=VISUAL)) is DecoderLM
    assert len(warned) == 1
    with pytest.warns(RuntimeWarning):
        assert type(family_of(toy())).__name__ == "Toy"
    with pytest.warns(RuntimeWarning), pytest.raises(vp.UnsupportedModelError, match=f"broken-one 7.1 .*{told}"):
        family_of(torch.nn.Linear(2, 2))


def test_a_family_can_be_given(site: Path) -> None:
    class Own(DecoderLM):
        def __init__(self, model: Any) -> None:
            super().__init__(model, visual=VISUAL)

    model = tiny_lm()
    with vp.FastV(keep=0.25).attach(model, family=Own):
        pass
    with pytest.raises(vp.UnsupportedModelError, match=r"family=Chunk was given, but its matches\(\) does not know"):
        vp.FastV(keep=0.25).attach(model, family=Chunk)
    for given in (Own(model), dict, "own"):
        with pytest.raises(vp.UnsupportedModelError, match=r"a class that extends vla_pruner.attach.family.Family"):
            vp.FastV(keep=0.25).attach(model, family=given)
    with vp.compiled(model, backend="eager", family=Own):
        pass
