"""The flags of `vla-pruner calibrate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vla_pruner.calibration.settings import CalibrateSettings
from vla_pruner.evaluation.flags import add_arms, policy_source
from vla_pruner.flags import Help, Pairs, add_weights, names, refuse_unused
from vla_pruner.outputs import STDOUT
from vla_pruner.policies.reference_names import CHECKPOINT

_FIELDS = (
    "source", "results", "methods", "keep", "layer", "pruned", "encoder_keep", "encoder_refresh", "controls", "tasks",
    "episodes", "every", "max_steps", "seed", "tolerance", "json",
)  # fmt: skip
_READING = frozenset({"results", "tolerance", "against", "json"})


def add_calibrate(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "calibrate",
        description=(
            "Replays recorded observations through a policy, unpruned and pruned in every way that is asked for, open\n"
            "loop, and says how far the action moves and how long a control step takes. No simulator and no robot."
        ),
        formatter_class=Help,
    )
    add = command.add_argument
    add(
        "--policy",
        metavar="MODEL",
        help=CHECKPOINT,
    )
    add(
        "--from",
        dest="source",
        metavar="DIR",
        type=Path,
        help="what was recorded: the --out of vla-pruner eval --trace, or a LeRobot dataset (layout 2.0, 2.1 or 3.0)",
    )
    add(
        "--tolerance",
        metavar="X",
        type=float,
        help="choose the fastest setting whose upper bound is at most this, in standard deviations of the recorded\n"
        "actions, such as 0.1 (default: choose none)",
    )
    add(
        "--against",
        metavar="DIR",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        help="evaluations of the same policy: their arms are calibrated unless --method says otherwise, and the rank\n"
        "correlation with their closed-loop losses is computed (default: none)",
    )
    add("--results", metavar="FILE", type=Path, help="run nothing: read a calibration that --json wrote")
    add("--json", metavar="FILE", help="write everything there; '-' is standard output (default: nowhere)")
    add_arms(command)
    add("--tasks", metavar="A,B", type=names, help="names of tasks, of a dataset their sentences (default: all)")
    add("--episodes", metavar="N", type=int, default=12, help="to replay, at most (default: %(default)s)")
    add("--every", metavar="N", type=int, default=1, help="take every N-th recorded step (default: %(default)s)")
    add("--max-steps", metavar="N", type=int, help="control steps of an episode, from its start (default: all)")
    add(
        "--camera",
        dest="cameras",
        metavar="POLICY=DATASET",
        type=_pair,
        action=Pairs,
        default=[],
        help="which camera of a dataset is which of the policy's; may be repeated (default for each: by equal names)",
    )
    add(
        "--seed", metavar="S", type=int, default=0, help="of a flow policy's noise, for datasets (default: %(default)s)"
    )
    add_weights(command)
    command.set_defaults(run=run_command, parser=command)


def run_command(options: argparse.Namespace) -> int:
    """Run the command that the flags describe.

    Raises:
        VLAPrunerError: they ask for something impossible.
    """
    from rich.console import Console

    from vla_pruner.calibration.command import run_calibrate

    return run_calibrate(settings_of(options), Console(highlight=False, stderr=options.json == STDOUT))


def settings_of(options: argparse.Namespace) -> CalibrateSettings:
    """Return the flags as settings.

    Raises:
        VLAPrunerError: they do not go together.
    """
    if options.results is not None:
        refuse_unused(options, "--results", _READING)
    return CalibrateSettings(
        policy=policy_source(options) if options.policy else None,
        cameras=dict(options.cameras),
        against=tuple(options.against),
        **{name: getattr(options, name) for name in _FIELDS},
    )


def _pair(text: str) -> tuple[str, str]:
    name, equals, camera = text.partition("=")
    if not (name and equals and camera):
        raise argparse.ArgumentTypeError(f"{text!r} is not POLICY=DATASET")
    return name, camera
