"""A tiny policy, servers on free ports of the loopback, and the robots' observations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

import vla_pruner as vp
from tests.serving.robots import Gated
from vla_pruner.serving import PolicyServer, ServerSettings
from vla_pruner.serving.logs import Sparing, log


@pytest.fixture(autouse=True)
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin a new log, so that messages of earlier tests suppress none of this one's."""
    monkeypatch.setattr(log, "filters", [Sparing()])


@pytest.fixture
def policy() -> Any:
    return vp.random_policy("reference", "tiny")


@pytest.fixture
def serve(policy: Any) -> Iterator[Callable[..., PolicyServer]]:
    """Start servers, which are stopped after the test: `serve(policy=..., pruner=..., **settings)`."""
    running: list[PolicyServer] = []
    gates: list[Gated] = []

    method = vp.VLAPruner(keep=0.25, preset="paper")

    def start(policy: Any = policy, pruner: Any = method, **settings: Any) -> PolicyServer:
        server = PolicyServer(policy, pruner, ServerSettings(port=0, **settings))
        running.append(server)
        server.start()
        if isinstance(policy, Gated):
            policy.begin()
            gates.append(policy)
        return server

    yield start
    for gated in gates:
        gated.gate.set()  # also if a test failed before it did
    for server in running:
        server.stop()
