"""The flags of `vla-pruner report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vla_pruner.flags import Help, add_interval, names


def add_report(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "report",
        description=(
            "Makes one HTML file of an evaluation's folder, finished, unfinished or merged: the verdict, a table of\n"
            "all arms, plots with intervals, and, where episodes were traced, a player of what was pruned with both\n"
            "score maps. It needs nothing else, so it can be mailed. Exit code: 0 written, 2 wrong input."
        ),
        formatter_class=Help,
    )
    command.add_argument("folder", metavar="DIR", type=Path, help="the --out of vla-pruner eval")
    command.add_argument("--out", metavar="FILE", type=Path, help="the file (default: report.html in DIR)")
    command.add_argument(
        "--episodes",
        metavar="A,B",
        type=names,
        default=(),
        help="traced episodes to play: TASK, TASK:STATE or TASK:STATE:ARM, a task by name or number\n"
        "(default: up to 4, those first that the unpruned policy solved and a pruned arm did not)",
    )
    add_interval(command)
    command.set_defaults(run=run_command)


def run_command(options: argparse.Namespace) -> int:
    """Run the command that the flags describe.

    Raises:
        VLAPrunerError: they ask for something impossible.
    """
    from rich.console import Console

    from vla_pruner.report.command import run_report

    return run_report(options.folder, options.out, options.episodes, Console(highlight=False), options.interval)
