"""`EncoderReuse` on LeRobot's policies, whose cameras are encoded one by one."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.families.encoders import CHECKS
from tests.lerobot.test_matrix import case, pi0_fast, scene_of
from tests.lerobot.tiny import KINDS
from vla_pruner.families import family_of
from vla_pruner.policies.lerobot import random_lerobot

CASES = {**{kind: case(kind) for kind in KINDS}, "pi0-fast": pi0_fast()}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("kind", CASES)
def test_encoder(kind, check):
    CHECKS[check](CASES[kind])


def test_cameras_that_come_and_go_are_encoded_whole():
    policy = random_lerobot("pi0", num_inference_steps=2)
    both = scene_of(policy, 0)
    fewer = {key: value for key, value in both.items() if key != f"observation.images.{policy.cameras[0]}"}
    with vp.VLAPruner(keep=0.5, window=1, preset="paper").attach(policy, encoder=vp.EncoderReuse(keep=0.25)) as session:
        whole = []
        for batch in (both, both, fewer, fewer, both, both):
            policy.module.predict_action_chunk(dict(batch))
            whole.append([ids is None for ids in session.encoded])
    cameras = len(policy.cameras)
    assert whole == [[True] * cameras, [False] * cameras] * 3


@pytest.mark.parametrize("kind", KINDS)
def test_attention_reaches_the_patches_of_its_token(kind):
    """If the images stay, patches are chosen by the last actions' attention to the token that they become."""
    policy = random_lerobot(kind)
    encoder = family_of(policy).encoder
    each = encoder.token_side**2
    tokens = 3
    reuse = vp.EncoderReuse(keep=tokens * each)
    with vp.VLAPruner(keep=1.0, window=1, preset="paper").attach(policy, encoder=reuse) as session, torch.no_grad():
        batch = scene_of(policy, 0)
        policy.module.predict_action_chunk(dict(batch))
        scores = session.scores["action"]
        count = session.step.layout.cameras[0]
        policy.module.predict_action_chunk(dict(batch))
        for camera, ids in enumerate(session.encoded):
            best = scores[:, camera * count : (camera + 1) * count].topk(tokens).indices.sort().values
            found = tokens_of(policy, ids, count * each)
            assert torch.equal(found, best), (kind, camera)


def tokens_of(policy, ids, patches):
    """Return (B, n) sorted ids of the visual tokens that depend on the encoder's outputs at patches (B, k), as the
    policy's projector says.
    """
    anatomy = family_of(policy).anatomy
    (projector,) = anatomy.projectors
    width = next(anatomy.towers[0].parameters()).dtype, anatomy.towers[0].config.hidden_size
    outputs = torch.randn(1, patches, width[1], dtype=width[0], generator=torch.Generator().manual_seed(0))
    before = projector(outputs)
    rows = []
    for row in ids:
        changed = outputs.clone()
        changed[0, row] += 1.0
        rows.append(torch.nonzero((projector(changed) != before).any(-1)[0]).flatten())
    return torch.stack(rows)
