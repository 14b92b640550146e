"""Shorter timings, in tests that do not read them."""

import pytest

from vla_pruner.auditing import share


@pytest.fixture(autouse=True)
def few_repeats(monkeypatch):
    monkeypatch.setattr(share, "WARM_UP", 0)
    monkeypatch.setattr(share, "MOST", 3)
