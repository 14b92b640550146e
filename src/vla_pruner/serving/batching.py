"""Control steps of all connections, gathered for the one thread that runs the model."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from time import perf_counter

from vla_pruner.serving.engine import Answer, Job
from vla_pruner.serving.errors import Overloaded, ServingError

Run = Callable[[Sequence[Job]], list[Answer | Exception]]

_Waiting = tuple[Job, float, asyncio.Future[tuple[Answer, float]]]
"""A job, the time from which it waits, and the future of its answer."""


class Batcher:
    """Hands jobs to a thread in batches: those that wait when the thread is free, and those within a window after it.

    It lives in one event loop.

    Args:
        run: computes the answers of jobs, in their order; called in the executor, one call at a time.
        executor: with one thread.
        window: seconds that a job waits for others.
        max_batch: jobs handed over at once.
        max_waiting: jobs that may wait.
        robots: the number of robots now; no job waits for more jobs than these can send.
    """

    def __init__(
        self,
        run: Run,
        executor: Executor,
        window: float,
        max_batch: int,
        max_waiting: int,
        robots: Callable[[], int],
    ) -> None:
        self._run = run
        self._executor = executor
        self._window = window
        self._max_batch = max_batch
        self._robots = robots
        self._max_waiting = max_waiting
        # Keyed by the answer's future, in the order of arrival: a robot that leaves takes its job out of the middle.
        self._queue: dict[asyncio.Future[tuple[Answer, float]], _Waiting] = {}
        self._came = asyncio.Event()
        self._task = asyncio.create_task(self._work())

    @property
    def waiting(self) -> int:
        """Jobs that the model has not begun."""
        return len(self._queue)

    async def submit(self, job: Job) -> tuple[Answer, float]:
        """Return the answer, and the seconds that the job waited. Cancelling frees the job's place in the queue.

        Raises:
            Overloaded: too many wait already.
            Exception: an error that `run` returned.
        """
        if len(self._queue) >= self._max_waiting:
            raise Overloaded(
                f"{self._max_waiting} control steps wait for the model, which is as many as this server lets wait; "
                "try again later, or start it with a higher --max-waiting."
            )
        answer: asyncio.Future[tuple[Answer, float]] = asyncio.get_running_loop().create_future()
        self._queue[answer] = job, perf_counter(), answer
        self._came.set()
        try:
            return await answer
        finally:
            self._queue.pop(answer, None)

    async def close(self) -> None:
        """Stop; jobs that wait still are answered with an error."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        for answer in self._queue:
            if not answer.done():
                answer.set_exception(ServingError("The server stopped before this control step began."))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Jobs of robots that left meanwhile are skipped.
            batch = [waiting for waiting in await self._gather() if not waiting[2].done()]
            if not batch:
                continue
            started = perf_counter()
            try:
                answers = await loop.run_in_executor(self._executor, self._run, [job for job, _, _ in batch])
            except asyncio.CancelledError:
                for *_, answer in batch:
                    if not answer.done():
                        answer.set_exception(ServingError("The server stopped during this control step."))
                raise
            except Exception as error:
                answers = [error] * len(batch)
            for (_, since, future), answer in zip(batch, answers, strict=True):
                if future.done():  # no robot waits for it any more
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result((answer, started - since))

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._next()]
        deadline = asyncio.get_running_loop().time() + self._window
        while len(batch) < self._max_batch:
            if not self._queue and len(batch) >= self._robots():
                break
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self._next())
            except TimeoutError:
                break
        return batch

    async def _next(self) -> _Waiting:
        while not self._queue:
            self._came.clear()
            await self._came.wait()
        return self._queue.pop(next(iter(self._queue)))
