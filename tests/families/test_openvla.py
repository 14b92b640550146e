"""OpenVLA and OpenVLA-OFT pruned: golden outputs of the official models for a given kept set, and the control step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vla_pruner as vp
from vla_pruner.auditing.reference import FullLength
from vla_pruner.caches import cache_of
from vla_pruner.models.openvla.loading import load_openvla

K = 3
ACTION_TOKENS = slice(31744, 32000)


@pytest.fixture(params=["sdpa", "eager"])
def backend(request):
    return request.param


def collected(module, pick):
    """Collect `pick(output)` of every call of a module."""
    found = []
    handle = module.register_forward_hook(lambda _, __, output: found.append(pick(output)))
    return found, handle


class TestOpenVLA:
    @pytest.fixture
    def policy(self, golden, backend):
        return load_openvla(golden / "openvla_tiny", dtype=torch.float32, attn_implementation=backend)

    @pytest.fixture
    def data(self, golden):
        return {**np.load(golden / "openvla_tiny/golden.npz")}, np.load(golden / "openvla_tiny/pruned.npz")

    def run(self, policy, data, t):
        pixels = policy.processor.pixel_values([data["image224"][t]])
        return policy.predict_action(
            torch.as_tensor(data["input_ids"]),
            pixel_values=pixels,
            attention_mask=torch.as_tensor(data["attention_mask"]),
            do_sample=False,
        )

    def test_golden_pruned(self, policy, data):
        data, pruned = data
        kept = tuple(int(i) for i in pruned["kept_visual"])
        lm = policy.language_model
        with vp.KeepFixed(kept, layer=K).attach(policy) as session:
            tokens, _ = collected(lm, lambda out: out.logits[0, -1])
            hidden, _ = collected(lm.model, lambda out: out.last_hidden_state[0])
            for t in range(4):
                tokens.clear()
                hidden.clear()
                action = self.run(policy, data, t)
                np.testing.assert_allclose(action, pruned["actions"][t], rtol=0, atol=1e-9)
                logits = torch.stack(tokens)
                assert logits.argmax(-1).tolist() == pruned["action_token_ids"][t].tolist()
                expected = pruned["decode_logits_action_range"][t]
                np.testing.assert_allclose(logits[:, ACTION_TOKENS], expected, rtol=0, atol=1e-4)
                prompt = hidden[0][torch.as_tensor(pruned["kept_sequence"])]
                np.testing.assert_allclose(prompt, pruned["hidden_final_prefill"][t], rtol=0, atol=1e-4)
                if t == 0:
                    np.testing.assert_allclose(logits[0], pruned["first_logits_t0"], rtol=0, atol=1e-4)
            assert session.kept is not None
            assert session.kept[0].tolist() == sorted(kept)
        assert np.abs(pruned["decode_logits_action_range"] - data["decode_logits_action_range"]).max() > 0.1

    def test_cache_lengths(self, policy, data):
        data, pruned = data
        caches, _ = collected(policy.language_model, cache_of)
        with vp.KeepFixed(tuple(int(i) for i in pruned["kept_visual"]), layer=K).attach(policy):
            self.run(policy, data, 0)
        lengths = [layer.keys.shape[-2] for layer in caches[-1].layers]
        assert lengths == pruned["kv_len_per_layer_after_7_tokens"].tolist()


class TestOFT:
    @pytest.fixture
    def policy(self, golden, backend):
        return load_openvla(golden / "openvla_oft_tiny", dtype=torch.float32, attn_implementation=backend)

    @pytest.fixture
    def data(self, golden):
        return np.load(golden / "openvla_oft_tiny/golden.npz"), np.load(golden / "openvla_oft_tiny/pruned.npz")

    def run(self, policy, data, t):
        images = [data["full_crop224"][t], data["wrist_crop224"][t]]
        return policy.predict_action(
            torch.as_tensor(data["input_ids"]),
            pixel_values=policy.processor.pixel_values(images),
            attention_mask=torch.as_tensor(data["attention_mask"]),
            proprio=data["proprio_normalized"][t],
        )

    def test_golden_pruned(self, policy, data):
        data, pruned = data
        kept = tuple(int(i) for i in pruned["kept_visual"])
        start, stop = data["action_slice"]
        with vp.KeepFixed(kept, layer=K).attach(policy):
            hidden, _ = collected(policy.language_model.model, lambda out: out.last_hidden_state[0])
            for t in range(4):
                action = self.run(policy, data, t)
                np.testing.assert_allclose(action, pruned["actions"][t], rtol=0, atol=1e-4)
                np.testing.assert_allclose(hidden[-1][start:stop], pruned["action_hidden_states"][t], rtol=0, atol=1e-4)
                if t == 0:
                    rows = hidden[-1][torch.as_tensor(pruned["kept_sequence"])]
                    np.testing.assert_allclose(rows, pruned["final_hidden_kept_t0"], rtol=0, atol=1e-4)
        assert np.abs(pruned["actions"] - data["actions"]).max() > 1e-3

    def test_action_attention_is_that_of_the_rows_the_head_reads(self, policy, data):
        """The action score is the mean over heads, rows and late layers of the rows 536 to 592, computed by hand."""
        data, _ = data
        start, stop = (int(i) for i in data["action_slice"])
        rows = []

        def short(module, args, kwargs, output):
            late(module, args, kwargs, output, gone=512 - 64)

        def late(module, args, kwargs, output, gone=0):
            hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
            shape = (*hidden.shape[:-1], -1, module.head_dim)
            query = module.q_proj(hidden).view(shape).transpose(1, 2)
            key = module.k_proj(hidden).view(shape).transpose(1, 2)

            def rotate(x):
                half = x.shape[-1] // 2
                return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

            logits = rotate(query) @ rotate(key).transpose(2, 3) * module.head_dim**-0.5
            rows.append(logits.softmax(-1)[0, :, start - gone : stop - gone, 1 : 513 - gone].mean((0, 1)))

        layers = policy.language_model.model.layers
        handles = [layer.self_attn.register_forward_hook(late, with_kwargs=True) for layer in layers[3:]]
        self.run(policy, data, 0)
        expected = torch.stack(rows).mean(0)
        for handle in handles:
            handle.remove()
        with vp.VLAPruner(keep=64, preset="paper").attach(policy) as session:
            self.run(policy, data, 0)
            assert (session.scores["action"][0] - expected).abs().max() < 1e-6
            assert expected.max() > 2 * expected.mean(), "uniform attention would show nothing"
        # The same in a pruned step, whose rows are elsewhere: the last layers attend to the kept tokens alone.
        rows.clear()
        with vp.VLAPruner(keep=64, warmup="semantic", preset="paper").attach(policy) as session:
            handles = [layer.self_attn.register_forward_hook(short, with_kwargs=True) for layer in layers[3:]]
            self.run(policy, data, 0)
            for handle in handles:
                handle.remove()
            assert session.kept is not None
            expected = torch.zeros(512).scatter(0, session.kept[0], torch.stack(rows).mean(0))
            assert (session.scores["action"][0] - expected).abs().max() < 1e-6

    def test_keep_per_camera(self, policy, data):
        data, _ = data
        method = vp.VLAPruner(keep={"image": 64, "wrist_image": 0.375}, warmup="semantic", preset="paper")
        with method.attach(policy) as session:
            self.run(policy, data, 0)
            assert session.kept is not None
            assert (session.kept < 256).sum() == 64
            assert (session.kept >= 256).sum() == 96


class TestDiffusion:
    @pytest.fixture
    def policy(self, golden, tmp_path):
        for source in ("openvla_oft_tiny", "openvla_oft_tiny_diffusion"):
            for file in (golden / source).iterdir():
                if source.endswith("tiny") and file.name.startswith("action_head"):
                    continue
                if file.suffix in (".pt", ".json", ".safetensors"):
                    (tmp_path / file.name).symlink_to(file)
        return load_openvla(tmp_path, dtype=torch.float32)

    def run(self, policy, golden):
        data = np.load(golden / "openvla_oft_tiny/golden.npz")
        noise = np.load(golden / "openvla_oft_tiny_diffusion/golden.npz")["noise"]
        images = [data["full_crop224"][0], data["wrist_crop224"][0]]
        return policy.predict_action(
            torch.as_tensor(data["input_ids"]),
            pixel_values=policy.processor.pixel_values(images),
            proprio=data["proprio_normalized"][0],
            noise=torch.as_tensor(noise),
        )

    def test_all_denoising_steps_are_one_control_step(self, policy, golden):
        lengths = []
        layer = policy.language_model.model.layers[K]
        handle = layer.mlp.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
        untouched = self.run(policy, golden)
        passes = len(lengths)
        assert passes > 1
        assert set(lengths) == {595}
        lengths.clear()
        with vp.VLAPruner(keep=128, window=1, preset="paper").attach(policy) as session:
            assert np.array_equal(self.run(policy, golden), untouched), "the first step only fills the memory"
            assert session.memory is not None
            assert session.memory.steps.tolist() == [1]
            assert lengths == [595] * passes
            lengths.clear()
            pruned = self.run(policy, golden)
            assert session.memory.steps.tolist() == [2]
            assert lengths == [595 - 512 + 128] * passes
        handle.remove()
        assert np.abs(pruned - untouched).max() > 1e-3

    def test_the_semantic_score_is_that_of_the_first_pass(self, policy, golden):
        seen = []
        with vp.SemanticOnly(keep=128).attach(policy) as session:
            layer = policy.language_model.model.layers[K]
            layer.register_forward_pre_hook(lambda *_: seen.append(session.scores["semantic"].clone()))
            self.run(policy, golden)
            assert len(seen) > 1
            assert torch.equal(session.scores["semantic"], seen[0])

    def test_forward_is_refused_while_attached(self, policy):
        with vp.SemanticOnly(keep=128).attach(policy), pytest.raises(vp.SessionError, match="predict_action"):
            policy(torch.ones(1, 4, dtype=torch.int64))
        assert "forward" not in vars(policy)

    def test_keep_all_is_bit_identical(self, policy, golden):
        untouched = self.run(policy, golden)
        with vp.VLAPruner(keep=1.0, warmup="semantic", preset="paper").attach(policy):
            assert np.array_equal(self.run(policy, golden), untouched)


def test_remote_code_is_refused():
    name = "OpenVLAForActionPrediction"
    remote = type(name, (torch.nn.Module,), {"__module__": "transformers_modules.openvla.modeling_prismatic"})
    with pytest.raises(vp.UnsupportedModelError, match="load_policy"):
        vp.Unpruned().attach(remote())


@pytest.mark.parametrize(
    ("package", "options"),
    [("torchao", {"quantization": "int8"}), ("accelerate", {"device_map": {"": "cpu"}})],
    ids=["int8", "device_map"],
)
@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_quantized_and_dispatched_policies_are_pruned_alike(golden, package, options, pruned):
    pytest.importorskip(package, reason=f"{package} is not installed")
    policy = load_openvla(golden / "openvla_tiny", dtype=torch.float32, **options)
    data = np.load(golden / "openvla_tiny/golden.npz")
    kept = torch.arange(0, 256, 4)

    def logits():
        found, handle = collected(policy.language_model, lambda out: out.logits[:, -1])
        policy.predict_action(
            torch.as_tensor(data["input_ids"]), pixel_values=policy.processor.pixel_values([data["image224"][0]])
        )
        handle.remove()
        return torch.stack(found)

    untouched = logits()
    with vp.VLAPruner(keep=1.0, warmup="semantic", preset="paper").attach(policy):
        assert torch.equal(logits(), untouched)
    with vp.KeepFixed(tuple(kept.tolist()), layer=K, pruned=pruned).attach(policy) as session:
        short = logits()
        assert session.step is not None
        layout = session.step.layout
    with FullLength(policy, layout, kept, layer=K, pruned=pruned):
        full = logits()
    assert (short - full).abs().max() < 1e-3
    assert (short - untouched).abs().max() > 1e-2
