"""LeRobot's MolmoAct2: the expert's attention, views, its CUDA graphs, variants of its layers, refusals."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.families import matrix
from tests.lerobot.test_matrix import drawn_as, molmoact2
from tests.state import whole_state
from vla_pruner.auditing.reference import FullLength
from vla_pruner.errors import CheckpointError
from vla_pruner.families import family_of
from vla_pruner.policies.molmoact2_random import random_molmoact2_policy

CASE = molmoact2()
BOTH = slice(0, 2)


def batch_of(policy, seed=0, cameras=None):
    """Return a batch of one robot in the form that LeRobot's processors return."""
    names = policy.cameras if cameras is None else cameras
    generator = torch.Generator().manual_seed(seed)
    images = {f"observation.images.{name}": torch.rand(3, 80, 100, generator=generator) for name in names}
    return policy.preprocessor({**images, "observation.state": torch.zeros(8), "task": "put it there"})


def chunk(policy, batch):
    noise = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(1))
    with drawn_as(noise):
        return policy.module.predict_action_chunk(dict(batch))


def test_action_score_is_the_experts_attention_to_the_prompt():
    """The score equals one that is computed here from softmax weights of a second run without a session."""
    policy = random_molmoact2_policy()
    batch = batch_of(policy)
    with vp.ActionOnly(keep=1.0).attach(policy) as session:
        chunk(policy, batch)
        score, layout = session.scores["action"], session.step.layout
    found = []

    def read(module, args, kwargs, output):
        rows = args[0]
        query = module.q_proj(rows).unflatten(-1, (module.num_heads, module.head_dim)).transpose(1, 2)
        logits = module.q_norm(query) @ kwargs["kv_k"].permute(0, 2, 3, 1) * module.head_dim**-0.5
        weights = (logits + kwargs["attn_mask"]).softmax(-1)
        attended = (weights @ kwargs["kv_v"].transpose(1, 2)).transpose(1, 2).flatten(2)
        assert (module.out_proj(attended) - output).abs().max() < 1e-5
        found.append(weights.mean(dim=(1, 2)))

    blocks = policy.module._backbone().action_expert.blocks
    hooks = [block.cross_attn.register_forward_hook(read, with_kwargs=True) for block in blocks[len(blocks) // 2 :]]
    chunk(policy, batch)
    for hook in hooks:
        hook.remove()
    assert len(found) == 3 * 3, "three denoising steps, the later half of six blocks"
    expected = torch.stack(found).mean(dim=0).gather(1, layout.visual)
    assert (score - expected).abs().max() < 1e-6
    assert score.max() > 1.5 * score.min()


VARIANTS = {
    "norms behind": {"text": {"norm_after": True}},
    "keys normed as one": {"text": {"qk_norm_type": "olmo"}},
    "keys not normed": {"text": {"use_qk_norm": False}},
    "as many heads as query heads": {"text": {"num_key_value_heads": 8}},
    "two kinds of angles": {
        "text": {"rope_scaling_layers": [1, 4], "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    },
    "eager": {"backend": "eager"},
    "masked end of text": {"model": {"eos_token_id": 101}},
}


@pytest.mark.parametrize("pruned", matrix.POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant, pruned):
    """In one variant the letter e stands for the end of a text, which is masked for the expert."""
    case = molmoact2(**VARIANTS[variant])
    matrix.check_keep_all(case, pruned)
    model = case.build()
    untouched = case.step(model, 1, BOTH)
    method = vp.VLAPruner(keep=0.25, window=1, pruned=pruned, preset="paper")
    with method.attach(model) as session:
        for scene in range(2):
            actual = case.step(model, scene, BOTH)
        layout, kept = session.step.layout, session.kept
    with FullLength(model, layout, kept, layer=3, pruned=pruned):
        expected = case.step(model, 1, BOTH)
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - untouched).abs().max() > 1e-3


def test_views_are_cameras():
    policy = random_molmoact2_policy(cameras=("left", "front", "right"))
    family = family_of(policy)
    assert family.cameras == ("front", "left", "right"), "LeRobot shows them in the order of their names"
    batch = batch_of(policy)
    with vp.RandomKeep(keep={"front": 5, "left": 0.5, "right": 1.0}).attach(policy) as session:
        actual = chunk(policy, batch)
        layout, kept = session.step.layout, session.kept
    assert layout.cameras == (64, 64, 64)
    assert [int((kept // 64 == camera).sum()) for camera in range(3)] == [5, 32, 64]
    ids = batch["input_ids"]
    config = policy.module._backbone().config
    assert (ids.gather(1, layout.visual) == config.image_patch_id).all()
    assert int((ids == config.image_col_id).sum()) == 3 * 8, "columns' ends are live, and no visual tokens"
    with FullLength(policy, layout, kept, layer=3):
        assert (actual - chunk(policy, batch)).abs().max() < 1e-4


@pytest.mark.parametrize("pruned", matrix.POLICIES)
def test_a_camera_that_a_batch_lacks(pruned):
    policy = random_molmoact2_policy(cameras=("front", "left", "right"))
    batch = batch_of(policy, cameras=("front", "right"))
    untouched = chunk(policy, batch)
    with vp.RandomKeep(keep={"front": 8, "left": 8, "right": 16}, pruned=pruned).attach(policy) as session:
        actual = chunk(policy, batch)
        layout, kept = session.step.layout, session.kept
        assert layout.cameras == (64, 0, 64)
        assert layout.absent == {1}
        assert [int((kept // 64 == view).sum()) for view in range(2)] == [8, 16]
        with pytest.raises(vp.SessionError, match="reset"):
            chunk(policy, batch_of(policy))
    with FullLength(policy, layout, kept, layer=3, pruned=pruned):
        assert (actual - chunk(policy, batch)).abs().max() < 1e-4
    assert (actual - untouched).abs().max() > 1e-3


def test_its_cuda_graphs_are_set_aside_and_put_back():
    policy = random_molmoact2_policy()
    module = policy.module
    managers = (module._backbone().action_cuda_graph_manager, module._hf_model().depth_decode_cuda_graph_manager)
    before = [dict(vars(manager)) for manager in managers]

    def fail(*_):
        raise RuntimeError("robot fell over")

    handle = module._backbone().transformer.blocks[-1].mlp.register_forward_pre_hook(fail)
    asked = []
    managers[0].can_use_action_flow = lambda inputs: asked.append(inputs) or True
    managers[0].run_action_flow = lambda *_: pytest.fail("a graph would replay what was chosen at its capture")
    with pytest.raises(RuntimeError, match="fell over"), vp.VLAPruner(keep=0.5, preset="paper").attach(policy):
        module.select_action(batch_of(policy))
    handle.remove()
    with vp.VLAPruner(keep=0.5, preset="paper").attach(policy):
        module.select_action(batch_of(policy))  # it calls eval(), which enables graphs
        assert managers[0].enabled
    assert not asked
    del managers[0].can_use_action_flow, managers[0].run_action_flow
    assert [dict(vars(manager)) for manager in managers] == before


def test_select_action_is_one_control_step_per_queue():
    policy = random_molmoact2_policy(n_action_steps=3)
    with vp.VLAPruner(keep=0.5, window=1, preset="paper").attach(policy) as session:
        counts = []
        for step in range(7):
            policy.module.select_action(batch_of(policy, step))
            counts.append(int(session.memory.steps[0]))
        assert session.kept.shape == (1, 64)
        policy.module.reset()
        assert session.memory is None
    assert counts == [1, 1, 1, 2, 2, 2, 3]


def test_bfloat16():
    policy = random_molmoact2_policy(dtype=torch.bfloat16)
    batch = batch_of(policy)
    untouched = chunk(policy, batch)
    for pruned in matrix.POLICIES:
        with vp.VLAPruner(keep=1.0, pruned=pruned, preset="paper").attach(policy):
            assert torch.equal(chunk(policy, batch), untouched)
        with vp.VLAPruner(keep=0.5, window=1, pruned=pruned, preset="paper").attach(policy):
            for _ in range(2):
                assert chunk(policy, batch).isfinite().all()


def test_what_is_not_supported_is_refused():
    policy = random_molmoact2_policy(inference_action_mode="discrete")
    before = whole_state(policy.module)
    with pytest.raises(vp.UnsupportedModelError, match="inference_action_mode='continuous'"):
        vp.VLAPruner(preset="paper").attach(policy)
    assert whole_state(policy.module) == before
    gated = random_molmoact2_policy(model={"action_expert_depth_gate": True})
    with pytest.raises(vp.UnsupportedModelError, match="depth"):
        vp.VLAPruner(preset="paper").attach(gated)
    policy = random_molmoact2_policy()
    with pytest.raises(vp.BudgetError, match="a layer from 1 to 5"):
        vp.VLAPruner(layer=0, refresh_every=9, preset="paper").attach(policy)
    batch = batch_of(policy)
    with vp.VLAPruner(preset="paper").attach(policy):
        with pytest.raises(vp.UnsupportedModelError, match="inference_action_mode='continuous'"):
            policy.module.predict_action_chunk(dict(batch), inference_action_mode="discrete")
        with pytest.raises(vp.SessionError, match="detach before training"):
            policy.module.forward(dict(batch))
        with pytest.raises(vp.SessionError, match="without depth"):
            policy.module._hf_model()._consume_generation_tokens(None, past_key_values=None, attention_mask=None)
        policy.module.predict_action_chunk(dict(batch))
    flash = random_molmoact2_policy()
    flash.module._backbone().transformer.config._attn_implementation_internal = "flash_attention_2"
    with pytest.raises(vp.UnsupportedModelError, match="sdpa and eager"):
        vp.VLAPruner(preset="paper").attach(flash)


def test_rows_with_other_numbers_of_images_are_refused():
    policy = random_molmoact2_policy()
    images = list(torch.rand(3, 3, 80, 80))
    batch = policy.preprocessor.batch([images[:1], images[1:]], [[5, 6], [7]])
    with vp.VLAPruner(preset="paper").attach(policy), pytest.raises(vp.SessionError, match="as many images"):
        policy.module.predict_action_chunk(batch)


def saved(policy, folder):
    """Save a LeRobot checkpoint in `folder`, beside the base checkpoint that LeRobot builds it from."""
    policy.module._hf_model().save_pretrained(folder / "base")
    policy.module.config.checkpoint_path = str(folder / "base")
    policy.module.save_pretrained(folder / "policy")
    return folder / "policy"


def test_loaded_policy(tmp_path):
    policy = random_molmoact2_policy(inference_action_mode=None)
    folder = saved(policy, tmp_path)
    with torch.no_grad():
        policy.module._backbone().transformer.blocks[2].attn_norm.weight.mul_(2)
    policy.module.save_pretrained(folder)  # fine-tuned: the weights of the folder are not those of the base
    loaded = vp.load_policy(folder)
    assert loaded.module.config.inference_action_mode == "continuous"
    assert loaded.cameras == policy.cameras
    own, other = policy.module.state_dict(), loaded.module.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)
    policy.module.config.inference_action_mode = "continuous"
    batch = batch_of(policy)
    # The loaded policy's vision tower has another attention function.
    assert (chunk(policy, batch) - chunk(loaded, batch)).abs().max() < 1e-5
    assert vp.load_policy(folder, dtype="bfloat16").dtype == torch.bfloat16


def test_what_is_missing_is_named(tmp_path):
    policy = random_molmoact2_policy()
    folder = saved(policy, tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"base.*checkpoint_path in config\.json"):
        vp.load_policy(folder)
    (tmp_path / "elsewhere").rename(tmp_path / "base")
    weights = load_file(folder / "model.safetensors")
    weights["model.surplus"] = weights.pop(next(name for name in weights if name.endswith("att_proj.weight")))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Missing: .*att_proj\.weight.*Unexpected: model\.surplus"):
        vp.load_policy(folder)


def test_the_plugin_loads_it(tmp_path):
    plugin = pytest.importorskip("lerobot_policy_vla_pruner.modeling_vla_pruner", reason="the plugin is not installed")
    policy = random_molmoact2_policy()
    config = plugin.VLAPrunerConfig(device="cpu", keep=0.25, options={"window": 1})
    pruned = plugin.VLAPrunerPolicy.from_pretrained(saved(policy, tmp_path), config=config)
    for seed in range(2):
        pruned.predict_action_chunk(batch_of(policy, seed))
    assert pruned.session.kept.shape == (1, 32)


@pytest.mark.parametrize("pruned", matrix.POLICIES)
def test_real_time_chunking(pruned):
    """Real-time chunking steers each denoising step towards the rest of the previous chunk."""
    from lerobot.policies.rtc.configuration_rtc import RTCConfig

    policy = random_molmoact2_policy(rtc_config=RTCConfig(enabled=True, execution_horizon=4))

    def run():
        torch.manual_seed(0)
        left, chunks = None, []
        for seed in range(3):
            batch = batch_of(policy, seed)
            made = policy.module.predict_action_chunk(dict(batch), inference_delay=1, prev_chunk_left_over=left)
            left = torch.nn.functional.pad(made[:, 3:], (0, 32 - made.shape[2]))
            chunks.append(made)
        return torch.stack(chunks)

    untouched = run()
    with vp.VLAPruner(keep=1.0, pruned=pruned, preset="paper").attach(policy):
        assert torch.equal(run(), untouched)
    with vp.VLAPruner(keep=0.25, window=1, pruned=pruned, preset="paper").attach(policy) as session:
        assert (run() - untouched)[1:].abs().max() > 1e-3
        assert session.kept.shape == (1, 32)
        assert not session.scores["action"].requires_grad
    plain = random_molmoact2_policy()
    torch.manual_seed(0)
    assert (plain.module.predict_action_chunk(batch_of(plain)) - untouched[0]).abs().max() < 1e-5
