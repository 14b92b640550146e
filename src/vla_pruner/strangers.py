"""What strangers send, put into messages and logs: short whatever its size, and without effect on a terminal."""

from __future__ import annotations

import re
import reprlib
from dataclasses import dataclass
from typing import Any

import numpy as np

# Control characters of both blocks, what breaks lines or turns their direction around, and halves of surrogate pairs.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, repr=False)
class Unread:
    """A value of a message that the protocol has no use for, but that does no harm under a key that nobody needs: an
    array of text, times or complex numbers, a msgpack extension, or a map whose keys are not text. Its content is not
    looked at.

    Attributes:
        what: what it is.
    """

    what: str

    def __repr__(self) -> str:
        return self.what


def shown(value: Any) -> str:
    """A value in at most 80 characters, without writing out all of it first."""
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def one_line(text: str) -> str:
    """The text with every control character as its escape, so that it is one line of a log and no command to a
    terminal.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


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
