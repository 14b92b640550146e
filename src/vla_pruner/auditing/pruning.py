"""Does the pruner prune what it says, and nothing else?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_pruner.attach.layout import Layout
from vla_pruner.auditing.probes import HiddenProbe, LengthProbe
from vla_pruner.auditing.reference import FullLength
from vla_pruner.auditing.report import Check
from vla_pruner.auditing.seeing import distance
from vla_pruner.auditing.subject import Subject, identical
from vla_pruner.fate import Fate
from vla_pruner.wording import span

EXACT = 1e-4
"""Tolerance in float32: absolute, or a share of the largest value compared if that is above 1."""

HALF = 0.25
"""Tolerance in half precision: a share of the change that pruning itself makes."""

NEVER = "{method} pruned none of the first control steps, so there is nothing to look at."
VANISHED = "The same episode was pruned before and is not now: an episode leaks into the next."
OTHER = 1000
"""The number added to a scene's number to get another scene."""


def lengths(subject: Subject) -> Check:
    """Every layer below the pruning layer computes the whole sequence, every other one the shortened one."""
    if subject.steps is None:
        return _never("lengths", subject)
    plain = LengthProbe(subject.family.decoder, subject.family.anatomy.acting_rows)
    with plain:
        subject.act(subject.scene(0))
    probe = LengthProbe(subject.family.decoder, subject.family.anatomy.acting_rows)
    with subject.attach() as session:
        subject.begin()
        for step in range(subject.steps - 1):
            subject.act(subject.scene(step), step)
        with probe:
            subject.act(subject.scene(subject.steps), subject.steps)
        kept, step = session.kept, session.step
    if kept is None or step is None:
        return Check("lengths", False, "", VANISHED)
    full, layer, depth = step.layout.length, subject.method.layer, len(plain.lengths)
    short = full - step.layout.tokens + kept.shape[1]
    expected = [{full}] * layer + [{short}] * (depth - layer)
    before = f"{full} tokens in {span('layer', 0, layer)}, {short}" if layer else f"{short} tokens"
    figure = (
        f"{before} in {span('layer', layer, depth - layer)} "
        f"({kept.shape[1]} of {step.layout.tokens} visual tokens kept)"
    )
    problems = _unlike("unpruned", plain.prompts, [{full}] * depth) + _unlike("pruned", probe.prompts, expected)
    detail = "Rows that each layer's feed-forward part computes in calls of the prompt."
    if problems or not short < full:
        detail = f"Layers computed other lengths than they should: {'; '.join(problems) or 'none is shortened'}."
    return Check("lengths", not problems and short < full, figure, detail)


def keep_all(subject: Subject) -> Check:
    """keep = 1.0 changes no bit of any action, also past the warm-up."""
    name = "keep 1.0"
    method: Any = subject.method
    if not hasattr(method, "keep"):
        return Check(name, None, "", f"{type(method).__name__} has no keep.")
    scenes = range((subject.steps or 1) + 2)
    subject.begin()
    untouched = [subject.watch(subject.scene(number), number) for number in scenes]
    with subject.attach(replace(method, keep=1.0)):
        subject.begin()
        found = [subject.watch(subject.scene(number), number) for number in scenes]
    changed = [number for number in scenes if not identical(found[number], untouched[number])]
    detail = "Actions and final hidden states of an episode of different scenes, against those of the policy alone."
    if changed:
        far = max(distance(found[number][0], untouched[number][0]) for number in changed)
        detail = (
            f"With every token kept, {len(changed)} of {len(scenes)} control steps are not bit-identical in actions "
            f"and hidden states (actions: L1 up to {far:.3g})."
        )
    return Check(name, not changed, f"{len(scenes)} control steps bit-identical" if not changed else "", detail)


def reference(subject: Subject, pruned: str) -> Check:
    """The pruned model agrees with the whole sequence in which the pruned tokens cannot be used (or are frozen)."""
    name = f"reference {pruned}"
    if subject.steps is None:
        return _never(name, subject)
    if Fate.of(pruned).readable and not subject.family.freezes:
        return Check(
            name, None, "", f"{type(subject.family).__name__} reads outputs, of which frozen tokens have none."
        )
    method = replace(subject.method, pruned=pruned)
    last = subject.steps - 1
    short, full, plain = (HiddenProbe(subject.family) for _ in range(3))
    with subject.attach(method) as session:
        found = subject.run(session, list(range(subject.steps)), short)
    if found is None:
        return Check(name, False, "", VANISHED)
    subject.begin()
    with plain:
        untouched = subject.act(subject.scene(last), last)
    subject.begin()
    with FullLength(subject.policy, found.layout, found.kept, layer=method.layer, pruned=pruned), full:
        expected = subject.act(subject.scene(last), last)
    rows = _LiveRows(found.layout, found.kept)
    hidden = [rows.of(probe) for probe in (short, full, plain)]
    actions = (found.action, expected, untouched)
    if len({len(calls) for calls in hidden}) > 1:
        detail = f"The decoder was called {len(hidden[0])} times pruned, {len(hidden[1])} times at full length."
        return Check(name, False, "", detail)
    compare = _compare_exactly if subject.exact else _compare_half
    return compare(name, hidden, actions, reads_cache=bool(subject.family.readers))


def scenes(subject: Subject) -> Check:
    """Two scenes, each shown until the method prunes, keep different tokens."""
    name = "scenes"
    if subject.steps is None:
        return _never(name, subject)
    if not subject.method.needs:
        return Check(name, None, "", f"{type(subject.method).__name__} does not look at the scene.")
    with subject.attach() as session:
        one = subject.run(session, [0] * subject.steps)
        other = subject.run(session, [OTHER] * subject.steps)
    if one is None or other is None:
        return Check(name, False, "", VANISHED)
    first, second = (set(found.kept[0].tolist()) for found in (one, other))
    count, tokens = len(first), one.layout.tokens
    figure = f"{len(first & second)} of {count} kept tokens in common ({count * count / tokens:.0f} expected by chance)"
    detail = "Two scenes of coloured blocks, an episode each."
    if first == second:
        detail = "Two different scenes kept the same tokens: the choice does not follow what is seen."
    return Check(name, first != second, figure, detail)


class _LiveRows:
    """The rows of a sequence that are there before and after pruning, padding apart."""

    def __init__(self, layout: Layout, kept: Tensor) -> None:
        live = torch.ones_like(layout.prompt).scatter(1, layout.visual, False)
        live = live.scatter(1, layout.visual.gather(1, kept.to(layout.visual.device)), True)
        self._length = layout.length
        self._positions = live.nonzero()[:, 1].view(layout.rows, -1)
        self._real = layout.prompt.gather(1, self._positions)

    def of(self, probe: HiddenProbe) -> list[tuple[bool, Tensor]]:
        """Return for each call whether it is one of the prompt, and its hidden states (rows, D)."""
        return [self._of_call(is_decoder, hidden) for is_decoder, hidden in probe.calls]

    def _of_call(self, is_decoder: bool, hidden: Tensor) -> tuple[bool, Tensor]:
        positions, real = self._positions.to(hidden.device), self._real.to(hidden.device)
        if not is_decoder or hidden.shape[1] not in (self._length, positions.shape[1]):
            return False, hidden.flatten(0, 1)
        if hidden.shape[1] == self._length:
            hidden = hidden.gather(1, positions[..., None].expand(-1, -1, hidden.shape[2]))
        return True, hidden[real]


def _compare_exactly(name: str, hidden: list[Any], actions: tuple[np.ndarray, ...], reads_cache: bool) -> Check:
    short, full, plain = (torch.cat([rows.flatten() for _, rows in calls]) for calls in hidden)
    apart, by_pruning = _largest(short - full), _largest(short - plain)
    tolerance = EXACT * max(1.0, _largest(full))
    action = float(np.abs(actions[0] - actions[1]).max())
    action_tolerance = EXACT * max(1.0, float(np.abs(actions[1]).max()))
    passed = apart <= tolerance and action <= action_tolerance and by_pruning > tolerance
    figure = f"hidden states {apart:.1e} apart, actions {action:.1e} (pruning moves them by {by_pruning:.2g})"
    detail = (
        f"Largest differences of the final hidden states of all live rows of every call (tolerance {tolerance:.1e}) "
        f"and of the action chunk ({action_tolerance:.1e}), against the same model at full length."
    )
    if not by_pruning > tolerance:
        detail = "Pruning moved the hidden states by no more than rounding does, so this shows nothing."
    elif not passed:
        detail = f"The pruned policy computes something else than it should. {detail}"
    return Check(name, passed, figure, detail)


def _compare_half(name: str, hidden: list[Any], actions: tuple[np.ndarray, ...], reads_cache: bool) -> Check:
    # A decoded token that rounding turned over moves all that follows; an expert's calls all start alike.
    wanted = [index for index, (is_prompt, _) in enumerate(hidden[0]) if is_prompt or reads_cache]
    short, full, plain = (torch.cat([calls[index][1].flatten() for index in wanted]) for calls in hidden)
    size = max(_mean(full), 1e-12)
    apart, by_pruning = _mean(short - full) / size, _mean(short - plain) / size
    passed = apart < HALF * by_pruning
    figure = f"hidden states {apart:.2%} apart, pruning moves them by {by_pruning:.2%}"
    detail = (
        f"Mean difference of the final hidden states of live rows, as a share of their size; in half precision at most "
        f"{HALF:g} of what pruning itself changes. Actions: L1 {distance(*actions[:2]):.2g} apart, pruning moves them "
        f"by {distance(actions[0], actions[2]):.2g}."
    )
    return Check(name, passed, figure, detail)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _mean(values: Tensor) -> float:
    return float(values.abs().mean())


def _unlike(state: str, found: list[set[int]], expected: list[set[int]]) -> list[str]:
    wrong = [index for index, lengths in enumerate(found) if lengths != expected[index]]
    return [f"{state}, layer {index} {sorted(found[index])} and not {sorted(expected[index])}" for index in wrong[:3]]


def _never(name: str, subject: Subject) -> Check:
    return Check(name, None, "", NEVER.format(method=type(subject.method).__name__))
