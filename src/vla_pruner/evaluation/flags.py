"""The flags of `vla-pruner eval`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.policies import PolicySource
from vla_pruner.evaluation.recipes import RECIPES
from vla_pruner.evaluation.settings import DEFAULT_MARGIN, PRESETS, EvalSettings
from vla_pruner.flags import (
    Help,
    Pairs,
    add_encoder,
    add_interval,
    add_methods,
    add_output,
    add_weights,
    check_weights,
    flag,
    names,
    option,
    refuse_unused,
)
from vla_pruner.policies.reference_names import CHECKPOINT

_ASKED = (
    "out", "tasks", "preset", "episodes", "max_steps", "first", "seed", "methods", "keep", "layer", "pruned",
    "encoder_keep", "encoder_refresh", "controls", "horizon", "shard", "max_errors", "ray", "workers", "trace", "batch",
    "interval",
)  # fmt: skip
_MERGING = frozenset({"merge", "out", "interval", "quiet", "no_color"})


def add_eval(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "eval",
        description=(
            "Runs a policy on a benchmark, unpruned, pruned and under controls, every arm on the same episodes in\n"
            "turns. Each episode is on the disk when it ends: the same command goes on where a run stopped.\n"
            "Exit code: 0 all episodes ran, 1 some crashed (the same command tries them again), 2 wrong input."
        ),
        formatter_class=Help,
    )
    _add_plan(command)
    add_arms(command)
    _add_verdict(command)
    _add_running(command)
    add_weights(command)
    command.add_argument(
        "--suite-option",
        metavar="NAME=VALUE",
        action=Pairs,
        default=[],
        type=option,
        help="for the suites: of LIBERO and Meta-World image_size=N; of LIBERO also assets=DIR, seed=N,\n"
        "center_crop=false, pro=DIR and strength=N; of SIMPLER dataset=NAME; may be repeated (default: none)",
    )
    add_output(command)
    command.set_defaults(run=run_command, parser=command)


def _add_plan(command: argparse.ArgumentParser) -> None:
    """Add the flags for what runs: the policy, the suites, and their episodes."""
    add = command.add_argument
    add(
        "--policy",
        metavar="MODEL",
        help=f"{CHECKPOINT};\n"
        "'expert' (the suite's script, which sees the simulator's state) and 'nothing' prove the harness itself",
    )
    add(
        "--suite",
        dest="suites",
        metavar="A,B",
        type=names,
        help="libero_spatial, libero_object, libero_goal, libero_10 (libero: these four), libero_90,\n"
        "metaworld:mt8, metaworld:mt6, metaworld:mt4 or simpler_widowx; those of LIBERO's four also perturbed:\n"
        "libero_object_swap (_object, _lan, _task: LIBERO-PRO's) or libero_object:camera (:light, :background)",
    )
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the run; an unfinished one is continued")
    add("--tasks", metavar="A,B", type=names, help="names or numbers of tasks (default: as the preset says)")
    add(
        "--preset",
        choices=tuple(PRESETS),
        default="quick",
        help="\n\n".join(f"{name}: {preset.what}" for name, preset in PRESETS.items()) + "\n\n(default: %(default)s)",
    )
    add("--episodes", metavar="N", type=int, help="of each task and arm (default: the preset's)")
    add(
        "--first",
        metavar="I",
        type=int,
        default=0,
        help="the first initial state; choose settings on some, confirm them on others (default: %(default)s)",
    )
    add("--seed", metavar="S", type=int, default=0, help="of what the policy draws (default: %(default)s)")
    add(
        "--recipe",
        choices=tuple(RECIPES),
        help="arms of a whole experiment, in place of --method, --keep, --layer, --pruned and --controls;\n\n"
        + "\n\n".join(f"{name}: {recipe.what}" for name, recipe in RECIPES.items())
        + "\n\n(default: none)",
    )


def _add_verdict(command: argparse.ArgumentParser) -> None:
    """Add the flags for what is concluded."""
    command.add_argument(
        "--margin",
        metavar="P",
        type=float,
        default=100 * DEFAULT_MARGIN,
        help="loss in percentage points below which pruning counts as not worse, declared beforehand\n"
        "(default: %(default)g)",
    )
    add_interval(command)


def _add_running(command: argparse.ArgumentParser) -> None:
    """Add the flags for how it runs: the ends of episodes, parts, traces, and what runs at once."""
    add = command.add_argument
    add("--horizon", metavar="N", type=int, help="actions of a chunk carried out (default: the policy's convention)")
    add("--max-steps", metavar="N", type=int, help="of an episode (default: the suite's; smoke: 40)")
    add("--max-errors", metavar="N", type=int, default=10, help="crashes that end the run (default: %(default)s)")
    add(
        "--shard", metavar="I/N", type=_shard, help="run the I-th of N parts; --merge puts them together (default: all)"
    )
    add(
        "--merge",
        metavar="DIR",
        type=Path,
        nargs="+",
        action="extend",
        help="run nothing: put the folders of one evaluation together",
    )
    add(
        "--trace",
        metavar="N",
        type=int,
        default=0,
        help="write down what was seen, done, scored and kept in N episodes of each task and arm, the first ones\n"
        "(default: %(default)s)",
    )
    add(
        "--batch",
        metavar="N",
        type=int,
        default=1,
        help="episodes of one arm whose control steps share forward passes: faster, but their latencies are not\n"
        "recorded (default: %(default)s)",
    )
    add(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help="spread episodes over a Ray cluster; without an address, one of this machine's own (default: off)",
    )
    add("--workers", metavar="N", type=int, help="policies that run at once on Ray (default: as many as there is room)")


def add_arms(command: argparse.ArgumentParser) -> None:
    """Add the flags of the arms that run: methods and their settings, and controls."""
    add_methods(command, ", or none")
    add_encoder(command)
    command.add_argument(
        "--encoder-refresh",
        metavar="N",
        type=int,
        help="encode everything in the first control step of an episode and every N-th after it, with --encoder-keep\n"
        "(default: 8)",
    )
    command.add_argument(
        "--controls",
        metavar="A,B",
        type=_controls,
        help="again (unpruned twice), random (as many tokens drawn), blank (black images), or none\n(default: all)",
    )


def policy_source(options: argparse.Namespace) -> PolicySource:
    """Return the source of the policy.

    Raises:
        OptionError: the flags about its weights do not go together.
    """
    check_weights(options)
    return PolicySource(
        options.policy,
        options.random_weights,
        options.size or "tiny",
        options.device,
        options.dtype,
        dict(options.option),
    )


def run_command(options: argparse.Namespace) -> int:
    """Run the command that the flags describe.

    Raises:
        VLAPrunerError: they ask for something impossible.
    """
    from vla_pruner.evaluation.command import run_eval, run_merge
    from vla_pruner.terminal import output

    console = output(options.quiet, options.no_color)
    if options.merge:
        refuse_unused(options, "--merge", _MERGING)
        return run_merge(options.merge, options.out, console, options.interval)
    return run_eval(settings_of(options), console)


def settings_of(options: argparse.Namespace) -> EvalSettings:
    """Return the flags as settings.

    Raises:
        VLAPrunerError: they do not go together.
    """
    if not options.policy or not options.suites:
        raise EvaluationError("--policy and --suite say what to run; give both (or --merge with folders).")
    if options.workers is not None and options.ray is None:
        raise EvaluationError("--workers is for --ray; give --ray too.")
    asked = {name: getattr(options, name) for name in _ASKED}
    if options.recipe is not None:
        asked |= _arms_of(options.recipe, asked)
    return EvalSettings(
        policy=policy_source(options),
        suites=options.suites,
        margin=options.margin / 100,
        suite_options=dict(options.suite_option),
        **asked,
    )


def _arms_of(recipe: str, asked: dict[str, Any]) -> dict[str, Any]:
    arms = dataclasses.asdict(RECIPES[recipe])
    del arms["what"]
    twice = [flag(name) for name in arms if asked[name] is not None]
    if twice:
        raise EvaluationError(f"--recipe {recipe} sets {', '.join(twice)} itself; leave {', '.join(twice)} out.")
    return arms


def _controls(text: str) -> tuple[str, ...]:
    return () if text.strip() == "none" else names(text)


def _shard(text: str) -> tuple[int, int]:
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is no part such as 2/4, the second of four")
    return int(number), int(count)
