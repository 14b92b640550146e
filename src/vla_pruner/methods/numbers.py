"""Options that come out of arrays are turned into the plain numbers that they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """Return `value` with NumPy's integers and floats as Python's, also inside of tuples and mappings; all else as it
    is.

    A float of less precision is the shortest decimal that it stands for: `np.float32(0.1)` is 0.1, so that methods made
    of either are equal and keep equally many tokens.
    """
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, np.floating):
        return float(str(value))
    if type(value) is tuple:
        return tuple(map(plain, value))
    if isinstance(value, Mapping) and any(isinstance(one, np.generic) for one in value.values()):
        return {name: plain(one) for name, one in value.items()}
    return value
