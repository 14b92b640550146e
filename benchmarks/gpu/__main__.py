"""Everything that is measured on a GPU, in ten minutes and without a network: docs/gpu.md.

    python -m benchmarks.gpu --out DIR          # on a machine with a GPU
    python -m benchmarks.gpu --out DIR --dry    # every line of it on the CPU, tiny

Each item runs in a process of its own, which is killed at the item's limit, and is written to DIR/items/NAME.json
before the next begins. DIR/gpu.json has all of them. An item whose file is there does not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.child import COMPILING_AT_ONCE, ROOT, write
from benchmarks.gpu.plan import COMPILING, PLAN, TEN_MINUTES, Bar, Item, chosen, seconds, told

FORMAT = "vla-pruner gpu 1"
DRY_PATIENCE = 10
"""By how much a dry run may take longer than the plan: the limits are a GPU machine's."""
DONE, FAILED, STOPPED, ABSENT = "done", "failed", "stopped at its limit", "not here"

Command = Callable[[Item, Path], list[str]]


class Run:
    """One run of the plan.

    Args:
        out: folder of the results.
        dry: tiny sizes on the CPU.
        limits: seconds for items whose limit differs from the plan's.
        budget: seconds for the whole run; an item gets at most the rest of them.
        backend: of compiled items.
        command: for tests, a function (item, file) that returns the command line of an item's process.
    """

    def __init__(
        self,
        out: Path,
        dry: bool = False,
        limits: Mapping[str, int] | None = None,
        budget: float = TEN_MINUTES,
        backend: str = "inductor",
        command: Command | None = None,
    ) -> None:
        self._out = out
        self._dry = dry
        self._limits = limits or {}
        self._patience = DRY_PATIENCE if dry else 1
        self._end = time.monotonic() + budget * self._patience
        self._backend = backend
        self._command = command or self._own_command
        (out / "items").mkdir(parents=True, exist_ok=True)

    def file_of(self, item: Item) -> Path:
        """Return the path of an item's results."""
        return self._out / "items" / f"{item.name}.json"

    def run(self, items: Sequence[Item], again: bool = False) -> dict[str, Any]:
        """Run items that have no file yet (`again`: all items), and write each before the next begins; return the
        results of all items, including those of earlier runs.
        """
        for item in items:
            if self.file_of(item).is_file() and not again:
                print(f"{item.name}: there already; --again runs it anew.", flush=True)
                continue
            found = self._item(item)
            write(self.file_of(item), found)
            self.summary()
            reason = f" ({found['reason']})" if found.get("reason") else ""
            print(f"{item.name}: {found['status']}{reason}, {found['seconds']:.0f} s", flush=True)
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Write all items that have a file, with their bars, to gpu.json, and return them."""
        files = [self.file_of(item) for item in PLAN if self.file_of(item).is_file()]
        items = [json.loads(file.read_text(encoding="utf-8")) for file in files]
        conditions = next((item["conditions"] for item in items if item.get("conditions")), None)
        found = {"format": FORMAT, "dry": self._dry, "conditions": conditions, "items": items}
        write(self._out / "gpu.json", found)
        return found

    def _item(self, item: Item) -> dict[str, Any]:
        head = {"item": item.name, "says": item.says, "dry": self._dry}
        if item.missing is not None:
            return {**head, "status": ABSENT, "reason": item.missing, "seconds": 0.0, "bars": judged(item, {}, None)}
        limit = min(self._limits.get(item.name, item.limit) * self._patience, self._end - time.monotonic())
        if limit < 1:
            reason = "the time of the whole run was over"
            return {**head, "status": STOPPED, "reason": reason, "seconds": 0.0, "bars": judged(item, {}, None)}
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            run = self._compile if item.name == COMPILING else self._one
            status, reason, found = run(item, limit, Path(folder))
        taken = round(time.monotonic() - start, 1)
        bars = judged(item, found, (found.get("conditions") or {}).get("device_name"), self._dry)
        return {**head, "status": status, "reason": reason, "seconds": taken, "limit": limit, **found, "bars": bars}

    def _one(self, item: Item, limit: float, folder: Path) -> tuple[str, str | None, dict[str, Any]]:
        file, log = folder / "found.json", self._out / "items" / f"{item.name}.log"
        code = wait(start(self._command(item, file), log), time.monotonic() + limit)
        found = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return *ending(code, log), found

    def _compile(self, item: Item, limit: float, folder: Path) -> tuple[str, str | None, dict[str, Any]]:
        """Compile the compiled items' programs in several processes at once, within one limit for all of them."""
        end = time.monotonic() + limit
        waiting = [
            (one, job.name) for one in PLAN for job in one.jobs if one.missing is None and job.options.get("compile")
        ]
        if self._dry:
            waiting = waiting[:2]  # more processes would show nothing new
        running: list[tuple[str, subprocess.Popen[bytes], Path, Path]] = []
        found: dict[str, Any] = {"processes": []}
        while waiting or running:
            while waiting and len(running) < COMPILING_AT_ONCE and time.monotonic() < end:
                one, job = waiting.pop(0)
                name = f"{one.name}-{job}"
                file, log = folder / f"{name}.json", self._out / "items" / f"{COMPILING}-{name}.log"
                words = [*self._command(one, file), "--compile-only", job]
                running.append((name, start(words, log), file, log))
            over = time.monotonic() >= end
            for entry in list(running):
                name, process, file, log = entry
                code = wait(process, 0.0) if over else process.poll()
                if code is None and not over:
                    continue
                running.remove(entry)
                status, reason = ending(code, log)
                content = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
                found["conditions"] = found.get("conditions") or content.get("conditions")
                told = {"name": name, "status": status, "reason": reason, "jobs": content.get("compiled", [])}
                found["processes"].append(told)
            if over:
                break
            time.sleep(0.05)
        found["processes"] += [
            {"name": f"{one.name}-{job}", "status": STOPPED, "reason": "never began"} for one, job in waiting
        ]
        states = [one["status"] for one in found["processes"]]
        status = next((bad for bad in (FAILED, STOPPED) if bad in states), DONE)
        return status, None, found

    def _own_command(self, item: Item, file: Path) -> list[str]:
        dry = ["--dry"] if self._dry else []
        return [sys.executable, "-m", "benchmarks.gpu.child", item.name, str(file), *dry, "--backend", self._backend]


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a process in the repository's root, in its own process group, so that its children can be killed with
    it.
    """
    paths = [str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )


def wait(process: subprocess.Popen[bytes], end: float) -> int | None:
    """Return the exit code; None if the process ran past `end` and was killed together with its children."""
    try:
        return process.wait(max(0.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        # A process that is blocked in a driver may stay for a while; the next item does not wait for it.
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            print(f"Process {process.pid} does not go away.", flush=True)
        return None


def ending(code: int | None, log: Path) -> tuple[str, str | None]:
    """Return status and reason of a process that ended with this code; None: it was killed at its limit."""
    if code is None:
        return STOPPED, None
    if code == 0:
        return DONE, None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return FAILED, lines[-1][:500] if lines else f"exit code {code}"


def judged(item: Item, found: Mapping[str, Any], device: str | None, dry: bool = False) -> list[dict[str, Any]]:
    """Return every bar of an item, with the measured figure and whether it meets the bar; `met` is None if there is no
    figure that can be compared with it.
    """
    jobs = {job["name"]: job["report"] for job in found.get("jobs", ())}

    def one(bar: Bar) -> dict[str, Any]:
        report = jobs.get(bar.job)
        arm = None if report is None else next((arm for arm in report["arms"] if arm["name"] == bar.arm), None)
        figure = None
        if arm is not None:
            figure = arm["speed"]["value"] if bar.figure == "speed" else arm["milliseconds"]["p50"]
        other = bar.device is not None and bar.device not in (device or "")
        met = None if figure is None or other or dry else bar.holds(figure)
        return {"says": bar.says, "found": figure, "met": met}

    return [one(bar) for bar in item.bars]


def limits_of(words: Sequence[str]) -> dict[str, int]:
    """Read limits, each written as NAME=SECONDS.

    Raises:
        ValueError: a limit is written otherwise, or its name is unknown.
    """
    found = {}
    for word in words:
        name, _, number = word.partition("=")
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"--limit is {word}; it is NAME=SECONDS, such as oft=200.")
        chosen((name,))
        found[name] = int(number)
    return found


def names(text: str) -> tuple[str, ...]:
    """Split a text at its commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the plan; return 0 if every item that can run here was done, 1 if one failed or ran out of time, and 2 if the
    flags are wrong or there is no GPU.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", metavar="DIR", type=Path, required=True, help="folder of the results")
    add("--dry", action="store_true", help="every line of it on the CPU, with tiny sizes")
    add("--only", metavar="A,B", type=names, default=(), help="these items (default: all)")
    add("--skip", metavar="A,B", type=names, default=(), help="not these")
    add("--again", action="store_true", help="run items whose file is there, too")
    add("--limit", metavar="ITEM=S", action="append", default=[], help="another limit of an item; may be repeated")
    add(
        "--budget",
        metavar="S",
        type=float,
        default=TEN_MINUTES,
        help="seconds of the whole run (default: %(default)s)",
    )
    add("--backend", default="inductor", help="of compiled items, as of torch.compile (default: %(default)s)")
    add("--plan", action="store_true", help="print the plan, and run nothing")
    given = parser.parse_args(arguments)
    try:
        items, limits = chosen(given.only, given.skip), limits_of(given.limit)
        problem = None if given.plan else obstacle(given.out, given.dry)
        if not (given.budget > 0 and math.isfinite(given.budget)):
            problem = f"--budget is {given.budget:g}; it is a number of seconds above 0."
    except ValueError as error:
        problem = str(error)
    if problem is not None:
        print(f"benchmarks.gpu: {problem}", file=sys.stderr)
        return 2
    print(told(items, limits), flush=True)
    if given.plan:
        return 0
    if seconds(items, limits) > given.budget:
        print(f"The limits are more than the {given.budget:g} s of the run: the last items may find none left.")
    run = Run(given.out, given.dry, limits, given.budget, given.backend)
    found = run.run(items, given.again)
    for item in found["items"]:
        for bar in item["bars"]:
            figure = "-" if bar["found"] is None else f"{bar['found']:.2f}"
            print(f"{bar['says']}: {figure}, {MET[bar['met']]}")
    mine = {item.name for item in items}
    states = {item["status"] for item in found["items"] if item["item"] in mine}
    return 0 if states <= {DONE, ABSENT} else 1


MET = {True: "met", False: "not met", None: "not measured"}


def obstacle(out: Path, dry: bool) -> str | None:
    """Return why a run cannot write to this folder or cannot run here; None if it can."""
    if out.exists() and not out.is_dir():
        return f"--out is {out}, which is a file; give a folder."
    summary = out / "gpu.json"
    held: dict[Path, Any] = {}
    for file in (summary, *sorted((out / "items").glob("*.json"))):
        try:
            held[file] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {"dry": dry}
        except (OSError, ValueError):
            held[file] = None
        if not isinstance(held[file], dict):
            return f"{file} cannot be read; move it away, and what it is of runs again."
    if held[summary].get("dry") is not dry:
        kind = "no dry run, and this is one" if dry else "a dry run, and this is none"
        return f"--out is {out}, which holds {kind}; give another folder."
    if not dry:
        import torch

        if not torch.cuda.is_available():
            return "torch finds no CUDA device here; --dry goes through everything on the CPU."
    return None


if __name__ == "__main__":
    sys.exit(main())
