"""One policy, several threads: one of them acts, the others get an error, and no step is mixed of two."""

from __future__ import annotations

import threading

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import CACHE, LAYERS, VISUAL, K, decode, make_cache, prompt, tiny_lm
from tests.families import cases
from tests.families.matrix import BOTH, WINDOW
from vla_pruner.caches import cache_of
from vla_pruner.families import family_of

FAMILIES = [
    cases.decoder_lm(),
    cases.reference(),
    cases.openvla("sdpa"),
    cases.openvla_oft("l1"),
    cases.openvla_oft("diffusion"),
    cases.pi0("sdpa"),
]


def in_thread(function):
    """Return the result or the error of `function` in a thread of its own."""
    found = []

    def run():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_a_second_thread_is_refused_while_a_step_is_open_and_the_first_goes_on(case):
    model = case.build()
    refused = []

    def intrude(*_):
        if threading.current_thread() is threading.main_thread():
            refused.append(in_thread(lambda: case.step(model, 9, BOTH)))

    method = vp.VLAPruner(keep=0.25, window=WINDOW, preset="paper")
    with method.attach(model, **case.options) as session:
        expected = [case.step(model, scene, BOTH) for scene in range(WINDOW + 2)]
        session.reset()
        layers = family_of(model, **case.options).decoder.layers
        handles = [layers[index].mlp.register_forward_pre_hook(intrude) for index in (0, len(layers) - 1)]
        actual = [case.step(model, scene, BOTH) for scene in range(WINDOW + 2)]
        for handle in handles:
            handle.remove()
        assert session.kept is not None
        # Between steps it is any thread's turn.
        session.reset()
        elsewhere = [in_thread(lambda scene=scene: case.step(model, scene, BOTH)) for scene in range(WINDOW + 2)]
    assert len(refused) >= 2 * (WINDOW + 2)
    assert all(isinstance(error, vp.SessionError) and "another thread" in str(error) for error in refused)
    for one, other, third in zip(actual, expected, elsewhere, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_what_changes_a_session_is_refused_from_another_thread_within_a_step():
    policy = vp.reference_policy("autoregressive")
    case = cases.reference()
    found = []

    def intrude(*_):
        for change in (session.reset, policy.reset, lambda: setattr(session, "memory", None)):
            found.append(in_thread(change))

    with vp.VLAPruner(keep=0.25, window=1, preset="paper").attach(policy) as session:
        case.step(policy, 0, BOTH)
        handle = policy.language_model.model.layers[2].register_forward_pre_hook(intrude)
        case.step(policy, 1, BOTH)
        handle.remove()
        assert session.memory is not None
        assert session.memory.steps.tolist() == [2, 2]
    assert found
    assert all(isinstance(error, vp.SessionError) and "another thread" in str(error) for error in found)


def test_a_step_that_failed_leaves_the_turn_to_others():
    model = tiny_lm()

    def step():
        return decode(model, prompt(2)[0], None, make_cache("dynamic", model), 2)[1]

    with vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", preset="paper").attach(model, visual=VISUAL):
        expected = step()
        for layer in (0, LAYERS - 1):
            handle = model.model.layers[layer].register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                step()
            handle.remove()
            assert in_thread(step).shape == expected.shape


def test_threads_that_decode_in_turns_are_refused():
    model = tiny_lm()
    with (
        vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", preset="paper").attach(model, visual=VISUAL),
        torch.no_grad(),
    ):
        out = model(inputs_embeds=prompt()[0], use_cache=True)
        token = torch.ones(2, 1, dtype=torch.int64)
        other = in_thread(lambda: model(input_ids=token, **{CACHE: cache_of(out)}))
        assert isinstance(other, vp.SessionError)
        model(input_ids=token, **{CACHE: cache_of(out)})


@pytest.mark.parametrize("layer", range(8))
def test_a_step_during_which_the_session_was_detached_has_no_result(layer):
    policy = vp.reference_policy("autoregressive")
    case = cases.reference()
    session = vp.VLAPruner(keep=0.25, warmup="semantic", preset="paper").attach(policy)
    handle = policy.language_model.model.layers[layer].register_forward_pre_hook(
        lambda *_: in_thread(session.detach) and None
    )
    with pytest.raises(vp.SessionError, match="was detached while a control step ran"):
        case.step(policy, 0, BOTH)
    handle.remove()
    assert not session.attached


@pytest.mark.parametrize("layer", range(8))
def test_a_step_during_which_a_method_was_attached_is_its_own_or_refused(layer):
    policy = vp.reference_policy("autoregressive")
    case = cases.reference()
    method = vp.VLAPruner(keep=0.25, warmup="semantic", preset="paper")
    found = []
    handle = policy.language_model.model.layers[layer].register_forward_pre_hook(
        lambda *_: found or found.append(in_thread(lambda: method.attach(policy)))
    )
    with pytest.raises(vp.SessionError, match="no control step is open"):
        case.step(policy, 0, BOTH)
    handle.remove()
    found[0].detach()


def test_a_layer_that_is_called_by_itself_is_refused():
    model = tiny_lm()
    with vp.VLAPruner(keep=0.25, layer=K, warmup="semantic", preset="paper").attach(model, visual=VISUAL):
        for layer in (model.model.layers[0], model.model.layers[K]):
            with pytest.raises(vp.SessionError, match="called by itself"):
                layer(prompt()[0])
