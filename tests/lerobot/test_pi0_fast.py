"""LeRobot's pi0-FAST: rows that act, rows that have ended, absent cameras, layer 0, options with and without effect."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.lerobot.test_matrix import pi0_fast, scene_of
from tests.state import whole_state
from vla_pruner.auditing.reference import FullLength
from vla_pruner.errors import CheckpointError
from vla_pruner.policies.lerobot import load_lerobot, random_lerobot

CASE = pi0_fast()
BOTH = slice(0, 2)


def tokens_of(module, batch):
    """Return the decoded tokens (B, T)."""
    found = []
    original = module.model.sample_actions_fast_kv_cache

    def watched(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    module.model.sample_actions_fast_kv_cache = watched
    try:
        module.predict_action_chunk(dict(batch))
    finally:
        del module.model.sample_actions_fast_kv_cache
    return found[0]


def attention_of_rows(module, layout, batch):
    """Return each acting row's attention (B, T, M) float32, the mean over heads and the later half of the layers."""
    decoder = module.model.paligemma_with_expert.paligemma.model.language_model
    backend, decoder.config._attn_implementation = decoder.config._attn_implementation, "eager"
    later, found = decoder.layers[len(decoder.layers) // 2 :], []
    hooks = [layer.self_attn.register_forward_hook(lambda _, __, output: found.append(output[1])) for layer in later]
    try:
        module.predict_action_chunk(dict(batch))
    finally:
        decoder.config._attn_implementation = backend
        for hook in hooks:
            hook.remove()
    last = [weights[:, :, -1, : layout.length].mean(dim=1) for weights in found]
    each = [torch.stack(last[at : at + len(later)]).mean(dim=0) for at in range(0, len(last), len(later))]
    return torch.stack(each, dim=1).gather(2, layout.visual[:, None].expand(-1, len(each), -1))


def test_action_score_is_that_of_the_rows_that_emit_tokens():
    policy = random_lerobot("pi0_fast")
    batch = scene_of(policy, 0)
    with vp.ActionOnly(keep=1.0).attach(policy) as session:
        policy.module.predict_action_chunk(dict(batch))
        score, layout = session.scores["action"], session.step.layout
    expected = attention_of_rows(policy.module, layout, batch)
    assert expected.shape[1] == 8, "the last prompt row, and seven decoded ones"
    assert (score - expected.mean(dim=1)).abs().max() < 1e-6
    assert (expected[:, 0] - expected[:, -1]).abs().max() > 1e-3, "rows must differ, or this test could not fail"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_that_have_ended_do_not_count(temperature):
    """One robot emits its end marker as its third token; the other one goes on."""
    policy = random_lerobot("pi0_fast", temperature=temperature)
    module = policy.module
    batch = scene_of(policy, 0)
    torch.manual_seed(0)
    tokens = tokens_of(module, batch)
    module._paligemma_tokenizer.marker = int(tokens[0, 2])
    assert not (tokens[1] == tokens[0, 2]).any()
    assert not (tokens[0, :2] == tokens[0, 2]).any()
    with vp.ActionOnly(keep=1.0).attach(policy) as session:
        torch.manual_seed(0)
        assert torch.equal(tokens_of(module, batch), tokens)
        score, layout = session.scores["action"], session.step.layout
    torch.manual_seed(0)
    rows = attention_of_rows(module, layout, batch)
    assert (score[0] - rows[0, :3].mean(dim=0)).abs().max() < 1e-6
    assert (score[1] - rows[1].mean(dim=0)).abs().max() < 1e-6
    assert (score[0] - rows[0].mean(dim=0)).abs().max() > 1e-4, "the rows behind must matter"
    with vp.ActionOnly(keep=1.0).attach(policy) as session:
        torch.manual_seed(0)
        module.predict_action_chunk(dict(batch))
        session.detach()  # deferred reads are computed now
        assert (session.scores["action"] - score).abs().max() < 1e-6


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_absent_cameras_go_first(pruned):
    policy = random_lerobot("pi0_fast")
    batch = {key: value for key, value in scene_of(policy, 0).items() if not key.endswith(".base")}

    def logits():
        head, found = policy.module.model.paligemma_with_expert.paligemma.lm_head, []
        handle = head.register_forward_hook(lambda _, __, logits: found.append(logits))
        policy.module.predict_action_chunk(dict(batch))
        handle.remove()
        return torch.cat(found, dim=1)

    untouched = logits()
    with vp.RandomKeep(keep=1.0, pruned=pruned).attach(policy):
        assert torch.equal(logits(), untouched)
    with vp.RandomKeep(keep=0.5, pruned=pruned).attach(policy) as session:
        actual = logits()
        layout, kept = session.step.layout, session.kept
    assert layout.absent == {0}
    assert (kept >= 64).all(), "no budget is spent on what is not there"
    assert kept.shape == (2, 64)
    with FullLength(policy, layout, kept, layer=3, pruned=pruned):
        expected = logits()
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - untouched).abs().max() > 1e-3


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_before_the_decoder(pruned):
    policy = CASE.build()
    method = vp.VLAPruner(keep=0.25, window=1, layer=0, pruned=pruned, refresh_every=9, preset="paper")
    with method.attach(policy) as session:
        for scene in range(2):
            actual = CASE.step(policy, scene, BOTH)
        kept, layout = session.kept, session.step.layout
    with FullLength(policy, layout, kept, layer=0, pruned=pruned):
        expected = CASE.step(policy, 1, BOTH)
    assert (actual - expected).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # importing the compiler raises a warning
def test_what_has_no_effect_is_no_reason_to_refuse():
    """`compile_model` compiles the path without a cache, and `rtc_config` steers denoising, which pi0-FAST lacks."""
    policy = random_lerobot("pi0_fast", compile_model=True)
    module = policy.module
    before = whole_state(module)
    plain = random_lerobot("pi0_fast").module
    batch = scene_of(policy, 0)
    module.config.rtc_config = SimpleNamespace(enabled=True)
    with vp.RandomKeep(keep=0.5).attach(module) as session, vp.RandomKeep(keep=0.5).attach(plain):
        assert torch.equal(module.predict_action_chunk(dict(batch)), plain.predict_action_chunk(dict(batch)))
        assert session.kept is not None
    module.config.rtc_config = None
    assert whole_state(module) == before


def test_decoding_without_a_cache_is_refused():
    policy = random_lerobot("pi0_fast", use_kv_cache=False)
    module = policy.module
    before = whole_state(module)
    with pytest.raises(vp.UnsupportedModelError, match="use_kv_cache=True"):
        vp.VLAPruner(preset="paper").attach(module)
    assert whole_state(module) == before
    module.config.use_kv_cache = True
    batch = scene_of(policy, 0)
    with vp.VLAPruner(preset="paper").attach(module):
        module.config.use_kv_cache = False
        with pytest.raises(vp.UnsupportedModelError, match="use_kv_cache=True"):
            module.predict_action_chunk(batch)
        module.config.use_kv_cache = True
        images, masks = module._preprocess_images(batch)
        tokens, mask = batch["observation.language.tokens"], batch["observation.language.attention_mask"]
        with pytest.raises(vp.SessionError, match="use_kv_cache=True"):
            module.model.sample_actions_fast(images, masks, tokens, mask)
        with pytest.raises(vp.SessionError, match="detach before training"):
            module.forward({**batch, "action.tokens": tokens, "action.token_mask": mask})
        module.predict_action_chunk(batch)


def test_select_action_is_one_control_step_per_queue():
    policy = random_lerobot("pi0_fast", n_action_steps=3)
    with vp.VLAPruner(keep=0.5, window=1, preset="paper").attach(policy) as session:
        counts = []
        for step in range(7):
            policy.module.select_action(scene_of(policy, step))
            counts.append(int(session.memory.steps[0]))
    assert counts == [1, 1, 1, 2, 2, 2, 3]


def test_bfloat16():
    policy = random_lerobot("pi0_fast", dtype=torch.bfloat16)
    assert policy.dtype == torch.bfloat16
    untouched = CASE.step(policy, 0, BOTH)
    for pruned in ("drop", "freeze"):
        with vp.VLAPruner(keep=1.0, pruned=pruned, preset="paper").attach(policy):
            assert torch.equal(CASE.step(policy, 0, BOTH), untouched)
        with vp.VLAPruner(keep=0.5, window=1, pruned=pruned, preset="paper").attach(policy):
            for scene in range(2):
                assert CASE.step(policy, scene, BOTH).isfinite().all()


def test_a_checkpoint_whose_tokenizers_run_code_must_be_trusted(tmp_path):
    module = random_lerobot("pi0_fast").module
    module.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"'lerobot/fast-action-tokenizer'.*trust_processors=True"):
        load_lerobot(tmp_path)
    with pytest.raises(CheckpointError, match=r"'lerobot/fast-action-tokenizer'.*could not be fetched"):
        load_lerobot(tmp_path, trust_processors=True)


def test_the_plugin_asks_for_trust_with_its_flag(tmp_path):
    plugin = pytest.importorskip("lerobot_policy_vla_pruner.modeling_vla_pruner", reason="the plugin is not installed")
    random_lerobot("pi0_fast").module.save_pretrained(tmp_path)
    config = plugin.VLAPrunerConfig(device="cpu")
    with pytest.raises(CheckpointError, match=r"'lerobot/fast-action-tokenizer'.*--policy\.trust_processors=true"):
        plugin.VLAPrunerPolicy.from_pretrained(tmp_path, config=config)
