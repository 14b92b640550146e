"""A policy behind openpi's websocket protocol, as an object that starts and stops."""

from __future__ import annotations

import asyncio
import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any, cast

from websockets.asyncio.server import Server, serve
from websockets.exceptions import ConnectionClosed

from vla_pruner.client.codec import pack, unpack
from vla_pruner.client.errors import CodecError
from vla_pruner.errors import ObservationError
from vla_pruner.methods import Method
from vla_pruner.policies.base import Policy
from vla_pruner.serving.batching import Batcher
from vla_pruner.serving.connections import Connection, Connections, room
from vla_pruner.serving.doors import Doors, check_address, tls_context, unbound
from vla_pruner.serving.engine import Answer, Engine, Job, Robot
from vla_pruner.serving.errors import Overloaded, ServingError
from vla_pruner.serving.logs import log, traceback_of
from vla_pruner.serving.metrics import Metrics
from vla_pruner.serving.observations import Seen, reader_of
from vla_pruner.serving.settings import OWN_METADATA, ServerSettings
from vla_pruner.wording import counted

# Errors in handshakes are the clients' own: the library would log a traceback for each failed one.
_library_log = logging.getLogger("vla_pruner.serving.websockets")
_library_log.setLevel(logging.CRITICAL)

GOING_AWAY, INTERNAL_ERROR, TRY_AGAIN_LATER = 1001, 1011, 1013
_LONGEST_ERROR = 1_000
"""The characters of an error that a client gets."""
_LONGEST_GOODBYE = 10.0
"""The seconds that a client has to leave when the server closes its connection."""
_LAST_WORDS = 5.0
"""The seconds that robots have to read that their step will not be answered."""


class PolicyServer:
    """Serves one policy to many robots, each with a memory of its own.

        with PolicyServer(policy, VLAPruner(keep=0.25)) as server:
            print(server.url)

    The event loop runs in a thread of its own, messages are read in another, and the policy runs in a third, where the
    method is attached while the server runs; nothing else may use the policy then.

    Args:
        policy: as `load_policy` gives it. It holds no state of its own between two calls of `act`.
        pruner: a method, or None to serve the policy unpruned.
        settings: address, limits and the rest.

    Raises:
        ServingError: the settings, the method or the observations' layout do not fit.
    """

    def __init__(self, policy: Policy, pruner: Method | None = None, settings: ServerSettings | None = None) -> None:
        self.settings = ServerSettings() if settings is None else settings
        asked = self.settings
        reader = reader_of(
            policy,
            asked.observations,
            asked.camera_keys,
            asked.default_prompt,
            asked.action_dim,
            asked.center_crop,
            asked.action_horizon,
        )
        self._engine = Engine(policy, pruner, reader, self.settings)
        self._reader = reader
        self._robots: dict[int, Robot] = {}
        self._numbers = 0
        self._tls = tls_context(self.settings)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._batcher: Batcher | None = None
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self._port: int | None = None
        self._metadata = b""
        self.metrics = Metrics(self._count, lambda: 0 if self._batcher is None else self._batcher.waiting)
        self._doors = Doors(self.settings, self.metrics, self._count)
        self._connections = Connections(lambda: self.metrics.turned_away("crowded"))
        self._backlog = 0
        self._decoder: ThreadPoolExecutor | None = None

    def __enter__(self) -> PolicyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def port(self) -> int:
        """The port that the server listens on.

        Raises:
            ServingError: the server does not run.
        """
        if self._port is None:
            raise ServingError("The server does not run, so it has no port; call start() first.")
        return self._port

    @property
    def url(self) -> str:
        """The address that a client connects to."""
        scheme, host = "ws" if self._tls is None else "wss", self.settings.host
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def failure(self) -> BaseException | None:
        """The error that ended the server; None while it runs, and after `stop`."""
        return self._failure

    def start(self) -> None:
        """Warm the policy up, open the port, and return.

        Raises:
            ServingError: it runs already, the port cannot be had, or the policy does not act.
            VLAPrunerError: the method does not fit the policy.
        """
        if self._thread is not None:
            raise ServingError("The server runs already.")
        self._ready.clear()
        self._failure = None
        self._thread = threading.Thread(target=self._run, name="vla-pruner-serve", daemon=True)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            self._thread.join()
            self._thread = None
            raise self._failure

    def stop(self) -> None:
        """Refuse new connections, answer the steps under way, close the others, and leave the policy as it was.
        Stopping twice does nothing.
        """
        if self._thread is None:
            return
        loop, stopping = self._loop, self._stopping
        if loop is not None and stopping is not None and not loop.is_closed():
            loop.call_soon_threadsafe(stopping.set)
        self._thread.join()
        self._thread = None

    def _run(self) -> None:
        try:
            asyncio.run(self._main())
        except BaseException as error:
            self._failure = error
        finally:
            self._port = None
            self._ready.set()

    async def _main(self) -> None:
        self._loop, self._stopping = asyncio.get_running_loop(), asyncio.Event()
        self._loop.set_exception_handler(_note)
        # An impossible address is refused now, and not after minutes of warming up.
        await check_address(self.settings)
        self._doors.places, self._connections.most, self._backlog = room(self.settings.max_robots)
        with (
            ThreadPoolExecutor(1, thread_name_prefix="vla-pruner-policy") as worker,
            ThreadPoolExecutor(1, thread_name_prefix="vla-pruner-decoder") as self._decoder,
        ):
            await self._loop.run_in_executor(worker, self._engine.open)
            try:
                await self._listen(worker)
            finally:
                await self._loop.run_in_executor(worker, self._engine.close)

    async def _listen(self, worker: ThreadPoolExecutor) -> None:
        settings = self.settings
        assert self._stopping is not None
        self._metadata = pack(self._describe())
        self._batcher = Batcher(
            self._engine.run, worker, settings.batch_window, settings.max_batch, settings.max_waiting, self._count
        )
        try:
            server = await serve(
                self._serve,
                settings.host,
                settings.port,
                process_request=self._doors.answer,
                create_connection=cast(Any, self._connection),  # the server only calls it
                backlog=self._backlog,
                ssl=self._tls,
                compression=None,
                origins=[None],  # a web page may not use this machine's server; robots send no origin
                max_size=settings.max_message,
                max_queue=2,
                ping_interval=settings.ping_interval,
                ping_timeout=settings.ping_timeout,
                close_timeout=min(_LONGEST_GOODBYE, settings.ping_timeout),
                logger=_library_log,
                server_header=None,
            )
        except OSError as error:
            await self._batcher.close()
            raise unbound(settings, error) from error
        self._port = next(iter(server.sockets)).getsockname()[1]
        self._doors.open = True
        self._ready.set()
        try:
            await self._stopping.wait()
        finally:
            self._doors.open = False
            server.close(close_connections=False)
        answered = await _closed(server, settings.grace)
        if not answered:
            log.warning("Answers took longer than %g seconds of grace; their robots get an error.", settings.grace)
        await self._batcher.close()
        if not answered and not await _closed(server, _LAST_WORDS):
            self._connections.abort()

    def _connection(self, *args: Any, **options: Any) -> Connection:
        return Connection(*args, among=self._connections, patience=self.settings.ping_timeout, **options)

    def _count(self) -> int:
        return len(self._robots)

    async def _serve(self, connection: Any) -> None:
        """Serve one robot, from its connection to its end."""
        if self._count() >= self._doors.places:
            self.metrics.turned_away("full")
            await _end(connection, self._doors.full, TRY_AGAIN_LATER)
            return
        self._numbers += 1
        robot = Robot(self._numbers)
        self._robots[robot.number] = robot
        self.metrics.robot_came(robot.number)
        connection.is_robot = True
        try:
            await connection.send(self._metadata)
            await self._converse(connection, robot)
        except ConnectionClosed:
            pass  # it left, or was gone
        finally:
            if robot.step:
                episodes, steps = counted(robot.episode + 1, "episode"), counted(robot.step, "control step")
                last = "" if robot.episode == 0 else ", the last one"
                log.info("Robot %d left after %s%s of %s.", robot.number, episodes, last, steps)
            # Its place is free when its socket is, and not before.
            await self._see_off(connection)
            del self._robots[robot.number]
            self.metrics.robot_left(robot.number)

    async def _see_off(self, connection: Connection) -> None:
        try:
            async with asyncio.timeout(self.settings.ping_timeout):
                await connection.close()
        except (TimeoutError, ConnectionClosed):
            pass
        finally:
            connection.transport.abort()
        await connection.wait_closed()

    async def _converse(self, connection: Connection, robot: Robot) -> None:
        before = 0.0
        assert self._stopping is not None
        while True:
            # A received message is answered. A robot with another question when the server stops has been answered once
            # since.
            message = None if self._stopping.is_set() else await self._next(connection)
            if message is None:
                await connection.close(GOING_AWAY, "the server stops")
                return
            start = perf_counter()
            try:
                found = await self._step_or_leave(connection, robot, message)
            except Overloaded as error:
                self.metrics.failed("overloaded")
                await _end(connection, str(error), TRY_AGAIN_LATER)
                return
            except (CodecError, ObservationError) as error:
                self.metrics.failed("refused")
                log.info("Robot %d sent what was refused: %s", robot.number, error)
                await _end(connection, str(error), INTERNAL_ERROR)
                return
            except Exception as error:
                self.metrics.failed("failed")
                log.warning("A control step of robot %d failed: %s", robot.number, error)
                await _end(connection, str(error), INTERNAL_ERROR)
                return
            if found is None:
                self.metrics.failed("left")
                return
            answer, waited = found
            done = perf_counter()
            reply = {
                "actions": answer.actions,
                "policy_timing": answer.timing,
                "server_timing": {
                    "infer_ms": 1e3 * (done - start),
                    "queue_ms": 1e3 * waited,
                    "batch_robots": float(answer.batch),
                    "prev_total_ms": 1e3 * before,
                    "episode_step": float(robot.step - 1),
                },
            }
            await connection.send(pack(reply))
            before = perf_counter() - start
            self.metrics.answered(answer, before)

    async def _next(self, connection: Connection) -> str | bytes | None:
        """Return the client's next message; None if the server stops and none is there."""
        assert self._stopping is not None
        message = asyncio.create_task(connection.recv())
        stop = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait((message, stop), return_when=asyncio.FIRST_COMPLETED)
            return message.result() if message.done() else None
        finally:
            stop.cancel()
            if not message.done():
                message.cancel()
            await asyncio.gather(message, stop, return_exceptions=True)

    async def _step_or_leave(
        self, connection: Connection, robot: Robot, message: str | bytes
    ) -> tuple[Answer, float] | None:
        """Return the result of `_step`; None if the robot leaves before, and no forward pass begins for it any more."""
        step = asyncio.create_task(self._step(robot, message))
        gone = asyncio.create_task(connection.wait_closed())
        try:
            await asyncio.wait((step, gone), return_when=asyncio.FIRST_COMPLETED)
            return step.result() if step.done() else None
        finally:
            for task in (step, gone):
                task.cancel()
            await asyncio.gather(step, gone, return_exceptions=True)

    async def _step(self, robot: Robot, message: str | bytes) -> tuple[Answer, float]:
        assert self._batcher is not None
        if isinstance(message, str):
            raise CodecError("A text message came; observations are binary messages of msgpack.")
        # Long messages take milliseconds, in which the event loop has other clients to answer.
        seen = await asyncio.get_running_loop().run_in_executor(self._decoder, self._read, message)
        why = robot.episode_begins(seen, perf_counter(), self.settings.episode_gap, self.settings.episode_jump)
        if why is not None:
            if robot.step:
                steps = counted(robot.step, "control step")
                log.info("Robot %d: an episode of %s is over (%s).", robot.number, steps, why)
                robot.begin_episode()
            self.metrics.episode_began(robot.number)
            absent = [key for camera, key in self._reader.keys.items() if camera not in seen.images]
            if absent:
                log.info("Robot %d sends no %s; the policy takes it as absent.", robot.number, " and no ".join(absent))
        found = await self._batcher.submit(Job(robot, seen))
        robot.heard, robot.state = perf_counter(), seen.proprio
        return found

    def _read(self, message: bytes) -> Seen:
        return self._reader.read(unpack(message))

    def _describe(self) -> dict[str, Any]:
        """Return the metadata that clients get when they connect."""
        from vla_pruner import __version__

        engine, policy = self._engine, self._engine.policy
        horizon, size = engine.actions_shape
        found = {
            "protocol": "openpi",
            "server": f"vla-pruner/{__version__}",
            "model": self.settings.name or type(policy).__name__,
            "pruner": _described(engine.method),
            "visual_tokens": engine.tokens,
            "action_horizon": horizon,
            "action_dim": size,
            "image_keys": list(self._reader.keys.values()),
            "state_keys": list(self._reader.state),
            "state_size": policy.proprio_size,
            "max_message": self.settings.max_message,
        }
        assert set(found) == OWN_METADATA
        return {**self.settings.metadata, **found}


def _described(method: Method | None) -> dict[str, Any]:
    if method is None:
        return {"name": "none"}
    found: dict[str, Any] = {"name": type(method).__name__}
    for name, value in vars(method).items():
        plain = isinstance(value, (bool, int, float, str, type(None)))
        found[name] = value if plain else repr(value)
    return found


async def _closed(server: Server, seconds: float) -> bool:
    """Return True if every connection ended in time."""
    try:
        await asyncio.wait_for(server.wait_closed(), seconds)
    except TimeoutError:
        return False
    return True


async def _end(connection: Connection, text: str, code: int) -> None:
    """Send an error, as openpi's clients expect it: a text, and the end of the connection."""
    told = text.encode(errors="backslashreplace").decode()[:_LONGEST_ERROR]
    await connection.send(told)
    await connection.close(code, told.encode()[:120].decode(errors="ignore"))


def _note(_: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Log an error of the event loop itself; the server's log takes a few of each kind."""
    error = context.get("exception")
    if isinstance(error, OSError):
        log.warning("The event loop reports: %s (%s).", context["message"], error)
    else:
        log.error("The event loop reports: %s\n%s", context["message"], traceback_of(error) if error else "")
