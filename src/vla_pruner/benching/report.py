"""The results of a benchmark: one an arm, with everything that its figures depend on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vla_pruner.benching.roofline import Peaks

TOLERANCE = 0.01
"""The part of the formula's FLOPs within which the decoder's counted ones agree with them."""


@dataclass(frozen=True)
class Speed:
    """The speed as a multiple of the untouched model's; the median over the rounds, each a pair.

    Attributes:
        value: 1 if nothing changes.
        low, high: 95 % interval of the median; None for fewer than 6 rounds.
        rounds: pairs.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int


@dataclass(frozen=True)
class Refresh:
    """The cost of a whole cycle of a method that runs every n-th step unpruned.

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
        counted: the FLOPs that ran, by torch's dispatcher ("vision", "prefill", "pruning", "decode", "other").
        formula: the least that it takes ("vision", "prefill", "decode"; "pruning" for the work of freezing).
        vision_by_formula: whether the formula knows the vision encoder; else it has the counted figure.
    """

    counted: dict[str, float]
    formula: dict[str, float]
    vision_by_formula: bool = True

    @property
    def difference(self) -> dict[str, float]:
        """The excess of the counted FLOPs over the formula's, as a part of the formula's: decoder (with an expert), and
        the whole step with all that no formula has.
        """
        decoder = sum(self.formula[stage] for stage in ("prefill", "decode"))
        counted = sum(self.counted[stage] for stage in ("prefill", "decode"))
        whole = sum(self.formula.values())
        return {"decoder": counted / decoder - 1, "step": sum(self.counted.values()) / whole - 1}

    @property
    def agree(self) -> bool:
        """True if the decoder's two figures are the same within `TOLERANCE`."""
        return abs(self.difference["decoder"]) <= TOLERANCE


@dataclass(frozen=True)
class Compiling:
    """The cost of compiling an arm, before anything was timed.

    Attributes:
        graphs: their number: one for each kind of call.
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
        ceiling: Amdahl's: how many times faster any method at this layer and keep can be; None if it is not known.
        memory: "kind" and "bytes".
        refresh: the cost of a whole cycle, of a method that runs every n-th step unpruned; else None. All other figures
            are those of pruned steps.
        compiling: None if nothing is compiled.
        encoder: the choice of the vision encoder's patches as Python shows it; None: all are encoded. All figures are
            those of steps that reuse patches.
        why: the source of the saving, and its limits.
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
    encoder: str | None = None
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
        settings: of the benchmark.
        conditions: machine, device, driver, versions, dtype, attention backend, threads, load.
        shape: of one robot's control step: visual tokens, other tokens, layers, tokens decoded, denoising steps.
        peaks: of the device.
        arms: the untouched model first.
        order: the arms of each round, in the order of their turns.
        backend: of every arm's compilation; None: nothing was compiled.
        one_graph: whether prompt and decoding were compiled as one graph; the stage "prefill" is both then.
        shares: for each pruning layer, the part of an unpruned step that the prompt spends from that layer on. Of
            compiled arms by FLOPs, since inside of a graph nothing can be timed.
        prepare_ms: from images and words to the inputs of a step; not part of any figure. None if the step has it.
        acting: the stage after the prompt: "decode", "denoise" or "".
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
        """Return the arm of this name; KeyError if there is none."""
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
