"""The errors between a robot and its policy server."""

from __future__ import annotations

from vla_pruner.errors import VLAPrunerError


class CodecError(VLAPrunerError, ValueError):
    """A message cannot be packed, or is not one of the protocol."""


class ClientError(VLAPrunerError, ValueError):
    """An address, a key or another setting of a client is invalid; no server was contacted yet."""


class ServerError(VLAPrunerError, RuntimeError):
    """The server answered with an error: it got the observation, and trying again would not help."""


class ConnectionLost(VLAPrunerError, ConnectionError):
    """The server could not be reached, or the connection broke and could not be made again in time."""
