"""OpenVLA and OpenVLA-OFT, written anew on the installed transformers."""

from vla_pruner.models.openvla.configuration import OpenVLAConfig
from vla_pruner.models.openvla.loading import load_openvla
from vla_pruner.models.openvla.network import OpenVLAForActionPrediction
from vla_pruner.models.openvla.oft import OpenVLAOFT
from vla_pruner.models.openvla.random_weights import random_openvla

__all__ = ["OpenVLAConfig", "OpenVLAForActionPrediction", "OpenVLAOFT", "load_openvla", "random_openvla"]
