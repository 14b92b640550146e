"""The presets that are the authors' code for OpenVLA, FastV and SparseVLM against vectors made by running that code:
scores, kept sets, pick order, tokens, logits. February's and May's differ in the direction of the decay alone.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import vla_pruner as vp
from tests.attach.tiny import CACHE
from vla_pruner.caches import cache_of
from vla_pruner.methods.base import Evidence

STEPS, DECODED = 6, 7
KEEPS = (0.5, 0.25, 0.125)


PRESETS = ("official-2026-02", "official")
FILES = {
    "official-2026-02": "official_vla_pruner/vlapruner_golden.npz",
    "official": "official_openvla_2026_05/openvla_golden.npz",
}
NAMES = {
    "official-2026-02": ("keep", "lasttok_keep", "hist_bf16_as_f32"),
    "official": ("mean_keep", "last_keep", "estimate"),
}
"""The files' names of the mean over all rows, the last row, and the estimate."""


@pytest.fixture
def recorded(golden):
    """The results of the code of each preset."""

    def load(preset):
        file = golden / FILES[preset]
        if not file.is_file():
            pytest.skip(f"{file} is absent")
        with np.load(file) as found:
            return dict(found)

    return load


@pytest.fixture
def vectors(recorded):
    return recorded("official-2026-02")


@pytest.fixture
def llama(golden, vectors):
    options = json.loads(str(vectors["meta"]))["text_config"]
    theta = options.pop("rope_theta")
    config = LlamaConfig(
        **options, rope_parameters={"rope_type": "default", "rope_theta": theta}, tie_word_embeddings=False
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa").eval()
    model.load_state_dict(load_file(golden / "official_vla_pruner" / "tiny_llama.safetensors"))
    return model


def control_step(model, embeds):
    """The authors' control step: a prefill and greedy decoding, seven tokens in all."""
    with torch.no_grad():
        out = model(inputs_embeds=embeds[None], use_cache=True)
        logits = [out.logits[0, -1]]
        for _ in range(DECODED - 1):
            token = logits[-1].argmax().view(1, 1)
            out = model(input_ids=token, **{CACHE: cache_of(out)}, use_cache=True)
            logits.append(out.logits[0, -1])
    return torch.stack(logits)


@pytest.mark.parametrize(
    ("preset", "keep", "queries"),
    [
        *((preset, keep, "all") for preset in PRESETS for keep in KEEPS),
        ("official-2026-02", 0.25, "last"),
        *(("official", keep, "last") for keep in KEEPS),
    ],
)
def test_official_preset_reproduces_the_authors_code(llama, recorded, preset, keep, queries):
    vectors = recorded(preset)
    name = f"{NAMES[preset][queries == 'last']}{keep}"
    method = vp.VLAPruner(keep=keep, preset=preset, semantic_queries=queries)
    semantic = "sem_score" if queries == "all" else "last_token_score"
    with method.attach(llama, visual=slice(1, 257)) as session:
        for step in range(STEPS):
            logits = control_step(llama, torch.tensor(vectors["inputs_embeds"][step]))
            close(session.scores["semantic"][0], vectors[f"{name}/{semantic}"][step], 1e-5)
            close(session.scores["action"][0], vectors[f"{name}/av_vec"][step], 1e-5)
            close(logits, vectors[f"{name}/scores"][step], 1e-4)
            assert logits.argmax(-1).tolist() == vectors[f"{name}/tokens"][step].tolist()
            if not vectors[f"{name}/pruned"][step]:
                assert session.kept is None
            else:
                assert session.kept is not None
                assert session.kept[0].tolist() == vectors[f"{name}/kept"][step].tolist()


@pytest.mark.parametrize(
    ("name", "method"),
    [("fastv", vp.FastV(keep=0.25)), ("sparsevlm", vp.SparseVLM(keep=0.25, preset="official"))],
)
def test_the_authors_comparisons_are_reproduced(llama, vectors, name, method):
    name = f"{name}_keep0.25"
    with method.attach(llama, visual=slice(1, 257)) as session:
        for step in range(STEPS):
            logits = control_step(llama, torch.tensor(vectors["inputs_embeds"][step]))
            if method.queries == "last":
                close(session.scores["semantic"][0], vectors[f"{name}/last_token_score"][step], 1e-5)
            assert session.kept is not None
            assert session.kept[0].tolist() == vectors[f"{name}/kept"][step].tolist()
            close(logits, vectors[f"{name}/scores"][step], 1e-4)
            assert logits.argmax(-1).tolist() == vectors[f"{name}/tokens"][step].tolist()


def test_fastv_is_the_authors_of_may(llama, recorded):
    vectors, name = recorded("official"), "fastv_keep0.25"
    with vp.FastV(keep=0.25).attach(llama, visual=slice(1, 257)) as session:
        for step in range(STEPS):
            logits = control_step(llama, torch.tensor(vectors["inputs_embeds"][step]))
            assert session.kept is not None
            assert session.kept[0].tolist() == vectors[f"{name}/kept"][step].tolist()
            close(logits, vectors[f"{name}/scores"][step], 1e-4)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("keep", KEEPS)
def test_pick_order_is_the_authors(recorded, preset, keep):
    vectors, k = recorded(preset), int(256 * keep)
    mean, _, estimated = NAMES[preset]
    name = f"{mean}{keep}"
    method = vp.VLAPruner(keep=keep, preset=preset)
    memory = vp.Memory.empty(1, 3, 256)
    for step in range(STEPS):
        if vectors[f"{name}/pruned"][step]:
            evidence = Evidence(
                valid=torch.ones(1, 256, dtype=torch.bool),
                memory=memory,
                semantic=torch.tensor(vectors[f"{name}/sem_score"][step])[None],
                features=torch.tensor(vectors["visual_embeds"][step])[None],
            )
            estimate = method.action_estimate(evidence)[0]
            np.testing.assert_array_equal(estimate.numpy(), vectors[f"{name}/{estimated}"][step])
            assert int(method.candidates(evidence, k).sum()) == vectors[f"{name}/union_size"][step]
            assert method.pick_order(evidence, k)[0].tolist() == vectors[f"{name}/greedy_order"][step].tolist()
        kept = torch.tensor(vectors[f"{name}/kept"][step].astype(np.int64))
        seen = torch.zeros(1, 256, dtype=torch.bool)
        seen[0, kept] = True
        memory = memory.push(torch.tensor(vectors[f"{name}/av_vec"][step])[None], seen if kept[0] >= 0 else None)


def close(found, expected, tolerance):
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)
