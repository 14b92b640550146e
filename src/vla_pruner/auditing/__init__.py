"""The audit: proves of one policy that it sees, that pruning prunes, and that nothing else changed."""

from vla_pruner.auditing.reference import FullLength

__all__ = ["FullLength"]
