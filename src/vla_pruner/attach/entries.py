"""Watches the calls of a policy by which control steps and episodes begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
                with _images_forgotten_on_failure(session), session.timed_step(outermost):
                    result = original(*args, **kwargs)
                gave_up = outermost and session.heed_trial()
        except Exception as error:
            if session.attached:
                raise
            raise SessionError(_DETACHED) from error
        if not session.attached and not gave_up:
            raise SessionError(_DETACHED)
        return result

    for owner, name in family.whole_steps:
        replaced.put(owner, name, step)


def watch_actions(session: Session, policy: Any, replaced: Replacements) -> None:
    """Make a policy that wraps its model forget what the images left also if it refuses the model's actions, as it does
    if they are not finite. That is after the calls that `watch_steps` watches.
    """

    def act(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with _images_forgotten_on_failure(session):
            return original(*args, **kwargs)

    if not isinstance(policy, nn.Module) and callable(getattr(policy, "act", None)):
        replaced.put(policy, "act", act)


@contextmanager
def _images_forgotten_on_failure(session: Session) -> Iterator[None]:
    """Have the session hold nothing of the images of a step that fails: it would be reused in all later ones."""
    try:
        yield
    except BaseException:
        with suppress(SessionError):  # another thread is within a control step, which this one was not
            session.forget_images()
        raise


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
