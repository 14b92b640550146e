"""Flags that several subcommands share, and argparse types for them (text in, value out)."""

from __future__ import annotations

import argparse
import shutil
import textwrap
from collections.abc import Callable
from typing import Any

from vla_pruner.errors import OptionError
from vla_pruner.statistics import INTERVALS, NEWCOMBE

DTYPES = ("float32", "bfloat16", "float16")
"""Types of weights that commands take, by torch's names."""
_FLAGS = {"methods": "method", "suites": "suite", "source": "from", "cameras": "camera"}


class Help(argparse.HelpFormatter):
    """Help that fits the terminal. Texts are filled to its width; a blank line in a text begins a new line.

    Lines break only between words: argparse also breaks at hyphens, which would split flags and names of methods.
    """

    def __init__(self, prog: str, **options: Any) -> None:
        options.setdefault("width", min(shutil.get_terminal_size().columns, 120) - 2)
        super().__init__(prog, **options)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return _filled(text, width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n".join(indent + line for line in _filled(text, width - len(indent)))


def _filled(text: str, width: int) -> list[str]:
    parts = [" ".join(part.split()) for part in text.split("\n\n")]
    return [line for part in parts for line in textwrap.wrap(part, width, break_on_hyphens=False)]


def amount(text: str) -> float | int:
    """Return a budget as it is written: 1 is one token, and 1.0 is all of them.

    Raises:
        ValueError: the text is no number.
    """
    return int(text) if text.isdecimal() else float(text)


def number_or_name(text: str) -> int | str:
    """Return a task as it is written: digits are its number, all else its name."""
    return int(text) if text.isdecimal() else text


def budget(text: str) -> float | int:
    """Read a budget of visual tokens: a fraction or a number of them."""
    try:
        return amount(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither a fraction of the visual tokens, such as 0.25, nor a number of them, such as 64"
        ) from error


def names(text: str) -> tuple[str, ...]:
    """Read words separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def listed(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    """Return a type for values separated by commas, each read by `kind`."""

    def read(text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(word) for word in names(text))
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of values separated by commas") from error
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of values separated by commas: {error}") from error

    return read


def option(text: str) -> tuple[str, Any]:
    """Read NAME=VALUE; a value with commas, and that of "cameras", is several words, digits are a number, and true and
    false are what they say.
    """
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    parts = names(value)
    if name == "cameras" or len(parts) > 1:
        return name, parts
    if value.lower() in ("true", "false"):
        return name, value.lower() == "true"
    return name, int(value) if value.isdecimal() else value


class Pairs(argparse.Action):
    """Adds a (name, value) to a list, and refuses a name that it has: only one of two values would count."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        found = list(getattr(namespace, self.dest))
        if values[0] in dict(found):
            raise argparse.ArgumentError(self, f"{values[0]} was given twice; give it once")
        setattr(namespace, self.dest, [*found, values])


def add_methods(command: argparse.ArgumentParser, or_none: str = "") -> None:
    """Add the flags for pruning: an arm for every method, budget, layer and fate of the other tokens. All are None if
    not given.

    Args:
        or_none: the help's text on a method "none", if there is one.
    """
    add = command.add_argument
    add(
        "--method",
        dest="methods",
        metavar="A,B",
        type=names,
        help="what prunes, with options of its own after colons: vla-pruner,vla-pruner:preset=paper,fastv:layer=2;\n"
        f"a method of your own: my_module:MyMethod; one arm each{or_none} (default: vla-pruner)",
    )
    add(
        "--keep",
        metavar="X,Y",
        type=listed(budget),
        help="visual tokens kept, fractions such as 0.25 or numbers such as 64; one arm each\n"
        "(default: 0.25; vla-cache: 0.61)",
    )
    add("--layer", metavar="K,L", type=listed(int), help="pruning layers; one arm each (default: 3)")
    add(
        "--pruned",
        metavar="A,B",
        type=names,
        help="what becomes of the other tokens, drop or freeze; vla-cache can only reuse; one arm each\n"
        "(default: as each method has it: vla-pruner freezes, vla-cache reuses, the others drop)",
    )


def add_encoder(command: argparse.ArgumentParser) -> None:
    """Add the flag for reuse inside the vision encoder: an arm for every method and budget. It is None if not given."""
    command.add_argument(
        "--encoder-keep",
        metavar="X,Y",
        type=listed(budget),
        help="patches of each image that the vision encoder encodes, the others staying as in the last control step;\n"
        "fractions such as 0.25 or numbers such as 64, 1.0 is all; one arm each (default: all, in every arm)",
    )


def add_interval(command: argparse.ArgumentParser) -> None:
    """Add the flag for the interval of a paired difference."""
    command.add_argument(
        "--interval",
        choices=INTERVALS,
        default=NEWCOMBE,
        help="of differences to the unpruned policy: Newcombe's with tasks as strata, or Tango's over all pairs as\n"
        "one, as other tools report it; verdicts go by Newcombe's (default: %(default)s)",
    )


def add_weights(command: argparse.ArgumentParser) -> None:
    """Add the flags that, beside --policy, name the source of a policy."""
    add = command.add_argument
    add("--device", metavar="D", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    add("--random-weights", action="store_true", help="no checkpoint: weights drawn, as of audit (default: off)")
    add("--size", choices=("tiny", "full"), help="of random weights (default: tiny)")
    add_option(command)


def add_option(command: argparse.ArgumentParser) -> None:
    """Add the flag for the options of `load_policy`; its value is a list of (name, value)."""
    command.add_argument(
        "--option",
        metavar="NAME=VALUE",
        action=Pairs,
        default=[],
        type=option,
        help="for load_policy, such as unnorm_key=bridge_orig or cameras=image,wrist_image; may be repeated\n"
        "(default: none)",
    )


def check_weights(options: argparse.Namespace) -> None:
    """Refuse flags of `add_weights` that do not go together.

    Raises:
        OptionError: --size was given for a checkpoint, or --option for random weights.
    """
    if options.random_weights and options.option:
        raise OptionError("--option is for checkpoints; with --random-weights leave it out.")
    if not options.random_weights and options.size is not None:
        raise OptionError("--size is for --random-weights; a checkpoint has its own size. Leave it out.")


def refuse_unused(options: argparse.Namespace, mode: str, read: frozenset[str]) -> None:
    """Refuse flags that are given but not read, since a user would think that they count.

    Args:
        options: parsed by a subcommand that set `parser` among its defaults.
        mode: the flag that makes the others pointless, such as "--merge".
        read: destinations of the flags that `mode` reads, its own included.

    Raises:
        OptionError: others were given.
    """
    parser: argparse.ArgumentParser = options.parser
    unread = [name for name in vars(options) if name not in read | {"run", "parser", "command", "version"}]
    given = [flag(name) for name in unread if getattr(options, name) != parser.get_default(name)]
    if given:
        raise OptionError(f"{mode} does not read {', '.join(given)}; leave {', '.join(given)} out.")


def flag(name: str) -> str:
    """Return the flag whose value argparse stores under `name`."""
    return "--" + _FLAGS.get(name, name).replace("_", "-")


def add_output(command: argparse.ArgumentParser) -> None:
    """Add the flags for a subcommand's output."""
    command.add_argument(
        "--quiet", action="store_true", help="print what came out and what went wrong, no progress (default: off)"
    )
    command.add_argument(
        "--no-color", action="store_true", help="print without colours, as the variable NO_COLOR does (default: off)"
    )
