"""Budgets per camera, cameras known to be absent, and prompts that run again within one control step."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import K, decode, make_cache, prompt, tiny_lm
from vla_pruner.families.decoder_lm import DecoderLM

CAMERAS = {"front": slice(1, 17), "wrist": slice(17, 25)}
ALL = frozenset(range(24))


def step(model, seed=1, rows=2):
    return decode(model, prompt(rows, seed=seed)[0], None, make_cache("dynamic", model), 2)[1]


def kept_by_camera(session):
    assert session.kept is not None
    return [(row < 16).sum().item() for row in session.kept], [(row >= 16).sum().item() for row in session.kept]


class Blind(DecoderLM):
    """A decoder whose family knows that some cameras are absent."""

    absent: frozenset[int] = frozenset()

    def layout(self, call):
        return replace(super().layout(call), absent=self.absent)


def attach_blind(method, model, absent):
    family = Blind(model, visual=CAMERAS)
    family.absent = frozenset(absent)
    return vp.Session(method, model, family)


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
@pytest.mark.parametrize(
    ("keep", "front", "wrist"),
    [({"front": 4, "wrist": 0.5}, 4, 4), ({"wrist": 1, "front": 1.0}, 16, 1), ({"front": 0.125, "wrist": 8}, 2, 8)],
)
def test_each_camera_keeps_its_own_budget(keep, front, wrist, pruned):
    model = tiny_lm()
    for method in (
        vp.VLAPruner(keep=keep, layer=K, warmup="semantic", pruned=pruned, preset="paper"),
        vp.RandomKeep(keep=keep, layer=K, pruned=pruned),
    ):
        with method.attach(model, visual=CAMERAS) as session:
            for seed in range(3):
                step(model, seed)
                assert kept_by_camera(session) == ([front] * 2, [wrist] * 2)


def test_a_cameras_tokens_compete_among_themselves():
    """The tokens that a camera keeps are those that it would keep as the only camera that is pruned."""
    model = tiny_lm()
    both = vp.VLAPruner(keep={"front": 4, "wrist": 3}, layer=K, window=1, preset="paper")
    front = vp.VLAPruner(keep={"front": 4, "wrist": 1.0}, layer=K, window=1, preset="paper")
    kept = []
    for method in (both, front):
        with method.attach(model, visual=CAMERAS) as session:
            step(model, 1)
            step(model, 2)
            kept.append(session.kept)
    assert kept[1].shape == (2, 12)
    assert torch.equal(kept[0][:, :4], kept[1][:, :4])


def test_random_cameras_differ():
    model = tiny_lm()
    with vp.RandomKeep(keep={"a": 0.5, "b": 0.5}, layer=K).attach(
        model, visual={"a": slice(1, 13), "b": slice(13, 25)}
    ) as session:
        step(model)
        assert session.kept is not None
        assert session.kept[0, :6].tolist() != (session.kept[0, 6:] - 12).tolist()


def test_keep_all_per_camera_is_bit_identical():
    model = tiny_lm()
    untouched = step(model)
    with vp.VLAPruner(keep={"front": 1.0, "wrist": 8}, layer=K, warmup="semantic", preset="paper").attach(
        model, visual=CAMERAS
    ):
        assert torch.equal(step(model), untouched)


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"front": 4}, "'front', 'wrist'"),
        ({"front": 4, "wrist": 4, "top": 4}, "cameras are 'front', 'wrist'"),
        ({"front": 17, "wrist": 4}, "has 16 visual tokens"),
    ],
)
def test_cameras_that_do_not_fit_are_refused_at_attach(keep, message):
    with pytest.raises(vp.OptionError, match=message):
        vp.VLAPruner(keep=keep, layer=K, preset="paper").attach(tiny_lm(), visual=CAMERAS)


@pytest.mark.parametrize("keep", [{}, {"front": 0}, {"front": 1.5}, {1: 4}, {"front": {"left": 4}}])
def test_keep_per_camera_is_checked_when_written(keep):
    with pytest.raises(vp.BudgetError, match="keep"):
        vp.VLAPruner(keep=keep, preset="paper")


@pytest.mark.parametrize(
    ("keep", "absent", "expected"),
    [
        (0.5, {1}, 8),  # half of the camera that is there
        (0.5, {0}, 4),
        (10, {1}, 10),
        (10, {0}, 8),  # no more than there are
        (0.5, set(), 12),
        ({"front": 4, "wrist": 0.5}, {1}, 4),
        ({"front": 1.0, "wrist": 0.5}, {1}, 16),
    ],
)
def test_no_budget_is_spent_on_a_camera_known_to_be_absent(keep, absent, expected):
    model = tiny_lm()
    masked = torch.ones(2, 31, dtype=torch.int64)
    for camera in absent:
        masked[:, list(CAMERAS.values())[camera]] = 0
    there = ALL - {i for camera in absent for i in (range(16) if camera == 0 else range(16, 24))}
    for method in (
        vp.VLAPruner(keep=keep, layer=K, warmup="semantic", preset="paper"),
        vp.RandomKeep(keep=keep, layer=K),
    ):
        with attach_blind(method, model, absent) as session:
            decode(model, prompt()[0], masked, make_cache("dynamic", model), 1)
            assert session.kept is not None
            assert session.kept.shape == (2, expected)
            assert all(set(row) <= there for row in session.kept.tolist())


def test_keep_all_changes_nothing_where_a_camera_is_absent():
    model = tiny_lm()
    untouched = step(model)
    with attach_blind(vp.VLAPruner(keep=1.0, layer=K, warmup="semantic", preset="paper"), model, {1}) as session:
        assert torch.equal(step(model), untouched)
        assert session.kept is None


def test_a_fixed_set_stays_as_given_where_a_camera_is_absent():
    model = tiny_lm()
    with attach_blind(vp.KeepFixed((0, 20, 23), layer=K), model, {1}) as session:
        step(model)
        assert session.kept is not None
        assert session.kept[0].tolist() == [0, 20, 23]


class Looping(DecoderLM):
    """A decoder that runs its prompt several times in one control step."""

    first = True

    def opens_step(self, call):
        return self.first

    def repeats_prompt(self, call):
        return True


@pytest.mark.parametrize("pruned", ["drop", "freeze"])
def test_a_prompt_that_runs_again_keeps_its_tokens(pruned):
    model = tiny_lm()
    first, second = prompt(seed=1)[0], prompt(seed=2)[0]

    def run(embeds):
        with torch.no_grad():
            return model(inputs_embeds=embeds, use_cache=False).logits

    family = Looping(model, visual=CAMERAS)
    method = vp.VLAPruner(keep=6, layer=K, warmup="semantic", pruned=pruned, preset="paper")
    with vp.Session(method, model, family) as session:
        run(first)
        kept = session.kept
        alone = session.scores["action"].clone()
        family.first = False
        again = run(second)
        assert session.kept is kept
        mean = session.scores["action"]
        assert session.memory is not None
        assert session.memory.steps.tolist() == [1, 1]
        with pytest.raises(vp.SessionError, match="run again with 30"):
            run(second[:, :30])
    assert kept is not None
    assert not torch.equal(mean, alone)
    # Row 0 and row 1 keep different sets, so each is compared on its own.
    for row in range(2):
        with vp.KeepFixed(tuple(kept[row].tolist()), layer=K, pruned=pruned).attach(model, visual=CAMERAS):
            expected = run(second[row : row + 1])
        assert (again[row, -1] - expected[0, -1]).abs().max() < 1e-5


def test_a_second_reset_does_not_begin_the_first_episode_again():
    model = tiny_lm()
    with vp.RandomKeep(keep=6, layer=K).attach(model, visual=CAMERAS) as session:
        step(model)
        first = session.kept
        session.reset()
        session.reset()
        step(model)
        assert not torch.equal(session.kept, first)
