"""Names of the reference policies; needs no torch, so that the command line can say them."""

from __future__ import annotations

DEFAULT = "metaworld"
"""The policy that is used if none is named."""

NAMES = ("metaworld", "libero-object", "autoregressive")
"""The policies whose weights are in the package."""

CHECKPOINT = (
    "folder of a checkpoint, its hub name, or a policy that ships with the package: "
    f"{', '.join(f'reference:{name}' for name in NAMES)}; reference is reference:{DEFAULT}"
)
"""What names a policy, for help texts."""
