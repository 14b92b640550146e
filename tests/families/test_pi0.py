"""pi0 of transformers: golden actions, unpruned and for a given kept set, and a freeze reference made without this
project's hooks.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PI0Config, PI0ForConditionalGeneration

import vla_pruner as vp
from tests.families import cases
from vla_pruner.caches import cache_in

K = 3


@pytest.fixture(scope="module")
def folder(request):
    from tests.conftest import GOLDEN

    if not GOLDEN.is_dir():
        pytest.skip(f"no golden vectors at {GOLDEN}; set VLA_PRUNER_GOLDEN to their folder")
    return GOLDEN / "transformers_pi0_tiny"


@pytest.fixture(params=["sdpa", "eager"])
def pi0(request, folder):
    return load_pi0(folder, request.param)


@pytest.fixture(scope="module")
def inputs(folder):
    return np.load(folder / "inputs.npz")


@pytest.fixture(scope="module")
def pruned(folder):
    return np.load(folder / "pruned.npz")


def load_pi0(folder, backend):
    """The checkpoint with its names mapped here: the renaming of older transformers misses the vision tower."""
    config = PI0Config.from_pretrained(folder)
    model = PI0ForConditionalGeneration._from_config(config, attn_implementation=backend).eval()
    nested = hasattr(model.model.vlm.vision_tower, "vision_model")
    renames = {
        "paligemma_with_expert.paligemma.model.language_model.model.": "model.vlm.language_model.",
        "paligemma_with_expert.paligemma.model.vision_tower.": f"model.vlm.vision_tower.{'vision_model.' * nested}",
        "paligemma_with_expert.paligemma.model.": "model.vlm.",
        "paligemma_with_expert.gemma_expert.model.": "model.dit.",
        "action_out_proj.": "action_out_proj.",
        "": "embed_action_time.",
    }
    state = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith("lm_head.weight"):
            old = next(prefix for prefix in renames if name.startswith(prefix))
            state[renames[old] + name.removeprefix(old)] = value
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all("dit.embed_tokens" in name for name in missing), missing
    return model


def sample(model, inputs, padded=False, rows=slice(None)):
    suffix = "_padded" if padded else ""
    return model.sample_actions(
        state=torch.tensor(inputs["state"][rows]),
        input_ids=torch.tensor(inputs[f"input_ids{suffix}"][rows]),
        pixel_values=torch.tensor(inputs["pixel_values"][rows]),
        noise=torch.tensor(inputs["noise"][rows]),
        attention_mask=torch.tensor(inputs[f"attention_mask{suffix}"][rows]),
        pixel_attention_mask=torch.tensor(inputs["pixel_attention_mask"][rows]),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_golden_actions(pi0, inputs, folder, padded):
    golden = np.load(folder / "golden.npz")
    name = "actions_padded" if padded else "actions"
    np.testing.assert_allclose(sample(pi0, inputs, padded), golden[name], rtol=0, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True])
def test_golden_actions_pruned(pi0, inputs, pruned, padded):
    name = "actions_padded" if padded else "actions"
    untouched = sample(pi0, inputs, padded)
    with vp.KeepFixed(tuple(pruned["kept_visual"]), layer=K).attach(pi0) as session:
        actions = sample(pi0, inputs, padded)
        assert session.kept is not None
        assert session.kept[0].tolist() == pruned["kept_visual"].tolist()
    np.testing.assert_allclose(actions, pruned[name], rtol=0, atol=1e-4)
    assert (untouched - actions).abs().max() > 1e-3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pruned_as", ["drop", "freeze"])
def test_keep_all_is_bit_identical(pi0, inputs, padded, pruned_as):
    untouched = sample(pi0, inputs, padded)
    with vp.VLAPruner(keep=1.0, layer=K, pruned=pruned_as, warmup="semantic", preset="paper").attach(pi0):
        for _ in range(2):
            assert torch.equal(sample(pi0, inputs, padded), untouched)


@pytest.mark.parametrize("padded", [False, True])
def test_frozen_agrees_with_overwritten_rows(pi0, inputs, pruned, padded):
    kept = tuple(int(i) for i in pruned["kept_visual"])
    gone = [i for i in range(512) if i not in kept]
    entered = {}

    def overwrite(index, module, args, kwargs):
        hidden = args[0].clone()
        if index == K:
            entered["rows"] = hidden[:, gone]
        hidden[:, gone] = entered["rows"]
        return (hidden, *args[1:]), kwargs

    layers = pi0.model.vlm.language_model.layers
    handles = [
        layers[i].register_forward_pre_hook(functools.partial(overwrite, i), with_kwargs=True)
        for i in range(K, len(layers))
    ]
    expected = sample(pi0, inputs, padded)
    for handle in handles:
        handle.remove()
    untouched = sample(pi0, inputs, padded)
    with vp.KeepFixed(kept, layer=K, pruned="freeze").attach(pi0):
        actions = sample(pi0, inputs, padded)
    assert (actions - expected).abs().max() < 1e-4
    assert (untouched - expected).abs().max() > 1e-3


def test_lengths_and_action_scores(pi0, inputs, pruned):
    kept = tuple(int(i) for i in pruned["kept_visual"])
    method = vp.VLAPruner(keep=len(kept), layer=K, warmup="semantic", preset="paper")
    with method.attach(pi0) as session:
        lengths, cached = watch_lengths(pi0)
        first = sample(pi0, inputs)
        assert lengths == [528] * K + [528 - 512 + 128] * 3
        assert session.kept is not None
        assert session.kept.shape == (2, 128)
        action = session.scores["action"]
        assert ((action > 0).sum(1) == 128).all(), "the expert sees the kept tokens only"
        second = sample(pi0, inputs)
        session.reset()
        assert torch.equal(sample(pi0, inputs), first), "an episode leaks nothing into the next"
        assert second.shape == first.shape
    # Every denoising step starts from the prompt alone, whatever the model's own crop left behind.
    suffix = pi0.config.chunk_size + 1
    assert set(cached) == {(layer, (528 if layer < K else 144) + suffix) for layer in range(6)}


def test_batch_rows_are_independent(pi0, inputs):
    method = vp.VLAPruner(keep=0.25, layer=K, window=1, preset="paper")
    with method.attach(pi0) as session:
        together = [sample(pi0, inputs) for _ in range(3)]
        kept = session.kept
        assert kept is not None
        for row in range(2):
            session.reset()
            alone = [sample(pi0, inputs, rows=slice(row, row + 1)) for _ in range(3)]
            assert session.kept is not None
            assert torch.equal(session.kept[0], kept[row])
            for step in range(3):
                assert (alone[step][0] - together[step][row]).abs().max() < 1e-4


def test_absent_camera_is_dropped_first(pi0, inputs):
    """Row 1 lacks its second camera: its image tokens are replaced by padding, and no budget is spent on it."""
    ids, mask = inputs["input_ids"].copy(), inputs["attention_mask"].copy()
    text = ids[1, 512:].copy()
    ids[1, 256 : 256 + len(text)], ids[1, 256 + len(text) :] = text, 0
    mask[1, 256 + len(text) :] = 0
    cameras = np.array([[True, True], [True, False]])
    changed = {**inputs, "input_ids": ids, "attention_mask": mask, "pixel_attention_mask": cameras}
    with vp.VLAPruner(keep=128, layer=K, warmup="semantic", preset="paper").attach(pi0) as session:
        both = sample(pi0, changed)
        assert session.kept is not None
        assert (session.kept[1] < 256).all()
        alone_in = {**changed, "input_ids": ids[1:, :272], "attention_mask": mask[1:, :272]}
        alone_in |= {name: inputs[name][1:] for name in ("state", "noise")}
        alone_in |= {"pixel_values": inputs["pixel_values"][1:, :1], "pixel_attention_mask": cameras[1:, :1]}
        session.reset()
        alone = sample(pi0, alone_in)
    assert (alone[0] - both[1]).abs().max() < 1e-4


def watch_lengths(model):
    lengths, cached = [], []
    for index, layer in enumerate(model.model.vlm.language_model.layers):
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: lengths.append(kwargs["hidden_states"].shape[1]), with_kwargs=True
        )
        reader = model.model.dit.layers[index].self_attn
        reader.register_forward_hook(
            lambda module, args, kwargs, output, index=index: cached.append(
                (index, cache_in(kwargs).layers[index].keys.shape[-2])
            ),
            with_kwargs=True,
        )
    return lengths, cached


def test_the_expert_rows_that_act_are_the_actions_not_the_state(pi0, inputs):
    """The action score is the mean over heads, action rows, late layers and denoising steps, computed by hand."""
    rows = []

    def late(module, args, kwargs, output):
        hidden, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        query = module.q_proj(hidden).view(*hidden.shape[:-1], -1, module.head_dim).transpose(1, 2)
        half = query.shape[-1] // 2
        turned = torch.cat([-query[..., half:], query[..., :half]], -1)
        query = query * cos[:, None] + turned * sin[:, None]
        # The cache holds the prompt and the suffix of this step.
        keys = cache_in(kwargs).layers[module.layer_idx].keys
        probabilities = (query @ keys.transpose(2, 3) * module.head_dim**-0.5).softmax(-1)
        rows.append(probabilities[:, :, 1:, :512].mean((1, 2)))

    layers = pi0.model.dit.layers
    handles = [layer.self_attn.register_forward_hook(late, with_kwargs=True) for layer in layers[3:]]
    sample(pi0, inputs)
    for handle in handles:
        handle.remove()
    with vp.VLAPruner(keep=128, layer=K, preset="paper").attach(pi0) as session:
        sample(pi0, inputs)
        expected = torch.stack(rows).mean(0)
        assert len(rows) == 3 * pi0.config.num_inference_steps
        assert (session.scores["action"] - expected).abs().max() < 1e-6


def test_a_camera_absent_in_all_rows_takes_no_budget(pi0, inputs):
    ids, mask = inputs["input_ids"].copy(), inputs["attention_mask"].copy()
    ids[:, 256:272], ids[:, 272:] = ids[:, 512:].copy(), 0
    mask[:, 272:] = 0
    shown = np.array([[False, True]] * 2)
    changed = {**inputs, "input_ids": ids, "attention_mask": mask, "pixel_attention_mask": shown}
    with vp.VLAPruner(keep=0.5, layer=K, warmup="semantic", preset="paper").attach(pi0) as session:
        sample(pi0, changed)
        assert session.kept is not None
        assert session.kept.shape == (2, 128)
        assert (session.kept >= 256).all(), "ids are those of the second camera"
    with vp.VLAPruner(keep={"a": 64, "b": 64}, layer=K, warmup="semantic", preset="paper").attach(
        pi0, cameras=("a", "b")
    ) as session:
        sample(pi0, changed)
        assert session.kept is not None
        assert session.kept.shape == (2, 64)


def test_absent_tokens_are_never_preferred(pi0, inputs):
    """More is to be kept than row 1 has: the rest is taken from the masked tokens, and only the rest."""
    ids, mask = inputs["input_ids"].copy(), inputs["attention_mask"].copy()
    ids[1, 256:272], ids[1, 272:] = ids[1, 512:].copy(), 0
    mask[1, 272:] = 0
    cameras = np.array([[True, True], [True, False]])
    changed = {**inputs, "input_ids": ids, "attention_mask": mask, "pixel_attention_mask": cameras}
    for method in (vp.RandomKeep(keep=300, layer=K), vp.MaxMinDiversity(keep=300, layer=K)):
        with method.attach(pi0) as session:
            sample(pi0, changed)
            assert session.kept is not None
            assert session.kept[1, :256].tolist() == list(range(256)), method


def test_a_users_own_embed_prefix_survives(pi0, inputs):
    calls = []
    original = pi0.model.embed_prefix

    def own(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    pi0.model.embed_prefix = own
    with vp.RandomKeep(keep=0.5, layer=K).attach(pi0):
        sample(pi0, inputs)
    assert vars(pi0.model)["embed_prefix"] is own
    assert calls


@pytest.mark.parametrize("shown", [(True, True), (True, False)])
def test_a_text_that_holds_an_image_token_is_refused(shown):
    """It would be taken for a token of a camera, the absent one's if there is one."""
    model = cases.pi0("sdpa").build()
    each = 16 * sum(shown)
    ids = torch.tensor([[500] * each + [1, 500, 2, 3, 4] + [0] * (32 - each)])
    given = {
        "state": torch.ones(1, 32),
        "pixel_values": torch.zeros(1, 2, 3, 56, 56),
        "pixel_attention_mask": torch.tensor([shown]),
        "attention_mask": (torch.arange(ids.shape[1]) < each + 5).long()[None],
    }
    try:
        model.sample_actions(input_ids=ids, **given)
    except RuntimeError as error:
        pytest.skip(f"the untouched model refuses it: {error}")
    with vp.FastV(keep=0.5, layer=1).attach(model) as session:
        with pytest.raises(vp.SessionError, match="another number of image tokens than its cameras"):
            model.sample_actions(input_ids=ids, **given)
        model.sample_actions(input_ids=ids.where(torch.arange(ids.shape[1]) != each + 1, 7), **given)
        assert session.kept is not None
