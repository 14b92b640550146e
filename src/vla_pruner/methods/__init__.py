"""The choice of the tokens that stay: pure tensors in, ids out. Nothing here knows a model."""

from vla_pruner.methods.action_and_diversity import ActionAndDiversity
from vla_pruner.methods.action_only import ActionOnly
from vla_pruner.methods.base import Evidence, Method
from vla_pruner.methods.cdpruner import CDPruner
from vla_pruner.methods.controls import KeepFixed, RandomKeep, Unpruned
from vla_pruner.methods.dart import DART
from vla_pruner.methods.divprune import DivPrune
from vla_pruner.methods.encoder_reuse import EncoderReuse
from vla_pruner.methods.fastv import FastV
from vla_pruner.methods.max_min_diversity import MaxMinDiversity
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.score_fusion import ScoreFusion
from vla_pruner.methods.scored import Scored
from vla_pruner.methods.semantic_only import SemanticOnly
from vla_pruner.methods.sparsevlm import SparseVLM
from vla_pruner.methods.text_query import TextQuery
from vla_pruner.methods.vla_cache import VLACache
from vla_pruner.methods.vla_pruner import VLAPruner

__all__ = [
    "DART",
    "ActionAndDiversity",
    "ActionOnly",
    "CDPruner",
    "DivPrune",
    "EncoderReuse",
    "Evidence",
    "FastV",
    "KeepFixed",
    "MaxMinDiversity",
    "Memory",
    "Method",
    "RandomKeep",
    "ScoreFusion",
    "Scored",
    "SemanticOnly",
    "SparseVLM",
    "TextQuery",
    "Unpruned",
    "VLACache",
    "VLAPruner",
]
