"""The settings of a calibration, checked before anything slow begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from vla_pruner.calibration.agreement import arms_of
from vla_pruner.calibration.errors import CalibrationError
from vla_pruner.calibration.recordings import EPISODES
from vla_pruner.checks import is_count, is_number, is_seed
from vla_pruner.evaluation.arms import CONTROLS, Arm, all_arms, method_arms
from vla_pruner.evaluation.policies import PolicySource
from vla_pruner.evaluation.settings import named_methods
from vla_pruner.flags import flag
from vla_pruner.method_names import LAYER


@dataclass(frozen=True)
class CalibrateSettings:
    """The flags of `vla-pruner calibrate`; see its help.

    Attributes:
        policy: the policy's source; None with `results`.
        source: folder of the recordings; None with `results`.
        results: file of an earlier calibration, in place of a new one.
        methods, keep, layer, pruned, encoder_keep, encoder_refresh, controls: as of an evaluation. Without any of them,
            `against` says which arms run.
        tasks, episodes, every, max_steps, cameras, seed: as of `find_recordings`.
        tolerance: largest upper bound that is accepted, in standard deviations of the recorded actions.
        against: folders of evaluations whose losses are compared.
        json: file for all results, "-" for standard output.
    """

    policy: PolicySource | None = None
    source: Path | None = None
    results: Path | None = None
    methods: tuple[str, ...] | None = None
    keep: tuple[float | int, ...] | None = None
    layer: tuple[int, ...] | None = None
    pruned: tuple[str, ...] | None = None
    encoder_keep: tuple[float | int, ...] | None = None
    encoder_refresh: int | None = None
    controls: tuple[str, ...] | None = None
    tasks: tuple[str, ...] | None = None
    episodes: int = EPISODES
    every: int = 1
    max_steps: int | None = None
    cameras: Mapping[str, str] = field(default_factory=dict)
    seed: int = 0
    tolerance: float | None = None
    against: Sequence[Path] = ()
    json: str | None = None

    def __post_init__(self) -> None:
        if self.results is not None and (self.policy or self.source):
            raise CalibrationError("--results runs nothing, so --policy and --from do not go with it; leave them out.")
        if self.results is not None and not self.against and self.tolerance is None:
            raise CalibrationError("--results is read for --tolerance or --against; give one of them.")
        if self.results is None and (self.policy is None or self.source is None):
            raise CalibrationError("--policy and --from say what to replay; give both (or --results with a file).")
        if self.policy is not None and self.policy.scripted:
            raise CalibrationError(f"--policy is {self.policy.name}, which sees no images, so nothing can be pruned.")
        for name, least in {"episodes": 1, "every": 1, "max_steps": 1}.items():
            value = getattr(self, name)
            if value is not None and not is_count(value, least):
                raise CalibrationError(f"{flag(name)} is {value!r}; it is a whole number of {least} or more.")
        for name in ("methods", "keep", "layer", "pruned", "encoder_keep", "controls", "tasks", "against"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (tuple, list)):
                raise CalibrationError(
                    f"{flag(name)} is {value!r}; it is a tuple of values, of which there may be one."
                )
        if not is_seed(self.seed):
            raise CalibrationError(f"--seed is {self.seed!r}; it is a whole number of 0 or more, and below 2**32.")
        if self.tolerance is not None and (not is_number(self.tolerance) or self.tolerance <= 0.0):
            raise CalibrationError(
                f"--tolerance is {self.tolerance!r}; it is a part of the recorded actions' standard deviation, such as "
                "0.1."
            )

    def arms(self) -> list[Arm]:
        """Return all arms but the unpruned one.

        Raises:
            VLAPrunerError: a method, an option or a control is unknown, or an evaluation's arm cannot be made.
        """
        encoder = self.encoder_keep, self.encoder_refresh
        given = (self.methods, self.keep, self.layer, self.pruned, *encoder, self.controls)
        if self.against and all(one is None for one in given):
            return arms_of(self.against)
        methods = method_arms(named_methods(self), self.keep, self.layer or LAYER, self.pruned, *encoder)
        return list(all_arms(methods, CONTROLS if self.controls is None else self.controls)[1:])
