"""Methods by their names on the command line: "vla-pruner", "vla-pruner:preset=paper:window=5", or a method of the
user's own as "my_module:MyMethod:window=5".

The first word is a name, of this package or of another distribution's entry point in the group `vla_pruner.methods`. If
the text after its colon has no "=", both together are a module and a class in it. Names of this package always mean its
own methods.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from vla_pruner import methods, plugins
from vla_pruner.errors import OptionError, PluginError, VLAPrunerError
from vla_pruner.fate import Fate
from vla_pruner.methods import EncoderReuse, Method, RandomKeep, Scored
from vla_pruner.methods.presets import Published, PublishedWord

FRESH = 8
"""The default of `refresh_every` at layer 0, where a dropped token is never seen again without a refresh."""

KEEP: tuple[float | int, ...] = (0.25,)
LAYER = (3,)
FATES = tuple(Fate)
_OF_EVERY_ARM = ("keep", "layer", "pruned")
"""Options of any method, which flags give all of them at once."""


@dataclass(frozen=True)
class Named:
    """A method made from its name.

    Attributes:
        name: with dashes; of a method that is named by its module and class, these: "my_module:MyMethod".
        options: its own ones as written, without keep, layer and pruned.
        method: the method.
    """

    name: str
    options: tuple[str, ...]
    method: Any

    @classmethod
    def of(cls, method: Method) -> Named:
        """Return the `Named` of a method that exists already, of this package or of another."""
        if isinstance(method.layer, Published):
            # Tables name the layer before there is a model that could choose it.
            method = dataclasses.replace(method, layer=int(method.layer))
        kind = type(method)
        known = kind in known_methods().values()
        fields = [field for field in dataclasses.fields(method) if field.name not in _OF_EVERY_ARM]
        values = {field.name: getattr(method, field.name) for field in fields}
        own = [field.name for field in fields if values[field.name] != field.default]
        written = [f"{name}={values[name]}" for name in own if not isinstance(values[name], PublishedWord)]
        return cls(method_name(kind) if known else kind.__name__, _with_told(written, method), method)

    @property
    def title(self) -> str:
        """The name in tables; unique among methods that differ."""
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
    """Return one method for each name, layer, fate of the other tokens, and keep.

    Args:
        texts: names, or modules and classes, each with options of its own if wanted, after colons; its own keep, layer
            and pruned replace the arguments.
        keep: budgets; None: .25, or the published one of a method that reuses tokens.
        layers: pruning layers.
        pruned: the fates of the other tokens, of which each method takes those that it supports; None: as the method
            has it by default.
        refresh_every: of methods that have it; None: as their options say, and at layer 0 every 8th step.

    Raises:
        OptionError: there is no such method, it has no such option or value, or it can do none of `pruned`.
        PluginError: a method from outside of this package cannot be imported, or is no method that names can make.
    """
    unknown = [word for word in pruned or () if word not in FATES]
    if unknown:
        raise OptionError(f"--pruned is {', '.join(unknown)}; it is {', '.join(FATES[:-1])} or {FATES[-1]}.")
    found = []
    for text in texts:
        shown, found_kind, options = _read(text)
        kind: Any = found_kind
        extra: dict[str, Any] = {}
        for option in options:
            word, value = _option(shown, kind, option)
            if word in extra:
                raise OptionError(f"--method is {text}, which has the option {word} twice; give it once.")
            extra[word] = value
        own = {word: (extra.pop(word),) for word in _OF_EVERY_ARM if word in extra}
        others = tuple(option for option in options if option.partition("=")[0] in extra)
        drops = Fate.DROP in kind().treatments
        for layer in own.get("layer", layers):
            for fate in _fates(shown, kind().treatments, own.get("pruned", pruned)):
                for amount in own.get("keep", keep or (KEEP if drops else (kind().keep,))):
                    made = {"keep": amount, "layer": layer, **({} if fate is None else {"pruned": fate}), **extra}
                    if hasattr(kind, "refresh_every") and "refresh_every" not in extra:
                        made["refresh_every"] = refresh_every or (FRESH if layer == 0 else None)
                    method = _made(shown, kind, made)
                    found.append(Named(shown, _with_told(others, method), method))
    return tuple(found)


def told_of_fates(arms: Iterable[tuple[str, str]]) -> str:
    """Return a sentence on methods that were left to their own defaults for the tokens that are not kept, so that a
    comparison of them is one of fates, too; empty if all have the same fates.

    Args:
        arms: method and fate of every arm that prunes, controls apart.
    """
    of_method: dict[str, set[str]] = {}
    for method, fate in arms:
        of_method.setdefault(method, set()).add(fate)
    if len({frozenset(fates) for fates in of_method.values()}) < 2:
        return ""
    told = ", ".join(f"{method} {' and '.join(sorted(fates))}" for method, fates in of_method.items())
    return f"These methods differ in the fate of the other tokens, too ({told}); --pruned chooses it for all."


def _with_told(written: Sequence[str], method: Method) -> tuple[str, ...]:
    return (*written, *(option for option in method.told if option not in written))


def _made(shown: str, kind: type[Method], options: dict[str, Any]) -> Method:
    try:
        return kind(**options)
    except VLAPrunerError:
        raise
    except Exception as error:
        if not plugins.is_foreign(kind):
            raise
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise OptionError(f"{shown} refuses {told}: {type(error).__name__}: {error}") from error


def _read(text: str) -> tuple[str, type[Method], list[str]]:
    """Return the name for tables, the method, and its options as they were written."""
    name, *options = (word.strip() for word in text.split(":"))
    if not options or "=" in options[0]:
        shown, kind = _by_name(name)
        return shown, kind, options
    path, own = f"{name}:{options[0]}", _own(name)
    if own is not None:
        raise OptionError(
            f"--method has the option {options[0]!r}; {method_name(own)} takes {_options_of(own)} after its name, "
            f"separated by colons. (A module of your own needs another name than {name}, which is a method's.)"
        )
    try:
        kind = plugins.class_at(path)
    except PluginError as error:
        raise PluginError(
            f"--method is {text}, which reads as a module and a class, MODULE:CLASS:option=value: {error} Methods that "
            f"have a name: {', '.join(_names())}."
        ) from error
    return path, _checked(path, kind), options[1:]


def _by_name(name: str) -> tuple[str, type[Method]]:
    own = _own(name)
    if own is not None:
        return method_name(own), own
    named = [one for one in plugins.plugins(plugins.METHODS) if _plain(one.name) == _plain(name)]
    if not named:
        raise OptionError(
            f"--method is {name}; it is one of {', '.join(_names())}, or a method of your own as MODULE:CLASS."
        )
    if len(named) > 1:
        raise PluginError(
            f"--method is {name}, which is {' and '.join(map(str, named))}; uninstall one, or give the module and "
            "class of the one that you mean."
        )
    shown = named[0].name.replace("_", "-")
    return shown, _checked(str(named[0]), named[0].load())


def _checked(what: str, kind: Any) -> type[Method]:
    """Return a class from outside if it is a method that a name and options can make.

    Raises:
        PluginError: it is not.
    """
    if not issubclass(kind, Method):
        raise PluginError(f"{what} is no method: it does not extend vla_pruner.Method.")
    known = {field.name for field in dataclasses.fields(kind) if field.init}
    if "keep" not in known:
        raise PluginError(
            f"{what} has no option `keep`: make it a frozen dataclass with a field of this name, such as "
            "`keep: float = 0.25`."
        )
    undefined = [name for name in ("budget", "select") if getattr(kind, name) is getattr(Method, name)]
    if undefined:
        raise PluginError(
            f"{what} does not define {' and '.join(undefined)}, which say how many tokens stay and which."
        )
    try:
        treatments: Any = kind().treatments
    except Exception as error:
        raise PluginError(
            f"{what} cannot be made without options ({type(error).__name__}: {error}); give every field a default."
        ) from error
    if not treatments or not set(treatments) <= set(FATES):
        raise PluginError(f"{what} has the treatments {treatments!r}; they are some of {', '.join(FATES)}.")
    return kind


def _fates(name: str, able: tuple[str, ...], asked: Sequence[str] | None) -> tuple[str | None, ...]:
    if asked is None:
        return (None,)
    found = tuple(fate for fate in asked if fate in able)
    if not found:
        raise OptionError(
            f"--pruned is {', '.join(asked)}, but {name} can only {' or '.join(able)} tokens; add that, or leave "
            "--pruned out."
        )
    return found


def _options_of(kind: type[Method]) -> str:
    return ", ".join(f"{field.name}=..." for field in _fields(kind))


def _fields(kind: type[Method]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(kind) if field.init and field.name != "then"]


def _option(shown: str, kind: type[Method], text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    known = {field.name: field for field in _fields(kind)}
    if not equals or name not in known:
        raise OptionError(
            f"--method has the option {text!r}; {shown} takes {_options_of(kind)} after its name, separated by colons."
        )
    if value.lower() == "none":
        return name, None
    if isinstance(known[name].default, bool):
        if value.lower() not in ("true", "false"):
            raise OptionError(f"--method has the option {text!r}; {name} of {shown} is true or false.")
        return name, value.lower() == "true"
    for read in (int, float):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, value


def _own(name: str) -> type[Method] | None:
    """Return the method of this package that has this name."""
    for word, kind in known_methods().items():
        if _plain(name) in (_plain(word), kind.__name__.lower()):
            return kind
    return None


def _plain(name: str) -> str:
    return name.replace("-", "").replace("_", "").lower()


def _names() -> list[str]:
    """Return the names of the methods of this package and of other distributions."""
    others = [one.name.replace("_", "-") for one in plugins.plugins(plugins.METHODS) if _own(one.name) is None]
    return list(dict.fromkeys([*known_methods(), *others]))


def known_methods() -> dict[str, type[Method]]:
    """Return every method of this package that has a budget, by its name with dashes; `Scored` is a base of methods."""
    found: dict[str, type[Method]] = {}
    for name in methods.__all__:
        kind: Any = getattr(methods, name)
        if isinstance(kind, type) and issubclass(kind, Method) and hasattr(kind, "keep") and kind is not Scored:
            found[method_name(kind)] = kind
    return dict(sorted(found.items()))


def method_name(kind: type) -> str:
    """Return a method's name on the command line: that of the file that defines it."""
    return "random" if kind is RandomKeep else kind.__module__.rpartition(".")[2].replace("_", "-")


def encoders_of(
    keep: Sequence[float | int] | None, refresh_every: int | None = None
) -> tuple[EncoderReuse | None, ...]:
    """Return one choice of the vision encoder's patches for each budget; None encodes all of them.

    Args:
        keep: budgets, as of `EncoderReuse`; 1.0, and None in place of all, is an encoder that is left alone.
        refresh_every: control steps of which one encodes everything; None: as published by `EncoderReuse`.

    Raises:
        OptionError: a budget or `refresh_every` is out of its range, or it is given without a budget.
    """
    if keep is None:
        if refresh_every is not None:
            raise OptionError("--encoder-refresh is for --encoder-keep; give that too, or leave it out.")
        return (None,)
    refresh = {} if refresh_every is None else {"refresh_every": refresh_every}
    made = [EncoderReuse(keep=amount, **refresh) for amount in keep]
    return tuple(None if one.keep == 1.0 and isinstance(one.keep, float) else one for one in made)


def with_encoders(
    made: Sequence[Named], encoders: Sequence[EncoderReuse | None]
) -> Iterator[tuple[Named, EncoderReuse | None]]:
    """Yield every method with every choice of patches. If patches are reused at all, a method that keeps all tokens is
    left out where the encoder is left alone: it would be the unpruned policy once more.
    """
    for one in made:
        for encoder in encoders:
            keep = getattr(one.method, "keep", None)
            if not any(encoders) or encoder is not None or not isinstance(keep, float) or keep < 1:
                yield one, encoder


def encoder_title(encoder: EncoderReuse | None) -> str:
    """Return what the title of an arm's method is followed by in tables; empty if the encoder is left alone."""
    if encoder is None:
        return ""
    refresh = "" if encoder.refresh_every == EncoderReuse.refresh_every else f" refresh={encoder.refresh_every}"
    return f" encoder={encoder.keep!r}{refresh}"


def was_pruned(session: Any) -> bool:
    """Return True if visual tokens were pruned in a session's last control step, or patches of the vision encoder were
    reused. None is no session.
    """
    return session is not None and (session.kept is not None or any(ids is not None for ids in session.encoded))


def attached(
    method: Method | None, policy: Any, seed: int, encoder: EncoderReuse | None = None
) -> AbstractContextManager[Any]:
    """Return a context manager that gives a session, or None for the untouched model.

    A method that draws at random gets `seed` on top of its own, so that no draw repeats from episode to episode.
    """
    if method is None:
        return nullcontext(None)
    if isinstance(method, RandomKeep):
        method = dataclasses.replace(method, seed=(method.seed + seed) % 2**31)
    return method.attach(policy, encoder=encoder)
