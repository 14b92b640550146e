"""One episode: one arm on one unit, from the reset to its record."""

from __future__ import annotations

import socket
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import numpy as np
import torch

from vla_pruner.errors import VLAPrunerError
from vla_pruner.evaluation.arms import Arm
from vla_pruner.evaluation.policies import sees_images
from vla_pruner.evaluation.records import Record
from vla_pruner.evaluation.traces import Tracer
from vla_pruner.evaluation.units import Unit
from vla_pruner.simulators.base import Convention, Environment, SimulatorUnavailable
from vla_pruner.statistics import percentile


@dataclass
class _Course:
    """What has happened in an episode so far."""

    success: bool = False
    steps: int = 0
    rewards: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    kept: list[int | None] = field(default_factory=list)
    visual_tokens: int | None = None


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
) -> Record:
    """Runs one episode to its end; a crash of policy or simulator ends it and is recorded as what it is.

    The noise that a flow policy starts from depends on the unit and the control step alone, so it is the same in every
    arm. torch's global generator is as before afterwards.

    Args:
        policy: a `Policy`, or one that sees the simulator's state.
        environment: of the unit's task; the episode begins with its reset.
        convention: how the policy sees the suite.
        run, attempt, versions: for the record.
        max_steps: ends the episode earlier than the suite does.
        tracer: is told of every control step; None: nobody is.

    Raises:
        VLAPrunerError, SimulatorUnavailable: it cannot run at all, as it would not the next time.
    """
    course, error = _Course(), None
    started, begun = datetime.now(UTC), perf_counter()
    try:
        with torch.random.fork_rng(generator_devices(policy)):
            _drive(course, policy, environment, convention, arm, unit, max_steps, tracer)
    except (VLAPrunerError, SimulatorUnavailable):
        raise
    except Exception as crash:
        error = describe(crash)
    pruned = [count for count in course.kept if count is not None]
    return Record(
        run=run,
        arm=arm.key,
        unit=unit,
        success=None if error else course.success,
        termination="error" if error else "success" if course.success else "max_steps",
        steps=course.steps,
        control_steps=len(course.latency),
        sum_reward=float(sum(course.rewards)),
        max_reward=float(max(course.rewards, default=0.0)),
        latency_ms=[round(milliseconds, 3) for milliseconds in course.latency],
        latency_p50_ms=round(percentile(course.latency, 50), 3) if course.latency else None,
        latency_p99_ms=round(percentile(course.latency, 99), 3) if course.latency else None,
        visual_tokens=course.visual_tokens,
        kept_tokens=[min(pruned), max(pruned)] if pruned else [],
        pruned_steps=len(pruned),
        error=error,
        attempt=attempt,
        seconds=round(perf_counter() - begun, 3),
        started=started.isoformat(timespec="seconds"),
        worker=socket.gethostname(),
        versions=dict(versions or {}),
    )


def _drive(
    course: _Course,
    policy: Any,
    environment: Environment,
    convention: Convention,
    arm: Arm,
    unit: Unit,
    max_steps: int | None,
    tracer: Tracer | None,
) -> None:
    limit = environment.task.max_steps if max_steps is None else min(max_steps, environment.task.max_steps)
    observation, _ = environment.reset(initial_state=unit.initial_state)
    if not sees_images(policy):
        policy.watch(environment)
    with arm.attach(policy, unit) as session:
        policy.reset()
        if session is not None:
            session.reset()
        over = False
        while not over:
            images, proprio = convention.observe(observation)
            if arm.is_blank:
                images = {name: np.zeros_like(image) for name, image in images.items()}
            seed = unit.noise_seed(len(course.latency), arm.noise_stream)
            torch.manual_seed(seed)
            start = perf_counter()
            chunk = policy.act(images, observation.instruction, proprio)
            course.latency.append(1e3 * (perf_counter() - start))
            _note_kept(course, session)
            if tracer is not None:
                tracer.note(
                    images, observation.instruction, proprio, chunk, seed=seed, steps=course.steps, session=session
                )
            actions = convention.plan(chunk)
            if session is not None and session.method.motion:
                session.moved(convention.path(actions))
            for action in actions:
                observation, reward, terminated, truncated, info = environment.step(action)
                course.steps += 1
                course.rewards.append(float(reward))
                course.success = bool(info["success"])
                over = terminated or truncated or course.success or course.steps >= limit
                if over:
                    break


def _note_kept(course: _Course, session: Any) -> None:
    if session is None:
        return
    course.kept.append(None if session.kept is None else int(session.kept.shape[1]))
    if session.step is not None:
        course.visual_tokens = session.step.layout.tokens


def describe(crash: BaseException) -> dict[str, str]:
    """A crash for a record: its type, its message, and where it came from."""
    frames = traceback.extract_tb(crash.__traceback__)
    where = " < ".join(f"{frame.filename}:{frame.lineno} {frame.name}" for frame in reversed(frames[-4:]))
    return {"type": type(crash).__name__, "message": str(crash)[:2000], "where": where}


def generator_devices(policy: Any) -> list[int]:
    """CUDA devices whose generators are put back: the policy's."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    parameters = getattr(getattr(policy, "module", policy), "parameters", list)()
    return sorted({one.device.index for one in parameters if one.is_cuda and one.device.index is not None})
