"""The functions that put a session or compiled calls on a model: the only place that uses methods' sessions and
families alike.
"""

from __future__ import annotations

from typing import Any

from vla_pruner.attach.attached import session_on
from vla_pruner.attach.compiled import Compiled, check_not_compiled
from vla_pruner.attach.session import Session
from vla_pruner.errors import OptionError, SessionError
from vla_pruner.families import family_of
from vla_pruner.families.wrappers import unwrapped
from vla_pruner.methods import EncoderReuse, Method


def attach(
    method: Method,
    model: Any,
    compile: bool = False,
    only_if_faster: bool = False,
    encoder: EncoderReuse | None = None,
    **family_options: Any,
) -> Session:
    """Attach a method to `model` in place; arguments, result and errors as of `Method.attach`."""
    if not isinstance(compile, bool):
        raise OptionError(
            f"compile={compile!r} was given; it is True or False. For another backend than torch's own attach "
            'first and call session.compile("...").'
        )
    if not isinstance(only_if_faster, bool):
        raise OptionError(f"only_if_faster={only_if_faster!r} was given; it is True or False.")
    family = family_of(model, **family_options)
    session = Session(method.fitted(family.one_pass), unwrapped(model), family, encoder)
    try:
        if compile:
            session.compile()
        if only_if_faster:
            session.detach_unless_faster()
    except BaseException:
        session.detach()
        raise
    return session


def compiled(model: Any, backend: str = "inductor", **family_options: Any) -> Compiled:
    """Compile a policy as it is, in place, in the same way as `session.compile()`: the baseline of a compiled session.

    Args:
        model: a supported policy or language model.
        backend: as in `torch.compile`.
        **family_options: as in `Method.attach`.

    Returns:
        a context manager with `remove()`, which restores the policy.

    Raises:
        UnsupportedModelError: the model is not supported, or compiled already.
        SessionError: a session is attached; that has a compile() of its own.
    """
    family = family_of(model, **family_options)
    if session_on(family.decoder) is not None:
        raise SessionError(f"{type(model).__name__} has a session; call compile() of that, or detach it first.")
    model = unwrapped(model)
    check_not_compiled(model, family)
    made = Compiled(family, backend)
    made.install(model)
    return made
