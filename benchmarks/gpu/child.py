"""One item of the plan, in a process of its own: `benchmarks.gpu` starts it and kills it at its limit.

    python -m benchmarks.gpu.child ITEM FILE [--dry] [--compile-only JOB] [--backend NAME]

What it finds stands in FILE after every step, so that what was found before a kernel hung is not lost.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.gpu.plan import CHOOSING, COMPILING, CORRECTNESS, PLAN, Item

ROOT = Path(__file__).parents[2]
GPU_TESTS = ("tests/gpu", "tests/methods/test_greedy_triton.py", "tests/bench/test_measure.py")
DRY_TESTS = ("tests/gpu/test_on_device.py",)
COMPILING_AT_ONCE = 4
"""Processes that compile at the same time: three times OpenVLA's weights and pi0's fit into 78 GB."""


class Found:
    """The results of an item so far, in a file that always holds all of them."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.content: dict[str, Any] = {}

    def add(self, **fields: Any) -> None:
        """Set fields, and write the file."""
        self.content |= fields
        write(self._file, self.content)

    def append(self, field: str, value: Any) -> None:
        """Append to a list, and write the file."""
        self.add(**{field: [*self.content.get(field, ()), value]})


def write(file: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    part.replace(file)


def run_tests(found: Found, dry: bool) -> None:
    """Run the tests marked `gpu`; dry: some tests of the same file, on the CPU."""
    import pytest

    class Recorder:
        """Records every test when it ends."""

        def pytest_runtest_logreport(self, report: Any) -> None:
            # A skipped test has no report of its call.
            if report.when == "call" or report.outcome != "passed":
                told = {"name": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
                if report.outcome == "failed":
                    told["why"] = str(report.longrepr)[-4000:]
                if report.outcome == "skipped":
                    told["why"] = str(report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr)
                found.append("tests", told)

    # Other plugins of the installed pytest may warn, and in this project warnings fail a test.
    options = ["-q", "-p", "no:cacheprovider", "-o", "filterwarnings=default", "--rootdir", str(ROOT)]
    files = [str(ROOT / name) for name in (DRY_TESTS if dry else GPU_TESTS)]
    # In a dry run the tests of one model stand for all: the usual tests run these files on the CPU anyway.
    which = ["-m", "not gpu", "-k", "llama and (keep_all or full_length)"] if dry else ["-m", "gpu"]
    code = pytest.main([*options, *which, *files], plugins=[Recorder()])
    found.add(pytest_exit_code=int(code))
    tests = found.content.get("tests", [])
    if code or not any(test["outcome"] == "passed" for test in tests):
        raise SystemExit(f"pytest ended with {int(code)}")


def run_jobs(found: Found, item: Item, dry: bool, compile_only: str | None, backend: str) -> None:
    """Run the benchmarks of an item, one after the other; if `compile_only` names one, only compile its programs."""
    import torch

    from vla_pruner.benching.arms import Turns, arms_of
    from vla_pruner.benching.feeds import feed
    from vla_pruner.benching.policies import build
    from vla_pruner.benching.run import bench_subject, turns_of
    from vla_pruner.benching.settings import BenchSettings
    from vla_pruner.benching.subject import Subject

    def say(what: str, done: int, of: int) -> None:
        # Otherwise every round would print a line.
        if of <= 1 or done == 1 or what.startswith("compiling"):
            print(f"{item.name}: {what}", flush=True)

    policies: dict[tuple[Any, ...], Any] = {}
    for job in item.jobs:
        if compile_only not in (None, job.name):
            continue
        settings = BenchSettings(model=job.model, **job.settings(dry, backend))
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        start, device = time.perf_counter(), torch.device(settings.device)
        key = (settings.model, settings.cameras)
        if key not in policies:
            policies[key] = build(settings, device, getattr(torch, settings.dtype))
        policy = policies[key]
        subject = Subject(policy, feed(policy, settings, device), settings, device)
        built = time.perf_counter() - start
        if compile_only:
            with turns_of(Turns(subject, arms_of(settings)), say, whole_episodes=False) as turns:
                told = {name: asdict(of) for name, of in turns.compiling.items()}  # type: ignore[attr-defined]
            found.append("compiled", {"name": job.name, "arms": told, "building_s": built})
        else:
            report = bench_subject(subject, say, whole_episodes=False).to_json()
            found.append("jobs", {"name": job.name, "building_s": built, "report": report})
        # Programs and the memory of their CUDA graphs are freed after the job.
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def run_choosing(found: Found, dry: bool) -> None:
    """Time every form of the greedy filter on the device."""
    import torch

    from benchmarks.greedy import SIZES, forms_on, problem, summary, time_forms

    device = torch.device("cpu" if dry else "cuda")
    for tokens, k in ((64, 16),) if dry else SIZES:
        for rows in (1, 8):
            forms = forms_on(*problem(rows, tokens, k, device), k)
            taken = summary(time_forms(forms, 2 if dry else 30, device))
            found.append("forms", {"tokens": tokens, "k": k, "rows": rows, "forms": taken})


def conditions(dry: bool) -> dict[str, Any]:
    """Return the machine, its device and the versions."""
    import torch

    from vla_pruner.conditions import machine_conditions

    found = machine_conditions(("torch", "transformers", "numpy", "triton", "lerobot"))
    if not dry:
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "device_name": torch.cuda.get_device_name(0),
            "device_memory": properties.total_memory,
            "cuda": torch.version.cuda,
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the item; return the exit code 0 if all of it ran."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("item", choices=[item.name for item in PLAN])
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--compile-only", metavar="JOB")
    parser.add_argument("--backend", default="inductor")
    given = parser.parse_args(arguments)
    os.environ["HF_HUB_OFFLINE"] = "1"
    (item,) = (item for item in PLAN if item.name == given.item)
    found = Found(given.file)
    found.add(conditions=conditions(given.dry))
    if item.name == CORRECTNESS:
        run_tests(found, given.dry)
    elif item.name == CHOOSING:
        run_choosing(found, given.dry)
    elif item.name != COMPILING:
        run_jobs(found, item, given.dry, given.compile_only, given.backend)
    found.add(whole=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
