"""Simulators behind one interface (`base`): Meta-World, which the reference policies were trained in, LIBERO, and
SIMPLER's bridge tasks.

Importing this imports no simulator.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vla_pruner.checks import is_count, is_seed
from vla_pruner.simulators.base import (
    Convention,
    Environment,
    Images,
    Observation,
    SeesTheState,
    SimulatorUnavailable,
    Suite,
    SuiteError,
    Task,
)
from vla_pruner.simulators.libero_names import BASES, PATTERNS, PERTURBATIONS, refuse_known

__all__ = [
    "SUITES",
    "Convention",
    "Environment",
    "Images",
    "Observation",
    "SeesTheState",
    "SimulatorUnavailable",
    "Suite",
    "SuiteError",
    "Task",
    "find_suite",
]


def _libero(name: str, **options: Any) -> Suite:
    from vla_pruner.simulators.libero import LiberoSuite

    return LiberoSuite(name, **options)


def _metaworld(name: str, **options: Any) -> Suite:
    from vla_pruner.simulators.metaworld_suite import MetaWorldSuite

    return MetaWorldSuite(name, **options)


def _simpler(name: str, **options: Any) -> Suite:
    from vla_pruner.simulators.simpler import SimplerSuite

    return SimplerSuite(name, **options)


SUITES: dict[str, Callable[..., Suite]] = {
    "libero_spatial": _libero,
    "libero_object": _libero,
    "libero_goal": _libero,
    "libero_10": _libero,
    "libero_90": _libero,
    "metaworld:mt8": _metaworld,
    "metaworld:mt6": _metaworld,
    "metaworld:mt4": _metaworld,
    "simpler_widowx": _simpler,
    **dict.fromkeys(PERTURBATIONS, _libero),
}
"""The factory of each suite by its name; called with the name and the options."""

_OPTIONS = {
    _libero: ("assets", "image_size", "seed", "center_crop", "pro", "strength"),
    _metaworld: ("image_size",),
    _simpler: ("dataset",),
}
_LARGEST = 4096


def _is_folder(value: object) -> bool:
    return isinstance(value, (str, Path)) and bool(str(value))


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "assets": (_is_folder, "a folder; if its name is a number, ./NAME"),
    "pro": (_is_folder, "a folder; if its name is a number, ./NAME"),
    "image_size": (
        lambda value: is_count(value, 1) and value <= _LARGEST,
        f"a number of pixels from 1 to {_LARGEST}",
    ),
    "seed": (is_seed, "a whole number of 0 or more, and below 2**32"),
    "center_crop": (lambda value: value in (True, False), "true or false"),
}
"""Of options whose value no suite looks at before an episode begins: what it may be, for code and in words. `strength`
and `dataset` are refused where they are read.
"""


def find_suite(name: str, **options: Any) -> Suite:
    """Return the suite of a name. Its simulator is imported now, so that a missing one is known before anything runs.

    Args:
        name: a key of `SUITES`.
        **options: of `LiberoSuite` (assets, image_size, seed, center_crop, pro, strength), `MetaWorldSuite`
            (image_size) or `SimplerSuite` (dataset).

    Raises:
        SuiteError: there is no such suite, or it has no such option or value.
        SimulatorUnavailable: a package that it needs is not installed, is of an untested version, or has no assets.
    """
    if name.startswith("simpler_google"):
        from vla_pruner.simulators.simpler import GOOGLE_ROBOT

        raise SuiteError(GOOGLE_ROBOT)
    if name not in SUITES:
        refuse_known(name)
        whole = ", ".join(one for one in SUITES if one not in PERTURBATIONS)
        raise SuiteError(
            f"There is no suite {name!r}; the suites are {whole}, and perturbed {' and '.join(PATTERNS)}, {BASES}."
        )
    known = _OPTIONS[SUITES[name]]
    unknown = sorted(set(options) - set(known))
    if unknown:
        found = ", ".join(map(repr, unknown))
        raise SuiteError(f"{name} has no option {found} (--suite-option); its options are {', '.join(known)}.")
    for option, value in options.items():
        fits, what = _VALUES.get(option, (lambda _: True, ""))
        if value is not None and not fits(value):
            raise SuiteError(f"{option} of {name} is {value!r} (--suite-option); it is {what}.")
    return SUITES[name](name, **options)
