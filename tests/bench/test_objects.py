"""`vp.bench` from Python: policies and methods that are there already, and arguments of another kind."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LlamaModel

import vla_pruner as vp
from tests.attach.tiny import tiny_lm
from tests.state import whole_state
from vla_pruner.benching.arms import arms_of
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.policies.pi0 import TransformersPI0

pytestmark = pytest.mark.usefixtures("quick")


@dataclass(frozen=True)
class EveryOther(vp.Method):
    """A third-party method without a keep."""

    offset: int = 0

    def budget(self, tokens: int) -> int:
        return tokens // 2

    def select(self, evidence: vp.Evidence, k: int) -> Tensor:
        rows, tokens = evidence.valid.shape
        return torch.arange(self.offset, tokens, 2)[:k].expand(rows, -1)


def test_a_policy_and_methods_that_are_there_already() -> None:
    policy: Any = vp.random_policy("reference")
    before = whole_state(policy)
    methods = (vp.FastV(keep=0.5, layer=2), EveryOther(), EveryOther(offset=1), "vla-pruner")
    report = vp.bench(policy, methods=methods, keep=0.25, iters=1)
    assert [arm.name for arm in report.arms] == [
        "unpruned",
        "fastv 0.5 drop K=2",
        "EveryOther drop K=3",
        "EveryOther drop K=3 offset=1",
        "vla-pruner 0.25 freeze K=3 semantic_queries=last",
    ]
    assert [arm.kept for arm in report.arms] == [64, 32, 32, 32, 16]
    assert report.settings["model"] == "ReferencePolicy"
    assert (report.settings["dtype"], report.settings["device"]) == ("float32", "cpu")
    assert report.to_json()["settings"]["methods"][0] == repr(methods[0])
    assert whole_state(policy) == before
    with vp.FastV().attach(policy), pytest.raises(vp.SessionError, match="has a session already"):
        vp.bench(policy, iters=1)


@pytest.mark.parametrize("family", ["openvla", "openvla-oft", "pi0"])
def test_a_policy_of_every_family(family: str) -> None:
    report = vp.bench(vp.random_policy(family), methods=vp.FastV(keep=8, layer=1, pruned="freeze"), iters=1)
    assert [arm.kept for arm in report.arms][1:] == [8]
    assert report.arms[1].name == "fastv 8 freeze K=1"


def test_a_single_value_is_a_tuple_of_one() -> None:
    plain = BenchSettings("llama:64,6", keep=0.25, methods="fastv", pruned="freeze", layer=2)
    assert plain == BenchSettings("llama:64,6", keep=(0.25,), methods=("fastv",), pruned=("freeze",), layer=(2,))
    assert BenchSettings("llama:64,6", keep=[0.5, 8]).keep == (0.5, 8)


def test_methods_that_differ_in_what_no_title_shows_are_arms_of_their_own() -> None:
    @dataclass(frozen=True)
    class FastV(vp.FastV):
        """A third-party method under a name that is known."""

    settings = BenchSettings("llama:64,6", methods=(vp.FastV(), vp.FastV(), FastV(), type("FastV", (FastV,), {})()))
    names = [arm.name for arm in arms_of(settings)]
    assert names == ["unpruned", "fastv 0.25 drop K=3", "FastV 0.25 drop K=3", "FastV 0.25 drop K=3 #2"]


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        (None, {}, "model is a NoneType; it is reference, reference-chunk, openvla"),
        (7, {}, "model is an int; it is"),
        (vp.FastV, {}, "model is the class FastV; it is"),
        (torch.nn.Linear(2, 2), {}, "A benchmark of Linear is not known"),
        ("reference", {"keep": "0.25"}, "--keep is '0.25'; it is a fraction"),
        ("reference", {"keep": True}, "--keep is True"),
        ("reference", {"keep": ()}, "--keep names nothing"),
        ("reference", {"methods": vp.FastV}, "--method is the class FastV; it is a method's name"),
        ("reference", {"methods": (vp.FastV(), 3)}, "--method is 3"),
        ("reference", {"methods": None}, "--method is None"),
        ("reference", {"methods": vp.FastV(), "keep": 0.5}, "--keep is for methods that are given by name"),
        ("reference", {"methods": vp.FastV(), "layer": 2}, "--layer is for methods that are given by name"),
        ("reference", {"methods": vp.TextQuery(gate=3)}, "in a benchmark no arm moves"),
        ("reference", {"methods": vp.SparseVLM(then=((5, 0.1),))}, "prunes at several layers"),
        ("reference", {"layer": 1.5}, "--layer is 1.5; it is a layer"),
        ("reference", {"method": "fastv"}, "bench was given method; it takes size"),
        ("reference", {"loaded": True}, "bench was given loaded"),
        ("reference", {"prompt_tokens": 300}, "--prompt-tokens does not apply"),
    ],
)
def test_other_kinds_get_a_sentence(model: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(vp.VLAPrunerError) as caught:
        vp.bench(model, **options)
    assert said in str(caught.value)


def test_a_bare_model_is_told_what_to_do() -> None:
    pi0 = vp.random_policy("pi0")
    for bare, fix in (
        (pi0.module, "bench(vla_pruner.policies.pi0.TransformersPI0(model))"),
        (vp.random_policy("llava").module, "attach(policy, only_if_faster=True)"),
        (tiny_lm(), "one has 128 positions; give one that has more, or llama:HIDDEN,LAYERS"),
        (LlamaModel, "the class LlamaModel; it is .* Give a model of this class that is loaded, and not the class"),
    ):
        with pytest.raises(vp.UnsupportedModelError) as caught:
            vp.bench(bare)
        assert re.search(fix if bare is LlamaModel else re.escape(fix), str(caught.value))
    wrapped = TransformersPI0(pi0.module)
    assert vp.bench(wrapped, methods=vp.FastV(keep=8, layer=1), iters=1).arms[1].kept == 8


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"device": "cpu"}, {"layers": 2}, {"size": "tiny"}])
def test_a_policy_that_is_loaded_is_what_it_is(options: dict[str, Any]) -> None:
    (name,) = options
    with pytest.raises(vp.OptionError, match=f"--{name} does not apply to"):
        vp.bench(vp.random_policy("reference"), **options)


def test_numbers_of_numpy_are_no_traceback() -> None:
    with pytest.raises(vp.OptionError, match="keep"):
        vp.bench("reference", keep=np.float32(0.25))


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("openvla-7b", {"layers": 1}, r"the decoder has 1 layer; give layer=0\."),
        ("openvla-7b", {"layer": (3, 32)}, "layer=32 was given, but the decoder has 32 layers; give a layer from 0 to"),
        ("openvla-oft", {"layers": 3}, "layer=3 was given, but the decoder has 3 layers"),
        ("pi0", {"layers": 1}, "has 1 layer; pruning begins at layer 1 here"),
        ("pi0", {"layer": 0, "methods": "divprune"}, "give a layer from 1 to 17"),
        ("llama:64,2", {}, "the decoder has 2 layers"),
        ("openvla-7b", {"layers": 4, "methods": vp.FastV(layer=9)}, "layer=9 was given"),
        ("reference", {"layer": 8}, "the decoder has 8 layers"),
    ],
)
def test_a_layer_that_cannot_be_is_refused_before_weights_are_drawn(
    model: str, options: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vla_pruner.benching import run

    monkeypatch.setattr(run, "build", lambda *_: pytest.fail("weights were drawn"))
    with pytest.raises(vp.OptionError, match=said):
        vp.bench(model, **options)


def test_the_published_depths_are_those_of_the_configurations() -> None:
    from transformers import LlamaConfig, PI0Config

    from vla_pruner.models.reference.configuration import ReferenceConfig

    def layers(name: str) -> int | None:
        return BenchSettings(name)._depth

    assert layers("reference") == ReferenceConfig.num_layers
    assert layers("openvla-7b") == layers("openvla-oft") == LlamaConfig().num_hidden_layers
    assert layers("pi0") == PI0Config().vlm_config.text_config.num_hidden_layers
    assert layers("pi05") == layers("lerobot-pi0") == layers("pi0")
