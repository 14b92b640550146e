"""A robot's end of the connection: one observation out, one result back, and a new connection where one broke."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from vla_pruner.client.codec import pack, unpack
from vla_pruner.client.errors import ConnectionLost, ServerError

TRY_AGAIN_LATER = 1013
"""Close code of a server that has no room at the moment."""

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_FINAL = (400, 401, 403, 404)


class PolicyClient:
    """One robot's connection to a policy server. A context manager; it connects when it is made.

    Where the connection breaks, or the server is full or restarts, `infer` connects anew with growing pauses and sends
    the same observation again. The server then knows nothing of the steps before, so pruning by action history warms up
    again; `reconnects` counts how often.

    Args:
        url: "ws://host:port", "wss://host:port", or "host:port".
        api_key: sent as `Authorization: Api-Key ...`.
        ca_file: with "wss", a certificate to trust besides the system's, such as the server's own.
        timeout: seconds that one answer may take.
        patience: seconds of trying to (re)connect before giving up; 0: one try.

    Attributes:
        metadata: what the server said of itself when it was connected to last.
        reconnects: connections made after the first.

    Raises:
        ConnectionLost: the server cannot be reached within `patience`.
        ServerError: it refuses this client: no or a wrong key, or no such path.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        api_key: str | None = None,
        ca_file: str | Path | None = None,
        timeout: float = 60.0,
        patience: float = 60.0,
    ) -> None:
        self._url = url if "://" in url else f"ws://{url}"
        self._headers = {"Authorization": f"Api-Key {api_key}"} if api_key else None
        self._options = _tls(self._url, ca_file)
        self._timeout = timeout
        self._patience = patience
        self._socket: ClientConnection | None = None
        self._reset = False
        self.metadata: dict[str, Any] = {}
        self.reconnects = -1
        self._connect(time.monotonic() + patience)

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """One control step.

        Args:
            observation: images, state and prompt by the server's keys.

        Returns:
            "actions" (horizon, dim), "policy_timing" and "server_timing".

        Raises:
            ServerError: the server answered with an error; the next call connects anew.
            ConnectionLost: no answer came, also after connecting anew.
            CodecError: the observation cannot be packed, or the answer is none of the protocol.
        """
        sent = {**observation, "reset": True} if self._reset else dict(observation)
        message = pack(sent)
        deadline = time.monotonic() + self._patience
        pause = _FIRST_WAIT
        while True:
            try:
                if self._socket is None:
                    self._connect(deadline)
                answer = self._ask(message)
            except (ConnectionClosed, OSError, _NoRoom) as error:
                self._drop()
                if isinstance(error, ConnectionLost) or time.monotonic() >= deadline:
                    raise ConnectionLost(f"{self._url} gave no answer ({_reason(error)}).") from error
                pause = _wait(pause, deadline)
                continue
            except BaseException:
                # Also where a signal interrupts the wait: the answer would be taken for that to the next observation.
                self._drop()
                raise
            self._reset = False
            return answer

    def reset(self) -> None:
        """Begin a new episode: the next observation tells the server to forget this robot's steps so far."""
        self._reset = True

    def close(self) -> None:
        """Leave the server. The next `infer` would connect anew."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _ask(self, message: bytes) -> dict[str, Any]:
        assert self._socket is not None
        self._socket.send(message)
        answer = self._socket.recv(timeout=self._timeout)
        if isinstance(answer, bytes):
            return unpack(answer)
        # An error is a text, and then the connection closes: its code says whether to try again.
        with suppress(ConnectionClosed, TimeoutError):
            self._socket.recv(timeout=self._timeout)
        code = self._socket.close_code
        self._drop()
        if code == TRY_AGAIN_LATER:
            raise _NoRoom(answer)
        raise ServerError(answer)

    def _connect(self, deadline: float) -> None:
        pause = _FIRST_WAIT
        while True:
            try:
                connecting = connect(
                    self._url,
                    additional_headers=self._headers,
                    compression=None,
                    max_size=None,
                    open_timeout=self._timeout,
                    **self._options,
                )
                # Left in close() or _drop(): a robot's connection is no block of code.
                self._socket = found = connecting.__enter__()
                greeting = found.recv(timeout=self._timeout)
                if isinstance(greeting, str):
                    raise _NoRoom(greeting)
                self.metadata = unpack(greeting)
                self.reconnects += 1
                return
            except InvalidStatus as error:
                status, body = error.response.status_code, (error.response.body or b"").decode("utf-8", "replace")
                if status in _FINAL:
                    raise ServerError(f"{self._url} refused the connection ({status}): {body.strip()}") from error
                last: Exception = error
            except (InvalidHandshake, ConnectionClosed, OSError, _NoRoom) as error:
                last = error
            except BaseException:
                self._drop()
                raise
            self._drop()
            if time.monotonic() >= deadline:
                raise ConnectionLost(f"{self._url} cannot be reached ({_reason(last)}).") from last
            pause = _wait(pause, deadline)

    def _drop(self) -> None:
        if self._socket is not None:
            # Nobody is there to say goodbye to: only what this side holds is let go of. The library's threads read and
            # write on until the socket is shut down; closing alone does not wake them.
            with suppress(OSError):
                self._socket.socket.shutdown(socket.SHUT_RDWR)
            self._socket.close_socket()
            self._socket = None


class _NoRoom(Exception):
    """The server is full at the moment."""


def _wait(pause: float, deadline: float) -> float:
    """Sleep up to `pause` seconds, half of it drawn, so that robots do not come back as one; returns the next pause."""
    time.sleep(min(pause * random.uniform(0.5, 1.0), max(0.0, deadline - time.monotonic())))
    return min(2 * pause, _LONGEST_WAIT)


def _reason(error: BaseException) -> str:
    if isinstance(error, InvalidStatus):
        body = (error.response.body or b"").decode("utf-8", "replace").strip()
        return f"{error.response.status_code}: {body}"
    return str(error) or type(error).__name__


def _tls(url: str, ca_file: str | Path | None) -> dict[str, Any]:
    if ca_file is None:
        return {}
    import ssl

    context = ssl.create_default_context()
    context.load_verify_locations(ca_file)
    return {"ssl": context}
