"""Untrusted values in messages and logs: short whatever their size."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, repr=False)
class Unread:
    """A value of a message that the protocol does not use, and that is harmless under an unused key: an array of text,
    times or complex numbers, a msgpack extension, or a map whose keys are not text. Its content is not looked at.

    Attributes:
        what: its kind, in words.
    """

    what: str

    def __repr__(self) -> str:
        return self.what


def shown(value: Any) -> str:
    """Return a value in at most 80 characters, without writing out all of it first."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


class _Short(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxstring = self.maxother = self.maxlong = 80

    def repr_bytes(self, value: bytes, level: int) -> str:
        return repr(value[:80])

    def repr_ndarray(self, value: np.ndarray, level: int) -> str:
        return f"an array of shape {value.shape} and type {value.dtype}"


_SHORT = _Short()
