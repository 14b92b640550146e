"""`vla-pruner bench`: its flags, the run, the table and the files."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.benching.settings import NAMED, SIZES, BenchSettings
from vla_pruner.flags import DTYPES, Help, add_encoder, add_methods, add_option
from vla_pruner.method_names import LAYER
from vla_pruner.outputs import STDOUT, check_folder, check_output, left_to, write_file, write_output
from vla_pruner.policies.reference_names import NAMES as REFERENCES
from vla_pruner.terminal import LogLines, literal, say

_FIELDS = (
    "model", "size", "layers", "keep", "methods", "pruned", "layer", "encoder_keep", "batch", "cameras", "dtype",
    "device", "compile", "prompt_tokens", "decode_tokens", "denoise_steps", "refresh_every", "iters", "threads", "seed",
    "options",
)  # fmt: skip


def add_bench(commands: Any) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "bench",
        description=(
            "Times whole control steps of a policy, unpruned and pruned, in one process and in turns, with the time\n"
            "of each stage, the FLOPs counted and by formula, the roofline of the device and what pruning can reach\n"
            "at most. Weights are drawn on the device unless MODEL is a checkpoint."
        ),
        formatter_class=Help,
    )
    add_flags(command)
    add = command.add_argument
    add("--batch", metavar="B", type=int, default=1, help="robots in one call (default: %(default)s)")
    add("--json", metavar="FILE", help="write everything there; '-' is standard output (default: nowhere)")
    add(
        "--out",
        metavar="DIR",
        type=Path,
        help="folder for bench.json and bench.md, one Markdown row an arm (default: none)",
    )
    command.set_defaults(run=run_bench)


def add_flags(command: argparse.ArgumentParser) -> None:
    """Add every setting of a benchmark but the batch."""
    add = command.add_argument
    add(
        "--model",
        metavar="MODEL",
        required=True,
        help=f"{', '.join(NAMED)},\nllama:HIDDEN,LAYERS[,HEADS,INTERMEDIATE,VOCAB], reference:NAME "
        f"({', '.join(REFERENCES)}; reference is the autoregressive one here), or the folder of a checkpoint "
        "or its hub name",
    )
    add("--size", choices=SIZES, default="full", help="of random weights: published or tiny (default: %(default)s)")
    add_option(command)
    add("--layers", metavar="N", type=int, help="depth of the decoder, and of an expert (default: as published)")
    add_methods(command)
    add_encoder(command)
    command.set_defaults(methods=("vla-pruner",), layer=LAYER)
    add("--cameras", metavar="N", type=int, help="images of each robot (default: as published)")
    add("--dtype", choices=DTYPES, default="float32", help="of the weights (default: %(default)s)")
    add("--device", metavar="D", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    add("--compile", action="store_true", help="compile every arm, the unpruned one too (default: off)")
    add("--prompt-tokens", metavar="N", type=int, help="positions of the prompt, visual ones included")
    add("--decode-tokens", metavar="N", type=int, help="tokens that act, where they are decoded")
    add("--denoise-steps", metavar="N", type=int, help="steps of flow matching (default of all three: as published)")
    add(
        "--refresh-every",
        metavar="N",
        type=int,
        help="run every N-th step unpruned, of methods that can (default: never; at layer 0 every 8th)",
    )
    add("--iters", metavar="N", type=int, default=30, help="timed control steps of each arm (default: %(default)s)")
    add("--threads", metavar="N", type=int, help="of torch on the CPU (default: torch's)")
    add("--seed", metavar="N", type=int, default=0, help="of weights and inputs (default: %(default)s)")


def settings_of(options: argparse.Namespace, **given: Any) -> BenchSettings:
    """Return the flags as settings, except for those in `given`.

    Raises:
        VLAPrunerError: they do not go together.
    """
    given = {"options": dict(options.option), **given}
    return BenchSettings(**{name: getattr(options, name) for name in _FIELDS if name not in given}, **given)


def run_bench(options: argparse.Namespace) -> int:
    """Run the benchmark, print the table and write the files.

    Raises:
        VLAPrunerError: the flags do not allow a benchmark.
    """
    settings = settings_of(options)
    check_output(options.json)
    if options.out is not None:
        check_folder(options.out)
    console = Console(highlight=False, stderr=options.json == STDOUT)
    with left_to(options.json):
        report = _run(settings, console)
    from vla_pruner.benching.table import to_markdown

    text = json.dumps(report.to_json(), indent=2) + "\n"
    if options.json is not None:
        write_output(options.json, text)
    if options.out is not None:
        write_file(str(options.out / "bench.json"), text, "--out")
        write_file(str(options.out / "bench.md"), to_markdown(report), "--out")
    return 0


def _run(settings: BenchSettings, console: Console) -> Any:
    from vla_pruner.benching.run import bench
    from vla_pruner.benching.table import notes, to_rich

    options = {name: getattr(settings, name) for name in _FIELDS if name != "model"}
    timed: list[LogLines] = []
    with console.status("loading") as status:

        def progress(what: str, done: int, of: int) -> None:
            compiling = what.startswith("compiling")
            each = "" if compiling else "round "
            status.update(literal(what if of <= 1 else f"{what}, {each}{done} of {of}"))
            if console.is_interactive or of <= 1:
                return
            if compiling:
                say(console, f"{what}, {done} of {of}")
                return
            if not timed:
                timed.append(LogLines(console, of, "rounds"))
            timed[0].at(done)

        report = bench(settings.model, progress=progress, **options)
    for table in to_rich(report, console.width):
        console.print(table)
    for note in notes(report):
        say(console, note, soft_wrap=True)
    for warning in report.warnings:
        say(console, f"Warning: {warning}", style="yellow", soft_wrap=True)
    return report
