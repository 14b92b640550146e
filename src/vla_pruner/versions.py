"""The versions of transformers that this package runs on: those that its tests ran on, and those between them."""

from __future__ import annotations

import re

from vla_pruner.errors import UnsupportedModelError

OLDEST, NEWEST = (5, 4), (5, 24)
"""First and last minor version of transformers that the tests ran on: `make test-oldest` and `make test-newest`."""

SUPPORTED = "{}.{} to {}.{}".format(*OLDEST, *NEWEST)
INSTALL = "pip install 'transformers>={}.{},<{}.{}'".format(*OLDEST, NEWEST[0], NEWEST[1] + 1)


def transformers_problem(version: str) -> str | None:
    """Return a sentence on a version of transformers that was not tested, with the fix; None for one that is
    supported.
    """
    found = re.match(r"(\d+)\.(\d+)", version)
    numbers = tuple(map(int, found.groups())) if found else ()
    if OLDEST <= numbers <= NEWEST:
        return None
    why = ", which no test has run on yet" if numbers > NEWEST else ""
    return f"transformers {version} is installed{why}; supported is {SUPPORTED}. Run: {INSTALL}"


def check_transformers() -> None:
    """Raise UnsupportedModelError unless the installed transformers is one that was tested."""
    import transformers

    problem = transformers_problem(transformers.__version__)
    if problem is not None:
        raise UnsupportedModelError(problem)
