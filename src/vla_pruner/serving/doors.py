"""Admission: API key, TLS, health, metrics, and the port that the server listens on."""

from __future__ import annotations

import asyncio
import hmac
import ssl
from collections.abc import Callable
from http import HTTPStatus

from websockets.asyncio.server import Request, Response, ServerConnection

from vla_pruner.serving.errors import ServingError
from vla_pruner.serving.logs import log
from vla_pruner.serving.metrics import Metrics
from vla_pruner.serving.settings import ServerSettings

HEALTH = ("/healthz", "/health")
METRICS = "/metrics"


class Doors:
    """Looks at each HTTP request before the websocket's handshake.

    Args:
        settings: key and limits.
        metrics: shown to requests; they count refusals.
        robots: the number connected now.

    Attributes:
        open: whether new robots are let in.
        places: robots that may be connected.
    """

    def __init__(self, settings: ServerSettings, metrics: Metrics, robots: Callable[[], int]) -> None:
        self._settings = settings
        self._metrics = metrics
        self._robots = robots
        self.open = False
        self.places = settings.max_robots

    @property
    def full(self) -> str:
        """The answer to a robot that finds no room."""
        return (
            f"{self.places} robots are connected, which is as many as this server takes; try again later, or start it "
            "with a higher --max-robots."
        )

    def answer(self, connection: ServerConnection, request: Request) -> Response | None:
        """Return a response; None lets the handshake go on."""
        path = request.path.partition("?")[0]
        if path in HEALTH:
            if self.open:
                return connection.respond(HTTPStatus.OK, "OK\n")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "stopping\n")
        if not self._has_key(request):
            self._metrics.turned_away("key")
            kind = "a wrong" if request.headers.get_all("Authorization") else "no"
            log.warning("A connection from %s was refused, since it came with %s key.", _peer(connection), kind)
            response = connection.respond(
                HTTPStatus.UNAUTHORIZED, "This server wants the header 'Authorization: Api-Key KEY' with its key.\n"
            )
            response.headers["WWW-Authenticate"] = "Api-Key"
            return response
        if path == METRICS:
            response = connection.respond(HTTPStatus.OK, self._metrics.text())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = "text/plain; version=0.0.4; charset=utf-8"
            return response
        if "upgrade" not in ",".join(request.headers.get_all("Connection")).lower():
            return connection.respond(
                HTTPStatus.NOT_FOUND, f"There are {', '.join((*HEALTH, METRICS))}, and websockets for robots.\n"
            )
        if not self.open:
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, "The server stops.\n")
        if self._robots() >= self.places:
            self._metrics.turned_away("full")
            return connection.respond(HTTPStatus.SERVICE_UNAVAILABLE, self.full + "\n")
        return None

    def _has_key(self, request: Request) -> bool:
        key = self._settings.api_key
        if key is None:
            return True
        given = request.headers.get_all("Authorization")
        # Compared in constant time, so that the time of a refusal gives no hint of the key.
        wanted = f"Api-Key {key}".encode()
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), wanted)


def _peer(connection: ServerConnection) -> str:
    address = connection.remote_address
    return str(address[0]) if isinstance(address, tuple) else "an unknown address"


def tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    """Return the TLS context of the connections; None if no certificate is given.

    Raises:
        ServingError: the files cannot be read, or do not go together.
    """
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ValueError) as error:
        raise ServingError(
            f"--tls-cert is {settings.tls_cert} and --tls-key is {settings.tls_key}, which cannot be used ({error}); "
            "give PEM files that belong together, the key without a password."
        ) from error
    return context


async def check_address(settings: ServerSettings) -> None:
    """Bind host and port and let them go. The socket never listens, so no client can connect.

    Raises:
        ServingError: another program has the port, or the host is none of this machine.
    """
    loop = asyncio.get_running_loop()
    try:
        bound = await loop.create_server(asyncio.Protocol, settings.host, settings.port, start_serving=False)
    except (OSError, UnicodeError) as error:
        raise unbound(settings, error) from error
    bound.close()


def unbound(settings: ServerSettings, error: Exception) -> ServingError:
    """Return the error of an address that cannot be listened on."""
    why = getattr(error, "strerror", None) or error
    return ServingError(
        f"--host {settings.host!r} with --port {settings.port} cannot be listened on ({why}); choose another port, or "
        "0 for a free one, and an address of this machine."
    )
