"""The study of docs/study.md: which method, budget, fate and layer on the reference policies, closed loop.

    python -m benchmarks.study run grid --shard 1/2 --out DIR     runs or continues a part (`vla-pruner eval`)
    python -m benchmarks.study publish grid --out DIR             merges DIR's parts into benchmarks/results/study
    python -m benchmarks.study resume grid --out DIR              makes a part of what was published, to be continued
    python -m benchmarks.study table grid                         success by method, budget and fate, as Markdown

Parts are folders DIR/PHASE-I; a killed run goes on with the same command. `grid` and `options` are of the
autoregressive policy, phases that begin with `chunk` of the two-camera policy for Meta-World, with `libero` of the one
for LIBERO-Object. Grids, options and layers share their initial states; what they favour is confirmed on others.
"""

from __future__ import annotations

import argparse
import gzip
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_pruner import cli, markdown
from vla_pruner.calibration.agreement import read_eval_info
from vla_pruner.errors import VLAPrunerError
from vla_pruner.evaluation.manifest import Manifest
from vla_pruner.evaluation.options import ArmOptions
from vla_pruner.evaluation.records import latest, read_records
from vla_pruner.evaluation.run import Run
from vla_pruner.method_names import encoder_title
from vla_pruner.wording import counted

RESULTS = Path(__file__).parent / "results" / "study"
WHOLE = ("run.json", "table.md")
RECORDS = "episodes.jsonl"

# Every method leaves the same first steps unpruned, so that they differ in the choice of tokens alone.
_WAIT = ":warmup_steps=3"
_METHODS = (
    "vla-pruner:preset=paper",
    "vla-pruner:semantic_queries=last",
    *(
        f"{name}{_WAIT}"
        for name in (
            "action-only",
            "score-fusion",
            "action-and-diversity",
            "semantic-only",
            "fastv",
            "sparsevlm",
            "text-query",
            "divprune",
            "max-min-diversity",
        )
    ),
    f"max-min-diversity{_WAIT}:metric=euclidean",
)
_OPTIONS = (
    *(f"vla-pruner:preset=paper:{option}" for option in ("unseen=carry", "semantic_queries=text", "window=1")),
    *(f"vla-pruner:preset=paper:layer={layer}" for layer in (1, 2, 5)),
    *(f"action-and-diversity{_WAIT}:layer={layer}" for layer in (1, 5)),
)
_CONFIRMED = tuple(
    f"{name}:keep={keep}:pruned={fate}"
    for keep, fate in ((0.25, "drop"), (0.125, "freeze"))
    for name in ("vla-pruner:preset=paper", f"action-only{_WAIT}")
)
_CHUNK_METHODS = (
    "vla-pruner:preset=paper",
    "vla-pruner:semantic_queries=last",
    *(
        f"{name}{_WAIT}"
        for name in (
            "action-only",
            "action-and-diversity",
            "fastv",
            "divprune",
            "max-min-diversity",
        )
    ),
)
# What NVIDIA's TensorRT Edge-LLM and Intel's OpenVINO ship, beside the last prompt row of VLA-Pruner.
_VENDORS = (
    *("--method", f"vla-pruner:semantic_queries=last,dart{_WAIT},cdpruner{_WAIT}", "--layer", "2"),
    *("--keep", "0.25,0.125", "--pruned", "drop,freeze", "--controls", "random"),
)
# Dropped at .125 is left out on LIBERO, where an episode takes five times as long: three methods and random tokens lost
# 15 to 85 points there (`libero-vendors`).
_LIBERO_METHODS = tuple(
    f"{name}:keep={keep}:pruned={fate}"
    for keep, fate in ((0.5, "drop"), (0.25, "drop"), (0.25, "freeze"), (0.125, "freeze"))
    for name in _CHUNK_METHODS
)
# Layer 2 is that of the grids, which have the same initial states; 5 is the middle.
_CHUNK_LAYERS = tuple(
    f"vla-pruner:semantic_queries=last:layer={layer}:keep=0.25:pruned={fate}"
    for layer, fate in ((1, "drop"), (3, "drop"), (5, "drop"), (1, "freeze"))
)
_CHUNK_CONFIRMED = (
    "vla-pruner:semantic_queries=last:keep=0.25:pruned=freeze",
    "vla-pruner:semantic_queries=last:keep=0.125:pruned=freeze",
    "vla-pruner:preset=paper:keep=0.25",
)
_COMMON = ("--policy", "reference:autoregressive", "--suite", "metaworld:mt4", "--margin", "5", "--batch", "8")
_CHUNK = ("--policy", "reference:metaworld", "--suite", "metaworld:mt8", "--margin", "5", "--batch", "8")
_LIBERO = ("--policy", "reference:libero-object", "--suite", "libero_object", "--margin", "5", "--batch", "8")
_ENCODER = (
    *("--method", "vla-pruner:semantic_queries=last", "--keep", "1.0,0.25", "--layer", "2", "--pruned", "freeze"),
    *("--encoder-keep", "1.0,0.5,0.25"),
)
# `_lan` is left out: the policy knows only the words of its own ten instructions.
_CHANGES = ("_swap", "_object", "_task", ":camera", ":light", ":background")
PHASES: dict[str, tuple[str, ...]] = {
    "grid": (
        *_COMMON,
        *("--episodes", "50", "--method", ",".join(_METHODS)),
        *("--keep", "0.5,0.25,0.125", "--pruned", "drop,freeze", "--layer", "3"),
    ),
    "options": (
        *_COMMON,
        *("--episodes", "50", "--method", ",".join(_OPTIONS)),
        *("--keep", "0.25", "--pruned", "drop", "--layer", "3", "--controls", "none"),
    ),
    "confirm": (
        *_COMMON,
        *("--first", "50", "--episodes", "150", "--method", ",".join(_CONFIRMED), "--layer", "3", "--controls", "none"),
    ),
    "chunk-grid": (
        *_CHUNK,
        *("--episodes", "2", "--method", ",".join(_CHUNK_METHODS)),
        *("--keep", "0.5,0.25,0.125", "--pruned", "drop,freeze", "--layer", "2"),
    ),
    "chunk-vendors": (*_CHUNK, "--episodes", "10", *_VENDORS),
    "chunk-layers": (
        *_CHUNK,
        *("--episodes", "3", "--method", ",".join(_CHUNK_LAYERS), "--layer", "2", "--controls", "none"),
    ),
    "chunk-confirm": (
        *_CHUNK,
        *("--first", "10", "--episodes", "75", "--method", ",".join(_CHUNK_CONFIRMED)),
        *("--layer", "2", "--controls", "again"),
    ),
    "chunk-encoder": (*_CHUNK, "--episodes", "15", *_ENCODER, "--controls", "again"),
    "libero-grid": (
        *_LIBERO,
        *("--episodes", "2", "--method", ",".join(_LIBERO_METHODS)),
        *("--layer", "2", "--controls", "again,random"),
    ),
    "libero-layers": (
        *_LIBERO,
        *("--episodes", "1", "--method", ",".join(_CHUNK_LAYERS), "--layer", "2", "--controls", "none"),
    ),
    "libero-vendors": (*_LIBERO, "--episodes", "2", *_VENDORS),
    # All stored initial states that LIBERO-Object has.
    "libero-confirm": (
        *_LIBERO,
        *("--episodes", "50", "--method", ",".join(_CHUNK_CONFIRMED[:1])),
        *("--layer", "2", "--controls", "none"),
    ),
    # Does pruning cost more where the scene is new?
    "libero-new": (
        *("--policy", "reference:libero-object", "--margin", "5", "--batch", "8"),
        *("--suite", ",".join(f"libero_object{change}" for change in _CHANGES), "--episodes", "2"),
        *("--method", _CHUNK_CONFIRMED[0], "--layer", "2", "--controls", "none"),
    ),
    # The same question where the policy still acts: `libero-new` leaves it few episodes to lose.
    "libero-near": (
        *("--policy", "reference:libero-object", "--margin", "5", "--batch", "8"),
        *("--suite", "libero_object:camera,libero_object:light", "--suite-option", "strength=0.3", "--episodes", "3"),
        *("--method", _CHUNK_CONFIRMED[0], "--layer", "2", "--controls", "none"),
    ),
    "libero-encoder": (*_LIBERO, "--episodes", "3", *_ENCODER, "--controls", "none"),
}


def run(phase: str, out: Path, part: str | None) -> int:
    """Run or continue one part of a phase; its exit code is that of `vla-pruner eval`."""
    number = "1" if part is None else part.partition("/")[0]
    arguments = ["eval", *PHASES[phase], "--out", str(out / f"{phase}-{number}")]
    return cli.main(arguments if part is None else [*arguments, "--shard", part])


def publish(phase: str, out: Path) -> int:
    """Merge the parts of a phase and put what a reader needs into the repository, the records compressed: all of it, or
    nothing if a part is damaged or lacks episodes that were published before.
    """
    parts = sorted(folder for folder in out.glob(f"{phase}-*") if folder.is_dir())
    if not parts:
        print(f"{out} has no folder {phase}-...; run it first.", file=sys.stderr)
        return 2
    target = RESULTS / phase
    with tempfile.TemporaryDirectory() as folder:
        merged, made = Path(folder) / phase, Path(folder) / "made"
        code = cli.main(["eval", "--merge", *map(str, parts), "--out", str(merged)])
        if code > 1:
            return code
        done = _run_in(merged)
        lost = _lost(target, done)
        if lost:
            print(
                f"{target} holds {counted(lost, 'episode')} of this run that the parts lack; put the missing part "
                "beside them, or go on from what was published (resume).",
                file=sys.stderr,
            )
            return 2
        made.mkdir()
        for name in WHOLE:
            shutil.copyfile(merged / name, made / name)
        info = json.loads((merged / "eval_info.json").read_text())
        kept = {name: info[name] for name in ("run", "conditions", "summary", "verdict", "errors")}
        (made / "summary.json").write_text(json.dumps(kept, indent=1) + "\n")
        if reported := cli.main(["report", str(merged), "--out", str(made / "report.html")]):
            return reported
        # Without a time stamp, the same records give the same file.
        with open(made / f"{RECORDS}.gz", "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            packed.write((merged / RECORDS).read_bytes())
        shutil.copytree(made, target, dirs_exist_ok=True)
    left = sum(len(arms) for _, arms in done.left())
    absent = f" but for {counted(left, 'episode')} that did not run" if left else ""
    print(f"{target} holds {phase}{absent}.")
    return code


def _run_in(folder: Path) -> Run:
    return Run(Manifest.read(folder), latest(read_records(folder / RECORDS), str(folder)))


def _lost(target: Path, done: Run) -> int:
    """The number of episodes that were published of the same run, and are not in what is `done`."""
    if not (target / "run.json").exists():
        return 0
    before = _run_in(target)
    return len(before.records.keys() - done.records.keys()) if before.manifest.run == done.manifest.run else 0


def resume(phase: str, out: Path) -> int:
    """Make a part of what was published of a phase; `run` without a shard goes on with it, by the same code."""
    source, part = RESULTS / phase, out / f"{phase}-1"
    if part.exists() or not source.exists():
        print(f"{part} is there already." if part.exists() else f"{source} holds nothing to resume.", file=sys.stderr)
        return 2
    _run_in(source)  # what is damaged is refused before a part is made, which would begin the run anew
    records = gzip.decompress((source / f"{RECORDS}.gz").read_bytes())
    part.mkdir(parents=True)
    shutil.copyfile(source / "run.json", part / "run.json")
    (part / RECORDS).write_bytes(records)
    print(f"{part} goes on where {source} ended.")
    return 0


def layer_of(phase: str) -> str:
    """The layer of most arms of a phase."""
    flags = PHASES[phase]
    return flags[flags.index("--layer") + 1]


def table(summary: dict[str, Any], layer: str = "3") -> str:
    """One row a method; cells are the difference to the unpruned policy in points with its 95 % interval."""
    by_title = {arm["title"]: arm for arm in summary["arms"]}
    rows: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for title, arm in by_title.items():
        if arm["kind"] in ("method", "random"):
            name, keep, fate = named(title, layer)
            rows.setdefault(name, {})[fate, keep] = arm
    every = [(fate, keep) for fate in ("drop", "freeze") for keep in ("0.5", "0.25", "0.125")]
    columns = [column for column in every if any(column in row for row in rows.values())]

    def loss(name: str) -> float:
        return -sum(arm["difference"]["value"] or 0.0 for arm in rows[name].values()) / len(rows[name])

    lines = [
        [name, *(_cell(rows[name][column]) if column in rows[name] else "-" for column in columns)]
        for name in sorted(rows, key=loss)
    ]
    return markdown.table(["method", *map(" ".join, columns)], lines) + "\n"


def named(title: str, layer: str = "3") -> tuple[str, str, str]:
    """Method with its options, keep and fate of an arm's title; the steps that all methods wait, the phase's `layer`,
    and the paper's preset, which was the default of the published runs, are no options here.
    """
    found = ArmOptions.of({"title": title})
    words = [word for word in found.own if not word.startswith(("warmup_steps=", "preset=paper"))]
    words += encoder_title(found.encoder).split()
    if f"{found.layer}" != layer:
        words.insert(0, f"K={found.layer}")
    return " ".join([found.method, *words]), f"{found.keep}", found.pruned


def _cell(arm: dict[str, Any]) -> str:
    found = arm["difference"]
    if not found["pairs"]:
        return "-"
    return f"{100 * found['value']:+.1f} ({100 * found['low']:+.0f} to {100 * found['high']:+.0f})"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("do", choices=("run", "publish", "resume", "table"))
    parser.add_argument("phase", choices=tuple(PHASES))
    parser.add_argument("--out", type=Path, default=Path("study"), help="folder of the parts (default: %(default)s)")
    parser.add_argument("--shard", metavar="I/N", help="run the I-th of N parts (default: all)")
    given = parser.parse_args(arguments)
    if given.do == "run":
        return run(given.phase, given.out, given.shard)
    try:
        if given.do != "table":
            return {"publish": publish, "resume": resume}[given.do](given.phase, given.out)
        if not (RESULTS / given.phase / "summary.json").exists():
            print(f"{RESULTS / given.phase} holds nothing yet; publish it first.", file=sys.stderr)
            return 2
        print(table(read_eval_info(RESULTS / given.phase)["summary"], layer_of(given.phase)), end="")
    except (VLAPrunerError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
