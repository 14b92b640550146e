"""Compiled sessions in every family: the same steps, and no graph after the first episode."""

from __future__ import annotations

from shutil import which

import pytest
import torch
from torch._dynamo.utils import counters

import vla_pruner as vp
from tests.families import cases, matrix
from tests.families.compiled import check_family

# Importing the compiler warns of itself.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")

FAMILIES = {
    "reference": (cases.reference, "drop"),
    "openvla": (lambda: cases.openvla("sdpa"), "freeze"),
    "oft": (lambda: cases.openvla_oft("l1", "eager"), "freeze"),
    "oft, discrete": (lambda: cases.openvla_oft(None), "drop"),
    "oft, diffusion": (lambda: cases.openvla_oft("diffusion"), "drop"),
    "pi0": (lambda: cases.pi0("sdpa"), "freeze"),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_same_as_uncompiled_and_no_graph_after_the_first_episode(name):
    build, pruned = FAMILIES[name]
    check_family(build(), vp.VLAPruner(keep=0.25, layer=1, window=1, pruned=pruned))


def test_denoising_steps_are_one_program():
    case = cases.pi0("sdpa")
    model = case.build()
    with vp.FastV(keep=0.25).attach(model) as session:
        session.compile("eager")
        case.step(model, 0, matrix.BOTH)
        assert session._compiled is not None
        assert session._compiled.programs == 2


def test_a_prompt_without_text_is_refused_in_our_words():
    case = cases.pi0("sdpa")
    model = case.build()
    call = model.sample_actions

    def without_text(**given):
        given["attention_mask"][:, 32:] = 0
        return call(**given)

    with vp.FastV(keep=0.25, layer=1, semantic_queries="text").attach(model) as session:
        session.compile("eager")
        model.sample_actions = without_text
        with pytest.raises(vp.SessionError, match="no text after its last visual token"):
            case.step(model, 0, matrix.BOTH)
        del model.sample_actions
        case.step(model, 1, matrix.BOTH)


@pytest.mark.skipif(which("g++") is None, reason="no C++ compiler")
def test_inductor_computes_the_same():
    """The one test that runs the compiler itself."""
    from tests.attach.tiny import VISUAL, decode, prompt, tiny_lm

    model = tiny_lm(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    method = vp.MaxMinDiversity(keep=0.25, layer=1)

    def steps():
        return [decode(model, prompt(1, seed=s)[0][..., :16], None, None, 2)[1] for s in range(2)]

    with method.attach(model, visual=VISUAL):
        expected = steps()
    with method.attach(model, visual=VISUAL) as session:
        session.compile()
        counters.clear()
        actual = steps()
        made = counters["stats"]["unique_graphs"]
        session.reset()
        again = steps()
        assert counters["stats"]["unique_graphs"] == made
    for one, two, other in zip(actual, again, expected, strict=True):
        assert (one - other).abs().max() < 1e-4
        assert torch.equal(one, two)
