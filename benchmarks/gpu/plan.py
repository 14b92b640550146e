"""The plan of the ten minutes on a GPU: the items in their order, their limits, and the bars for their figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from vla_pruner.registry import row_named

TEN_MINUTES = 600

CORRECTNESS, COMPILING, CHOOSING = "correctness", "compiling", "choosing"
"""Items that are no benchmark of a policy."""

_FEW = {"layers": 4, "decode_tokens": 2, "denoise_steps": 2}
"""Sizes of a dry run, where the policy has the setting."""


@dataclass(frozen=True)
class Job:
    """One benchmark of a policy.

    Attributes:
        name: unique within its item.
        model: as of `vla-pruner bench --model`.
        options: fields of `BenchSettings` beside those that all jobs share.
    """

    name: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def settings(self, dry: bool, backend: str = "inductor") -> dict[str, Any]:
        """Return the fields of `BenchSettings` except the model.

        Args:
            dry: tiny sizes on the CPU, the last budget alone, at most two robots, two steps per arm, "compiled" without
                compiling.
            backend: of compiled jobs, as of `torch.compile`.
        """
        shared: dict[str, Any] = {"device": "cuda", "dtype": "bfloat16", "iters": 60}
        last: dict[str, Any] = {}
        if dry:
            row = row_named(self.model)
            known = row.bench.options if row is not None and row.bench else ()
            shared = {"device": "cpu", "dtype": "float32", "size": "tiny", "threads": 1}
            last = {"iters": 2, "batch": min(2, self.options.get("batch", 1)), "keep": self.options["keep"][-1:]}
            last |= {name: few for name, few in _FEW.items() if name in known}
        compiled = self.options.get("compile", False)
        return {**shared, **self.options, **last, "compile": ("eager" if dry else backend) if compiled else False}


@dataclass(frozen=True)
class Bar:
    """A limit that a figure of the run should meet.

    Attributes:
        says: the bar in words.
        job, arm: the job and the arm of the figure.
        figure: "speed" (against unpruned) or "p50" (milliseconds of a control step).
        at_least, at_most: the limit; one of them is given.
        device: a part of the name of the GPU for which the bar is meant; None: any.
    """

    says: str
    job: str
    arm: str
    figure: str
    at_least: float | None = None
    at_most: float | None = None
    device: str | None = None

    def holds(self, found: float) -> bool:
        """Return True if a figure meets the bar."""
        return found >= self.at_least if self.at_least is not None else found <= (self.at_most or 0.0)


@dataclass(frozen=True)
class Item:
    """A part of the run, with a process and a file of its own.

    Attributes:
        name: name of the item and of its file.
        says: description of the item.
        limit: seconds after which its process is killed; the results until then are kept.
        jobs: benchmarks, in their order.
        needs: a module without which the item's status is "not here".
        bars: the bars for its figures.
    """

    name: str
    says: str
    limit: int
    jobs: tuple[Job, ...] = ()
    needs: str | None = None
    bars: tuple[Bar, ...] = ()

    @property
    def missing(self) -> str | None:
        """The reason why the item cannot run on this machine; None if it can."""
        if self.needs is not None and find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        unknown = [job.model for job in self.jobs if row_named(job.model) is None]
        return f"this version knows no {unknown[0]}" if unknown else None


def arm_named(keep: float, fate: str) -> str:
    """Return the name of the arm of `VLAPruner` at layer 3, by its default but for the fate."""
    return f"vla-pruner {keep:g} {fate} K=3 semantic_queries=last"


_QUARTER, _BOTH = (0.25,), (0.25, 0.125)
_DROPPED = {"keep": _QUARTER, "pruned": ("drop",)}
_AT_QUARTER, _AT_EIGHTH = arm_named(0.25, "drop"), arm_named(0.125, "drop")

PLAN: tuple[Item, ...] = (
    Item(CORRECTNESS, "the tests marked `gpu`", 100),
    Item(COMPILING, "the programs of the items below, several processes at once, into torch's own cache", 140),
    Item(
        "oft",
        "OpenVLA-OFT, two cameras: dropped and frozen, compiled and eager",
        150,
        (
            Job("dropped", "openvla-oft", {"cameras": 2, "keep": _BOTH, "pruned": ("drop",), "compile": True}),
            Job("eager", "openvla-oft", {"cameras": 2, "keep": _BOTH, "pruned": ("drop", "freeze"), "iters": 24}),
            Job("frozen", "openvla-oft", {"cameras": 2, "keep": _BOTH, "pruned": ("freeze",), "compile": True}),
        ),
        bars=(
            Bar(
                "OpenVLA-OFT, two cameras, .125 dropped: at least 2.0x",
                "dropped",
                _AT_EIGHTH,
                "speed",
                2.0,
            ),
        ),
    ),
    Item(
        "pi0",
        "pi0, three cameras: dropped, compiled and eager; frozen, eager",
        80,
        (
            Job("compiled", "pi0", {"cameras": 3, **_DROPPED, "compile": True}),
            Job("eager", "pi0", {"cameras": 3, "keep": _QUARTER, "pruned": ("drop", "freeze"), "iters": 24}),
        ),
        bars=(
            Bar("pi0, three cameras, .25 dropped: at least 1.35x", "compiled", _AT_QUARTER, "speed", 1.35),
            Bar("pi0, three cameras, .25 dropped: under 12 ms", "compiled", _AT_QUARTER, "p50", at_most=12.0),
        ),
    ),
    Item(
        "pi05",
        "LeRobot's pi0.5, three cameras: dropped, compiled",
        80,
        (Job("compiled", "lerobot-pi05", {"cameras": 3, **_DROPPED, "compile": True}),),
        needs="lerobot",
        bars=(
            Bar(
                "pi0.5, unpruned and compiled: within 1.2x of sglang's 43 ms on an H200",
                "compiled",
                "unpruned",
                "p50",
                at_most=1.2 * 43,
                device="H200",
            ),
        ),
    ),
    Item(
        "openvla",
        "OpenVLA, eight robots in a call and one: dropped, compiled",
        110,
        (
            Job("eight", "openvla-7b", {"batch": 8, **_DROPPED, "compile": True}),
            Job("one", "openvla-7b", {"batch": 1, **_DROPPED, "compile": True}),
        ),
        bars=(Bar("OpenVLA, batch 8, .25 dropped: at least 2.0x", "eight", _AT_QUARTER, "speed", 2.0),),
    ),
    Item(
        "smolvla",
        "LeRobot's SmolVLA: dropped, compiled and eager",
        90,
        (
            Job("eager", "lerobot-smolvla", {**_DROPPED, "iters": 24}),
            Job("compiled", "lerobot-smolvla", {**_DROPPED, "compile": True}),
        ),
        needs="lerobot",
    ),
    Item(
        "molmoact2",
        "LeRobot's MolmoAct2: dropped, compiled and eager",
        110,
        (
            Job("eager", "lerobot-molmoact2", {**_DROPPED, "iters": 24}),
            Job("compiled", "lerobot-molmoact2", {**_DROPPED, "compile": True}),
        ),
        needs="lerobot",
    ),
    Item(CHOOSING, "the greedy filter alone, every form of it", 20),
)
"""All items, the most valuable first."""


def chosen(only: tuple[str, ...] = (), skip: tuple[str, ...] = ()) -> tuple[Item, ...]:
    """Return items by name, in the plan's order.

    Raises:
        ValueError: there is no item of a given name.
    """
    known = [item.name for item in PLAN]
    for name in (*only, *skip):
        if name not in known:
            raise ValueError(f"{name!r} is no item; there are {', '.join(known)}.")
    return tuple(item for item in PLAN if (not only or item.name in only) and item.name not in skip)


def seconds(items: tuple[Item, ...], limits: Mapping[str, int]) -> int:
    """Return the sum of the limits of the items that can run here."""
    return sum(limits.get(item.name, item.limit) for item in items if item.missing is None)


def told(items: tuple[Item, ...], limits: Mapping[str, int]) -> str:
    """Return the plan as text, with the sum of its limits."""
    lines = [
        f"{item.name:12} {'-' if item.missing else limits.get(item.name, item.limit):>4} s  {item.says}"
        + (f" (not here: {item.missing})" if item.missing else "")
        for item in items
    ]
    return "\n".join([*lines, f"{'sum':12} {seconds(items, limits):>4} s of at most {TEN_MINUTES}"])
