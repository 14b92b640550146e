"""The two-camera reference policies: OpenVLA-OFT's shape, small enough for a CPU."""

from vla_pruner.models.chunk.configuration import ChunkConfig
from vla_pruner.models.chunk.loading import load_chunk_policy, save_chunk_policy
from vla_pruner.models.chunk.network import ChunkPolicy

__all__ = ["ChunkConfig", "ChunkPolicy", "load_chunk_policy", "save_chunk_policy"]
