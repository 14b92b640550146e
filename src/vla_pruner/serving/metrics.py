"""The server's counters, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from vla_pruner.serving.engine import Answer

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROBOTS = (1, 2, 4, 8, 16, 32, 64)
_PREFIX = "vla_pruner"


class Metrics:
    """Counters of one server, in a registry of their own: several servers in one process do not mix.

    Args:
        robots: the number connected now.
        waiting: the number of control steps that wait now.
    """

    def __init__(self, robots: Callable[[], int], waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            f"{_PREFIX}_requests", "Control steps asked for, by how they ended.", ["outcome"], registry=self._registry
        )
        self._refused = Counter(
            f"{_PREFIX}_refused_connections", "Connections refused, by why.", ["reason"], registry=self._registry
        )
        self._latency = self._histogram("request_seconds", "From an observation's last byte to its reply.", _SECONDS)
        self._inference = self._histogram(
            "inference_seconds", "The forward pass that a control step had part in.", _SECONDS
        )
        self._batch = self._histogram(
            "batch_robots", "Robots that shared a control step's forward pass, itself included.", _ROBOTS
        )
        self._kept = Counter(
            f"{_PREFIX}_kept_tokens", "Visual tokens kept, of all control steps.", registry=self._registry
        )
        self._tokens = Counter(f"{_PREFIX}_visual_tokens", "Visual tokens, of all steps.", registry=self._registry)
        self._episodes = Counter(f"{_PREFIX}_episodes", "Episodes begun, of all robots.", registry=self._registry)
        self._of_robot = Gauge(
            f"{_PREFIX}_robot_episodes",
            "Episodes that a connected robot has begun; its number is that of the log.",
            ["robot"],
            registry=self._registry,
        )
        Gauge(f"{_PREFIX}_sessions", "Robots connected.", registry=self._registry).set_function(robots)
        Gauge(f"{_PREFIX}_queue_depth", "Control steps that wait.", registry=self._registry).set_function(waiting)
        for outcome in ("answered", "refused", "failed", "overloaded", "left"):
            self._requests.labels(outcome)
        for reason in ("key", "full", "crowded"):
            self._refused.labels(reason)

    def answered(self, answer: Answer, seconds: float) -> None:
        """Count a control step; `seconds` from its observation to its reply."""
        self._requests.labels("answered").inc()
        self._latency.observe(seconds)
        self._inference.observe(answer.timing["infer_ms"] / 1e3)
        self._batch.observe(answer.batch)
        self._kept.inc(answer.timing["kept_tokens"])
        self._tokens.inc(answer.timing["total_tokens"])

    def failed(self, outcome: str) -> None:
        """Count a step that was "refused" (its message was wrong), "failed", "overloaded", or whose robot "left"
        before.
        """
        self._requests.labels(outcome).inc()

    def episode_began(self, robot: int) -> None:
        """Count an episode that a robot, given by its number, began."""
        self._episodes.inc()
        self._of_robot.labels(robot).inc()

    def robot_came(self, robot: int) -> None:
        """Begin to count the episodes of a robot."""
        self._of_robot.labels(robot)

    def robot_left(self, robot: int) -> None:
        """Forget a robot that came."""
        self._of_robot.remove(robot)

    def turned_away(self, reason: str) -> None:
        """Count a refused connection: no "key", the server is "full" of robots, or "crowded" by others."""
        self._refused.labels(reason).inc()

    def text(self) -> str:
        """Return Prometheus' text format."""
        return generate_latest(self._registry).decode()

    def _histogram(self, name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", what, buckets=buckets, registry=self._registry)
