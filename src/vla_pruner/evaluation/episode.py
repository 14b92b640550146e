"""One episode: one arm on one unit, from the reset to its record."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vla_pruner.accelerators import accelerators_of, generators_put_back
from vla_pruner.errors import ObservationError, VLAPrunerError
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.policies import sees_images
from vla_pruner.evaluation.records import Record
from vla_pruner.evaluation.traces import Tracer
from vla_pruner.evaluation.units import Unit
from vla_pruner.method_names import was_pruned
from vla_pruner.simulators.base import Convention, Environment, Observation, OutcomeError, SimulatorUnavailable, outcome
from vla_pruner.statistics import percentile
from vla_pruner.wording import readable, said_by

CRASHES = (Exception, SystemExit, GeneratorExit)
"""The errors of a policy or a simulator that end one episode: everything but an interrupt."""


class EnvironmentCrashed(Exception):
    """An environment raised something, whatever its class: its cause."""


class Course:
    """One arm on one unit while it runs: its observations, its progress, and its record.

    Attributes:
        over: True if no further control step is to be run, also after a crash.
        control_steps: those that were run.
        seconds: that the episode has taken, the environment included.
    """

    def __init__(
        self, environment: Environment, convention: Convention, arm: Arm, unit: Unit, max_steps: int | None = None
    ) -> None:
        self.arm, self.unit = arm, unit
        self.over = False
        self.control_steps = 0
        self.seconds = 0.0
        self.steps = 0
        self._environment = environment
        self._convention = convention
        limit = environment.task.max_steps
        self._limit = limit if max_steps is None else min(max_steps, limit)
        self._observation: Observation | None = None
        self._success = False
        self._rewards: list[float] = []
        self._latency: list[float] = []
        self._kept: list[int | None] = []
        self._pruned_steps = 0
        self._visual_tokens: int | None = None
        self._error: dict[str, str] | None = None
        self._started = datetime.now(UTC)

    def begin(self) -> None:
        """Reset the environment."""
        with self._of_environment():
            self._observation, _ = self._environment.reset(initial_state=self.unit.initial_state)

    def see(self) -> Observation:
        """Return the policy's observation."""
        assert self._observation is not None
        with self._of_environment():  # images are drawn here
            seen = self._convention.observe(self._observation)
            if seen.proprio is not None and not np.isfinite(seen.proprio).all():
                raise OutcomeError("The environment's state holds numbers that are not finite (NaN or infinity).")
        if self.arm.is_blank:
            return replace(seen, images={name: np.zeros_like(image) for name, image in seen.images.items()})
        return seen

    def note(self, session: Any, latency: float | None) -> None:
        """Note that a control step was run.

        Args:
            session: the one that is attached, or None.
            latency: milliseconds of `act`; None: they are not recorded.
        """
        self.control_steps += 1
        if latency is not None:
            self._latency.append(latency)
        if session is None:
            return
        self._kept.append(None if session.kept is None else int(session.kept.shape[1]))
        self._pruned_steps += was_pruned(session)
        if session.step is not None:
            self._visual_tokens = session.step.layout.tokens

    def carry_out(self, actions: np.ndarray) -> None:
        """Carry out the planned actions, (horizon, action_size), up to the end of the episode."""
        if not np.isfinite(actions).all():
            raise ValueError("The policy's action holds numbers that are not finite (NaN or infinity).")
        for action in actions:
            with self._of_environment():
                self._observation, *said = self._environment.step(action)
                reward, over, success = outcome(*said)
                if not np.isfinite(sum(self._rewards) + reward):
                    raise OutcomeError("The environment's rewards add up to no finite number.")
            self.steps += 1
            self._rewards.append(reward)
            self._success = success
            solved = success and self._environment.task.ends_at_success
            self.over = over or solved or self.steps >= self._limit
            if self.over:
                break

    @contextmanager
    def _of_environment(self) -> Iterator[None]:
        """Attribute errors in the block to the environment, even one of our classes.

        Raises:
            SimulatorUnavailable: it cannot run at all.
            EnvironmentCrashed: for everything else.
        """
        try:
            yield
        except SimulatorUnavailable:
            raise
        except CRASHES as crash:
            raise EnvironmentCrashed from crash

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """End the episode by a crash of policy or simulator in the block, and record it as what it is.

        Raises:
            VLAPrunerError, SimulatorUnavailable: it cannot run at all, as it would not the next time.
        """
        try:
            yield
        except CRASHES as crash:
            if not is_crash(crash):
                raise
            self.crash(crash)

    def crash(self, crash: BaseException) -> None:
        """End the episode by a crash."""
        cause = crash.__cause__ if isinstance(crash, EnvironmentCrashed) else None
        self._error = describe(cause or crash)
        self.over = True

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Add the time of the block to this episode's."""
        start = perf_counter()
        try:
            yield
        finally:
            self.seconds += perf_counter() - start

    def record(self, run: str, attempt: int, versions: Mapping[str, str | None] | None) -> Record:
        """Return the record of the episode."""
        pruned = [count for count in self._kept if count is not None]
        latency, error = self._latency, self._error
        return Record(
            run=run,
            arm=self.arm.key,
            unit=self.unit,
            success=None if error else self._success,
            termination="error" if error else "success" if self._success else "max_steps",
            steps=self.steps,
            control_steps=self.control_steps,
            sum_reward=float(sum(self._rewards)),
            max_reward=float(max(self._rewards, default=0.0)),
            latency_ms=[round(milliseconds, 3) for milliseconds in latency],
            latency_p50_ms=round(percentile(latency, 50), 3) if latency else None,
            latency_p99_ms=round(percentile(latency, 99), 3) if latency else None,
            visual_tokens=self._visual_tokens,
            kept_tokens=[min(pruned), max(pruned)] if pruned else [],
            pruned_steps=self._pruned_steps,
            error=error,
            attempt=attempt,
            seconds=round(self.seconds, 3),
            started=self._started.isoformat(timespec="seconds"),
            worker=socket.gethostname(),
            versions=dict(versions or {}),
        )


def run_episode(
    policy: Any,
    environment: Environment,
    convention: Convention,
    arm: Arm,
    unit: Unit,
    *,
    run: str,
    attempt: int = 1,
    max_steps: int | None = None,
    versions: Mapping[str, str | None] | None = None,
    tracer: Tracer | None = None,
    record_latency: bool = True,
) -> Record:
    """Run one episode to its end; a crash of policy or simulator ends it and is recorded as what it is.

    The noise that a flow policy starts from depends on the unit and the control step alone, so it is the same in every
    arm. torch's global generator is as before afterwards.

    Args:
        policy: a `Policy`, or one that sees the simulator's state.
        environment: of the unit's task; the episode begins with its reset.
        convention: the policy's view of the suite.
        run, attempt, versions: for the record.
        max_steps: ends the episode earlier than the suite does.
        tracer: notes every control step; None: no trace.
        record_latency: whether the record has the time of each `act`.

    Raises:
        VLAPrunerError, SimulatorUnavailable: it cannot run at all, as it would not the next time.
    """
    course = Course(environment, convention, arm, unit, max_steps)
    with course.guarded(), course.timed(), generators_put_back(generator_devices(policy)):
        course.begin()
        if not sees_images(policy):
            policy.watch(environment)
        with attached(arm, policy, unit) as session:
            while not course.over:
                _step(course, policy, convention, session, tracer, record_latency)
    return course.record(run, attempt, versions)


@contextmanager
def attached(arm: Arm, policy: Any, unit: Unit) -> Iterator[Any]:
    """Yield the session that an arm attaches at the beginning of an episode, or None."""
    with arm.attach(policy, unit) as session:
        policy.reset()
        if session is not None:
            session.reset()
        yield session


def _step(
    course: Course,
    policy: Any,
    convention: Convention,
    session: Any,
    tracer: Tracer | None,
    record_latency: bool,
) -> None:
    seen = course.see()
    seed = course.unit.noise_seed(course.control_steps, course.arm.noise_stream)
    torch.manual_seed(seed)
    start = perf_counter()
    chunk = policy.act(seen.images, seen.instruction, seen.proprio)
    milliseconds = 1e3 * (perf_counter() - start)
    course.note(session, milliseconds if record_latency else None)
    if tracer is not None:
        tracer.note(seen, chunk, seed=seed, steps=course.steps, session=session)
    actions = convention.plan(chunk)
    if session is not None and session.method.motion:
        session.moved(convention.path(actions))
    course.carry_out(actions)


def is_crash(error: BaseException) -> bool:
    """Return True if an error ends one episode. Others would end every episode the same way, so the run stops: a method
    that does not fit the model, a simulator that is missing. An observation that the policy refuses is the episode's
    own.
    """
    return isinstance(error, ObservationError) or not isinstance(error, (VLAPrunerError, SimulatorUnavailable))


def describe(crash: BaseException) -> dict[str, str]:
    """Return a crash for a record: its type, its message, and its place."""
    frames = traceback.extract_tb(crash.__traceback__)
    where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-4:]))
    return {"type": type(crash).__name__, "message": said_by(crash)[:2000], "where": readable(where)}


def generator_devices(policy: Any) -> list[torch.device]:
    """Return the accelerators whose random generators are restored: those that hold the policy."""
    return accelerators_of(getattr(getattr(policy, "module", policy), "parameters", list)())
