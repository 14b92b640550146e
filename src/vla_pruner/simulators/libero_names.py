"""The names of LIBERO's suites, as published and perturbed. Needs no simulator.

A perturbed suite has the tasks of one of the four published suites. LIBERO-PRO's are called as it calls them:
`libero_object_swap`. Those that are defined here have a colon: `libero_object:camera`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from vla_pruner.simulators.base import SuiteError

MAX_STEPS = {
    "libero_spatial": 220,
    "libero_object": 280,
    "libero_goal": 300,
    "libero_10": 520,
    "libero_90": 400,
}
"""Control steps of an episode, by OpenVLA's evaluation; LeRobot gives the spatial suite 280."""

_PERTURBED = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


class Origin(Enum):
    """The project that defines a perturbation."""

    PRO = "LIBERO-PRO"
    HERE = "vla-pruner"


KINDS = {
    "swap": Origin.PRO,
    "object": Origin.PRO,
    "lan": Origin.PRO,
    "task": Origin.PRO,
    "camera": Origin.HERE,
    "light": Origin.HERE,
    "background": Origin.HERE,
}
"""What is perturbed: places swapped, the look or the size of objects, the words of the instruction, the goal; the
camera's place, the light, the floor and the walls.
"""


@dataclass(frozen=True)
class Perturbation:
    """The difference between a suite and a published one."""

    base: str
    """The published suite, a key of `MAX_STEPS`."""
    kind: str
    """A key of `KINDS`."""

    @property
    def origin(self) -> Origin:
        return KINDS[self.kind]

    @property
    def suite(self) -> str:
        """The name of the perturbed suite."""
        return f"{self.base}{'_' if self.origin is Origin.PRO else ':'}{self.kind}"


PERTURBATIONS = {(found := Perturbation(base, kind)).suite: found for base in _PERTURBED for kind in KINDS}
"""The perturbed suites by their names."""

PATTERNS = tuple(
    f"BASE{mark}{{{','.join(kind for kind, origin in KINDS.items() if origin is one)}}}"
    for one, mark in ((Origin.PRO, "_"), (Origin.HERE, ":"))
)
"""How the names of perturbed suites are formed, for messages."""

BASES = f"BASE one of {', '.join(_PERTURBED)}"

_READ_BY = {
    "pro": tuple(kind for kind, origin in KINDS.items() if origin is Origin.PRO),
    "strength": ("camera", "light"),
}
"""The options of a suite that perturbations of some kinds alone read."""

LIBERO_PLUS = (
    "LIBERO-Plus is not supported: its lights, its textures and its new objects are an archive on Hugging Face "
    "(Sylvest/LIBERO-plus, assets.zip) that no package on PyPI has, its code replaces LIBERO's, and it takes the "
    "instruction from file names, with additions such as 'view 0 0 100 0 0 initstate 0'. What it varies can be varied "
    "here, by definitions of our own (libero_object:camera, libero_object:light, libero_object:background) and by "
    "LIBERO-PRO's (libero_object_swap, libero_object_object, libero_object_lan); see docs/libero.md. In an environment "
    "of its own, with vla-eval, LIBERO-Plus can ask a pruned policy over the model server of docs/serving.md."
)


def check_name(name: str) -> None:
    """Refuse a name that is none of LIBERO's suites.

    Raises:
        SuiteError: the message says which there are, or what is needed.
    """
    if name in MAX_STEPS or name in PERTURBATIONS:
        return
    refuse_known(name)
    raise SuiteError(
        f"LIBERO has no suite {name!r}; its suites are {', '.join(MAX_STEPS)}, and perturbed {' and '.join(PATTERNS)}, "
        f"{BASES}."
    )


def refuse_known(name: str) -> None:
    """Refuse a suite of another project that is known and not supported.

    Raises:
        SuiteError: it is one; the message says what is needed.
    """
    plain = name.lower().replace("-", "_")
    if plain.startswith(("libero_plus", "liberoplus")) or (plain.startswith("libero_") and plain.endswith("_plus")):
        raise SuiteError(LIBERO_PLUS)
    if (base := name.removesuffix("_env")) != name and base in _PERTURBED:
        raise SuiteError(
            f"LIBERO-PRO names {name!r} and its wheel has neither the tasks nor the initial states; floors and walls "
            f"change in {base}:background."
        )


def check_read(options: Iterable[str], suites: Iterable[str]) -> None:
    """Refuse options that none of several suites reads.

    Raises:
        SuiteError: it names the option and the suites that read it.
    """
    kinds = {PERTURBATIONS[name].kind for name in suites if name in PERTURBATIONS}
    for option in options:
        if option in _READ_BY and not kinds & set(_READ_BY[option]):
            readers = ", ".join(Perturbation("BASE", kind).suite for kind in _READ_BY[option])
            raise SuiteError(
                f"{option} is read by {readers} alone ({BASES}), and none of them runs; leave it out, or add one."
            )
