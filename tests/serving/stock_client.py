"""A robot that is driven by openpi's own client and runtime, in an environment without torch: Meta-World, closed loop.

    PYTHONPATH=src python tests/serving/stock_client.py HOST PORT TASK SEED OUT.npz

It writes the observations that it sent, the actions that came, and the timing of every reply.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from openpi_client import action_chunk_broker, websocket_client_policy
from openpi_client.runtime import environment, runtime
from openpi_client.runtime.agents import policy_agent

from vla_pruner.simulators.metaworld import MetaWorldEnv


class Robot(environment.Environment):
    def __init__(self, task: str, seed: int) -> None:
        self._env, self._seed = MetaWorldEnv(task), seed
        self.sent: list[Any] = []
        self.replies: list[Any] = []
        self.success = self._over = False

    def reset(self) -> None:
        self._now, self._over = self._env.reset(self._seed), False

    def is_episode_complete(self) -> bool:
        return self._over

    def get_observation(self) -> dict:
        self.sent.append(self._now)
        return {
            "observation/image": self._now.images["image"],
            "observation/state": self._now.proprio,
            "prompt": self._now.instruction,
        }

    def apply_action(self, action: dict) -> None:
        self.replies.append(action)
        self._now, solved, self._over = self._env.step(action["actions"])
        self.success = self.success or solved


def main(host: str, port: str, task: str, seed: str, out: str) -> None:
    client = websocket_client_policy.WebsocketClientPolicy(host, int(port))
    robot = Robot(task, int(seed))
    agent = policy_agent.PolicyAgent(action_chunk_broker.ActionChunkBroker(client, action_horizon=1))
    runtime.Runtime(robot, agent, subscribers=[]).run()
    try:
        client.infer({"prompt": "x"})
        error = ""
    except RuntimeError as refusal:
        error = str(refusal)
    timings = [{k: v for k, v in reply.items() if k != "actions"} for reply in robot.replies]
    np.savez(
        out,
        images=np.stack([one.images["image"] for one in robot.sent]),
        states=np.stack([one.proprio for one in robot.sent]),
        actions=np.stack([reply["actions"] for reply in robot.replies]),
        said=json.dumps(
            {
                "success": robot.success,
                "metadata": client.get_server_metadata(),
                "timings": timings,
                "error": error,
                "torch": "torch" in sys.modules,
            }
        ),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
