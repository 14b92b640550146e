"""Errors of the server."""

from __future__ import annotations

from vla_pruner.errors import VLAPrunerError


class ServingError(VLAPrunerError):
    """A policy cannot be served as asked; the message is one sentence and the fix."""


class SharedNoiseError(ServingError):
    """A policy draws at random in a pass that several robots share."""


class Overloaded(VLAPrunerError):
    """More control steps wait than the server allows; the robot may try again later."""
