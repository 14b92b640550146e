"""Instructions to token ids: one word, one token."""

from __future__ import annotations

import re
from collections.abc import Iterable

from vla_pruner.errors import ObservationError

BOS, PAD = 0, 1
_FIRST_WORD = 2


def split_words(instruction: str) -> list[str]:
    """Lower-case words of an instruction, punctuation dropped."""
    return re.findall(r"[a-z0-9]+", instruction.lower())


def vocabulary(instructions: Iterable[str]) -> tuple[str, ...]:
    """Return all words of the instructions, sorted."""
    return tuple(sorted({word for instruction in instructions for word in split_words(instruction)}))


def encode(instruction: str, words: tuple[str, ...], length: int) -> list[int]:
    """Return the token ids of an instruction, padded on the left to `length`; untrained words raise a clear error."""
    ids = {word: number for number, word in enumerate(words, _FIRST_WORD)}
    found = split_words(instruction)
    unknown = [word for word in found if word not in ids]
    if unknown or not found:
        what = f"words it was never trained on: {', '.join(unknown)}" if unknown else "no words"
        raise ObservationError(f"The instruction {instruction!r} has {what}. The policy knows: {', '.join(words)}.")
    if len(found) > length:
        raise ObservationError(
            f"The instruction {instruction!r} has {len(found)} words; the policy takes up to {length}."
        )
    return [PAD] * (length - len(found)) + [ids[word] for word in found]
