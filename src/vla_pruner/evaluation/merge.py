"""Several folders of one evaluation (shards, suites, more initial states) become one."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.manifest import MANIFEST, Manifest, Plan, check_same, check_versions
from vla_pruner.evaluation.records import EPISODES, Record, check_run, latest, read_records, write_bytes, write_text
from vla_pruner.evaluation.run import Run
from vla_pruner.evaluation.settings import CLAIM_EPISODES
from vla_pruner.evaluation.traces import make_folder, trace_path


def merge(folders: Sequence[Path], out: Path) -> Run:
    """Write the records of `folders` into `out`, with their traces, which can then be continued like any run.

    Raises:
        EvaluationError: an episode is in two of them, their settings or versions differ, their selections do not add up
            to one, a file is missing or damaged, or `out` holds an evaluation already.
    """
    if any((out / name).exists() for name in (EPISODES, MANIFEST)):
        raise EvaluationError(f"{out} holds an evaluation already; merge into a new folder.")
    if len({os.path.realpath(folder) for folder in folders}) < len(folders):
        raise EvaluationError("--merge names a folder twice; its episodes would count twice. Name each one once.")
    manifests = [Manifest.read(folder) for folder in folders]
    records = []
    for folder, manifest in zip(folders, manifests, strict=True):
        check_same(manifests[0].identity, manifest.identity, str(folders[0]), str(folder))
        of_folder = read_records(folder / EPISODES)
        check_run(of_folder, manifest.run, str(folder / EPISODES))
        records += of_folder
    found = latest(records, " and ".join(map(str, folders)))
    check_versions(list(found.values()))
    plan = _together([manifest.plan for manifest in manifests])
    whole = Manifest(
        manifests[0].identity,
        plan,
        plan.episodes >= CLAIM_EPISODES and manifests[0].identity["max_steps"] is None,
        _extended(manifests, plan),
        tuple(one for manifest in manifests for one in manifest.conditions),
    )
    places = {unit: place for place, unit in enumerate(plan.units())}
    strangers = [record for record in found.values() if record.unit not in places]
    if strangers:
        raise EvaluationError(
            f"{strangers[0].unit} is in the records, but in none of the selections that {MANIFEST} names; restore that "
            "file."
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EvaluationError(f"The folder {out} cannot be made ({error.strerror}); choose another --out.") from error
    for folder in folders:
        _take_traces(folder, out, found.values())
    ordered = sorted(found.values(), key=lambda record: places[record.unit])
    try:
        write_text(out / EPISODES, "".join(record.to_line().decode() for record in ordered))
        whole.write(out)
    except BaseException:
        for name in (EPISODES, MANIFEST):  # half of a merge would refuse the same command when it is given again
            with suppress(OSError):
                (out / name).unlink(missing_ok=True)
        raise
    return Run(whole, {record.key: record for record in ordered})


def _extended(manifests: Sequence[Manifest], plan: Plan) -> tuple[int, ...]:
    """Return `Manifest.extended` of the whole. Shards of a run have its initial states; a folder of further ones was
    declared apart, and results may have been looked at without it. Which folder ran first is not recorded, so the first
    initial states count as the first look.
    """
    looks = {one.plan.first + one.plan.episodes - plan.first for one in manifests} - {plan.episodes}
    return tuple(sorted(looks.union(*(one.extended for one in manifests))))


def _take_traces(folder: Path, out: Path, records: Iterable[Record]) -> None:
    """Link the traces of these records, or copy them to another disk; those of episodes that were cut off stay."""
    for record in records:
        source, target = (trace_path(one, *record.key) for one in (folder, out))
        if record.crashed or target.exists() or not source.exists():
            continue
        make_folder(target)
        try:
            os.link(source, target)
        except OSError:
            write_bytes(target, source.read_bytes())


def _together(plans: Sequence[Plan]) -> Plan:
    """One selection that holds all: of the same initial states, or of the same tasks and initial states in a row."""
    tasks = dict.fromkeys(task for plan in plans for task in plan.tasks)
    ranges = sorted({(plan.first, plan.first + plan.episodes) for plan in plans})
    gap = any(stop != start for (_, stop), (start, _) in itertools.pairwise(ranges))
    if gap or (len(ranges) > 1 and any(set(plan.tasks) != set(tasks) for plan in plans)):
        told = ", ".join(f"{start} to {stop - 1}" for start, stop in ranges)
        raise EvaluationError(
            f"The folders hold the initial states {told}, which do not add up to one selection: merge folders of the "
            "same initial states, or of the same tasks with initial states that follow on each other."
        )
    return dataclasses.replace(
        plans[0],
        tasks=tuple(tasks),
        first=ranges[0][0],
        episodes=ranges[-1][1] - ranges[0][0],
        shard=None,
    )
