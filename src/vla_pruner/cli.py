"""The command line: `vla-pruner <subcommand>`. One function a subcommand; what is heavy is imported inside of it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vla_pruner.errors import VLAPrunerError

WRONG_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """Wrong flags get one line, not the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0 done, 2 wrong input, 130 interrupted)."""
    parser = _Parser(prog="vla-pruner", description="Prune the visual tokens of vision-language-action policies.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser, metavar="COMMAND")
    _add_demo(commands)
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        return run(options)
    except VLAPrunerError as error:
        return _refuse(str(error))
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _refuse(message: str) -> int:
    print("vla-pruner: " + " ".join(message.split()), file=sys.stderr)
    return WRONG_INPUT


def _add_demo(commands: Any) -> None:
    from vla_pruner.demo import settings as demo

    command = commands.add_parser(
        "demo",
        help="a trained policy in a simulator, unpruned and pruned, in one table",
        description=(
            "Runs a trained policy in Meta-World on the same episodes: unpruned, with VLA-Pruner, and with a random "
            "choice of visual tokens. Prints one table and writes a report."
        ),
        formatter_class=argparse.RawTextHelpFormatter,
    )
    command.add_argument(
        "--tasks",
        metavar="A,B",
        type=_names,
        help="task names, separated by commas (default: all that the policy knows)",
    )
    command.add_argument(
        "--episodes",
        metavar="N",
        type=int,
        help=f"episodes a task and arm, however long they take\n(default: {demo.DEFAULT_EPISODES}, ended after "
        f"{demo.DEFAULT_MINUTES:g} minutes; with --quick {demo.QUICK_EPISODES}, ended after {demo.QUICK_MINUTES:g})",
    )
    command.add_argument(
        "--keep",
        metavar="X",
        type=float,
        default=demo.DEFAULT_KEEP,
        help="fraction of the visual tokens that the pruned arms keep; one arm keeps half of it (default: %(default)s)",
    )
    command.add_argument(
        "--seed",
        metavar="N",
        type=int,
        default=demo.DEFAULT_SEED,
        help="seed of the first initial state; the policy was trained on seeds below 90000 (default: %(default)s)",
    )
    command.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=demo.DEFAULT_OUT,
        help="folder for report.html, results.json and table.md (default: %(default)s)",
    )
    command.add_argument(
        "--weights",
        metavar="DIR",
        type=Path,
        help="folder with model.safetensors and config.json (default: the weights that ship with the package)",
    )
    command.add_argument("--quick", action="store_true", help="a first look in under 2 minutes (default: off)")
    command.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vla_pruner.demo import DemoSettings, run_demo
    from vla_pruner.simulators.metaworld import SimulatorUnavailable

    settings = DemoSettings(
        tasks=options.tasks,
        episodes=options.episodes,
        keep=options.keep,
        seed=options.seed,
        out=options.out,
        quick=options.quick,
        weights=options.weights,
    )
    try:
        return run_demo(settings, Console(highlight=False))
    except SimulatorUnavailable as error:
        sys.unraisablehook = lambda _: None  # MuJoCo's half-made renderers complain once more when they are freed
        return _refuse(str(error))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


if __name__ == "__main__":
    sys.exit(main())
