"""The models with a session, and a way to end one whose handle is gone."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

from torch import nn

from vla_pruner.attach.compiled import compiled_on
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.replacements import undo
from vla_pruner.wording import a_type

if TYPE_CHECKING:
    from vla_pruner.attach.session import Session

# A session lives as long as its hooks do, on the model: this reference to it must not hold the model.
_sessions: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Session]] = weakref.WeakKeyDictionary()


def session_on(decoder: nn.Module) -> Session | None:
    """Return the session that is attached to this decoder."""
    found = _sessions.get(decoder)
    return None if found is None else found()


def enter(decoder: nn.Module, session: Session) -> None:
    """Note that `session` is attached to `decoder`."""
    _sessions[decoder] = weakref.ref(session)


def leave(decoder: nn.Module) -> None:
    """Note that no session is attached to `decoder`."""
    _sessions.pop(decoder, None)


def check_free(decoder: nn.Module, model: Any) -> None:
    """Raise SessionError if a session is attached to `decoder`, which is `model`'s."""
    session = session_on(decoder)
    if session is not None:
        raise SessionError(
            f"{type(model).__name__} has a session already ({type(session.method).__name__}); detach that one first: "
            "session.detach(), or vla_pruner.detach(model) where the session is no longer at hand."
        )


def detach(model: Any) -> bool:
    """Detach any session from a model, for a session whose handle is lost: it lives on the model, which stays pruned
    until it is detached. Compiled calls of `vla_pruner.compiled` are removed, too.

    Args:
        model: the object that the method was attached to, one that holds it (a policy's wrapper), or a part of it that
            has the decoder in it.

    Returns:
        True if there was anything to remove.

    Raises:
        UnsupportedModelError: it is no module, and no policy around one.
    """
    module = model if isinstance(model, nn.Module) else getattr(model, "module", None)
    if not isinstance(module, nn.Module):
        raise UnsupportedModelError(
            f"detach was given {a_type(model)}; give the policy or model that a method was attached to."
        )
    parts = list(module.modules())
    steps = [session.detach for session in map(session_on, parts) if session is not None]
    steps += [compiled.remove for compiled in map(compiled_on, parts) if compiled is not None]
    undo(*steps)
    return bool(steps)
