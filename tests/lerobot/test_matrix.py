"""LeRobot's families with every method, dropping and freezing: see `tests/families/matrix.py` for the properties."""

from __future__ import annotations

import re
from contextlib import contextmanager

import pytest
import torch

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

from tests.families import matrix, text_decoders
from tests.lerobot.tiny import KINDS, random_batch
from vla_pruner.policies.lerobot import random_lerobot
from vla_pruner.policies.molmoact2_random import random_molmoact2_policy

STEPS = {"pi0": "num_inference_steps", "pi05": "num_inference_steps", "smolvla": "num_steps"}


def scene_of(policy, scene):
    """Return a batch of two robots; scenes change the images alone, not texts or states."""
    side = policy.module.config.image_features["observation.images." + policy.cameras[0]].shape[-1]
    images = random_batch(scene, 2, policy.cameras, side)
    batch = {**random_batch(0, 2, (), side), **{key: images[key] for key in images if "images" in key}}
    batch["observation.language.attention_mask"][1, -5:] = False
    return batch


def case(kind):
    def build():
        return random_lerobot(kind, **{STEPS[kind]: 3})

    def step(policy, scene, rows):
        batch = scene_of(policy, scene)
        noise = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(scene))
        return policy.module.predict_action_chunk({key: value[rows] for key, value in batch.items()}, noise=noise[rows])

    return matrix.Case(f"lerobot-{kind}", build, step)


def pi0_fast():
    """Return the case of pi0-FAST, whose result is the logits of every decoded token."""

    def step(policy, scene, rows):
        batch, head = scene_of(policy, scene), policy.module.model.paligemma_with_expert.paligemma.lm_head
        found = []
        handle = head.register_forward_hook(lambda _, __, logits: found.append(logits))
        try:
            policy.module.predict_action_chunk({key: value[rows] for key, value in batch.items()})
        finally:
            handle.remove()
        return torch.cat(found, dim=1)

    return matrix.Case("lerobot-pi0-fast", lambda: random_lerobot("pi0_fast"), step)


def molmoact2(**options):
    """Return the case of MolmoAct2: two robots, whose prompts differ in length."""

    def step(policy, scene, rows):
        generator = torch.Generator().manual_seed(scene)
        pictures = [list(torch.rand(len(policy.cameras), 3, 80, 100, generator=generator)) for _ in range(2)]
        texts = [list(b"put the bowl on the plate"), list(b"open it")]
        batch = policy.preprocessor.batch(pictures, texts)
        noise = torch.Generator().manual_seed(3)
        drawn = torch.randn(2, 10, 32, generator=noise)
        with drawn_as(drawn[rows]):
            images = {"pixel_values", "image_token_pooling", "image_grids", "image_num_crops"}
            given = {key: by_image(policy, value, rows, key in images) for key, value in batch.items()}
            return policy.module.predict_action_chunk(given)

    def build():
        return random_molmoact2_policy(**options)

    name = "-".join(["lerobot-molmoact2", *options])
    return matrix.Case(name, build, step)


def by_image(policy, value, rows, of_images):
    """Return the part of a tensor, by row or by image, that belongs to the given rows of two."""
    return value.unflatten(0, (2, -1))[rows].flatten(0, 1) if of_images else value[rows]


@contextmanager
def drawn_as(noise):
    """Make torch.randn return this noise in the block: MolmoAct2 draws the noise of all rows from one generator."""
    original = torch.randn
    torch.randn = lambda *_, **__: noise
    try:
        yield
    finally:
        torch.randn = original


# LeRobot's transformers gives the layers of two of Qwen's decoders angles of another shape than newer versions do.
CASES = [*map(case, KINDS), pi0_fast(), molmoact2(), *map(text_decoders.text_decoder, text_decoders.KINDS)]
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


# LeRobot's pi0s end the training mode in each of their steps, and SmolVLA runs the layers of its decoder itself, with a
# cache in every mode.
@pytest.mark.parametrize("case", [case for case in CASES if not re.search("smolvla|pi0", case.name)], ids=str)
def test_gradient_checkpointing_is_refused_while_it_is_in_use(case):
    matrix.check_checkpointing(case)
