"""LeRobot imports this package at its start; the policy type `vla_pruner` is then known to its tools."""

from lerobot_policy_vla_pruner.configuration_vla_pruner import VLAPrunerConfig

__all__ = ["VLAPrunerConfig"]
