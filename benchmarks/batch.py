"""Throughput against the number of robots in one call: `vla-pruner bench` for several batches, in one table.

    python -m benchmarks.batch --model openvla-7b --device cuda --dtype bfloat16 --compile --batch 1,2,4,8 --out DIR

Every flag of `vla-pruner bench` is one here; only `--batch` is a list. `--out` gets batch.json (every report whole) and
batch.md (one row a batch and arm), written anew after each batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vla_pruner import markdown
from vla_pruner.benching.command import add_flags, settings_of
from vla_pruner.benching.report import BenchReport
from vla_pruner.benching.run import bench
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.errors import OptionError, VLAPrunerError

TITLES = ("model", "arm", "robots", "ms p50", "robots/s", "of one robot's", "speed (95 %)", "roofline ms", "reached")


def to_markdown(reports: Sequence[BenchReport]) -> str:
    """One row a batch and arm, arm by arm; "of one robot's" is the throughput against that of the smallest batch."""
    rows = [
        tuple(_cells(report, first.name, first.robots_per_second)) for first in reports[0].arms for report in reports
    ]
    return markdown.table(TITLES, rows) + "\n"


def _cells(report: BenchReport, name: str, of_first: float) -> Iterator[str]:
    arm = report[name]
    yield report.settings["model"]
    yield arm.name
    yield f"{report.shape['batch']}"
    yield f"{arm.milliseconds['p50']:.2f}"
    yield f"{arm.robots_per_second:.4g}"
    yield f"{arm.robots_per_second / of_first:.2f}x"
    speed, interval = "-", ""
    if arm.speed is not None:
        speed = f"{arm.speed.value:.2f}x"
        interval = "" if arm.speed.low is None else f" ({arm.speed.low:.2f} to {arm.speed.high:.2f})"
    yield speed + interval
    yield f"{sum(arm.roofline.values()):.2f}"
    yield f"{100 * arm.reached:.0f} %"


def batches(text: str) -> tuple[int, ...]:
    """Whole numbers of 1 or more, separated by commas; sorted, each once."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers of 1 or more, such as 1,2,4,8")
    return tuple(sorted({int(word) for word in words}))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the batches one after another; return 0, or 2 if the flags do not fit together."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_flags(parser)
    parser.add_argument("--batch", metavar="B,C", type=batches, default=(1, 2, 4, 8), help="robots in one call")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder for batch.json and batch.md")
    options = parser.parse_args(arguments)
    try:
        run(settings_of(options, batch=1), options.batch, options.out)
    except VLAPrunerError as error:
        print(f"benchmarks.batch: {error}", file=sys.stderr)
        return 2
    return 0


def run(settings: BenchSettings, sizes: Sequence[int], out: Path) -> None:
    """Benchmark these settings for each batch, and write both files after each.

    Raises:
        VLAPrunerError: the settings do not allow a benchmark, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out is {out}, which is a file; give a folder.")
    out.mkdir(parents=True, exist_ok=True)
    reports: list[BenchReport] = []
    options = {name: value for name, value in settings.to_json().items() if name not in ("model", "batch")}
    for size in sizes:
        print(f"{settings.model}, {size} robots", file=sys.stderr)
        reports.append(bench(settings.model, batch=size, **options))
        for warning in reports[-1].warnings:
            print(f"Warning: {warning}", file=sys.stderr)
        (out / "batch.json").write_text(json.dumps([report.to_json() for report in reports], indent=2) + "\n")
        (out / "batch.md").write_text(to_markdown(reports))
    print(to_markdown(reports), end="")


if __name__ == "__main__":
    sys.exit(main())
