"""The settings of a server: refusals and warnings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vla_pruner.serving import ServerSettings, ServingError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"port": 70000}, "--port is 70000"),
        ({"max_robots": 0}, "--max-robots is 0"),
        ({"max_batch": True}, "--max-batch is True"),
        ({"max_message": 0}, "--max-message is 0 MiB"),
        ({"max_message": 1.5}, "--max-message is 1.5 bytes"),
        ({"batch_window": 5}, "--batch-window is 5000 ms"),
        ({"ping_interval": 0}, "ping_interval is 0"),
        ({"grace": float("inf")}, "--grace is inf"),
        ({"seed": -1}, "--seed is -1"),
        ({"tls_cert": Path("x")}, "go together"),
        ({"api_key": ""}, "API key is empty"),
        ({"api_key": "a b"}, "has blanks"),
        ({"compile": "no"}, "--compile is 'no'"),
        ({"only_if_faster": 1}, "--only-if-faster is 1"),
        ({"center_crop": None}, "center_crop is None"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        ServerSettings(**settings)


def test_only_other_machines_without_a_key_are_warned_of() -> None:
    for host in ("127.0.0.1", "127.8.8.8", "localhost", "::1"):
        assert not ServerSettings(host=host).is_open
    for host in ("0.0.0.0", "", "::", "192.168.0.5", "robot.lab"):
        assert ServerSettings(host=host).is_open
        assert not ServerSettings(host=host, api_key="k").is_open
