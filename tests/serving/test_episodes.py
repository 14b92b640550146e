"""Episodes of clients that never report that one begins, as openpi's do not."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.robots import WAIT, observation
from tests.serving.test_command import asked  # noqa: F401
from tests.serving.test_observations import fake, image
from vla_pruner import cli
from vla_pruner.client import PolicyClient
from vla_pruner.errors import ObservationError
from vla_pruner.serving import PolicyServer, ServingError
from vla_pruner.serving.engine import Robot
from vla_pruner.serving.observations import Seen, reader_of
from vla_pruner.serving.settings import ServerSettings

Serve = Callable[..., PolicyServer]


def at(state: list[float] | None, reset: bool = False, prompt: str = "go") -> Seen:
    return Seen({}, prompt, None if state is None else np.array(state, np.float32), reset)


def running(state: list[float] | None = None) -> Robot:
    known = None if state is None else np.array(state, np.float32)
    return Robot(1, step=5, instruction="go", state=known, heard=100.0)


def test_what_begins_an_episode() -> None:
    assert Robot(1).episode_begins(at(None), 0.0, None, None) == "it is the first"
    robot = running([0.0, 1.0])
    assert robot.episode_begins(at([9.0, 9.0]), 1e6, None, None) is None
    assert robot.episode_begins(at([0.0, 1.0], reset=True), 100.0, None, None) == "the client says so"
    assert robot.episode_begins(at([0.0, 1.0], prompt="stop"), 100.0, None, None) == "the prompt is another one"
    assert robot.episode_begins(at([0.0, 1.0]), 102.0, 2.0, None) is None
    assert robot.episode_begins(at([0.0, 1.0]), 102.1, 2.0, None) == "2.1 s of silence"
    assert robot.episode_begins(at([0.4, 0.6]), 100.0, None, 0.5) is None
    assert robot.episode_begins(at([0.0, 0.4]), 100.0, None, 0.5) == "the state jumped by 0.6"
    assert robot.episode_begins(at([0.0]), 100.0, None, 0.5) == "the state jumped by inf"
    assert running().episode_begins(at([0.0]), 100.0, None, 0.5) is None


def test_a_jump_of_the_state_begins_an_episode_over_the_wire(
    policy: Any, serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    """Fifty trials over one connection are fifty episodes, each of which warms up anew."""
    server = serve(episode_jump=5.0)
    kept = []
    with caplog.at_level(logging.INFO, "vla_pruner.serving"), PolicyClient(server.url, timeout=WAIT) as client:
        for trial in range(3):
            for step in range(5):
                sent = observation(policy, 0, step) | {"prompt": observation(policy, 0, 0)["prompt"]}
                sent["observation/state"] = np.full(policy.proprio_size, 10.0 * trial, np.float32)
                kept.append(client.infer(sent)["policy_timing"]["kept_tokens"])
        counted = server.metrics.text()
        tokens = server._engine.tokens
        client.close()
        server.stop()
    assert kept == [tokens, tokens, tokens, tokens // 4, tokens // 4] * 3
    assert "vla_pruner_episodes_total 3.0" in counted
    assert 'vla_pruner_robot_episodes{robot="1"} 3.0' in counted
    assert 'robot="1"' not in server.metrics.text(), "it left"
    told = [record.getMessage() for record in caplog.records]
    assert told.count("Robot 1: an episode of 5 control steps is over (the state jumped by 10).") == 2
    assert "Robot 1 left after 3 episodes, the last one of 5 control steps." in told


def test_a_prompt_for_observations_without_one() -> None:
    reader = reader_of(fake(("cam_high",), 14), "aloha", default_prompt="transfer the cube")
    sent: dict[str, Any] = {"state": np.ones(14), "images": {"cam_high": image(0, 3, 6, 8)}}
    assert reader.read(sent).instruction == "transfer the cube"
    assert reader.read({**sent, "prompt": "other"}).instruction == "other"
    with pytest.raises(ObservationError, match="'prompt' is text"):
        reader.read({**sent, "prompt": 3})
    with pytest.raises(ObservationError, match="has no 'prompt'"):
        reader_of(fake(("cam_high",), 14), "aloha").read(sent)


def test_a_default_prompt_that_the_policy_cannot_read_opens_no_port(policy: Any) -> None:
    server = PolicyServer(policy, None, ServerSettings(port=0, default_prompt="fly to the moon"))
    with pytest.raises(ServingError, match="words it was never trained on: fly, moon"):
        server.start()


def test_actions_are_cut_to_what_the_client_wants(policy: Any, serve: Serve) -> None:
    server = serve(action_dim=2)
    with PolicyClient(server.url, timeout=WAIT) as client:
        assert client.metadata["action_dim"] == 2
        cut = client.infer(observation(policy, 0, 0))["actions"]
    server.stop()
    whole = serve()
    with PolicyClient(whole.url, timeout=WAIT) as client:
        assert np.array_equal(client.infer(observation(policy, 0, 0))["actions"][:, :2], cut)
    with pytest.raises(ServingError, match="--action-dim is 99, and the policy's actions have 4 numbers"):
        PolicyServer(policy, None, ServerSettings(action_dim=99))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("episode_gap", 0.0), ("episode_gap", float("nan")), ("episode_jump", -1.0), ("action_dim", 0)],
)
def test_settings_out_of_their_range(setting: str, value: float) -> None:
    with pytest.raises(ServingError, match=f"--{setting.replace('_', '-')} is"):
        ServerSettings(**{setting: value})
    with pytest.raises(ServingError, match="--default-prompt is empty"):
        ServerSettings(default_prompt=" ")


def test_the_flags(asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    file = tmp_path / "about.json"
    file.write_text(json.dumps({"reset_pose": [0.0, 1.5]}))
    common = ["serve", "--policy", "reference", "--random-weights"]
    flags = ["--episode-gap", "2", "--episode-jump", "0.3", "--default-prompt", "go", "--metadata", str(file)]
    assert cli.main([*common, *flags, "--no-center-crop", "--action-dim", "3"]) == 0
    settings: ServerSettings = asked[0][2]
    assert (settings.episode_gap, settings.episode_jump, settings.default_prompt) == (2.0, 0.3, "go")
    assert (settings.metadata, settings.center_crop, settings.action_dim) == ({"reset_pose": [0.0, 1.5]}, False, 3)
    for content, said in (
        ("[1]", "holds no JSON object"),
        ("{", "cannot be read as JSON"),
        ('{"a": NaN}', "NaN is no number of JSON"),
        (
            '{"model": "y", "action_horizon": 9}',
            "--metadata has 'action_horizon', 'model', which the server says itself",
        ),
        ('{"a": ' + 40 * "[" + 40 * "]" + "}", "--metadata cannot be sent: "),
        ('{"a": 123456789012345678901234567890}', "--metadata cannot be sent: "),
    ):
        file.write_text(content)
        assert cli.main([*common, "--metadata", str(file)]) == 2
        assert said in capsys.readouterr().err
    assert cli.main([*common, "--metadata", str(tmp_path / "none.json")]) == 2
    assert "cannot be read as JSON" in capsys.readouterr().err
