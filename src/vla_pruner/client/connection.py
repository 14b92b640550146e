"""A robot's end of the connection: one observation out, one result back, and a new connection after a broken one."""

from __future__ import annotations

import logging
import math
import random
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
from websockets.exceptions import ConnectionClosed, InvalidStatus, WebSocketException
from websockets.sync.client import ClientConnection, connect

from vla_pruner.client.codec import pack, unpack
from vla_pruner.client.errors import ClientError, CodecError, ConnectionLost, ServerError
from vla_pruner.strangers import shown

log = logging.getLogger("vla_pruner.client")

TOO_BIG, TRY_AGAIN_LATER = 1009, 1013
"""Close codes of a server that does not read a message of that length, and of one without room at the moment."""

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0
_FINAL = (400, 401, 403, 404)
_PROXIES = ("http", "https")
_SCHEMES = {"ws": "ws", "wss": "wss", "http": "ws", "https": "wss"}


class PolicyClient:
    """One robot's connection to a policy server. A context manager; it connects when it is made.

    If the connection breaks, or the server is full or restarts, `infer` connects anew with growing pauses and sends
    the same observation again. The server then has no memory of the steps before, so pruning by action history warms up
    again: an episode begins. `reconnects` counts how often, the logger "vla_pruner.client" warns, `on_reconnect` is
    called, and `result["server_timing"]["episode_step"]` is 0.

    Several threads may use one client: their calls take turns, and each gets the answer to its own observation. They
    are one robot, with one memory.

    Args:
        url: "ws://host:port", "wss://host:port", or "host:port"; http and https stand for ws and wss.
        api_key: sent as `Authorization: Api-Key ...`.
        ca_file: with "wss", a certificate to trust besides the system's, such as the server's own.
        timeout: seconds that one answer may take.
        patience: seconds of trying to (re)connect before giving up; 0: one try.
        proxy: address of a proxy that leads to the server; None: the client connects directly, whatever proxies the
            environment names for the web.
        on_reconnect: called with this client after each connection but the first, before the observation is sent again.
            An exception from it ends the call of `infer`, for robots that should rather stop.

    Attributes:
        metadata: the server's description of itself at the last connection.
        reconnects: connections made after the first.

    Raises:
        ClientError: an argument is invalid.
        ConnectionLost: the server cannot be reached within `patience`.
        ServerError: it refuses this client: no or a wrong key, or no such path.
        CodecError: the listener there is no policy server.
    """

    def __init__(
        self,
        url: str = "ws://127.0.0.1:8000",
        api_key: str | None = None,
        ca_file: str | Path | None = None,
        timeout: float = 60.0,
        patience: float = 60.0,
        proxy: str | None = None,
        on_reconnect: Callable[[PolicyClient], object] | None = None,
    ) -> None:
        self._url, self._proxy, self._on_reconnect = _address(url), proxy, on_reconnect
        self._headers = {"Authorization": f"Api-Key {_key(api_key)}"} if api_key else None
        self._options = _tls(self._url, ca_file)
        if proxy is not None:
            _check_proxy(proxy)
        if not (timeout > 0 and math.isfinite(timeout)) or not patience >= 0:
            raise ClientError(
                f"timeout={timeout!r} and patience={patience!r} were given; they are seconds, above 0 and 0 or more."
            )
        # One that its own thread may take again: a signal's handler may close the client while it waits for an answer.
        self._turn = threading.RLock()
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
        """Run one control step.

        Args:
            observation: images, state and prompt by the server's keys.

        Returns:
            "actions" (horizon, dim), "policy_timing" and "server_timing".

        Raises:
            ServerError: the server answered with an error, or does not read observations of that length; the next call
                connects anew.
            ConnectionLost: no answer came, also after connecting anew.
            CodecError: the observation cannot be packed, or the answer does not follow the protocol.
        """
        with self._turn:
            # Taken before the answer is waited for: an episode that begins meanwhile is not lost.
            reset, self._reset = self._reset, False
            try:
                return self._infer(pack({**observation, "reset": True} if reset else dict(observation)))
            except BaseException:
                self._reset |= reset
                raise

    def reset(self) -> None:
        """Begin a new episode: the next observation tells the server to forget this robot's steps so far."""
        self._reset = True

    def close(self) -> None:
        """Leave the server, after the call that another thread may be in. The next `infer` would connect anew."""
        with self._turn:
            if self._socket is not None:
                self._socket.close()
                self._socket = None

    def _infer(self, message: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + self._patience
        pause = _FIRST_WAIT
        while True:
            try:
                if self._socket is None:
                    self._connect(deadline)
                return self._ask(message)
            except (ConnectionClosed, OSError, _NoRoom) as error:
                self._drop()
                if isinstance(error, ConnectionClosed) and error.rcvd is not None and error.rcvd.code == TOO_BIG:
                    raise self._too_big(message) from error  # a second try would be no shorter
                if isinstance(error, ConnectionLost) or time.monotonic() >= deadline:
                    raise ConnectionLost(f"{self._url} gave no answer ({_reason(error)}).") from error
                pause = _wait(pause, deadline)
            except BaseException:
                # Also if a signal interrupts the wait: the answer would be taken for that to the next observation.
                self._drop()
                raise

    def _ask(self, message: bytes) -> dict[str, Any]:
        assert self._socket is not None
        most = self.metadata.get("max_message")
        if isinstance(most, int) and len(message) > most:
            raise self._too_big(message)
        self._socket.send(message)
        answer = self._socket.recv(timeout=self._timeout)
        if isinstance(answer, bytes):
            found = unpack(answer)
            actions = found.get("actions") if isinstance(found, dict) else None
            if not isinstance(actions, np.ndarray) or not actions.ndim or not actions.size:
                raise CodecError(f"{self._url} answered without an array of actions; it is no policy server.")
            return found
        # An error is a text, and then the connection closes: its code says whether to try again.
        with suppress(ConnectionClosed, TimeoutError):
            self._socket.recv(timeout=self._timeout)
        code = self._socket.close_code
        self._drop()
        if code == TRY_AGAIN_LATER:
            raise _NoRoom(answer)
        raise ServerError(answer)

    def _too_big(self, message: bytes) -> ServerError:
        most = self.metadata.get("max_message")
        limit = f" up to {most}" if isinstance(most, int) else " fewer"
        return ServerError(
            f"The observation has {len(message)} bytes, and {self._url} reads{limit}; send smaller images, or have the "
            "server read more (vla-pruner serve --max-message)."
        )

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
                    proxy=self._proxy,
                    **self._options,
                )
                # Left in close() or _drop(): a robot's connection is no block of code.
                self._socket = found = connecting.__enter__()
                greeting = found.recv(timeout=self._timeout)
                if isinstance(greeting, str):
                    raise _NoRoom(greeting)
                metadata = unpack(greeting)
                if not isinstance(metadata, dict):
                    raise CodecError(f"{self._url} greets with no map of metadata; it is no policy server.")
                self.metadata = metadata
                self.reconnects += 1
                break
            except InvalidStatus as error:
                status, body = error.response.status_code, (error.response.body or b"").decode("utf-8", "replace")
                if status in _FINAL:
                    raise ServerError(f"{self._url} refused the connection ({status}): {body.strip()}") from error
                last: Exception = error
            except (WebSocketException, EOFError, OSError, _NoRoom) as error:
                last = error
            except BaseException:
                self._drop()
                raise
            self._drop()
            if time.monotonic() >= deadline:
                raise ConnectionLost(
                    f"{self._url} cannot be reached ({_reason(last)}).{_way(self._url, self._proxy)}"
                ) from last
            pause = _wait(pause, deadline)
        if self.reconnects:
            log.warning("Connected anew to %s, which knows nothing of the steps before: an episode begins.", self._url)
            if self._on_reconnect is not None:
                self._on_reconnect(self)

    def _drop(self) -> None:
        if self._socket is not None:
            # The other end is gone: only this side's resources are released. The library's threads read and write on
            # until the socket is shut down; closing alone does not wake them.
            with suppress(OSError):
                self._socket.socket.shutdown(socket.SHUT_RDWR)
            self._socket.close_socket()
            self._socket = None


class _NoRoom(Exception):
    """The server is full at the moment."""


def _wait(pause: float, deadline: float) -> float:
    """Sleep up to `pause` seconds, half of it drawn, so that robots do not come back at once; return the next pause."""
    time.sleep(min(pause * random.uniform(0.5, 1.0), max(0.0, deadline - time.monotonic())))
    return min(2 * pause, _LONGEST_WAIT)


def _reason(error: BaseException) -> str:
    if isinstance(error, InvalidStatus):
        body = (error.response.body or b"").decode("utf-8", "replace").strip()
        return f"{error.response.status_code}: {body}"
    return str(error) or type(error).__name__


def _address(url: str) -> str:
    """Return the address as a websocket's."""
    whole = url if "://" in url else f"ws://{url}"
    scheme = whole.partition("://")[0].lower()
    try:
        parts = urlsplit(whole)
        known = scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:  # an impossible port, or brackets that do not close
        known = False
    if not known or not whole.isascii() or not whole.isprintable() or " " in whole:
        raise ClientError(
            f"The address {shown(url)} is none of a policy server; give host:port or ws://host:port, or "
            "wss://host:port for a server with a certificate."
        )
    return _SCHEMES[scheme] + whole[len(scheme) :]


def _key(api_key: str) -> str:
    if not api_key.isascii() or not api_key.isprintable() or " " in api_key:
        raise ClientError("The API key has blanks, line ends or characters beyond ASCII; no server has such a key.")
    return api_key


def _check_proxy(proxy: str) -> None:
    try:
        parts = urlsplit(proxy)
        known = parts.scheme in _PROXIES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise ClientError("The proxy is none that can be asked; give an address such as http://proxy:3128.")


def _way(url: str, proxy: str | None) -> str:
    """Return a note on the way that was taken, if it may be the wrong one. A proxy's password is not shown."""
    if proxy is not None:
        return f" It was asked through the proxy {_place(proxy)}."
    named = getproxies()
    found = named.get("https" if url.startswith("wss") else "http") or named.get("all")
    if not found:
        return ""
    return (
        f" It was asked directly, and not through the proxy that the environment names ({_place(found)}); if only the "
        "proxy leads to it, give PolicyClient(..., proxy=...)."
    )


def _place(url: str) -> str:
    return shown(url.rpartition("@")[2].rpartition("//")[2])


def _tls(url: str, ca_file: str | Path | None) -> dict[str, Any]:
    if ca_file is None:
        return {}
    import ssl

    if not url.startswith("wss"):
        raise ClientError(f"ca_file={str(ca_file)!r} was given, but {url} has no certificate; its address is wss://...")
    context = ssl.create_default_context()
    try:
        context.load_verify_locations(ca_file)
    except (OSError, ValueError) as error:
        raise ClientError(f"ca_file={str(ca_file)!r} cannot be read as certificates ({error}).") from error
    return {"ssl": context}
