"""Seconds of the first episode of compiled policies: in a process that begins with an empty cache folder, and in a
second one that finds what the first left there.

    python -m benchmarks.compile_seconds --out DIR [--only reference,pi0] [--threads 2] [--limit 900]
    python -m benchmarks.compile_seconds --out DIR --dry     # every line of it, on one tiny policy, without inductor

Weights are random and tiny: what takes long is tracing and compiling, and both depend on the number of layers and
operations, not on the width. --out gets compile_seconds.json and compile_seconds.md, written anew after each policy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vla_pruner import markdown
from vla_pruner.conditions import machine_conditions
from vla_pruner.errors import OptionError, UnsupportedModelError, VLAPrunerError
from vla_pruner.outputs import check_folder
from vla_pruner.plugins import class_at
from vla_pruner.registry import ROWS

ROOT = Path(__file__).parents[1]
FORMAT = "vla-pruner compile seconds 1"
POLICIES = tuple(row.name for row in ROWS if row.random is not None and class_at(row.family).compilable)
DRY = ("reference",)
INDUCTOR = "inductor"
NOT_HERE = 3
"""The exit code of a process whose policy cannot be built here; its last line says why."""
PRUNED_STEPS = 2
"""Pruned control steps of the episode: one on CUDA warms a graph up, the next records it."""
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
"""The variables that name the folders of torch's caches."""
TITLES = (
    "policy", "programs", "graphs", "first process, s", "second process, s", "uncompiled, s", "found in the cache",
)  # fmt: skip


def episode(name: str, backend: str, threads: int | None) -> dict[str, Any]:
    """Run a policy's first episode compiled, and one uncompiled; return the seconds of each control step.

    Raises:
        UnsupportedModelError: the policy cannot be built here.
    """
    import torch
    from torch._dynamo.utils import counters

    import vla_pruner as vp
    from vla_pruner.policies.base import example_of

    if threads is not None:
        torch.set_num_threads(threads)
    policy = vp.random_policy(name)
    seen = example_of(policy)
    method = vp.VLAPruner(keep=0.25, preset="paper")

    def steps(session: Any) -> list[float]:
        taken = []
        for _ in range(method.history + PRUNED_STEPS):
            start = time.perf_counter()
            policy.act(seen.images, seen.instruction, seen.proprio)
            taken.append(time.perf_counter() - start)
        assert session.kept is not None, "no step was pruned"
        return taken

    with method.attach(policy) as session:
        uncompiled = steps(session)
    with method.attach(policy) as session:
        session.compile(backend)
        taken = steps(session)
        compiled = session._runner.compiled
        programs = 0 if compiled is None else compiled.programs
    found = {key: counters["inductor"][f"fxgraph_cache_{key}"] for key in ("hit", "miss", "bypass")}
    return {
        "seconds": sum(taken),
        "steps": taken,
        "uncompiled_seconds": sum(uncompiled),
        "programs": programs,
        "graphs": counters["stats"]["unique_graphs"],
        "cache": found,
    }


def both(name: str, backend: str, threads: int | None, limit: float) -> dict[str, Any]:
    """Run the episode in two processes that share a cache folder, which is empty at first.

    Args:
        name: of the policy.
        backend: as in `torch.compile`.
        threads: of torch.
        limit: seconds after which a process is killed.
    """
    found: dict[str, Any] = {"name": name}
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "HF_HUB_OFFLINE": "1",
            **{variable: str(Path(folder, variable.lower())) for variable in CACHES},
        }
        words = [sys.executable, "-m", "benchmarks.compile_seconds", "--child", name, "--backend", backend]
        words += [] if threads is None else ["--threads", str(threads)]
        for process in ("first", "second"):
            try:
                done = subprocess.run(
                    words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
                )
            except subprocess.TimeoutExpired:
                return {**found, "status": f"its {process} process took more than {limit:g} s"}
            if done.returncode:
                lines = (done.stdout + done.stderr).strip().splitlines()
                kind = "not here" if done.returncode == NOT_HERE else "failed"
                return {**found, "status": kind, "reason": lines[-1][:500] if lines else f"exit code {done.returncode}"}
            found[process] = json.loads(done.stdout.splitlines()[-1])
        found["cache_bytes"] = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
    return {**found, "status": "done"}


def to_markdown(policies: Sequence[dict[str, Any]]) -> str:
    """Return a table with one row a policy."""
    rows = []
    for policy in policies:
        if policy["status"] != "done":
            told = ": ".join(filter(None, (policy["status"], policy.get("reason"))))
            rows.append((policy["name"], told))
            continue
        first, second = policy["first"], policy["second"]
        cache = second["cache"]
        cells = (
            policy["name"],
            f"{first['programs']}",
            f"{first['graphs']}",
            f"{first['seconds']:.1f}",
            f"{second['seconds']:.1f}",
            f"{second['uncompiled_seconds']:.2f}",
            f"{cache['hit']} of {sum(cache.values())}",
        )
        rows.append(cells)
    return markdown.table(TITLES, rows) + "\n"


def names(text: str) -> tuple[str, ...]:
    """Return names of policies that are separated by commas."""
    found = tuple(word.strip() for word in text.split(",") if word.strip())
    unknown = [name for name in found if name not in POLICIES]
    if unknown or not found:
        told = ", ".join(map(repr, unknown or [text]))
        raise argparse.ArgumentTypeError(f"{told} is none of {', '.join(POLICIES)}")
    return found


def run(policies: Sequence[str], backend: str, threads: int | None, limit: float, out: Path) -> list[dict[str, Any]]:
    """Measure policies one after another, and write both files after each.

    Raises:
        OptionError: `out` cannot be written to.
    """
    check_folder(out)
    conditions = machine_conditions(("torch", "transformers", "lerobot", "triton"))
    if threads is not None:
        conditions["threads"] = threads
    measured: list[dict[str, Any]] = []
    for name in policies:
        measured.append(both(name, backend, threads, limit))
        print(to_markdown(measured[-1:]).splitlines()[-1], flush=True)
        content = {"format": FORMAT, "conditions": conditions, "backend": backend, "policies": measured}
        (out / "compile_seconds.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (out / "compile_seconds.md").write_text(to_markdown(measured), encoding="utf-8")
    return measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure; return 0 if every policy that can be built here was measured, 1 if one was not, 2 if flags are wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, help="folder of the results")
    add("--only", metavar="A,B", type=names, help=f"some of {', '.join(POLICIES)} (default: all)")
    add("--dry", action="store_true", help="one tiny policy, without inductor")
    add("--backend", help=f"as of torch.compile (default: {INDUCTOR})")
    add("--threads", metavar="N", type=int, help="of torch (default: as it is)")
    add("--limit", metavar="S", type=float, default=900.0, help="seconds of a process (default: %(default)s)")
    add("--child", metavar="NAME", choices=POLICIES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.child is not None:
        try:
            print(json.dumps(episode(given.child, given.backend or INDUCTOR, given.threads)))
        except UnsupportedModelError as error:
            print(error)
            return NOT_HERE
        return 0
    try:
        if given.out is None:
            raise OptionError("--out is missing; give the folder of the results.")
        if (given.threads is not None and given.threads < 1) or not given.limit > 0:
            raise OptionError("--threads is a whole number of 1 or more, and --limit a number of seconds above 0.")
        if given.dry and (given.only or given.backend):
            raise OptionError("--dry runs one policy, without inductor; leave --only and --backend out, or --dry.")
        policies = DRY if given.dry else given.only or POLICIES
        backend = "eager" if given.dry else given.backend or INDUCTOR
        measured = run(policies, backend, given.threads, given.limit, given.out)
    except VLAPrunerError as error:
        print(f"benchmarks.compile_seconds: {error}", file=sys.stderr)
        return 2
    return 0 if all(policy["status"] in ("done", "not here") for policy in measured) else 1


if __name__ == "__main__":
    sys.exit(main())
