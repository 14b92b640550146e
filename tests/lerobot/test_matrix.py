"""LeRobot's families with every method, dropping and freezing: see `tests/families/matrix.py` for the properties."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

from tests.families import matrix, text_decoders
from tests.lerobot.tiny import KINDS, random_batch
from vla_pruner.policies.lerobot import random_lerobot

STEPS = {"pi0": "num_inference_steps", "pi05": "num_inference_steps", "smolvla": "num_steps"}


def case(kind):
    def build():
        return random_lerobot(kind, **{STEPS[kind]: 3})

    def step(policy, scene, rows):
        side = policy.module.config.image_features["observation.images." + policy.cameras[0]].shape[-1]
        images = random_batch(scene, 2, policy.cameras, side)
        # Text and state stay as they are: the scenes change the images alone.
        batch = {**random_batch(0, 2, (), side), **{key: images[key] for key in images if "images" in key}}
        batch["observation.language.attention_mask"][1, -5:] = False
        noise = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(scene))
        return policy.module.predict_action_chunk({key: value[rows] for key, value in batch.items()}, noise=noise[rows])

    return matrix.Case(f"lerobot-{kind}", build, step)


# LeRobot's transformers gives the layers of two of Qwen's decoders angles of another shape than newer versions do.
CASES = [*map(case, KINDS), *map(text_decoders.text_decoder, text_decoders.KINDS)]
each_family = pytest.mark.parametrize("case", CASES, ids=str)
each_pruned = pytest.mark.parametrize("pruned", matrix.POLICIES)


@each_family
def test_visual_tokens_are_what_depends_on_the_images(case):
    matrix.check_layout(case)


@each_family
@each_pruned
def test_keep_all_changes_no_bit(case, pruned):
    matrix.check_keep_all(case, pruned)


@each_family
@each_pruned
@pytest.mark.parametrize("keep", matrix.KEEPS)
def test_pruned_agrees_with_the_full_length_reference(case, pruned, keep):
    matrix.check_reference(case, keep, pruned)


@each_family
@each_pruned
def test_nothing_is_left_behind(case, pruned):
    matrix.check_no_trace(case, pruned)


@each_family
@each_pruned
def test_episodes_do_not_leak(case, pruned):
    matrix.check_episodes(case, pruned)


@each_family
@each_pruned
def test_rows_are_what_single_robots_are(case, pruned):
    matrix.check_rows(case, pruned)


@each_family
@each_pruned
def test_progressive_pruning_agrees_with_the_full_length_reference(case, pruned):
    matrix.check_progressive(case, pruned)


@each_family
@each_pruned
def test_under_autocast_the_choice_is_float32(case, pruned):
    matrix.check_autocast(case, pruned)
