"""What a benchmark found: one result an arm, with everything that its figures depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vla_pruner.benching.roofline import Peaks

TOLERANCE = 0.01
"""Counted FLOPs of the decoder and those of the formula agree within this part of the formula's."""


@dataclass(frozen=True)
class Speed:
    """How many times faster than the untouched model; the median over the rounds, each a pair.

    Attributes:
        value: 1 where nothing changes.
        low, high: 95 % interval of the median; None for fewer than 6 rounds.
        rounds: pairs.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int


@dataclass(frozen=True)
class Refresh:
    """Of a method that runs every n-th step unpruned: what a whole cycle costs.

    Attributes:
        every: n.
        milliseconds: mean of the unpruned steps, with the session attached.
        amortised: mean milliseconds of a step over the cycle of one unpruned and n - 1 pruned ones.
        speed: mean of the untouched model over that.
    """

    every: int
    milliseconds: float
    amortised: float
    speed: float


@dataclass(frozen=True)
class FlopCount:
    """FLOPs of one control step, all robots, by stage.

    Attributes:
        counted: what ran, by torch's dispatcher ("vision", "prefill", "pruning", "decode", "other").
        formula: the least that it takes ("vision", "prefill", "decode"; "pruning" for what freezing computes).
        vision_by_formula: whether the formula knows the vision encoder; else it has the counted figure.
    """

    counted: dict[str, float]
    formula: dict[str, float]
    vision_by_formula: bool = True

    @property
    def difference(self) -> dict[str, float]:
        """How much more was counted than the formula says, as a part of the formula's: decoder (with an expert), and
        the whole step with all that no formula knows.
        """
        decoder = sum(self.formula[stage] for stage in ("prefill", "decode"))
        counted = sum(self.counted[stage] for stage in ("prefill", "decode"))
        whole = sum(self.formula.values())
        return {"decoder": counted / decoder - 1, "step": sum(self.counted.values()) / whole - 1}

    @property
    def agree(self) -> bool:
        """Whether the decoder's two figures are the same within `TOLERANCE`."""
        return abs(self.difference["decoder"]) <= TOLERANCE


@dataclass(frozen=True)
class Compiling:
    """What compiling an arm took, before anything was timed.

    Attributes:
        graphs: how many there are: one for each kind of call.
        seconds: of the steps in which they were compiled, which ran them too.
    """

    graphs: int
    seconds: float


@dataclass(frozen=True)
class ArmResult:
    """One arm.

    Attributes:
        name, kind: of the arm.
        method: as Python shows it; None for the untouched model.
        layer, pruned: of the method; None for the untouched model.
        kept: visual tokens that stay, of each robot.
        milliseconds: of the whole step: "p50", "p90", "p99", "mean" and all "samples", in their order.
        robots_per_second: control steps of single robots in a second: the batch over the median step.
        stages: median milliseconds by stage, and "total": the step as it is while stages are timed.
        speed: against the untouched model; None for itself.
        flops: counted and by formula.
        bytes_moved: weights and key-value cache, by stage.
        roofline: least milliseconds by stage, by the measured peaks.
        reached: the roofline's time as a part of the median.
        ceiling: Amdahl's: how many times faster any method at this layer and keep can be; None where it is not known.
        memory: "kind" and "bytes".
        refresh: what a whole cycle costs, of a method that runs every n-th step unpruned; else None. All other figures
            are those of pruned steps.
        compiling: None where nothing is compiled.
        why: where the time that is saved comes from, and what holds it up.
    """

    name: str
    kind: str
    method: str | None
    layer: int | None
    pruned: str | None
    kept: int
    milliseconds: dict[str, Any]
    robots_per_second: float
    stages: dict[str, float]
    speed: Speed | None
    flops: FlopCount
    bytes_moved: dict[str, float]
    roofline: dict[str, float]
    reached: float
    ceiling: float | None
    memory: dict[str, Any]
    refresh: Refresh | None = None
    compiling: Compiling | None = None
    why: str = ""

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`."""
        flops = {**asdict(self.flops), "difference": self.flops.difference, "agree": self.flops.agree}
        total = sum(self.roofline.values())
        return {**asdict(self), "flops": flops, "roofline": {**self.roofline, "total": total}}


@dataclass(frozen=True)
class BenchReport:
    """A whole benchmark.

    Attributes:
        settings: what was asked.
        conditions: machine, device, driver, versions, dtype, attention backend, threads, load.
        shape: of one robot's control step: visual tokens, other tokens, layers, tokens decoded, denoising steps.
        peaks: of the device.
        arms: the untouched model first.
        order: which arms had their turn in each round.
        backend: what every arm was compiled with; None: nothing was.
        one_graph: whether prompt and decoding were compiled as one graph; the stage "prefill" is both then.
        shares: for each pruning layer, the part of an unpruned step that the prompt spends from that layer on. Of
            compiled arms by FLOPs, since inside of a graph nothing can be timed.
        prepare_ms: from images and words to the inputs of a step; not part of any figure. None where the step has it.
        acting: what follows the prompt: "decode", "denoise" or "".
        warnings: why these figures may not be trusted.
    """

    settings: dict[str, Any]
    conditions: dict[str, Any]
    shape: dict[str, Any]
    peaks: Peaks
    arms: tuple[ArmResult, ...]
    order: list[list[str]]
    shares: dict[int, float | None]
    prepare_ms: float | None
    acting: str
    backend: str | None = None
    one_graph: bool = False
    warnings: tuple[str, ...] = ()

    @property
    def baseline(self) -> ArmResult:
        """The untouched model."""
        return self.arms[0]

    def __getitem__(self, name: str) -> ArmResult:
        """The arm of this name; KeyError if there is none."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """For `json.dump`."""
        return {
            "settings": self.settings,
            "conditions": self.conditions,
            "warnings": list(self.warnings),
            "shape": self.shape,
            "peaks": self.peaks.to_json(),
            "acting": self.acting,
            "compile_backend": self.backend,
            "one_graph": self.one_graph,
            "prepare_ms": self.prepare_ms,
            "reachable_share": {str(layer): share for layer, share in self.shares.items()},
            "flops_tolerance": TOLERANCE,
            "arms": [arm.to_json() for arm in self.arms],
            "order": self.order,
        }
