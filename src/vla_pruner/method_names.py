"""Methods as the command line names them: "vla-pruner", or "vla-pruner:unseen=carry:window=5"."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from vla_pruner import methods
from vla_pruner.errors import BudgetError
from vla_pruner.methods import Method, RandomKeep

FRESH = 8
"""At layer 0 a token that is gone is seen by nothing: this often all of them are looked at again."""

KEEP: tuple[float | int, ...] = (0.25,)
LAYER = (3,)
FATES = ("drop", "freeze", "reuse")
_OF_EVERY_ARM = ("keep", "layer", "pruned")
"""Options of any method, which flags give all of them at once."""


@dataclass(frozen=True)
class Named:
    """A method made from its name.

    Attributes:
        name: with dashes.
        options: of its own, as they were written, without keep, layer and pruned.
        method: the method.
    """

    name: str
    options: tuple[str, ...]
    method: Any

    @classmethod
    def of(cls, method: Method) -> Named:
        """A method that is there already, one of this package or of somebody else."""
        kind = type(method)
        known = kind in known_methods().values()
        fields = [field for field in dataclasses.fields(method) if field.name not in _OF_EVERY_ARM]
        own = [field for field in fields if getattr(method, field.name) != field.default]
        options = tuple(f"{field.name}={getattr(method, field.name)}" for field in own)
        return cls(method_name(kind) if known else kind.__name__, options, method)

    @property
    def title(self) -> str:
        """What tables call it; unique among methods that differ."""
        method = self.method
        # As it was written: 1 is one token, 1.0 all of them.
        budget = [repr(method.keep)] if hasattr(method, "keep") else []
        return " ".join([self.name, *budget, method.pruned, f"K={method.layer}", *self.options])


def methods_of(
    texts: Sequence[str],
    keep: Sequence[float | int] | None = None,
    layers: Sequence[int] = LAYER,
    pruned: Sequence[str] | None = None,
    refresh_every: int | None = None,
) -> tuple[Named, ...]:
    """One method for each name, layer, fate of the other tokens, and keep.

    Args:
        texts: names, each with options of its own where wanted, after colons; what it says of keep, layer and pruned
            itself stands in place of the arguments.
        keep: budgets; None: .25, or what a method that reuses tokens was published with.
        layers: pruning layers.
        pruned: what becomes of the other tokens, of which each method takes what it can do; None: "drop", or the only
            fate that it knows.
        refresh_every: of methods that have it; None: as their options say, and at layer 0 every 8th step.

    Raises:
        BudgetError: there is no such method, it has no such option or value, or it can do none of `pruned`.
    """
    unknown = [word for word in pruned or () if word not in FATES]
    if unknown:
        raise BudgetError(f"--pruned is {', '.join(unknown)}; it is {', '.join(FATES[:-1])} or {FATES[-1]}.")
    found = []
    for text in texts:
        name, *options = text.split(":")
        kind: Any = method_class(name)
        shown, extra = method_name(kind), dict(_option(kind, option) for option in options)
        own = {word: (extra.pop(word),) for word in _OF_EVERY_ARM if word in extra}
        others = tuple(option for option in options if option.partition("=")[0] in extra)
        drops = "drop" in kind().treatments
        for layer in own.get("layer", layers):
            for fate in _fates(shown, kind().treatments, own.get("pruned", pruned)):
                for amount in own.get("keep", keep or (KEEP if drops else (kind().keep,))):
                    made = {"keep": amount, "layer": layer, "pruned": fate, **extra}
                    if hasattr(kind, "refresh_every") and "refresh_every" not in extra:
                        made["refresh_every"] = refresh_every or (FRESH if layer == 0 else None)
                    found.append(Named(shown, others, kind(**made)))
    return tuple(found)


def _fates(name: str, able: tuple[str, ...], asked: Sequence[str] | None) -> tuple[str, ...]:
    if asked is None:
        return able[:1]
    found = tuple(fate for fate in asked if fate in able)
    if not found:
        raise BudgetError(
            f"--pruned is {', '.join(asked)}, but {name} can only {' or '.join(able)} tokens; add that, or leave "
            "--pruned out."
        )
    return found


def _option(kind: type[Method], text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    known = [field.name for field in dataclasses.fields(kind) if field.name != "then"]
    if not equals or name not in known:
        raise BudgetError(
            f"--method has the option {text!r}; {method_name(kind)} takes {', '.join(f'{word}=...' for word in known)} "
            "after its name, separated by colons."
        )
    if value.lower() == "none":
        return name, None
    for read in (int, float):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, value


def method_class(name: str) -> type[Method]:
    """The method of this name, written as its class or with dashes.

    Raises:
        BudgetError: there is none, or it has no `keep`.
    """
    plain = name.replace("-", "").replace("_", "").lower()
    for word, kind in known_methods().items():
        if plain in (word.replace("-", ""), kind.__name__.lower()):
            return kind
    raise BudgetError(f"--method is {name}; it is one of {', '.join(known_methods())}.")


def known_methods() -> dict[str, type[Method]]:
    """Every method that has a budget, by its name with dashes."""
    found: dict[str, type[Method]] = {}
    for name in methods.__all__:
        kind: Any = getattr(methods, name)
        if isinstance(kind, type) and issubclass(kind, Method) and hasattr(kind, "keep"):
            found[method_name(kind)] = kind
    return found


def method_name(kind: type) -> str:
    """A method as the command line calls it: by the file that defines it."""
    return "random" if kind is RandomKeep else kind.__module__.rpartition(".")[2].replace("_", "-")


def attached(method: Method | None, policy: Any, seed: int) -> AbstractContextManager[Any]:
    """A context manager that gives a session, or None for the untouched model.

    A method that draws at random gets `seed` on top of its own, so that no draw repeats from episode to episode.
    """
    if method is None:
        return nullcontext(None)
    if isinstance(method, RandomKeep):
        method = dataclasses.replace(method, seed=(method.seed + seed) % 2**31)
    return method.attach(policy)
