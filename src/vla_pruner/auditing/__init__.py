"""The audit: proves of one policy that it sees, that pruning prunes, and that nothing else changed."""

from vla_pruner.auditing.reference import FullLength
from vla_pruner.auditing.report import AuditReport, Check
from vla_pruner.auditing.run import audit

__all__ = ["AuditReport", "Check", "FullLength", "audit"]
