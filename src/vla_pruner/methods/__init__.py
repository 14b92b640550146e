"""Which tokens stay: pure tensors in, ids out. Nothing here knows a model."""

from vla_pruner.methods.base import Evidence, Method
from vla_pruner.methods.controls import KeepFixed, RandomKeep, Unpruned
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.vla_pruner import VLAPruner

__all__ = ["Evidence", "KeepFixed", "Memory", "Method", "RandomKeep", "Unpruned", "VLAPruner"]
