"""Action chunks, one action at a time."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, Protocol


class InfersActions(Protocol):
    """The interface that a broker needs: a `PolicyClient`, openpi's client, or any object of this shape."""

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]: ...

    def reset(self) -> None: ...


class ActionChunkBroker:
    """Carries out the first `horizon` actions of each chunk before it asks for another. Threads take
    turns.

    Args:
        policy: the source of the chunks.
        horizon: actions of a chunk that are carried out; None: all of them.

    Raises:
        ValueError: the horizon is not 1 or more.
    """

    def __init__(self, policy: InfersActions, horizon: int | None = None) -> None:
        if horizon is not None and horizon < 1:
            raise ValueError(f"horizon={horizon} was given; it is a number of actions, 1 or more.")
        self._policy = policy
        self._horizon = horizon
        self._result: dict[str, Any] | None = None
        self._next = 0
        self._turn = threading.RLock()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Return the policy's last result with one action (dim,) as "actions"; the observation is looked at only when a
        new chunk is needed.

        Raises:
            ValueError: the horizon is longer than the policy's chunks.
        """
        with self._turn:
            if self._result is None:
                self._result, self._next = dict(self._policy.infer(observation)), 0
            chunk = self._result["actions"]
            horizon = len(chunk) if self._horizon is None else self._horizon
            if horizon > len(chunk):
                raise ValueError(f"horizon={horizon} was given, but the policy's chunks have {len(chunk)} actions.")
            result = {**self._result, "actions": chunk[self._next]}
            self._next += 1
            if self._next >= horizon:
                self._result = None
            return result

    def reset(self) -> None:
        """Begin a new episode: the rest of the chunk is dropped, and the policy is reset."""
        with self._turn:
            self._result = None
            self._policy.reset()
