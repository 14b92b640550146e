"""Every family with every method, dropping and freezing: see `matrix.py` for the properties."""

from __future__ import annotations

import pytest

from tests.families import cases, matrix, text_decoders, vlms

FAMILIES = [
    cases.decoder_lm(),
    cases.reference(),
    cases.chunk(),
    cases.openvla("sdpa"),
    cases.openvla_oft("l1"),
    cases.openvla_oft("diffusion"),
    cases.pi0("sdpa"),
    vlms.case("llava"),
    *map(text_decoders.text_decoder, text_decoders.KINDS),
]
VARIANTS = [
    cases.openvla("eager"),
    cases.openvla_oft("l1", "eager"),
    cases.openvla_oft(None),
    cases.pi0("eager"),
    *(text_decoders.text_decoder(kind, "eager") for kind in text_decoders.KINDS),
]

each_family = pytest.mark.parametrize("case", FAMILIES, ids=str)
each_variant = pytest.mark.parametrize("case", FAMILIES + VARIANTS, ids=str)
each_pruned = pytest.mark.parametrize("pruned", matrix.POLICIES)


@pytest.mark.parametrize("case", [case for case in FAMILIES if case.noisy is not None], ids=str)
def test_visual_tokens_are_what_depends_on_the_images(case):
    matrix.check_layout(case)


@each_variant
@each_pruned
def test_keep_all_changes_no_bit(case, pruned):
    matrix.check_keep_all(case, pruned)


@each_variant
@each_pruned
@pytest.mark.parametrize("keep", matrix.KEEPS)
def test_pruned_agrees_with_the_full_length_reference(case, pruned, keep):
    matrix.check_reference(case, keep, pruned)


@each_variant
@each_pruned
def test_progressive_pruning_agrees_with_the_full_length_reference(case, pruned):
    matrix.check_progressive(case, pruned)


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


@each_variant
@each_pruned
def test_under_autocast_the_choice_is_float32(case, pruned):
    matrix.check_autocast(case, pruned)


@each_family
def test_gradient_checkpointing_is_refused_while_it_is_in_use(case):
    matrix.check_checkpointing(case)
