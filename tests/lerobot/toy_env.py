"""A gymnasium environment that shows noise to two cameras, and LeRobot's config of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import gymnasium as gym
import numpy as np
from lerobot.configs.types import FeatureType, PolicyFeature
from lerobot.envs.configs import EnvConfig

SIDE, STEPS = 64, 4
CAMERAS = ("base", "wrist")


class Toy(gym.Env):
    metadata = {"render_fps": 10, "render_modes": ["rgb_array"]}  # noqa: RUF012
    task = task_description = "reach the goal"
    _max_episode_steps = STEPS

    def __init__(self, render_mode="rgb_array"):
        self.render_mode = render_mode
        image = gym.spaces.Box(0, 255, (SIDE, SIDE, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(
            {
                "pixels": gym.spaces.Dict(dict.fromkeys(CAMERAS, image)),
                "agent_pos": gym.spaces.Box(-np.inf, np.inf, (8,), np.float32),
            }
        )
        self.action_space = gym.spaces.Box(-np.inf, np.inf, (7,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._observe(), {}

    def step(self, action):
        self._steps += 1
        done = self._steps == STEPS
        return self._observe(), float(action[0]), done, False, {"is_success": done}

    def render(self):
        return np.zeros((SIDE, SIDE, 3), np.uint8)

    def _observe(self):
        images = {name: self.np_random.integers(0, 256, (SIDE, SIDE, 3), np.uint8) for name in CAMERAS}
        return {"pixels": images, "agent_pos": self.np_random.normal(size=8).astype(np.float32)}


@EnvConfig.register_subclass("vla_pruner_toy")
@dataclass
class ToyConfig(EnvConfig):
    task: str | None = "Toy-v0"
    features: dict[str, PolicyFeature] = field(
        default_factory=lambda: {
            "action": PolicyFeature(FeatureType.ACTION, (7,)),
            "agent_pos": PolicyFeature(FeatureType.STATE, (8,)),
            **{f"pixels/{name}": PolicyFeature(FeatureType.VISUAL, (SIDE, SIDE, 3)) for name in CAMERAS},
        }
    )
    features_map: dict[str, str] = field(
        default_factory=lambda: {
            "action": "action",
            "agent_pos": "observation.state",
            **{f"pixels/{name}": f"observation.images.{name}" for name in CAMERAS},
        }
    )

    @property
    def gym_kwargs(self):
        return {}


if "gym_vla_pruner_toy/Toy-v0" not in gym.registry:
    gym.register("gym_vla_pruner_toy/Toy-v0", Toy)
