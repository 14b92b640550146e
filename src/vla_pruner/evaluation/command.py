"""`vla-pruner eval`: from the settings to the records, the table and `eval_info.json`."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from vla_pruner.evaluation.cluster import Cluster
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.eval_info import ARMS, EVAL_INFO, eval_info, of_arms
from vla_pruner.evaluation.manifest import MANIFEST, Manifest
from vla_pruner.evaluation.merge import merge
from vla_pruner.evaluation.options import ArmOptions
from vla_pruner.evaluation.records import Record, RecordFile, write_json, write_text
from vla_pruner.evaluation.replica import Replica
from vla_pruner.evaluation.run import Run, begin, open_records, recipe_of, run_here
from vla_pruner.evaluation.settings import EvalSettings
from vla_pruner.evaluation.summary import Summary, summarize
from vla_pruner.evaluation.table import (
    COSTS,
    OUTCOMES,
    cost_rows,
    notes,
    outcome_rows,
    suite_table,
    to_markdown,
    to_rich,
)
from vla_pruner.evaluation.traces import trace_path
from vla_pruner.evaluation.units import Unit
from vla_pruner.evaluation.verdict import sentences
from vla_pruner.method_names import told_of_fates
from vla_pruner.simulators import find_suite
from vla_pruner.simulators.base import SimulatorUnavailable, Suite
from vla_pruner.statistics import NEWCOMBE, holm, wilson
from vla_pruner.terminal import INTERRUPTED, LogLines, progress, remark, say, waiting
from vla_pruner.wording import counted, readable, span

TABLE = "table.md"


def run_eval(settings: EvalSettings, console: Console, find: Callable[..., Suite] = find_suite) -> int:
    """Run an evaluation, or go on with the one in its folder, and write its files.

    Args:
        settings: of the run.
        console: for progress and the table.
        find: makes a suite of its name; a stand-in for tests.

    Returns:
        0: every planned episode is there; 1: an episode crashed; 130: interrupted.

    Raises:
        EvaluationError: it cannot run, go on or write; finished episodes are kept.
        PackageMissing: scipy or statsmodels, which the summary needs, is not installed.
    """
    _check_statistics(arm.kind for arm in settings.arms())
    try:
        run, interrupted = _run(settings, console, find)
    except SimulatorUnavailable as error:
        raise EvaluationError(str(error)) from error
    if not run.records:
        say(console, "No episode was finished, so there is nothing to show.")
        return INTERRUPTED
    summary = _show(run, settings.out, console, settings.interval)
    if interrupted:
        return INTERRUPTED
    return 1 if summary.crashed else 0


def run_merge(folders: Sequence[Path], out: Path, console: Console, interval: str = NEWCOMBE) -> int:
    """Merge the folders of one evaluation and show the whole; the result is that of `run_eval`. `interval`: of
    differences, one of `statistics.INTERVALS`.

    Raises:
        EvaluationError: they do not belong together.
        PackageMissing: as of `run_eval`.
    """
    _check_statistics(arm["kind"] for arm in Manifest.read(folders[0]).identity["arms"])
    run = merge(folders, out)
    say(console, f"{counted(len(run.records), 'episode')} of {counted(len(folders), 'folder')}.")
    return 1 if _show(run, out, console, interval).crashed else 0


def _check_statistics(kinds: Iterable[str]) -> None:
    """Compute what the summary will need of arms of these kinds, so that a package that is missing is refused now: not
    after hours, and not when the records are in their folder already.

    Raises:
        PackageMissing: scipy or statsmodels is not installed.
    """
    wilson(0, 1)
    holm([1.0 for kind in kinds if kind == "method"])


def _run(settings: EvalSettings, console: Console, find: Callable[..., Suite]) -> tuple[Run, bool]:
    """Return the run as far as it came, and whether it was interrupted."""
    if (settings.out / MANIFEST).exists():
        Manifest.read(settings.out)  # refused now, before a file is made beside it and the policy is loaded
    stack, was_there = ExitStack(), settings.out.exists()
    try:
        file = stack.enter_context(open_records(settings.out))
        try:
            with waiting(console, f"loading {settings.policy.name}"):
                run, records = _start(settings, file, stack, find)
        except BaseException:
            if not was_there:
                _leave_nothing(file)
            raise
        _greet(run, file, console)
        _say_untraced(run, settings, console)
        try:
            _follow(run, records, console)
        except KeyboardInterrupt:
            say(console, "\nInterrupted: what is finished is kept; the same command goes on.")
            return run, True
        return run, False
    finally:
        stack.close()


def _leave_nothing(file: RecordFile) -> None:
    """Remove the folder that a run made which could not begin, unless something is in it."""
    if not file.path.stat().st_size:
        file.path.unlink()
        with suppress(OSError):
            file.path.parent.rmdir()


def _start(
    settings: EvalSettings, file: RecordFile, stack: ExitStack, find: Callable[..., Suite]
) -> tuple[Run, Iterator[Record]]:
    recipe = recipe_of(settings, find)
    if settings.ray is not None:
        cluster = stack.enter_context(Cluster(recipe, settings.ray, settings.workers))
        run = begin(settings, cluster.described, file)
        return run, cluster.run(run, file, settings.max_errors)
    replica = Replica(recipe)
    stack.callback(replica.close)
    run = begin(settings, replica.describe(), file)
    return run, run_here(run, replica, file, settings.max_errors)


def _greet(run: Run, file: RecordFile, console: Console) -> None:
    plan, arms = run.manifest.plan, run.manifest.identity["arms"]
    total = len(plan.units()) * len(arms)
    part = "" if plan.shard is None else f", shard {plan.shard[0]} of {plan.shard[1]}"
    margin = 100 * run.manifest.identity["margin"]
    remark(
        console,
        f"{counted(len(plan.tasks), 'task')}, {span('initial state', plan.first, plan.episodes)}, "
        f"{counted(len(arms), 'arm')}{part}: {counted(total, 'episode')}. Margin, declared now: {margin:g} points.",
    )
    options = [ArmOptions.of(arm) for arm in arms if arm["kind"] == "method"]
    fates = told_of_fates((one.method, one.pruned) for one in options)
    if fates:
        say(console, fates)
    if run.torn:
        say(console, f"The last line of {file.path} was cut off by a crash; its episode runs again.")
    done = sum(not record.crashed for record in run.records.values())
    if run.records:
        crashed = len(run.records) - done
        again = f"; {crashed} crashed and are tried again" if crashed else ""
        remark(console, f"Going on: {done} of {counted(total, 'episode')} are done{again}.")


def _write_arm(folder: Path, content: Mapping[str, Any]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(
            f"The folder {folder} cannot be made ({error.strerror}). The episodes are safe: make way for it and give "
            "the same command again."
        ) from error
    write_json(folder / EVAL_INFO, content)


def _say_untraced(run: Run, settings: EvalSettings, console: Console) -> None:
    traced = range(settings.first, settings.first + settings.trace)
    done = [one.key for one in run.records.values() if one.unit.initial_state in traced and not one.crashed]
    lacking = sum(not trace_path(settings.out, *key).exists() for key in done)
    if lacking:
        say(
            console,
            f"{counted(lacking, 'episode')} of those that --trace asks for ended without it and stay untraced; "
            "for traces of these choose a new --out.",
        )


def _follow(run: Run, records: Iterator[Record], console: Console) -> None:
    arms = run.manifest.identity["arms"]
    total = len(run.manifest.plan.units()) * len(arms)
    done = sum(not record.crashed for record in run.records.values())
    lines = LogLines(console, total, "episodes", done)
    with _Crashes(console) as crashes, progress(console, note=True) as shown:
        bar = shown.add_task("episodes", total=total, completed=done, note="")
        for record in records:
            done += not record.crashed
            shown.update(bar, completed=done, note=readable(f"{record.arm}: {record.unit.task}, {_ended(record)}"))
            crashes.add(record)
            lines.at(done)


class _Crashes:
    """Prints the crashes of each unit when the next one begins, those with the same message on one line. A context
    manager; the last ones are printed at its end.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._unit: Unit | None = None
        self._arms: dict[str, list[str]] = {}

    def __enter__(self) -> _Crashes:
        return self

    def __exit__(self, *_: object) -> None:
        self._print()

    def add(self, record: Record) -> None:
        """Note a record, crashed or not."""
        if record.unit != self._unit:
            self._print()
            self._unit = record.unit
        if record.error is not None:
            said = f"{record.error['type']}: {record.error['message']}"
            self._arms.setdefault(said, []).append(record.arm)

    def _print(self) -> None:
        for said, arms in self._arms.items():
            say(self._console, f"Crashed: {', '.join(arms)} on {self._unit}: {said}")
        self._arms.clear()


def _ended(record: Record) -> str:
    if record.crashed:
        return "crashed"
    return f"{'solved' if record.success else 'not solved'} in {record.steps} steps"


def _show(run: Run, out: Path, console: Console, interval: str) -> Summary:
    summary = summarize(run, interval)
    said = sentences(summary)
    title = f"{counted(summary.planned, 'episode')} an arm, {counted(summary.tasks, 'task')}"
    say(console)
    console.print(to_rich(title, OUTCOMES, outcome_rows(summary)))
    heads, rows = suite_table(summary)
    if rows:
        console.print(to_rich("By suite", heads, rows))
    console.print(to_rich("What it took", COSTS, cost_rows(summary)))
    for note in notes(summary):
        say(console, note, style="dim")
    say(console)
    for sentence in said:
        say(console, f"- {sentence}")
    info = eval_info(run, summary, said)
    write_json(out / EVAL_INFO, info)
    for name, content in of_arms(info).items():
        _write_arm(out / ARMS / name, content)
    write_text(out / TABLE, to_markdown(summary, said))
    say(console)
    say(console, f"Records: {(out / 'episodes.jsonl').resolve()}", soft_wrap=True)
    say(console, f"Results: {(out / EVAL_INFO).resolve()}", soft_wrap=True)
    say(console, f"Report:  vla-pruner report {shlex.quote(str(out))}", soft_wrap=True)
    return summary
