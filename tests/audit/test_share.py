"""The share of a control step is counted right: on a clock that ticks once for every layer computed."""

from __future__ import annotations

import pytest

import vla_pruner as vp
from vla_pruner import timing
from vla_pruner.auditing import share
from vla_pruner.auditing.run import CHECKS
from vla_pruner.auditing.subject import Subject


class Ticks:
    """A clock that a decoder's layers drive."""

    def __init__(self, decoder):
        self.count = 0
        for layer in decoder.layers:
            layer.mlp.register_forward_pre_hook(self.tick)

    def tick(self, *_):
        self.count += 1

    def now(self, _):
        return float(self.count)


@pytest.mark.parametrize("layer", [0, 1, 3, 5])
def test_layers_of_the_prompt_against_the_whole_step(layer, monkeypatch):
    policy = vp.random_policy("reference")
    subject = Subject(policy, vp.RandomKeep(keep=16, layer=layer))
    ticks = Ticks(subject.family.decoder)
    for module in (share, timing):
        monkeypatch.setattr(module, "now", ticks.now)
    check = CHECKS["share"](subject)
    # Six layers in the prompt and in each of three decode steps; 48 of 72 positions go.
    part = (6 - layer) / 24
    assert check.figure.startswith(f"{part:.0%} of 24000.0 ms; ")
    assert f"at most {1 / (1 - part * 48 / 72):.2f}x faster at this keep, {1 / (1 - part):.2f}x if" in check.figure
    reached = "layer 5" if layer == 5 else f"layers {layer} to 5"
    before = {0: "", 1: "layer 0, ", 3: "layers 0 to 2, ", 5: "layers 0 to 4, "}[layer]
    assert f"decoder {reached}, unpruned" in check.detail
    assert f"the rest: vision, {before}decoding" in check.detail
    assert "67% of the prompt's positions" in check.detail


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (0, "24 tokens in layers 0 to 5 "),
        (1, "72 tokens in layer 0, 24 in layers 1 to 5 "),
        (5, "72 tokens in layers 0 to 4, 24 in layer 5 "),
    ],
)
def test_the_layers_are_named_one_several_or_none(layer: int, said: str):
    check = CHECKS["lengths"](Subject(vp.random_policy("reference"), vp.RandomKeep(keep=16, layer=layer)))
    assert check.figure.startswith(said), check


def test_every_prompt_of_a_step_counts(monkeypatch):
    """OFT's diffusion head runs the whole sequence in every denoising step."""
    from vla_pruner.models.openvla import random_openvla

    policy = random_openvla(oft=True, head="diffusion", denoising_steps=3)
    subject = Subject(policy, vp.RandomKeep(keep=0.25))
    ticks = Ticks(subject.family.decoder)
    for module in (share, timing):
        monkeypatch.setattr(module, "now", ticks.now)
    assert CHECKS["share"](subject).figure.startswith("50% of 18000.0 ms; ")
    for name in ("vision towers", "lengths", "reference drop", "reference freeze"):
        check = CHECKS[name](subject)
        assert check.passed, check
