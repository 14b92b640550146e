"""Settings of the calibration's tests."""

import pytest


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Watching how busy the machine is takes half a second a run."""
    monkeypatch.setattr("vla_pruner.conditions.busy_cores", lambda: None)
    monkeypatch.setattr("vla_pruner.calibration.command.busy_cores", lambda: None)
