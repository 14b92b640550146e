"""A policy server: openpi's protocol outside, one memory per robot and batches of robots inside."""

from vla_pruner.serving.errors import ServingError
from vla_pruner.serving.server import PolicyServer
from vla_pruner.serving.settings import ServerSettings

__all__ = ["PolicyServer", "ServerSettings", "ServingError"]
