"""Units on a Ray cluster: one policy replica an actor, one writer of records, and nothing lost when a worker dies."""

from __future__ import annotations

import importlib
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from vla_pruner.errors import VLAPrunerError
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.records import Record, RecordFile
from vla_pruner.evaluation.replica import Recipe, Replica, Work, lost
from vla_pruner.evaluation.run import Run, keep_record
from vla_pruner.simulators.base import SimulatorUnavailable
from vla_pruner.wording import install

LOCAL = "local"
PATIENCE = 600.0
"""Seconds for which nothing happens on the cluster before the run stops."""

TRIES = 3
"""Workers that may die on one unit before it counts as crashed, or at their start before the run stops."""


class Worker:
    """The content of an actor. Refusals come back as text, so that the driver can report them in one line."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._replica: Replica | None = None

    def start(self) -> tuple[str, Any]:
        """Load the policy: ("described", ...) or ("refused", why)."""
        try:
            self._replica = Replica(self._recipe)
            return "described", self._replica.describe()
        except (VLAPrunerError, SimulatorUnavailable) as error:
            return "refused", str(error)

    def run_units(self, work: Work, run: str) -> tuple[str, Any]:
        """Run units: ("records", pairs of a record and its trace or None) or ("refused", why)."""
        assert self._replica is not None
        try:
            return "records", list(self._replica.run_units(work, run))
        except (VLAPrunerError, SimulatorUnavailable) as error:
            return "refused", str(error)


class Cluster:
    """Workers on a Ray cluster. A context manager: leaving it ends the workers.

    Args:
        recipe: from which every worker is made.
        address: of a running cluster, "auto" for the one that this machine is part of, or "local" to start one here.
        workers: their number; None: as many as the cluster has room for, one CUDA device or one core each.

    Attributes:
        described: of every worker, which all agree on it.

    Raises:
        EvaluationError: Ray is not installed or not reachable, or the workers cannot start or differ.
    """

    def __init__(self, recipe: Recipe, address: str, workers: int | None) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        try:
            self._ray: Any = importlib.import_module("ray")
        except ImportError as error:
            raise EvaluationError(f"--ray needs Ray, which is not installed; run: {install('ray')}") from error
        on_cuda = recipe.policy.device.startswith("cuda")
        if on_cuda:  # Ray shows each worker one device, which is the first that it sees
            recipe = replace(recipe, policy=replace(recipe.policy, device="cuda"))
        self._recipe = recipe
        self._began = not self._ray.is_initialized()
        if self._began:
            self._connect(address, workers)
        need = {"num_gpus": 1, "num_cpus": 1} if on_cuda else {"num_cpus": 1}
        # An actor that died is replaced here, never restarted by Ray: only this process has the list of its work.
        self._actor = self._ray.remote(max_restarts=0, max_task_retries=0, **need)(Worker)
        self._workers: list[Any] = []
        self._starting: dict[Any, Any] = {}
        self._deaths_at_start = 0
        self.described: dict[str, Any] = {}
        try:
            kind = "GPU" if on_cuda else "CPU"
            room = int(self._ray.cluster_resources().get(kind, 0))
            if room < (workers or 1):
                what = "CUDA devices" if on_cuda else "cores"
                raise EvaluationError(
                    f"--workers is {workers or 1}, but the cluster has {room} {what}, and a worker takes one; ask for "
                    "fewer, or add machines."
                )
            free = int(self._ray.available_resources().get(kind, 0))
            for _ in range(workers or max(1, free)):
                self._begin_worker()
            while self._starting:
                self._settle(self._next(list(self._starting)))
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str, workers: int | None) -> None:
        here = {"num_cpus": workers, "include_dashboard": False}
        try:
            self._ray.init(log_to_driver=False, **(here if address == LOCAL else {"address": address}))
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EvaluationError(
                f"--ray is {address}, where no Ray cluster answers ({reason}); start one with 'ray start --head', or "
                "give --ray alone for one of this machine's own."
            ) from error

    @property
    def workers(self) -> tuple[Any, ...]:
        """The live actors."""
        return tuple(self._workers)

    def _begin_worker(self) -> None:
        actor = self._actor.remote(self._recipe)
        self._starting[actor.start.remote()] = actor

    def _next(self, answers: list[Any]) -> Any:
        """Return the next of these answers.

        Raises:
            EvaluationError: none came for long, while no worker is at work.
        """
        while True:
            ended, _ = self._ray.wait(answers, num_returns=1, timeout=PATIENCE)
            if ended:
                return ended[0]
            if all(answer in self._starting for answer in answers):
                raise EvaluationError(
                    f"No worker could start within {PATIENCE / 60:g} minutes: the cluster has no room left for one. "
                    "What is finished is kept; give the same command again when there is."
                )

    def _settle(self, answer: Any) -> None:
        """Handle the start, the refusal or the death of a worker; one that died is replaced."""
        actor = self._starting.pop(answer)
        try:
            self._admit(actor, self._ray.get(answer))
        except self._ray.exceptions.RayError as error:
            self._discard(actor)
            self._deaths_at_start += 1
            if self._deaths_at_start >= TRIES:
                raise EvaluationError(
                    f"Workers died {TRIES} times at their start, mostly for want of memory; ask for fewer with "
                    "--workers."
                ) from error
            self._begin_worker()

    def _admit(self, actor: Any, answer: tuple[str, Any]) -> None:
        kind, content = answer
        if kind == "refused":
            raise EvaluationError(content)
        if self.described and content != self.described:
            odd = sorted(name for name in content if content[name] != self.described[name])
            raise EvaluationError(
                f"The workers differ in {', '.join(odd)}; install the same versions and checkpoints on every machine."
            )
        self.described = content
        self._deaths_at_start = 0
        self._workers.append(actor)

    def _discard(self, actor: Any) -> None:
        """End a worker, so that results of work that it may still be doing never count."""
        self._ray.kill(actor, no_restart=True)
        if actor in self._workers:
            self._workers.remove(actor)

    def run(self, run: Run, file: RecordFile, max_errors: int) -> Iterator[Record]:
        """Run the remaining work, yielding each record once it is on the disk; units in the order in which they end.

        Raises:
            EvaluationError: as `run_here`, or a worker refused.
        """
        waiting = deque((work, 0) for work in run.parts(self._recipe.batch))
        running: dict[Any, tuple[Any, Work, int]] = {}
        while waiting or running:
            busy = {id(actor) for actor, *_ in running.values()}
            for actor in self._workers:
                if waiting and id(actor) not in busy:
                    work, deaths = waiting.popleft()
                    running[actor.run_units.remote(work, run.manifest.run)] = (actor, work, deaths)
            ended = self._next([*running, *self._starting])
            if ended in self._starting:
                self._settle(ended)
                continue
            actor, work, deaths = running.pop(ended)
            try:
                kind, content = self._ray.get(ended)
            except self._ray.exceptions.RayError as error:
                self._discard(actor)
                self._begin_worker()
                if deaths + 1 < TRIES:
                    # One by one: it is not known which of the units it was, and the others need not die with it.
                    waiting.extendleft(([one], deaths + 1) for one in reversed(work))
                    continue
                told = {"type": type(error).__name__, "message": f"{TRIES} workers died on it", "where": "Ray"}
                kind = "records"
                content = [
                    (lost(unit, arm, run.manifest.run, number, told), None)
                    for unit, arms in work
                    for arm, number in arms
                ]
            if kind == "refused":
                raise EvaluationError(content)
            for record, trace in content:
                keep_record(run, file, record, trace, max_errors)
                yield record

    def close(self) -> None:
        """End the workers, and the cluster if it was started here."""
        for actor in (*self._workers, *self._starting.values()):
            self._discard(actor)
        self._starting.clear()
        if self._began:
            self._ray.shutdown()

    def __enter__(self) -> Cluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
