"""Episodes of one arm side by side: their control steps share forward passes, each with a memory of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vla_pruner.accelerators import generator_states, generators_put_back
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.episode import CRASHES, Course, attached, generator_devices, is_crash
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.records import Record
from vla_pruner.evaluation.units import Unit
from vla_pruner.methods import RandomKeep
from vla_pruner.observations import Observation
from vla_pruner.policies.base import BatchPolicy
from vla_pruner.simulators.base import Convention, Environment


def shares(arm: Arm) -> bool:
    """Return True if episodes of an arm can share passes: its method's decisions and memory are each robot's own.

    A random method has a seed for each unit; a motion gate opens for one robot and not for another; and keys and values
    of the last control step, of the decoder or the vision encoder, are not kept for each robot.
    """
    method = arm.method
    if arm.encoder is not None:
        return False
    if method is None:
        return True
    return not (isinstance(method, RandomKeep) or method.motion or method.fate.needs_last_step)


def check_batch(policy: Any, batch: int) -> None:
    """Refuse to run `batch` episodes side by side with a policy that acts for one robot at a time.

    Raises:
        EvaluationError: it does.
    """
    if batch > 1 and not isinstance(policy, BatchPolicy):
        raise EvaluationError(
            f"--batch is {batch}, but {type(policy).__name__} acts for one robot at a time (it has no act_batch); "
            "leave --batch out, or use --ray with several --workers."
        )


def run_together(
    policy: BatchPolicy,
    environments: Sequence[Environment],
    convention: Convention,
    arm: Arm,
    units: Sequence[Unit],
    *,
    run: str,
    attempts: Sequence[int],
    max_steps: int | None = None,
    versions: Mapping[str, str | None] | None = None,
) -> Iterator[tuple[int, Record]]:
    """Run B episodes of an arm to their ends. A finished episode leaves the pass; the others go on.

    A robot's row is computed as if it were alone, up to rounding. Latencies are in no record, since a pass is shared,
    and of its time each has an equal part. A crash of a simulator is its episode's own; one of the policy ends all that
    shared the pass.

    Args:
        environments: one for each unit.
        attempts: of each unit.
        convention, arm, run, max_steps, versions: as of `run_episode`.

    Yields:
        the place of a unit and its record, as soon as its episode is over.

    Raises:
        EvaluationError: the policy draws at random in a pass that several share.
        VLAPrunerError, SimulatorUnavailable: it cannot run at all, as it would not the next time.
    """
    courses = [
        Course(environment, convention, arm, unit, max_steps)
        for environment, unit in zip(environments, units, strict=True)
    ]
    told: set[int] = set()

    def ended() -> Iterator[tuple[int, Record]]:
        for place, course in enumerate(courses):
            if course.over and place not in told:
                told.add(place)
                yield place, course.record(run, attempts[place], versions)

    with generators_put_back(generator_devices(policy)):
        for course in courses:
            with course.guarded(), course.timed():
                course.begin()
        live = [course for course in courses if not course.over]
        session, stack = None, ExitStack()
        try:
            with _shared(live):
                session = stack.enter_context(attached(arm, policy, units[0]))
            while live and not live[0].over:
                with _shared(live):
                    live = _step(policy, convention, session, live)
                yield from ended()  # outside of the guarded block: a caller that stops listening is no crash
        finally:
            with _shared(live):
                stack.close()
    yield from ended()


@contextmanager
def _shared(live: Sequence[Course]) -> Iterator[None]:
    """End all these episodes, which shared the pass, by a crash in the block."""
    try:
        yield
    except CRASHES as crash:
        if not is_crash(crash):
            raise
        for course in live:
            if not course.over:
                course.crash(crash)


def _step(policy: BatchPolicy, convention: Convention, session: Any, live: list[Course]) -> list[Course]:
    """One control step of all; returns those that go on."""
    seen = []
    for course in live:
        with course.guarded(), course.timed():
            seen.append(course.see())
    live = _going_on(session, live)
    if not live:
        return []
    start = perf_counter()
    chunks = _act(policy, seen)
    passed = perf_counter() - start
    for course, chunk in zip(live, chunks, strict=True):
        with course.guarded(), course.timed():
            course.seconds += passed / len(live)
            course.note(session, None)
            course.carry_out(convention.plan(chunk))
    return _going_on(session, live)


def _going_on(session: Any, live: list[Course]) -> list[Course]:
    """Return the episodes that are not over; the session forgets the others."""
    rows = [row for row, course in enumerate(live) if not course.over]
    if session is not None and session.memory is not None and 0 < len(rows) < len(live):
        session.memory = session.memory.take(rows)
    return [live[row] for row in rows]


def _act(policy: BatchPolicy, seen: Sequence[Observation]) -> np.ndarray:
    devices = generator_devices(policy)
    undrawn = generator_states(devices)
    states = [one.proprio for one in seen if one.proprio is not None]
    chunks = policy.act_batch([one.images for one in seen], [one.instruction for one in seen], states or None)
    if not all(map(torch.equal, undrawn, generator_states(devices))):
        raise EvaluationError(
            f"{type(policy).__name__}.act_batch draws from torch's generator, so an episode's noise would depend on "
            "which others share its pass; leave --batch out."
        )
    return chunks
