"""The demo: a trained policy in a real simulator, unpruned and pruned on the same episodes, in one table."""

from vla_pruner.demo.arms import Arm, default_arms
from vla_pruner.demo.run import run_demo
from vla_pruner.demo.settings import DemoError, DemoSettings

__all__ = ["Arm", "DemoError", "DemoSettings", "default_arms", "run_demo"]
