"""Does anything stay behind: of an episode in the next one, of a session in the policy?"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import layers_of
from vla_pruner.auditing.report import Check
from vla_pruner.auditing.subject import Subject, identical

_ELSEWHERE = 2000
"""The number added to the numbers of scenes of the episode in between."""


def reset(subject: Subject) -> Check:
    """An episode is the same again after another one: the same actions of the policy alone, and the same kept sets and
    actions with the method.
    """
    steps = (subject.steps or 1) + 2
    problems = []
    first, _ = _episode(subject, None, steps, 0)
    _episode(subject, None, steps, _ELSEWHERE)
    again, _ = _episode(subject, None, steps, 0)
    if not _same(first, again):
        problems.append("the policy alone acts otherwise: its own reset() forgets too little")
    figure = f"{steps} control steps twice, another episode in between"
    if not subject.method.needs:
        name = type(subject.method).__name__
        return Check("reset", not problems, figure, "; ".join(problems) or f"{name} draws anew in every episode.")
    with subject.attach() as session:
        first, kept = _episode(subject, session, steps, 0)
        _episode(subject, session, steps, _ELSEWHERE)
        again, kept_again = _episode(subject, session, steps, 0)
    if not _same(first, again):
        problems.append("the pruned policy acts otherwise")
    if kept != kept_again:
        problems.append("other tokens are kept")
    detail = "Actions and final hidden states compared bit by bit, kept sets token by token."
    if problems:
        detail = f"After reset(), the same episode went otherwise: {'; '.join(problems)}."
    return Check("reset", not problems, figure, detail)


def detach(subject: Subject) -> Check:
    """After detaching, and after an exception inside a session, the policy is what it was."""
    subject.begin()
    untouched = subject.watch(subject.scene(0))
    before = snapshot(subject)
    subject.act(subject.scene(1))
    subject.begin()
    # State that the policy itself keeps of its last prompt (Qwen-VL's positions) is not left by a session.
    own = _differences(before, snapshot(subject))
    with subject.attach():
        subject.begin()
        for step in range((subject.steps or 1) + 1):
            subject.act(subject.scene(step), step)
    subject.begin()
    problems = [place for place in _differences(before, snapshot(subject)) if place not in own]
    _fail_inside(subject)
    subject.begin()
    problems += [
        f"{place} (after an exception)"
        for place in _differences(before, snapshot(subject))
        if place not in (*problems, *own)
    ]
    moved = not identical(untouched, subject.watch(subject.scene(0)))
    detail = "Attributes, hooks, weights and configs of every module; action and final hidden states bit by bit."
    if problems or moved:
        detail = f"Left behind: {', '.join(problems[:5]) or 'nothing in the modules'}"
        detail += "; and the policy computes something else." if moved else "."
    return Check("detach", not problems and not moved, f"{len(before)} attributes compared", detail)


def snapshot(subject: Subject) -> dict[str, Any]:
    """Return all state that could be left behind, by place; two snapshots are equal if nothing was."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    state: dict[str, Any] = {"attention functions": sorted(ALL_ATTENTION_FUNCTIONS)}
    owners: list[tuple[str, Any]] = [(name or "(module)", module) for name, module in subject.module.named_modules()]
    if subject.policy is not subject.module:
        owners.append(("(policy)", subject.policy))
    for place, owner in owners:
        for name, value in vars(owner).items():
            state[f"{place}.{name}"] = _describe(value)
        config = vars(owner).get("config")
        if hasattr(config, "__dict__"):
            for name, value in vars(config).items():
                state[f"{place}.config.{name}"] = _describe(value)
    return state


def _describe(value: Any) -> Any:
    """Return a description that is equal as long as the value is the same one."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Tensor):
        return id(value), value.data_ptr(), value.dtype, tuple(value.shape), _checksum(value)
    if isinstance(value, Mapping):
        # Unnamed keys, such as hook ids, by order.
        return [(str(key), _describe(part)) for key, part in value.items()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return type(value).__name__, [_describe(part) for part in value]
    return type(value).__name__, id(value)


def _checksum(tensor: Tensor) -> str:
    """Return a text, so that NaN equals itself; empty if there is nothing to sum."""
    if tensor.device.type == "meta" or tensor.numel() == 0:
        return ""
    return repr(tensor.detach().sum(dtype=torch.float32).item())


def _differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    places = [*before, *(place for place in after if place not in before)]
    return [place for place in places if before.get(place, _ABSENT) != after.get(place, _ABSENT)]


_ABSENT = object()


class _Interrupted(Exception):
    pass


def _fail_inside(subject: Subject) -> None:
    """Run a control step that breaks off in the last layer, with a session attached."""

    def interrupt(*_: Any) -> None:
        raise _Interrupted

    last: nn.Module = layers_of(subject.family.decoder)[-1].mlp
    try:
        with subject.attach():
            subject.begin()
            handle = last.register_forward_pre_hook(interrupt)
            try:
                subject.act(subject.scene(0))
            finally:
                handle.remove()
    except _Interrupted:
        pass


def _episode(subject: Subject, session: Any, steps: int, offset: int) -> tuple[list[Any], list[Any]]:
    subject.begin()
    actions, kept = [], []
    for step in range(steps):
        actions.append(subject.watch(subject.scene(step + offset), step))
        kept.append(None if session is None or session.kept is None else session.kept.tolist())
    return actions, kept


def _same(one: list[Any], other: list[Any]) -> bool:
    return all(identical(first, second) for first, second in zip(one, other, strict=True))
