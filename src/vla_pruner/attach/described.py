"""A session in one line."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from vla_pruner.attach.family import Family
from vla_pruner.methods.base import Method

if TYPE_CHECKING:
    from vla_pruner.attach.session import Session


def described(session: Session, family: Family) -> str:
    """Method, family, control step and kept tokens of a session; nothing is computed, and nothing on an accelerator is
    waited for.
    """
    step = session.step
    if step is None:
        done = "before the first control step"
    else:
        steps = sorted({count + 1 for count in step.memory.steps.tolist()})
        number = f"control step {steps[0]}" if len(steps) == 1 else f"control steps {steps[0]} to {steps[-1]}"
        tokens, kept = step.layout.tokens, step.kept
        amount = f"all {tokens}" if kept is None else f"{kept.shape[1]} of {tokens}"
        done = f"{number}, {amount} visual tokens kept"
    ended = "" if session.attached else ", detached"
    return f"<Session of {_options(session.method)} on {type(family).__name__}: {done}{ended}>"


def _options(method: Method) -> str:
    """A method with what it keeps and the options that are not its defaults."""
    told = ((field, getattr(method, field.name)) for field in fields(method))
    options = [f"{field.name}={value!r}" for field, value in told if field.name == "keep" or value != field.default]
    return f"{type(method).__name__}({', '.join(options)})"
