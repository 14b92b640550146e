"""Observations of openpi's LIBERO, DROID and ALOHA-sim programs, sent by openpi's own client, without torch.

    python tests/serving/stock_shapes.py LAYOUT HOST PORT OUT.npz

Keys, shapes and types are those of its `examples/`; the pictures are noise. It writes the actions of each step.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from openpi_client import action_chunk_broker, image_tools, websocket_client_policy

STEPS = 5


def picture(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def small(image: np.ndarray) -> np.ndarray:
    return image_tools.convert_to_uint8(image_tools.resize_with_pad(image, 224, 224))


def observation(layout: str, step: int) -> dict[str, Any]:
    """Return an observation in the form of the example's main.py."""
    if layout == "libero":
        return {
            "observation/image": small(np.ascontiguousarray(picture(step, 256, 256)[::-1, ::-1])),
            "observation/wrist_image": small(np.ascontiguousarray(picture(step + 50, 256, 256)[::-1, ::-1])),
            "observation/state": np.full(8, 0.1 * step),
            "prompt": "put the bowl on the plate",
        }
    if layout == "droid":
        return {
            "observation/exterior_image_1_left": image_tools.resize_with_pad(picture(step, 180, 320), 224, 224),
            "observation/wrist_image_left": image_tools.resize_with_pad(picture(step + 50, 180, 320), 224, 224),
            "observation/joint_position": np.full(7, 0.1 * step),
            "observation/gripper_position": np.array([0.5]),
            "prompt": "fold the towel",
        }
    # One camera of four, channels first, and no prompt.
    image = np.transpose(small(picture(step, 480, 640)), (2, 0, 1))
    return {"state": np.full(14, 0.1 * step), "images": {"cam_high": image}}


def main(layout: str, host: str, port: str, out: str) -> None:
    client = websocket_client_policy.WebsocketClientPolicy(host, int(port))
    replies = [client.infer(observation(layout, step)) for step in range(STEPS)]
    chunks = np.stack([reply["actions"] for reply in replies])
    kept = [reply["policy_timing"]["kept_tokens"] for reply in replies]
    broker = action_chunk_broker.ActionChunkBroker(client, action_horizon=chunks.shape[1])
    one = broker.infer(observation(layout, 0))["actions"]
    said = {"metadata": client.get_server_metadata(), "kept": kept, "one": list(np.shape(one))}
    np.savez(out, chunks=chunks, said=json.dumps(said))


if __name__ == "__main__":
    main(*sys.argv[1:])
