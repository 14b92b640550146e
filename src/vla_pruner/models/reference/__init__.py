"""The autoregressive reference policy: a small OpenVLA-shaped policy for Meta-World that ships with the package."""

from vla_pruner.models.reference.configuration import ReferenceConfig
from vla_pruner.models.reference.loading import load_autoregressive_policy, save_policy
from vla_pruner.models.reference.network import ReferencePolicy

__all__ = ["ReferenceConfig", "ReferencePolicy", "load_autoregressive_policy", "save_policy"]
