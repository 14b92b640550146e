"""The options of an arm that prunes, as its record carries them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vla_pruner.errors import VLAPrunerError
from vla_pruner.flags import amount
from vla_pruner.json_file import field_of, typed
from vla_pruner.method_names import encoder_title
from vla_pruner.methods import EncoderReuse

PRUNING = ("method", "random")
"""The kinds of arms that prune, and have options."""


@dataclass(frozen=True)
class ArmOptions:
    """The options from which an arm's method can be made again.

    Attributes:
        method: its name, as of `--method`; of the control, "random".
        keep: of all visual tokens, or an int for a number of them.
        pruned: the fate of the others.
        layer: the layer from which on it prunes.
        own: further options of the method, each as it was written: "window=5".
        encoder_keep: as `keep`, of the patches that the vision encoder encodes; None: it is left alone.
        encoder_refresh: control steps of which one encodes all patches; None: as `EncoderReuse` has it.
    """

    method: str
    keep: float | int
    pruned: str
    layer: int
    own: tuple[str, ...] = ()
    encoder_keep: float | int | None = None
    encoder_refresh: int | None = None

    @property
    def encoder(self) -> EncoderReuse | None:
        """The patches of the vision encoder."""
        if self.encoder_keep is None:
            return None
        refresh = {} if self.encoder_refresh is None else {"refresh_every": self.encoder_refresh}
        return EncoderReuse(keep=self.encoder_keep, **refresh)

    @property
    def title(self) -> str:
        """The arm's name in tables, but for the warm-up of a control, which its title tells as "after 3"."""
        words = (self.method, repr(self.keep), self.pruned, f"K={self.layer}", *self.own)
        return " ".join(words) + encoder_title(self.encoder)

    @property
    def setting(self) -> str:
        """The budgets and the fate, without the method: "0.25 drop"."""
        return f"{self.keep!r} {self.pruned}{encoder_title(self.encoder)}"

    @classmethod
    def of(cls, arm: Mapping[str, Any]) -> ArmOptions:
        """Return the options of an arm in a record; of a record from before arms carried them, from its title.

        Raises:
            ValueError: they are missing, odd, or another arm's; the message says which.
        """
        title, content = field_of(arm, "title", str), arm.get("options")
        if content is None:
            return cls._from_title(title)
        found = cls(
            field_of(content, "method", str, "options"),
            _number(field_of(content, "keep", Any), "keep"),
            field_of(content, "pruned", str),
            field_of(content, "layer", int),
            typed(tuple[str, ...], content.get("own", ()), "own"),
            None if content.get("encoder_keep") is None else _number(content["encoder_keep"], "encoder_keep"),
            typed(int | None, content.get("encoder_refresh"), "encoder_refresh"),
        )
        if found._checked().title != _plain(title):
            raise ValueError(f"the arm {title!r} has the options of {found.title!r}")
        return found

    @classmethod
    def _from_title(cls, title: str) -> ArmOptions:
        """Read "fastv 0.25 drop K=3 warmup_steps=5 encoder=0.5 refresh=4"."""
        try:
            method, keep, pruned, layer, *words = _plain(title).split(" ")
            place = next((place for place, word in enumerate(words) if word.startswith("encoder=")), len(words))
            encoder, refresh = None, None
            if place < len(words):
                encoder, *after = (word.partition("=")[2] for word in words[place:])
                refresh = int(after[0]) if after else EncoderReuse.refresh_every
            return cls(
                method,
                amount(keep),
                pruned,
                int(layer.removeprefix("K=")),
                tuple(words[:place]),
                None if encoder is None else amount(encoder),
                refresh,
            )._checked()
        except ValueError as error:
            raise ValueError(f"the arm {title!r} has no options, and its title does not tell them") from error

    def _checked(self) -> ArmOptions:
        try:
            _ = self.encoder
        except VLAPrunerError as error:
            raise ValueError(f"encoder_keep or encoder_refresh is out of its range: {error}") from error
        return self


def is_of_older_default(arm: Mapping[str, Any]) -> bool:
    """Return True if an arm in a record is the paper's rule by what was the default of `VLAPruner` before there was
    "recommended": its title tells no preset.
    """
    method = str(arm.get("method"))
    return method.startswith("VLAPruner(") and "preset='paper'" in method and " preset=" not in str(arm.get("title"))


def _plain(title: str) -> str:
    return title.replace(" after ", " warmup_steps=")


def _number(value: Any, name: str) -> float | int:
    return value if type(value) is int else typed(float, value, name)
