"""The one error of calibration."""

from __future__ import annotations

from vla_pruner.errors import VLAPrunerError


class CalibrationError(VLAPrunerError, ValueError):
    """The recordings cannot be read, do not fit the policy, or allow no conclusion; the message has the fix."""
