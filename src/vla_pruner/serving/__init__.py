"""A policy server: openpi's protocol outside, one memory per robot and batches of robots inside.

It needs the extra "serve": websockets, msgpack and prometheus_client.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vla_pruner.serving.errors import ServingError
    from vla_pruner.serving.server import PolicyServer
    from vla_pruner.serving.settings import ServerSettings

__all__ = ["PolicyServer", "ServerSettings", "ServingError"]

# The command line adds its flags even if the extra is not installed.
_LAZY = {"PolicyServer": "server", "ServerSettings": "settings", "ServingError": "errors"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"vla_pruner.serving.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'vla_pruner.serving' has no attribute {name!r}")
