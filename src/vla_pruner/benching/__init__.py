"""The benchmark: whole control steps, unpruned and pruned, with the physical limits beside them."""

from vla_pruner.benching.report import ArmResult, BenchReport
from vla_pruner.benching.run import bench
from vla_pruner.benching.settings import BenchSettings

__all__ = ["ArmResult", "BenchReport", "BenchSettings", "bench"]
