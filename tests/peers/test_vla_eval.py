"""plugins/vla_eval_server: vla-eval's own server and client, around a pruned policy."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp

anyio: Any = pytest.importorskip("anyio", reason="make test-peers installs vla-eval")
pytest.importorskip("vla_eval", reason="make test-peers installs vla-eval")
for needed in ("simplejpeg", "PIL"):
    pytest.importorskip(needed, reason="LIBERO's images need pillow and simplejpeg (extra libero-images)")

SERVER = Path(__file__).parents[2] / "plugins" / "vla_eval_server" / "server.py"
STEPS = 40


@pytest.fixture(scope="module")
def module() -> Any:
    spec = importlib.util.spec_from_file_location("vla_eval_server", SERVER)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def observation(robot: int, step: int) -> dict[str, Any]:
    """Return an observation in the form of vla-eval's LIBERO benchmark: upright, 256 pixels."""
    random = np.random.default_rng((robot, step))
    images = {name: random.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in ("agentview", "wrist")}
    return {"images": images, "task_description": f"task {robot}", "states": random.uniform(-0.3, 0.3, 8)}


async def served(server: Any, drive: Any) -> Any:
    """Return the result of `drive(url)`, awaited while vla-eval serves."""
    from vla_eval.model_servers.serve import serve_async

    async with anyio.create_task_group() as group:
        port = await group.start(lambda **options: serve_async(server, "127.0.0.1", 0, **options))
        found = await drive(f"ws://127.0.0.1:{port}")
        group.cancel_scope.cancel()
    return found


async def episodes(url: str, turns: list[list[int]]) -> dict[int, list[np.ndarray]]:
    """Return the actions of robots that take turns, each with its own connection and two episodes of `STEPS` // 2
    steps.
    """
    from vla_eval.connection import Connection

    found: dict[int, list[np.ndarray]] = {}
    for robots in turns:
        connections = {robot: Connection(url) for robot in robots}
        for connection in connections.values():
            await connection.connect()
        for step in range(STEPS):
            for robot, connection in connections.items():
                if step % (STEPS // 2) == 0:
                    await connection.start_episode({"task": {"name": "x"}})
                action = await connection.act(observation(robot, step))
                found.setdefault(robot, []).append(np.asarray(action["actions"]))
                if step % (STEPS // 2) == STEPS // 2 - 1:
                    await connection.end_episode({"success": False})
        for connection in connections.values():
            await connection.close()
    return found


@pytest.mark.parametrize("name", ["openvla-7b", "openvla-oft"])
def test_sessions_do_not_know_of_each_other(name: str, module: Any) -> None:
    """Two sessions in turns get the same actions as each alone, and a second episode begins anew."""
    made: Any = vp.random_policy(name)
    server = module.PrunedModelServer(made)
    kept: list[bool] = []
    act = made.act

    def noted(*args: Any, **options: Any) -> Any:
        actions = act(*args, **options)
        kept.append(server.session.kept is not None)
        return actions

    made.act = noted
    together = anyio.run(served, server, lambda url: episodes(url, [[0, 1]]))
    pruned, calls = kept[:], len(kept)
    alone = anyio.run(served, server, lambda url: episodes(url, [[0], [1]]))
    for robot in (0, 1):
        assert len(together[robot]) == STEPS
        for one, other in zip(together[robot], alone[robot], strict=True):
            assert np.array_equal(one, other)
            assert one.shape == (7,)
    each = calls // 4  # two robots, two episodes
    steps = [[step >= 3] * 2 for step in range(each)]  # three steps of warm-up, robots in turns
    assert pruned == 2 * [one for pair in steps for one in pair]
    assert server.memories == {}
    server.session.detach()


def test_the_unpruned_policy_is_served_for_comparison(module: Any) -> None:
    policy: Any = vp.random_policy("openvla-7b")
    server = module.PrunedModelServer(policy, method="none")
    served_actions = anyio.run(served, server, lambda url: episodes(url, [[0]]))[0]
    server = module.PrunedModelServer(policy, keep=1.0)
    kept_all = anyio.run(served, server, lambda url: episodes(url, [[0]]))[0]
    server.session.detach()
    assert all(np.array_equal(one, other) for one, other in zip(served_actions, kept_all, strict=True))


@pytest.mark.parametrize("method", ["vla-cache", "text-query:layer=1:gate=3"])
def test_a_method_that_needs_more_than_a_memory_is_refused(method: str, module: Any) -> None:
    policy = vp.random_policy("openvla-7b")
    with pytest.raises(vp.VLAPrunerError, match="serve"):
        module.PrunedModelServer(policy, method=method)
    assert not vp.detach(policy)


def test_a_wrong_observation_is_an_error_message_and_the_session_goes_on(module: Any) -> None:
    from vla_eval.connection import Connection

    server = module.PrunedModelServer(vp.random_policy("openvla-7b"))

    async def drive(url: str) -> Any:
        connection = Connection(url)
        await connection.connect()
        assert connection.server_info["observation_params"] == {"send_wrist_image": False, "send_state": False}
        await connection.start_episode({})
        right = observation(0, 0)
        seen = right["images"]["agentview"]
        wrong = {
            "images have no 'agentview'; found none": {**right, "images": {}},
            "images have no 'agentview'; found NoneType": {"task_description": "x"},
            r"'agentview' is .*uint8 from 0 to 255; found float32 \(256, 256, 3\)": {
                **right,
                "images": {"agentview": (seen / 255).astype(np.float32)},
            },
            r"found uint8 \(256, 256\)": {**right, "images": {"agentview": seen[..., 0]}},
            "no 'task_description'": {"images": right["images"]},
        }
        for said, sent in wrong.items():
            with pytest.raises(RuntimeError, match=f"observation_failed: ObservationError: .*{said}"):
                await connection.act(sent)
        action = await connection.act(observation(0, 0))
        await connection.close()
        return action["actions"]

    assert np.shape(anyio.run(served, server, drive)) == (7,)
    server.session.detach()
