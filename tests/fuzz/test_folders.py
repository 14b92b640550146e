"""Spoilt checkpoint folders, a few of them; `python -m tests.fuzz --folders 500` tries many."""

from __future__ import annotations

import pytest

from tests.fuzz import folders

pytestmark = pytest.mark.fuzz


def test_spoilt_folders_are_refused_or_act_finitely():
    assert folders.run(40) == []


def test_a_raw_exception_would_be_found(monkeypatch):
    def load(*_, **__):
        raise KeyError("raw")

    monkeypatch.setattr(folders.vp, "load_policy", load)
    assert any("KeyError: 'raw'" in fault for fault in folders.run(5))
