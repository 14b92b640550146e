"""`preset="official"` and FastV on OpenVLA-OFT against vectors made by running the authors' code for it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import vla_pruner as vp
from vla_pruner.attach.layout import Layout
from vla_pruner.families.openvla import OpenVLAOFT
from vla_pruner.methods.base import Evidence
from vla_pruner.models.openvla import random_openvla

KEEPS = (0.5, 0.25, 0.125, 0.0725)
ROWS = 58
"""Positions at the end whose hidden states were recorded: the last of the text, 56 placeholders and the stop token."""


@pytest.fixture
def vectors(golden):
    file = golden / "official_oft" / "oft_golden.npz"
    if not file.is_file():
        pytest.skip(f"{file} is absent")
    return recorded(file)


@pytest.fixture
def meta(vectors):
    return json.loads(str(vectors["meta"]))


@pytest.fixture
def policy(golden, vectors) -> Any:
    return policy_of(golden / "official_oft")


@cache
def recorded(file: Path) -> dict[str, Any]:
    with np.load(file) as found:
        return dict(found)


@cache
def policy_of(folder: Path) -> Any:
    """OpenVLA-OFT with their language model; embeddings are given, so nothing sees."""
    meta = json.loads(str(recorded(folder / "oft_golden.npz")["meta"]))
    text = dict(meta["text_config"])
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": text.pop("rope_theta")}
    sizes = {name: size for name, size in text.items() if not name.endswith("_id") and name != "vocab_size"}
    cameras = tuple(f"view {number}" for number in range(meta["views"]))
    policy: Any = random_openvla(size="tiny", oft=True, head=None, cameras=cameras, **sizes)
    weights = load_file(folder / "tiny_llama.safetensors")
    weights = {name: weight for name, weight in weights.items() if "embed_tokens" not in name and "lm_head" not in name}
    found = policy.language_model.load_state_dict(weights, strict=False)
    assert all("embed_tokens" in name or "lm_head" in name for name in found.missing_keys)
    assert not found.unexpected_keys
    assert policy.patches == meta["patches"]
    return policy


def control_step(policy: Any, embeds: Tensor) -> Tensor:
    """(58, H) the last hidden states of a pass, as `OpenVLAOFT.action_hidden_states` runs it."""
    mask = torch.ones(1, len(embeds), dtype=torch.int64)
    with torch.no_grad():
        output = policy.language_model(
            inputs_embeds=embeds[None],
            attention_mask=policy._bidirectional(mask, embeds.dtype),
            position_ids=torch.arange(len(embeds))[None],
            use_cache=False,
            headless=True,
        )
    return output.last_hidden_state[0, -ROWS:]


def grid(vectors: dict[str, Any], key: str, step: int) -> np.ndarray:
    """(V, P) or (V, k) values of the views in a row: (V * P,)."""
    return vectors[key][step].reshape(-1)


def kept_of(vectors: dict[str, Any], name: str, step: int) -> list[int]:
    """Ids of all views together, as a session has them."""
    kept = vectors[f"{name}/kept"][step].astype(int)
    patches = vectors[f"{name}/semantic"].shape[-1]
    return [view * patches + one for view, ids in enumerate(kept.tolist()) for one in ids]


def follow(policy: Any, vectors: dict[str, Any], meta: Any, name: str, method: vp.Method, **options: Any) -> None:
    with method.attach(policy, **options) as session:
        for step in range(meta["steps"]):
            if step in meta["resets"]:
                session.reset()
            tail = control_step(policy, torch.tensor(vectors["inputs_embeds"][step]))
            close(session.scores["semantic"][0], grid(vectors, f"{name}/semantic", step), 1e-5)
            if "action" in method.needs:
                close(session.scores["action"][0], grid(vectors, f"{name}/action15", step), 1e-5)
            if vectors[f"{name}/pruned"][step]:
                assert session.kept is not None, step
                assert session.kept[0].tolist() == kept_of(vectors, name, step)
            else:
                assert session.kept is None
            close(tail, vectors[f"{name}/tail_hidden"][step], 1e-4)
    assert vectors[f"{name}/pruned"].any()


@pytest.mark.parametrize("keep", KEEPS)
def test_official_is_the_authors_code_for_oft(policy, vectors, meta, keep):
    method = vp.VLAPruner(keep=keep, preset="official")
    follow(policy, vectors, meta, f"keep{keep}", method)
    with method.attach(policy) as session:
        assert session.method == vp.VLAPruner(keep=keep, preset="official-chunk", layer=4)


def test_a_layer_that_is_named_is_obeyed(policy):
    with vp.VLAPruner(keep=0.25, preset="official", layer=3).attach(policy) as session:
        assert session.method.layer == 3


@pytest.mark.parametrize("keep", KEEPS[:3])
def test_fastv_of_their_comparison(policy, vectors, meta, keep):
    cameras = dict.fromkeys(policy.cameras, keep)
    method = vp.FastV(keep=cameras, layer=4, semantic_queries="all")
    follow(policy, vectors, meta, f"fastv_keep{keep}", method)


def test_their_last_row_is_the_stop_token(policy, vectors, meta):
    """It is no row of the prompt, and so not what "last" means here; with it the family gives the same kept sets."""

    class StopReads(OpenVLAOFT):
        def _layout(self, call: Any) -> Layout:
            layout = super()._layout(call)
            assert layout.readers is not None
            layout.readers[:] = torch.arange(layout.length) == layout.length - 1
            return layout

    method = vp.FastV(keep=dict.fromkeys(policy.cameras, 0.25), layer=4)
    follow(policy, vectors, meta, "fastvlast_keep0.25", method, family=StopReads)


@pytest.mark.parametrize("keep", KEEPS)
def test_estimate_candidates_and_pick_order_are_the_authors(vectors, meta, keep):
    name = f"keep{keep}"
    views, patches = vectors[f"{name}/semantic"].shape[1:]
    k = vectors[f"{name}/kept"].shape[-1]
    method = vp.VLAPruner(keep=keep, preset="official-chunk")
    memory = vp.Memory.empty(views, 3, patches)  # a view a row
    for step in range(meta["steps"]):
        if step in meta["resets"]:
            memory = memory.reset(list(range(views)))
        kept = torch.tensor(vectors[f"{name}/kept"][step].astype(np.int64))
        pruned = bool(vectors[f"{name}/pruned"][step])
        if pruned:
            evidence = Evidence(
                valid=torch.ones(views, patches, dtype=torch.bool),
                memory=memory,
                semantic=torch.tensor(vectors[f"{name}/semantic"][step]),
                features=torch.tensor(vectors["visual_embeds"][step]),
            )
            close(method.action_estimate(evidence), vectors[f"{name}/estimate"][step], 1e-8)
            assert method.candidates(evidence, k).tolist() == vectors[f"{name}/candidates"][step].tolist()
            assert method.pick_order(evidence, k).tolist() == vectors[f"{name}/pick_order"][step].tolist()
        seen = torch.zeros(views, patches, dtype=torch.bool).scatter(1, kept.clamp_min(0), True) if pruned else None
        memory = memory.push(torch.tensor(vectors[f"{name}/action15"][step]), seen)


def close(found: Tensor, expected: np.ndarray, tolerance: float) -> None:
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)
