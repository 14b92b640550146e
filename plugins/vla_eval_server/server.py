"""A model server of vla-eval (PyPI: vla-eval 0.8) whose policy is pruned, with a memory for each of its sessions.

    python plugins/vla_eval_server/server.py --args.policy CHECKPOINT --args.keep 0.25 --port 8000

`vla-eval run` with a configuration of one of its LIBERO benchmarks drives it; an EPISODE_START begins an episode.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vla_eval.model_servers.base import SessionContext
from vla_eval.model_servers.predict import PredictModelServer
from vla_eval.specs import GRIPPER_CLOSE_POS, IMAGE_RGB, LANGUAGE, POSITION_DELTA, ROTATION_AA, DimSpec

import vla_pruner as vp
from vla_pruner.errors import ObservationError
from vla_pruner.method_names import methods_of
from vla_pruner.observations import Observation
from vla_pruner.serving.engine import check_method
from vla_pruner.simulators.libero_conventions import AGENT, WRIST, libero_convention

CAMERAS = {AGENT: "agentview", WRIST: "wrist"}
"""The names of the cameras in vla-eval's LIBERO benchmarks."""


class PrunedModelServer(PredictModelServer):
    """Serves a pruned policy with the observations of its evaluation on LIBERO (OpenVLA, OpenVLA-OFT, pi0, LeRobot's).

    Args:
        policy: a checkpoint's folder or hub name; or a loaded policy.
        method: as `--method` of `vla-pruner serve`; "none" is the unpruned policy.
        keep: visual tokens kept, a fraction or a number.
        layer: the pruning layer.
        device: where the policy runs.
        options: of vla-eval's own server.
    """

    def __init__(
        self,
        policy: Any,
        method: str = "vla-pruner",
        keep: float | int = 0.25,
        layer: int = 3,
        device: str = "cpu",
        **options: Any,
    ) -> None:
        self.policy: Any = vp.load_policy(policy, device=device) if isinstance(policy, str) else policy
        self.convention = libero_convention(self.policy)
        self.session = None
        if method != "none":
            (made,) = methods_of((method,), (keep,), (layer,))
            check_method(made.method)
            self.session = made.method.attach(self.policy)
        self.memories: dict[str, Any] = {}
        # vla-eval returns a chunk action by action, as many as the policy's own evaluation carries out.
        super().__init__(chunk_size=self.convention.horizon or getattr(self.policy, "chunk", 1), **options)

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_start(config, ctx)
        self.memories[ctx.session_id] = None

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        await super().on_episode_end(result, ctx)
        self.memories.pop(ctx.session_id, None)

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, Any]:
        images = {camera: _image(obs, CAMERAS[camera]) for camera in self.convention.cameras.values()}
        if "task_description" not in obs:
            raise ObservationError("The observation has no 'task_description', the task in words.")
        state = obs.get("states", obs.get("state"))
        proprio = None if state is None else np.asarray(state, np.float32)
        seen = self.convention.observe(Observation(images, obs["task_description"], proprio))
        if self.session is not None:
            self.session.memory = self.memories.get(ctx.session_id)
        chunk = self.policy.act(seen.images, seen.instruction, seen.proprio)
        if self.session is not None:
            self.memories[ctx.session_id] = self.session.memory
        return {"actions": self.convention.plan(chunk)}

    def get_observation_params(self) -> dict[str, Any]:
        wrist = WRIST in self.convention.cameras.values()
        return {"send_wrist_image": wrist, "send_state": self.convention.proprio}

    def get_action_spec(self) -> dict[str, DimSpec]:
        return {"position": POSITION_DELTA, "rotation": ROTATION_AA, "gripper": GRIPPER_CLOSE_POS}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        return {"agentview": IMAGE_RGB, "language": LANGUAGE}


def _image(obs: dict[str, Any], name: str) -> np.ndarray:
    images = obs.get("images")
    if not isinstance(images, dict) or name not in images:
        found = ", ".join(map(repr, images)) if isinstance(images, dict) else type(images).__name__
        raise ObservationError(f"The observation's images have no {name!r}; found {found or 'none'}.")
    image = images[name]
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise ObservationError(f"The image {name!r} is (height, width, 3) of uint8 from 0 to 255; found {found}.")
    return image


if __name__ == "__main__":
    from vla_eval.model_servers.serve import run_server

    run_server(PrunedModelServer)
