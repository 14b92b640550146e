"""Two servers behind a reverse proxy, eight robots, and one server that is killed."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp
from tests.serving.relay import Relay
from tests.serving.robots import WAIT, alone, observation
from vla_pruner.client import PolicyClient

ROOT = Path(__file__).parents[2]
METHOD = vp.VLAPruner(keep=0.25)
ROBOTS, BEFORE, AFTER = 8, 5, 5
HAPROXY = os.environ.get("HAPROXY") or shutil.which("haproxy")


class Replica:
    """A `vla-pruner serve` in its own process."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "vla_pruner.cli", "serve", "--policy", "reference", "--random-weights"]
        self.process = subprocess.Popen(
            [*command, "--port", "0", "--threads", "1"], stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        self.port = 0
        self._reader: threading.Thread | None = None

    def wait(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            found = re.search(r"at ws://127\.0\.0\.1:(\d+)", line)
            if found is not None:
                self.port = int(found[1])
                # The rest is read, too, so that the process never blocks on its pipe.
                self._reader = threading.Thread(target=self.process.stderr.read, daemon=True)
                self._reader.start()
                return
        raise AssertionError("the server did not start")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        if self._reader is not None:
            self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()


@pytest.fixture
def replicas() -> Iterator[list[Replica]]:
    made = [Replica(), Replica()]
    try:
        for replica in made:
            replica.wait()
        yield made
    finally:
        for replica in made:
            replica.kill()


def haproxy(ports: list[int], folder: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start HAProxy with the configuration of docs/serving.md and this machine's ports; return it and its port."""
    page = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    text = page.split("```haproxy\n")[1].split("```")[0]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for old, new in (("0.0.0.0:8000", port), ("10.0.0.1:8000", ports[0]), ("10.0.0.2:8000", ports[1])):
        assert old in text
        text = text.replace(old, f"127.0.0.1:{new}")
    path = folder / "haproxy.cfg"
    path.write_text(text)
    return subprocess.Popen([str(HAPROXY), "-f", str(path)]), port


@pytest.mark.parametrize("kind", ["relay", "haproxy"])
def test_robots_of_a_server_that_dies_begin_an_episode_elsewhere_and_are_told(
    kind: str, replicas: list[Replica], tmp_path: Path
) -> None:
    ports = [replica.port for replica in replicas]
    if kind == "haproxy" and HAPROXY is None:
        pytest.skip("no haproxy on the PATH; name one by the variable HAPROXY")
    relay, process = None, None
    if kind == "relay":
        relay = Relay(*ports)
        port = relay.port
    else:
        process, port = haproxy(ports, tmp_path)
    try:
        _drive(port, replicas)
    finally:
        if relay is not None:
            relay.close()
        if process is not None:
            process.kill()
            process.wait()


def _drive(port: int, replicas: list[Replica]) -> None:
    policy: Any = vp.random_policy("reference", "tiny")
    told: list[list[PolicyClient]] = [[] for _ in range(ROBOTS)]
    clients = [
        PolicyClient(f"ws://127.0.0.1:{port}", patience=WAIT, on_reconnect=told[robot].append)
        for robot in range(ROBOTS)
    ]

    def step(robot: int, number: int) -> tuple[np.ndarray, float]:
        result = clients[robot].infer(observation(policy, robot, number))
        return result["actions"], result["server_timing"]["episode_step"]

    with ThreadPoolExecutor(ROBOTS) as pool:

        def all_do(numbers: range) -> list[list[tuple[np.ndarray, float]]]:
            return list(pool.map(lambda robot: [step(robot, number) for number in numbers], range(ROBOTS)))

        first = all_do(range(BEFORE))
        replicas[0].kill()
        second = all_do(range(BEFORE, BEFORE + AFTER))
    moved = [robot for robot in range(ROBOTS) if clients[robot].reconnects]
    assert len(moved) == ROBOTS // 2
    for robot, client in enumerate(clients):
        assert client.reconnects == len(told[robot]) == (robot in moved)
        actions = [found for found, _ in first[robot] + second[robot]]
        steps = [found for _, found in first[robot] + second[robot]]
        if robot in moved:
            expected = alone(policy, METHOD, robot, range(BEFORE))
            expected += alone(policy, METHOD, robot, range(BEFORE, BEFORE + AFTER))
            assert steps == [*range(BEFORE), *range(AFTER)]
        else:
            expected = alone(policy, METHOD, robot, range(BEFORE + AFTER))
            assert steps == [*range(BEFORE + AFTER)]
        for found, (wanted, _) in zip(actions, expected, strict=True):
            assert np.array_equal(found, wanted)
        client.close()
