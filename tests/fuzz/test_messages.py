"""Spoilt messages, some hundred of them; `python -m tests.fuzz --messages 20000` sends many."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fuzz import messages

pytestmark = pytest.mark.fuzz


def test_spoilt_messages_are_refused_or_answered() -> None:
    assert messages.run(800) == []


@pytest.mark.parametrize("place", ["unpack", "Engine.run"])
def test_a_raw_exception_would_be_found(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the same messages of a seed each time."""
    whole = messages.unpack if place == "unpack" else messages.Engine.run
    calls = 0

    def broken(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls % 40 == 0:
            raise ZeroDivisionError("of the test")
        return whole(*arguments)

    monkeypatch.setattr(f"tests.fuzz.messages.{place}", broken)
    first = messages.run(200, seed=1)
    calls = 0
    assert messages.run(200, seed=1) == first
    assert any("ZeroDivisionError: of the test" in fault for fault in first)
