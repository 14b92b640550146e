"""The two-camera reference policy: its action rows act, and do not affect the rows that read the prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.families import cases, matrix
from vla_pruner.families import family_of

K = 2
TOKENS, CHUNK, LENGTH = 128, 8, 144


@pytest.fixture
def model() -> Any:
    policy: Any = vp.random_policy("reference-chunk")
    policy.decoder.set_attn_implementation("eager")
    return policy


def attention(model: Any, layer: int) -> torch.Tensor:
    """(2, LENGTH, LENGTH) attention of a layer in the unpruned policy, averaged over heads."""
    found: list[torch.Tensor] = []
    handle = model.decoder.layers[layer].self_attn.register_forward_hook(lambda _, __, out: found.append(out[1]))
    try:
        cases.chunk().step(model, 0, matrix.BOTH)
    finally:
        handle.remove()
    return found[0].mean(1)


@pytest.mark.parametrize(
    ("queries", "rows"),
    [
        ("all", slice(0, LENGTH - CHUNK)),
        ("text", slice(1 + TOKENS, LENGTH - CHUNK)),
        ("last", slice(LENGTH - CHUNK - 1, LENGTH - CHUNK)),
    ],
)
def test_semantic_score_is_that_of_prompt_rows(model: Any, queries: str, rows: slice) -> None:
    expected = attention(model, K - 1)[:, rows, 1 : 1 + TOKENS].mean(1)
    method = vp.VLAPruner(keep=0.25, layer=K, window=1, warmup="semantic", semantic_queries=queries, preset="paper")
    with method.attach(model) as session:
        cases.chunk().step(model, 0, matrix.BOTH)
        found, kept = session.scores["semantic"], session.kept
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)
    assert kept is not None
    assert torch.equal(kept, expected.topk(TOKENS // 4).indices.sort().values)


def test_action_score_is_that_of_action_rows(model: Any) -> None:
    later = range(family_of(model).depth // 2, family_of(model).depth)
    expected = torch.stack([attention(model, layer)[:, -CHUNK:, 1 : 1 + TOKENS].mean(1) for layer in later]).mean(0)
    with vp.ActionOnly(keep=0.25, layer=K).attach(model) as session:
        cases.chunk().step(model, 0, matrix.BOTH)
        found = session.scores["action"]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_cameras_and_the_pixels_of_their_tokens() -> None:
    policy: Any = vp.random_policy("reference-chunk")
    family = family_of(policy)
    assert (family.cameras, family.camera_tokens) == (("image", "wrist_image"), (64, 64))
    frames = np.stack([cases.images(0, camera, 64) for camera in range(2)], axis=1)
    patches = family.patches(policy.pixels(torch.as_tensor(frames)))
    assert patches.shape == (2, TOKENS, 3 * 8 * 8)
    second = frames[1, 1, 8:16, :8].transpose(2, 0, 1).reshape(-1)
    torch.testing.assert_close(patches[1, 64 + 8], torch.as_tensor(second).float(), atol=1e-3, rtol=0)


def test_detaching_within_a_step_is_a_sentence() -> None:
    policy = vp.random_policy("reference-chunk")
    example = policy.example()
    untouched = policy.act(example.images, example.instruction, example.proprio)
    session = vp.FastV(keep=0.25, layer=2).attach(policy)
    hook = policy.decoder.layers[3].register_forward_pre_hook(lambda *_: session.detach())
    with pytest.raises(vp.SessionError, match="was detached while a control step ran"):
        policy.act(example.images, example.instruction, example.proprio)
    hook.remove()
    assert np.array_equal(policy.act(example.images, example.instruction, example.proprio), untouched)
