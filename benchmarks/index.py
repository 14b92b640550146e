"""The index of benchmarks/results: each result, what measured it, and where.

python -m benchmarks.index      # writes benchmarks/results/README.md
"""

from __future__ import annotations

import json
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from vla_pruner import markdown

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"

KINDS = (
    ("batch/*", "Throughput by the number of robots in a call", "python -m benchmarks.batch"),
    ("bench/*", "Control steps, unpruned and pruned, in turns", "vla-pruner bench"),
    (
        "bootstrap_coverage",
        "How often bootstrap intervals miss the truth",
        "python -m benchmarks.bootstrap_coverage",
    ),
    (
        "compile_seconds/*",
        "Seconds of the first compiled episode, with an empty and a filled cache",
        "python -m benchmarks.compile_seconds",
    ),
    ("demo", "The demo in Meta-World", "vla-pruner demo"),
    ("drift/*", "Drift of the action where patches are reused, too", "vla-pruner calibrate"),
    ("encoder_flops", "FLOPs with reuse in the vision encoder", "python -m benchmarks.encoder_flops"),
    ("family_flops", "FLOPs of each family at its published size", "python -m benchmarks.family_flops"),
    ("frozen_products", "Keys and values of frozen tokens, two ways", "python -m benchmarks.frozen_products"),
    ("interval_coverage", "How often paired intervals miss the truth", "python -m benchmarks.interval_coverage"),
    ("layer_zero", "Success with pruning before the decoder", "vla-pruner eval"),
    ("libero_object_policy_success", "Success of the policy for LIBERO-Object", "python -m reference.chunk.evaluate"),
    ("metaworld_policy_success", "Success of the two-camera policy", "python -m reference.chunk.evaluate"),
    ("reference_policy_success", "Success of the autoregressive policy", "python -m reference.evaluate"),
    ("semantic_position", "The semantic score against token positions", "python -m benchmarks.semantic_position"),
    ("serving/*", "Replies of a server under load", "python -m benchmarks.serving"),
    ("study/calibration", "The study's calibration", "vla-pruner calibrate"),
    ("study/*", "A phase of the study (docs/study.md)", "python -m benchmarks.study"),
)
"""Results, as paths without the files' endings; of several patterns that match, the first counts."""

HEAD = """# Results

Made by `python -m benchmarks.index`; edit `benchmarks/index.py` instead. "Commit" is that of the code that ran; a "+"
means that it had changes that were not committed. Files have the exact command, the versions and the conditions.

Pages are made from the records and are not kept here:

    vla-pruner report benchmarks/results/study/grid --out grid.html      # likewise confirm, options, layer_zero

"""
TITLES = ("result", "what it is", "measured by", "processor, threads", "torch", "commit")


def index(files: list[str]) -> str:
    """The index as Markdown.

    Args:
        files: paths in benchmarks/results.

    Raises:
        ValueError: nothing in `KINDS` says what a file is.
    """
    rows: dict[str, tuple[str, str, list[str]]] = {}
    for file in sorted(files):
        if file == "README.md":
            continue
        stem = file.partition(".")[0]
        kind = next((kind for kind in KINDS if fnmatchcase(stem, kind[0]) or fnmatchcase(stem, f"{kind[0]}/*")), None)
        if kind is None:
            raise ValueError(f"benchmarks/index.py does not say what benchmarks/results/{file} is; add it to KINDS.")
        name = "/".join(stem.split("/")[: kind[0].count("/") + 1])
        rows.setdefault(name, (kind[1], kind[2], []))[2].append(file)
    return HEAD + markdown.table(TITLES, [_row(name, *row) for name, row in rows.items()]) + "\n"


def _row(name: str, what: str, command: str, files: list[str]) -> tuple[str, ...]:
    found = next((found for file in files if file.endswith(".json") and (found := _conditions(file))), {})
    versions = found.get("versions", {})
    torch = versions.get("torch") or next((one["torch"] for one in versions.values() if isinstance(one, dict)), "")
    processor = found.get("processor") or found.get("cpu") or ""
    threads = f", {found['threads']}" if "threads" in found else ""
    links = " ".join(f"[{Path(file).name}]({file})" for file in files)
    return f"{name}: {links}", what, f"`{command}`", f"{processor}{threads}", torch, found.get("git", "")


def _conditions(file: str) -> dict[str, Any]:
    content = json.loads((RESULTS / file).read_text(encoding="utf-8"))
    content = content[0] if isinstance(content, list) else content
    found = content.get("conditions") or content.get("machine") or {}
    return found[0] if isinstance(found, list) else found


def committed() -> list[str]:
    """Return the files of benchmarks/results that git tracks."""
    listed = subprocess.run(
        ["git", "ls-files", "benchmarks/results"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [line.removeprefix("benchmarks/results/") for line in listed.stdout.splitlines()]


def main() -> None:
    (RESULTS / "README.md").write_text(index(committed()), encoding="utf-8")


if __name__ == "__main__":
    main()
