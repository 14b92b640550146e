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
"""A job, since when it waits, and what its answer goes to."""


class Batcher:
    """Hands jobs to a thread in batches: what waits when the thread is free, and what comes within a window after it.

    It lives in one event loop.

    Args:
        run: computes the answers of jobs, in their order; called in the executor, one call at a time.
        executor: with one thread.
        window: seconds that a job waits for others.
        max_batch: jobs handed over at once.
        max_waiting: jobs that may wait.
        robots: how many there are now; nobody waits for more jobs than these can send.
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
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue(max_waiting)
        self._task = asyncio.create_task(self._work())

    @property
    def waiting(self) -> int:
        """Jobs that the model has not begun."""
        return self._queue.qsize()

    async def submit(self, job: Job) -> tuple[Answer, float]:
        """The answer, and the seconds that the job waited.

        Raises:
            Overloaded: too many wait already.
            Exception: what `run` answered.
        """
        answer: asyncio.Future[tuple[Answer, float]] = asyncio.get_running_loop().create_future()
        try:
            self._queue.put_nowait((job, perf_counter(), answer))
        except asyncio.QueueFull:
            raise Overloaded(
                f"{self._queue.maxsize} control steps wait for the model, which is as many as this server lets wait; "
                "try again later, or start it with a higher --max-waiting."
            ) from None
        return await answer

    async def close(self) -> None:
        """Stop; jobs that wait still are answered with an error."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        while not self._queue.empty():
            *_, answer = self._queue.get_nowait()
            if not answer.done():
                answer.set_exception(ServingError("The server stopped before this control step began."))

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            # Who is gone meanwhile waits for nothing.
            batch = [waiting for waiting in await self._gather() if not waiting[2].done()]
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
                if future.done():  # nobody waits for it any more
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result((answer, started - since))

    async def _gather(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        deadline = asyncio.get_running_loop().time() + self._window
        while len(batch) < self._max_batch:
            if self._queue.empty() and len(batch) >= self._robots():
                break
            try:
                async with asyncio.timeout_at(deadline):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
        return batch
