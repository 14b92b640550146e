"""LeRobot's asynchronous inference: its own gRPC server with the class of docs/lerobot.md, its own messages."""

from __future__ import annotations

import importlib
import pickle
import shutil
import time
from concurrent import futures
from typing import Any

import numpy as np
import pytest

import vla_pruner as vp
from tests.docs.pages import blocks, page
from tests.lerobot.tiny import load_tiny, save_processors, size_of

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")
grpc: Any = pytest.importorskip("grpc", reason="grpcio is not installed; lerobot[async] brings it")

CHUNK = 5


@pytest.fixture
def names(tmp_path, monkeypatch) -> dict[str, Any]:
    """The names that the page's block defines. LeRobot writes a folder of logs into the working directory."""
    monkeypatch.chdir(tmp_path)
    block = next(block for block in blocks(page("lerobot.md")) if "policy_server" in block)
    definitions, _ = block.split("policy_server.serve()")
    names: dict[str, Any] = {}
    module = importlib.import_module("lerobot.async_inference.policy_server")
    before = module.PolicyServer
    exec(definitions, names)
    yield names
    module.PolicyServer = before


def test_a_robot_client_gets_pruned_chunks(names, golden, tmp_path):
    built_with = importlib.import_module("vla_pruner.policies.lerobot_random").built_with
    source, folder = golden / "lerobot_smolvla_tiny", tmp_path / "smolvla"
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    save_processors(load_tiny(golden, "smolvla").module, "smolvla", folder)
    helpers = importlib.import_module("lerobot.async_inference.helpers")
    configs = importlib.import_module("lerobot.async_inference.configs")
    messages: Any = importlib.import_module("lerobot.transport.services_pb2")
    services = importlib.import_module("lerobot.transport.services_pb2_grpc")
    send = importlib.import_module("lerobot.transport.utils").send_bytes_in_chunks

    policy_server = names["policy_server"]
    assert policy_server.PolicyServer is names["PruningServer"]
    serving = names["PruningServer"](configs.PolicyServerConfig(inference_latency=0.001))
    server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    services.add_AsyncInferenceServicer_to_server(serving, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    features = {
        "observation.state": {"dtype": "float32", "shape": (8,), "names": [f"joint_{i}" for i in range(8)]},
        "observation.images.base": {"dtype": "image", "shape": (60, 80, 3), "names": ["height", "width", "channels"]},
        "observation.images.wrist": {"dtype": "image", "shape": (60, 80, 3), "names": ["height", "width", "channels"]},
    }
    kept, chunks = [], []
    try:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = services.AsyncInferenceStub(channel)
            stub.Ready(messages.Empty())
            asked = helpers.RemotePolicyConfig("smolvla", str(folder), features, CHUNK, "cpu")
            with built_with("smolvla", size_of(source)):
                stub.SendPolicyInstructions(messages.PolicySetup(data=pickle.dumps(asked)))
            for step in range(6):
                random = np.random.default_rng(step)
                seen = {f"joint_{i}": float(random.normal()) for i in range(8)}
                seen |= {name: random.integers(0, 256, (60, 80, 3), dtype=np.uint8) for name in ("base", "wrist")}
                timed = helpers.TimedObservation(
                    timestamp=time.time(), timestep=step, observation={**seen, "task": "lift"}, must_go=True
                )
                stub.SendObservations(send(pickle.dumps(timed), messages.Observation))
                chunks.append(pickle.loads(stub.GetActions(messages.Empty()).data))
                found = serving.session.kept
                kept.append(None if found is None else tuple(found.shape))
    finally:
        server.stop(None).wait()
    assert [len(chunk) for chunk in chunks] == [CHUNK] * 6
    assert chunks[0][0].get_action().shape == (7,)
    tokens = serving.session.step.layout.tokens
    assert kept == [(1, tokens // 4)] * 6
    serving.session.reset()  # as the page says: nothing else begins an episode
    assert serving.session.memory is None
    vp.detach(serving.policy)
