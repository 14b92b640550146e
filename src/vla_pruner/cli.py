"""The command line: `vla-pruner <subcommand>`. One function a subcommand, which imports heavy modules itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from vla_pruner.errors import VLAPrunerError
from vla_pruner.fate import WITHIN_A_STEP
from vla_pruner.flags import DTYPES, Help, add_option, add_output, budget, check_weights, names
from vla_pruner.policies.reference_names import CHECKPOINT, NAMES
from vla_pruner.wording import readable

WRONG_INPUT = 2


class _Parser(argparse.ArgumentParser):
    """A parser that answers wrong flags in one line, without the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_INPUT, f"{self.prog}: {message}; see {self.prog} --help\n")


class _Commands:
    """The subcommands of a parser, to which one of a given summary is added."""

    def __init__(self, commands: Any, summary: str) -> None:
        self._commands, self._summary = commands, summary

    def add_parser(self, name: str, **options: Any) -> argparse.ArgumentParser:
        return self._commands.add_parser(name, help=self._summary, **options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code (0 done, 1 a check failed, 2 wrong input, 130 interrupted)."""
    parser = _Parser(
        prog="vla-pruner",
        description="Prune the visual tokens of vision-language-action policies.",
        formatter_class=Help,
    )
    parser.add_argument("--version", action="store_true", help="print the versions of this, torch and transformers")
    commands = parser.add_subparsers(dest="command", parser_class=_Parser, metavar="COMMAND")
    arguments = sys.argv[1:] if arguments is None else arguments
    asked = next((word for word in arguments if word in _COMMANDS), None)
    for name, (add, summary) in _COMMANDS.items():
        if name == asked:  # only its flags, since those of most commands import torch
            add(_Commands(commands, summary))
        else:
            commands.add_parser(name, help=summary)
    options, unknown = parser.parse_known_args(arguments)
    if unknown:  # the help that has the flags is the subcommand's
        commands.choices.get(options.command, parser).error(f"unrecognized arguments: {' '.join(unknown)}")
    if options.version:
        _print_versions()
        return 0
    if options.command is None:
        parser.print_help(sys.stderr)
        return WRONG_INPUT
    run: Callable[[argparse.Namespace], int] = options.run
    try:
        if run is _env:  # it has to run even if transformers cannot be imported
            return run(options)
        with _no_loading_bars():
            return run(options)
    except VLAPrunerError as error:
        return _refuse(str(error))
    except BrokenPipeError:
        # The reader of the output has gone (`| head`). Python would complain once more when it closes standard output.
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = " to ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
        return _refuse(f"{what or 'A file or a connection'} cannot be used ({error.strerror or error}).")
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        return 130


def _refuse(message: str) -> int:
    print("vla-pruner: " + readable(" ".join(message.split())), file=sys.stderr)
    return WRONG_INPUT


def _print_versions() -> None:
    import torch
    import transformers

    from vla_pruner import __version__

    print(f"vla-pruner {__version__}\ntorch {torch.__version__}\ntransformers {transformers.__version__}")


@contextmanager
def _no_loading_bars() -> Iterator[None]:
    """Hide the bars in which transformers counts the weights that it loads, on stderr, before any output of ours.
    Downloads keep their bars: they take minutes.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    if constants.HF_HUB_DISABLE_PROGRESS_BARS is not None or not logging.is_progress_bar_enabled():
        yield  # the environment variable takes precedence
        return
    logging.disable_progress_bar()
    enable_progress_bars()  # those of downloads, which were turned off with the others
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _add_demo(commands: Any) -> None:
    from vla_pruner.demo import settings as demo

    command = commands.add_parser(
        "demo",
        description=(
            "Runs a trained policy in a simulator on the same episodes: unpruned, with the recommended setting, with\n"
            "the paper's, and with a random choice of visual tokens. Prints one table and writes a report."
        ),
        formatter_class=Help,
    )
    command.add_argument(
        "--suite",
        choices=tuple(demo.SUITES),
        help=f"the simulator, and the policy that was trained in it (default: {demo.DEFAULT_SUITE})",
    )
    command.add_argument(
        "--tasks",
        metavar="A,B",
        type=names,
        help="names or numbers of tasks, as of eval (default: all that the policy knows)",
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
        help="fraction of the visual tokens that the pruned arms keep (default: what each setting says)",
    )
    command.add_argument(
        "--seed",
        metavar="N",
        type=int,
        help="the first initial state: in metaworld a seed (the policy was trained on seeds below 90000; default:\n"
        f"{demo.SUITES['metaworld'].first}), in libero_object the number of a stored one (default: "
        f"{demo.SUITES['libero_object'].first})",
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
        metavar="NAME",
        help=f"{', '.join(NAMES)}, or a folder with model.safetensors and config.json\n(default: the suite's)",
    )
    command.add_argument("--quick", action="store_true", help="a first look in under 2 minutes (default: off)")
    command.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="compile every arm, the unpruned one too, before the episodes; the first time takes minutes, which count\n"
        "into those above (default: on; off with --quick, and without a C++ compiler)",
    )
    add_output(command)
    command.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> int:
    from vla_pruner.demo import DemoSettings, run_demo
    from vla_pruner.simulators.metaworld import SimulatorUnavailable
    from vla_pruner.terminal import output

    settings = DemoSettings(
        tasks=options.tasks,
        episodes=options.episodes,
        keep=options.keep,
        seed=options.seed,
        out=options.out,
        quick=options.quick,
        weights=options.weights,
        suite=options.suite,
        compile=options.compile,
    )
    try:
        return run_demo(settings, output(options.quiet, options.no_color))
    except SimulatorUnavailable as error:
        sys.unraisablehook = lambda _: None  # MuJoCo's half-made renderers complain once more when they are freed
        return _refuse(str(error))


def _add_audit(commands: Any) -> None:
    from vla_pruner.registry import random_names

    *names, last = random_names()
    command = commands.add_parser(
        "audit",
        description=(
            "Runs a policy on drawn images, alone and pruned, and proves that it sees, that the pruner prunes what it\n"
            "says and that nothing else changes. Exit code: 0 all passed, 1 a check failed, 2 wrong input."
        ),
        formatter_class=Help,
    )
    command.add_argument(
        "model",
        metavar="MODEL",
        help=f"{CHECKPOINT};\n\nwith --random-weights: {', '.join(names)} or {last}",
    )
    command.add_argument("--random-weights", action="store_true", help="no checkpoint: weights drawn (default: off)")
    command.add_argument(
        "--size", choices=("tiny", "full"), help="with --random-weights: tiny, or the published size (default: tiny)"
    )
    command.add_argument(
        "--method",
        metavar="NAME",
        default="vla-pruner",
        help="what prunes, with options of its own after colons: vla-pruner:preset=paper; a method of your own:\n"
        "my_module:MyMethod (default: %(default)s)",
    )
    command.add_argument(
        "--keep",
        metavar="X",
        type=budget,
        default=0.25,
        help="visual tokens kept: a fraction such as 0.25, or a number such as 64 (default: %(default)s)",
    )
    command.add_argument("--layer", metavar="K", type=int, default=3, help="the pruning layer (default: %(default)s)")
    command.add_argument(
        "--pruned",
        choices=WITHIN_A_STEP,
        help="what becomes of the other tokens (default: as the method has it: vla-pruner freezes, the others drop);\n"
        "both are compared with their reference",
    )
    command.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    command.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights (default: the checkpoint's; float32 for random weights)",
    )
    command.add_argument("--seed", metavar="N", type=int, default=0, help="of all draws (default: %(default)s)")
    command.add_argument(
        "--instruction", metavar="TEXT", help="instruction for the policy (default: one that it knows)"
    )
    add_option(command)
    command.add_argument("--details", action="store_true", help="explain every figure (default: failures only)")
    command.add_argument(
        "--json", metavar="FILE", help="write the report there too; '-' is standard output (default: no report)"
    )
    command.add_argument(
        "--certificate",
        metavar="FILE",
        help="write what was proven of these weights on this machine, with their hashes (default: no certificate)",
    )
    command.add_argument(
        "--compare",
        metavar="FILE",
        help="a certificate of another machine; exit code 1 if this audit contradicts it (default: none)",
    )
    command.set_defaults(run=_audit)


def _audit(options: argparse.Namespace) -> int:
    from rich.console import Console

    from vla_pruner.auditing.command import AuditSettings, run_audit
    from vla_pruner.outputs import STDOUT

    check_weights(options)
    settings = AuditSettings(
        model=options.model,
        random_weights=options.random_weights,
        size=options.size,
        method=options.method,
        keep=options.keep,
        layer=options.layer,
        pruned=options.pruned,
        device=options.device,
        dtype=options.dtype,
        seed=options.seed,
        instruction=options.instruction,
        options=dict(options.option),
        details=options.details,
        json=options.json,
        certificate=options.certificate,
        compare=options.compare,
    )
    return run_audit(settings, Console(highlight=False, stderr=options.json == STDOUT))


def _add_bench(commands: Any) -> None:
    from vla_pruner.benching.command import add_bench

    add_bench(commands)


def _add_eval(commands: Any) -> None:
    from vla_pruner.evaluation.flags import add_eval

    add_eval(commands)


def _add_calibrate(commands: Any) -> None:
    from vla_pruner.calibration.flags import add_calibrate

    add_calibrate(commands)


def _add_report(commands: Any) -> None:
    from vla_pruner.report.flags import add_report

    add_report(commands)


def _add_serve(commands: Any) -> None:
    from vla_pruner.serving.flags import add_serve

    add_serve(commands)


def _add_env(commands: Any) -> None:
    command = commands.add_parser(
        "env",
        description=(
            "Prints versions, devices, what each extra lacks, attention backends and whether MuJoCo draws. It names\n"
            "no user, no host and no path."
        ),
        formatter_class=Help,
    )
    command.add_argument("--json", action="store_true", help="as JSON (default: as text)")
    command.set_defaults(run=_env)


def _env(options: argparse.Namespace) -> int:
    from vla_pruner.installation import as_json, as_text, installation

    found = installation()
    print(as_json(found) if options.json else as_text(found))
    return 0


_COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "demo": (_add_demo, "a trained policy in a simulator, unpruned and pruned, in one table"),
    "audit": (_add_audit, "does a policy see, and is pruning exact: a checklist with figures"),
    "bench": (_add_bench, "how fast is a policy, unpruned and pruned, and why not faster"),
    "eval": (_add_eval, "success rates on LIBERO, Meta-World or SIMPLER: paired, resumable, with verdicts"),
    "report": (_add_report, "an evaluation's folder as one HTML file: verdict, plots, and what was pruned"),
    "calibrate": (
        _add_calibrate,
        "how far pruning moves a policy's action on recorded observations, and the fastest setting in tolerance",
    ),
    "serve": (_add_serve, "a policy server that openpi's clients use unchanged, with a memory for each robot"),
    "env": (_add_env, "what is installed here, for a report of a fault"),
}
"""What adds each subcommand, and its summary."""


if __name__ == "__main__":
    sys.exit(main())
