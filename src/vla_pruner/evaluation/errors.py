"""The one error of the evaluation."""

from __future__ import annotations

from vla_pruner.errors import VLAPrunerError


class EvaluationError(VLAPrunerError):
    """An evaluation cannot run, continue, merge or be written as asked; the message is one sentence and the fix."""
