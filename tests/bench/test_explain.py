"""`explain`: what a session prunes, and its share of a control step."""

from __future__ import annotations

import json

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import VISUAL, prompt, tiny_lm
from vla_pruner.benching.explain import Explanation
from vla_pruner.benching.feeds import feed
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.benching.subject import Subject


def test_a_policy_whose_control_step_is_known():
    policy = vp.reference_policy("metaworld")
    tokens = 512
    with vp.VLAPruner(keep=0.25, layer=2, window=1, preset="paper").attach(policy) as session:
        found = vp.explain(session)
    settings, device = BenchSettings("reference-chunk"), torch.device("cpu")
    step = Subject(policy, feed(policy, settings, device), settings, device).control_step
    whole, pruned = step.flops(None, 2), step.flops(128, 2)
    assert found.whole_step
    assert found.share == pytest.approx(whole["prompt, layers pruned"] / sum(whole.values()))
    assert found.ceiling == pytest.approx(sum(whole.values()) / sum(pruned.values()))
    assert found.pruned == (
        f"from decoder layer 2 of {step.decoder.layers} on, 128 of {tokens} visual tokens stay; the others are gone "
        "from there on",
    )
    assert found.steps == "the first of an episode is not pruned"
    assert any("layers 0 to 1" in part for part in found.untouched)
    assert not any("decoding" in part for part in found.untouched)
    assert found.refused == ()
    assert f"{found.share:.0%} of the FLOPs of a control step" in str(found)
    assert json.loads(json.dumps(found.to_json()))["share"] == found.share


@pytest.mark.parametrize("name", ["pi0", "reference"])
def test_what_acts_reads_fewer_positions_only_if_tokens_are_dropped(name):
    policy = vp.random_policy(name, "tiny")
    for method, length in (
        (vp.VLAPruner(layer=1), "keeps its length"),
        (vp.VLAPruner(layer=1, pruned="drop"), "gets shorter"),
        (vp.Unpruned(), "keeps its length"),
    ):
        with method.attach(policy) as session:
            (found,) = [part for part in vp.explain(session).untouched if "attention to the prompt" in part]
            assert found.endswith(length)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (0, []),
        (1, ["decoder layer 0, which runs on every token"]),
        (2, ["decoder layers 0 to 1, which run on every token"]),
    ],
)
def test_the_layers_that_run_on_every_token_are_one_several_or_none(layer: int, said: list[str]):
    method = vp.VLAPruner(keep=0.25, layer=layer, refresh_every=2)
    with method.attach(vp.random_policy("reference", "tiny")) as session:
        found = vp.explain(session)
    assert [part for part in found.untouched if part.startswith("decoder")] == said
    assert "the first 3 of an episode are not pruned; every 2nd of an episode" in found.steps


def test_a_vision_encoder_that_reuses_patches():
    policy = vp.random_policy("pi0", "tiny")
    step = feed(policy, BenchSettings("pi0", size="tiny"), torch.device("cpu")).step
    method = vp.VLAPruner(keep=0.25, layer=2, window=1, preset="paper")
    with method.attach(policy) as session:
        step()
        without = vp.explain(session)
    with method.attach(policy, encoder=vp.EncoderReuse(keep=0.25)) as session:
        step()
        found = vp.explain(session)
    assert "the vision encoder, which sees every patch" in without.untouched
    assert "the vision encoder, which sees every patch" not in found.untouched
    assert any("in the vision encoder, " in part and "every 8th after it encodes all" in part for part in found.pruned)
    assert found.share > without.share
    assert found.ceiling > without.ceiling
    assert "static graph" in dict(found.refused)["compile"]


def test_the_module_itself_has_the_share_of_the_policy_around_it():
    policy = vp.random_policy("pi0", "tiny")
    step = feed(policy, BenchSettings("pi0", size="tiny"), torch.device("cpu")).step
    found = []
    for target in (policy, policy.module):
        with vp.FastV(keep=0.25, layer=2).attach(target) as session:
            step()
            found.append(vp.explain(session))
    assert found[0].whole_step
    first, second = ((one.share, one.ceiling, one.whole_step, one.pruned) for one in found)
    assert first == second


def test_a_language_model_of_which_only_the_prompt_is_known():
    model = tiny_lm()
    with vp.FastV(keep=6, layer=3, pruned="freeze").attach(model, visual=VISUAL) as session:
        assert vp.explain(session).share is None or not vp.explain(session).whole_step
        with torch.inference_mode():
            model(inputs_embeds=prompt(1)[0])
        found = vp.explain(session)
    assert not found.whole_step
    assert found.share == pytest.approx(0.5)
    assert 1 < found.ceiling < 2
    assert "reuse (VLA-Cache)" in dict(found.refused)
    assert "6 of 24" in found.pruned[0]
    assert "readable from there on, but no longer computed" in found.pruned[0]
    assert "not known here" in str(found)
    assert "at most" in str(found).partition("decoder layers, ")[2], "the ceiling is that of the decoder alone"
    assert found.steps == "all are pruned"
    assert vp.explain(session).steps == "none is pruned any more: the session is detached"


def test_several_layers_a_schedule_and_a_verdict():
    policy = vp.random_policy("reference", "tiny")
    method = vp.SparseVLM(keep=0.75, layer=1, then=((2, 0.5), (3, 0.125)))
    with method.attach(policy) as session:
        found = vp.explain(session)
        assert [line.split(" on, ")[0] for line in found.pruned] == [f"from decoder layer {n} of 6" for n in (1, 2, 3)]
        assert any("decoding" in part for part in found.untouched)
    with vp.TextQuery(keep=0.25, layer=1, gate=3).attach(policy) as session:
        assert "session.moved" in vp.explain(session).steps
    with vp.VLACache().attach(policy) as session:
        assert "static graph" in dict(vp.explain(session).refused)["compile"]
    with vp.Unpruned().attach(policy) as session:
        found = vp.explain(session)
        assert (found.pruned, found.share) == (("nothing",), None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_any_type_have_the_same_share(dtype):
    policy, language_model = vp.random_policy("reference", "tiny"), tiny_lm()
    shares = []
    for kind in (torch.float32, dtype):
        with vp.FastV(keep=0.5, layer=2).attach(policy.to(kind)) as session:
            shares.append(vp.explain(session).share)
        with vp.FastV(keep=0.5).attach(language_model.to(kind), visual=VISUAL) as session:
            assert vp.explain(session).share is None
    assert shares[0] == shares[1] is not None


def test_what_is_no_session_is_refused():
    with pytest.raises(vp.OptionError, match="explain was given"):
        vp.explain("session")  # type: ignore[arg-type]
    assert isinstance(Explanation("m", "n", (), "", (), (), None, None, False, "fast"), Explanation)
