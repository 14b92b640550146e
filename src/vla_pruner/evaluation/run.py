"""The run: every arm on the same units in turns, each finished episode on the disk at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_pruner.conditions import machine_conditions
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.manifest import MANIFEST, Manifest, Plan, check_versions, identity
from vla_pruner.evaluation.records import EPISODES, Record, RecordFile, check_run, latest, packed
from vla_pruner.evaluation.replica import Recipe, Replica, Work
from vla_pruner.evaluation.settings import EvalSettings
from vla_pruner.evaluation.traces import Trace, write_trace
from vla_pruner.evaluation.units import Unit
from vla_pruner.flags import number_or_name
from vla_pruner.simulators import find_suite
from vla_pruner.simulators.base import Suite, Task, find_task
from vla_pruner.wording import counted


@dataclass
class Run:
    """A run that has begun, was continued, or is over.

    Attributes:
        manifest: its settings.
        records: those that count: one for each unit and arm that is done or has crashed.
        torn: bytes of a last line that was cut off, and is gone.
        crashes: of this process.
    """

    manifest: Manifest
    records: dict[tuple[Unit, str], Record]
    torn: int = 0
    crashes: list[Record] = field(default_factory=list)

    def left(self) -> Work:
        """Return the work that remains; crashed episodes are tried again."""
        arms = [arm["key"] for arm in self.manifest.identity["arms"]]
        work: Work = []
        for index, unit in enumerate(self.manifest.plan.units()):
            # The order turns from unit to unit: no arm always runs on the machine that another has warmed up.
            turn = index % len(arms)
            missing = []
            for arm in (*arms[turn:], *arms[:turn]):
                record = self.records.get((unit, arm))
                if record is None or record.crashed:
                    missing.append((arm, 1 if record is None else record.attempt + 1))
            if missing:
                work.append((unit, missing))
        return work

    def parts(self, batch: int) -> list[Work]:
        """Return `left`, `batch` units at a time."""
        work = self.left()
        return [work[first : first + batch] for first in range(0, len(work), batch)]


def recipe_of(settings: EvalSettings, find: Callable[..., Suite] = find_suite) -> Recipe:
    """Return the parts that every replica of a run is made from."""
    return Recipe(
        policy=settings.policy,
        suites=settings.suite_names,
        suite_options=dict(settings.suite_options),
        arms=settings.arms(),
        max_steps=settings.step_limit,
        horizon=settings.horizon,
        traced=range(settings.first, settings.first + settings.trace),
        batch=settings.batch,
        find=find,
    )


def tasks_of(offered: Mapping[str, tuple[Task, ...]], settings: EvalSettings) -> tuple[Task, ...]:
    """Return the tasks that run, suite by suite.

    Args:
        offered: all tasks of each suite, by its name.

    Raises:
        SuiteError: a task that was named is in none of the suites.
    """
    if settings.tasks is None:
        return tuple(task for tasks in offered.values() for task in tasks[: settings.tasks_a_suite])
    found: set[Task] = set()
    for wanted in settings.tasks:
        asked = number_or_name(wanted)
        having = [tasks for tasks in offered.values() if any(asked in (task.name, task.index) for task in tasks)]
        for tasks in having or list(offered.values())[:1]:
            found.add(find_task(tasks, asked))
    return tuple(task for tasks in offered.values() for task in tasks if task in found)


def _check_instructions(tasks: Sequence[Task], refused: Mapping[tuple[str, int], str]) -> None:
    found = [task for task in tasks if (task.suite, task.index) in refused]
    if not found:
        return
    first = found[0]
    others = "choose others by --tasks, or " if len(found) < len(tasks) else ""
    raise EvaluationError(
        f"The policy refuses the instructions of {len(found)} of {counted(len(tasks), 'task')}, so their episodes "
        f"would all crash; {others}give a policy that was trained on {first.suite}. Task {first.index}: "
        f"{refused[first.suite, first.index]}"
    )


def begin(settings: EvalSettings, described: Mapping[str, Any], file: RecordFile) -> Run:
    """Begin a run in its folder, or go on with the one that is there.

    Args:
        described: of a `Replica`.
        file: the folder's records.

    Raises:
        EvaluationError: the folder holds another run.
    """
    conditions = {
        **machine_conditions(()),
        "policy": settings.policy.name,
        "versions": described["versions"],
        "horizons": described["horizons"],
    }
    asked = Manifest(
        identity(settings, described),
        Plan(
            tasks_of(described["tasks"], settings),
            settings.first,
            settings.episodes_a_task,
            settings.seed,
            settings.shard,
        ),
        settings.for_claims,
        conditions=(conditions,),
    )
    asked.plan.units()  # refused now, if a task has not that many initial states
    _check_instructions(asked.plan.tasks, described["refused"])
    folder = settings.out
    if (folder / MANIFEST).exists():
        manifest = Manifest.read(folder).continued(asked, folder)
    elif file.records:
        raise EvaluationError(
            f"{file.path} holds {len(file.records)} episodes, but {folder / MANIFEST} is missing, so what they were "
            "run with is not known. Restore it, or choose another --out."
        )
    else:
        manifest = asked
        others = sorted(path.name for path in folder.iterdir() if path.is_file() and path.name != EPISODES)
        if others:
            raise EvaluationError(
                f"{folder} holds {others[0]} and no evaluation, and what is written there may overwrite it; choose a "
                "new folder as --out."
            )
    check_run(file.records, manifest.run, str(file.path))
    records = latest(file.records, str(file.path))
    check_versions(list(records.values()), described["versions"])
    manifest.write(folder)
    return Run(manifest, records, file.torn)


def run_here(run: Run, replica: Replica, file: RecordFile, max_errors: int) -> Iterator[Record]:
    """Run the remaining work in this process, yielding each record once it is on the disk.

    Raises:
        EvaluationError: more than `max_errors` episodes crashed, or a record could not be written.
    """
    for work in run.parts(replica.recipe.batch):
        for record, trace in replica.run_units(work, run.manifest.run):
            keep_record(run, file, record, trace, max_errors)
            yield record


def keep_record(run: Run, file: RecordFile, record: Record, trace: Trace | None, max_errors: int) -> None:
    """Write a record, and before it the trace of the episode, so that none is missing if a run stopped between the two;
    errors as in `run_here`.
    """
    if trace is not None:
        write_trace(file.path.parent, trace)
    file.append(record)
    run.records[record.key] = record
    if not record.crashed:
        return
    run.crashes.append(record)
    if len(run.crashes) > max_errors:
        error = record.error or {}
        raise EvaluationError(
            f"{len(run.crashes)} episodes crashed, more than --max-errors {max_errors}; the last was {record.arm} on "
            f"{record.unit}: {error.get('type')}: {error.get('message')} ({error.get('where')}). Crashes are no "
            "failures: fix their cause and give the same command again, which runs them anew."
        )


def open_records(folder: Path) -> RecordFile:
    """Return the records of a run's folder, made if it is absent.

    Raises:
        EvaluationError: it cannot be written to, is in use, or holds a damaged record.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(
            f"The folder {folder} cannot be made ({error.strerror}); choose another --out."
        ) from error
    path = folder / EPISODES
    if packed(path).exists() and not path.exists():
        raise EvaluationError(
            f"{packed(path)} holds this run's episodes, packed, and a run goes on in {EPISODES} alone. Unpack it "
            f"(gunzip --keep {packed(path)}), or choose another --out."
        )
    return RecordFile(path)
