"""The one error of calibration."""

from __future__ import annotations

from vla_pruner.errors import VLAPrunerError


class CalibrationError(VLAPrunerError, ValueError):
    """What was recorded cannot be read, does not fit the policy, or says nothing; the message has the fix."""
