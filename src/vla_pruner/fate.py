"""The fate, from the pruning layer on, of the visual tokens that are not kept."""

from __future__ import annotations

from enum import StrEnum

from vla_pruner.errors import OptionError


class Fate(StrEnum):
    """Options and records hold a fate by its word, such as `pruned="freeze"`; code reads the fate's properties.

    DROP: the tokens are gone.
    FREEZE: they stay readable, with keys and values of the hidden state with which they entered the pruning layer.
    REUSE: they stay readable, with the keys and values that they had in the last control step.
    """

    DROP = "drop"
    FREEZE = "freeze"
    REUSE = "reuse"

    @classmethod
    def of(cls, word: str) -> Fate:
        """Return the fate of this word.

        Raises:
            OptionError: there is no such fate.
        """
        found = _BY_WORD.get(word) if isinstance(word, str) else None
        if found is None:
            words = ", ".join(map(repr, _BY_WORD))
            raise OptionError(f"pruned={word!r} was given; what becomes of tokens is one of {words}.")
        return found

    def __repr__(self) -> str:
        return repr(self.value)

    @property
    def readable(self) -> bool:
        """True if later layers can attend to the tokens."""
        return self is not Fate.DROP

    @property
    def projects(self) -> bool:
        """True if every later layer computes the tokens' keys and values."""
        return self is Fate.FREEZE

    @property
    def needs_last_step(self) -> bool:
        """True if the keys and values of the last control step must be held for each robot."""
        return self is Fate.REUSE

    @property
    def gerund(self) -> str:
        """The word in texts, such as "dropping"."""
        return {Fate.DROP: "dropping", Fate.FREEZE: "freezing", Fate.REUSE: "reusing"}[self]


_BY_WORD: dict[str, Fate] = {fate.value: fate for fate in Fate}  # a plain dict, which compilers can trace

WITHIN_A_STEP = (Fate.DROP, Fate.FREEZE)
"""The fates that need nothing but the control step itself."""
