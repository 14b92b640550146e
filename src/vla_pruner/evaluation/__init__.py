"""The evaluation: a policy, unpruned, pruned and under controls, on the same episodes of a benchmark, with verdicts."""

from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.merge import merge
from vla_pruner.evaluation.policies import PolicySource
from vla_pruner.evaluation.records import Record, read_records
from vla_pruner.evaluation.settings import PRESETS, EvalSettings
from vla_pruner.evaluation.summary import Summary, summarize
from vla_pruner.evaluation.traces import Trace, read_trace, traces_of
from vla_pruner.evaluation.units import Unit

__all__ = [
    "PRESETS",
    "EvalSettings",
    "EvaluationError",
    "PolicySource",
    "Record",
    "Summary",
    "Trace",
    "Unit",
    "merge",
    "read_records",
    "read_trace",
    "summarize",
    "traces_of",
]
