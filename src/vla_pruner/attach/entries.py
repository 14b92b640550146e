"""Watches the calls of a policy by which control steps and episodes begin."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from vla_pruner.attach.family import Family
from vla_pruner.attach.turn import Turn
from vla_pruner.errors import SessionError
from vla_pruner.replacements import Replacements

if TYPE_CHECKING:
    from vla_pruner.attach.session import Session

_DETACHED = (
    "The session was detached while a control step ran, so what came of the step is neither the pruned model's nor the "
    "model's own; run it again."
)


def watch_steps(session: Session, family: Family, turn: Turn, replaced: Replacements) -> None:
    """Make each call that is a whole control step keep other threads out of it."""

    def step(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not session.attached:
            return original(*args, **kwargs)  # a replacement put on top meanwhile still calls this one
        family.check_step(args, kwargs)
        try:
            with turn.step() as outermost:
                with session.timed_step(outermost):
                    result = original(*args, **kwargs)
                gave_up = outermost and session.heed_trial()
        except Exception as error:
            session.forget_images()
            if session.attached:
                raise
            raise SessionError(_DETACHED) from error
        if not session.attached and not gave_up:
            raise SessionError(_DETACHED)
        return result

    for owner, name in family.whole_steps:
        replaced.put(owner, name, step)


def follow_resets(session: Session, policy: Any, turn: Turn, replaced: Replacements) -> None:
    """Make a policy's `reset` begin a new episode of the session, too."""

    def reset(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        turn.check()
        result = original(*args, **kwargs)
        session.reset()
        return result

    inner = None if isinstance(policy, nn.Module) else getattr(policy, "module", None)
    for owner in (policy, inner):
        if callable(getattr(owner, "reset", None)):
            replaced.put(owner, "reset", reset)
