"""The settings of an evaluation, checked before anything slow begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vla_pruner.checks import is_count, is_number, is_seed
from vla_pruner.errors import OptionError
from vla_pruner.evaluation.arms import CONTROLS, Arm, all_arms, method_arms
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.policies import PolicySource
from vla_pruner.flags import flag
from vla_pruner.method_names import LAYER
from vla_pruner.simulators.libero_names import check_read
from vla_pruner.statistics import INTERVALS, NEWCOMBE

DEFAULT_METHODS = ("vla-pruner",)
NO_METHOD = ("none",)
"""The unpruned policy alone, and controls."""
DEFAULT_MARGIN = 0.02
CLAIM_EPISODES = 50
"""Episodes a task below which a run is a look and no evidence."""

OF_METHODS = ("keep", "layer", "pruned", "encoder_keep", "encoder_refresh")
"""The settings that make arms of a method."""

LIBERO = ("libero_spatial", "libero_object", "libero_goal", "libero_10")


@dataclass(frozen=True)
class Preset:
    """The size of a run.

    Attributes:
        tasks: of each suite; None: all.
        episodes: of each task and arm.
        max_steps: of an episode; None: the suite's own.
        what: the same in words, for help texts.
    """

    tasks: int | None
    episodes: int
    max_steps: int | None
    what: str


PRESETS = {
    "smoke": Preset(1, 1, 40, "1 task a suite, 1 episode of 40 steps: does everything run?"),
    "quick": Preset(None, 10, None, "10 episodes a task and arm: a look, not for claims"),
    "standard": Preset(None, CLAIM_EPISODES, None, "50 episodes a task and arm: what is published"),
}


@dataclass(frozen=True)
class EvalSettings:
    """The flags of `vla-pruner eval`; see its help.

    Attributes:
        policy: its source.
        suites: names of suites; "libero" is all four that are published.
        out: the folder of the run.
        tasks: names or numbers of tasks, in every suite that has them; None: as the preset says.
        preset: one of `PRESETS`.
        episodes, max_steps: in place of the preset's.
        first: the first initial state.
        seed: of the policy's draws.
        methods, keep, layer, pruned, encoder_keep: every combination is an arm.
        encoder_refresh: control steps of which one encodes every patch, with `encoder_keep`; None: the default.
        controls: some of `CONTROLS`.
        margin: loss of success rate, as a fraction, below which an arm counts as not worse; declared beforehand.
        horizon: actions of a chunk that are carried out before the policy acts again; None: the suite's convention.
        shard: (number from 1, count): run only these units.
        max_errors: crashes after which the run stops.
        suite_options: for `find_suite`.
        ray: None: here; else the address of a Ray cluster, "local" for one of this machine's own.
        workers: policies that run at once on Ray; None: as many as the cluster has room for.
        trace: how many of the first initial states are traced, with every task and arm.
        batch: episodes of one arm that share forward passes, if policy and arm can; 1: each runs alone.
        interval: of the differences that are shown, one of `statistics.INTERVALS`.
    """

    policy: PolicySource
    suites: tuple[str, ...]
    out: Path
    tasks: tuple[str, ...] | None = None
    preset: str = "quick"
    episodes: int | None = None
    max_steps: int | None = None
    first: int = 0
    seed: int = 0
    methods: tuple[str, ...] | None = None
    keep: tuple[float | int, ...] | None = None
    layer: tuple[int, ...] | None = None
    pruned: tuple[str, ...] | None = None
    encoder_keep: tuple[float | int, ...] | None = None
    encoder_refresh: int | None = None
    controls: tuple[str, ...] | None = None
    margin: float = DEFAULT_MARGIN
    horizon: int | None = None
    shard: tuple[int, int] | None = None
    max_errors: int = 10
    suite_options: Mapping[str, Any] = field(default_factory=dict)
    ray: str | None = None
    workers: int | None = None
    trace: int = 0
    batch: int = 1
    interval: str = NEWCOMBE

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise EvaluationError(f"--preset is {self.preset}; it is one of {', '.join(PRESETS)}.")
        least_of = dict.fromkeys(("episodes", "max_steps", "horizon", "workers", "batch"), 1)
        least_of |= dict.fromkeys(("first", "trace", "max_errors"), 0)
        for name, least in least_of.items():
            value = getattr(self, name)
            if value is not None and not is_count(value, least):
                raise EvaluationError(f"{flag(name)} is {value!r}; it is a whole number of {least} or more.")
        if not is_seed(self.seed):
            raise EvaluationError(f"--seed is {self.seed!r}; it is a whole number of 0 or more, and below 2**32.")
        if not is_number(self.margin) or not 0.0 < self.margin < 1.0:
            found = f"{100 * self.margin:g}" if is_number(self.margin) else repr(self.margin)
            raise EvaluationError(
                f"--margin is {found}; it is a loss in percentage points between 0 and 100, such as 2."
            )
        if self.interval not in INTERVALS:
            raise EvaluationError(f"--interval is {self.interval}; it is one of {', '.join(INTERVALS)}.")
        if self.shard is not None and not (
            len(self.shard) == 2 and all(is_count(one, 1) for one in self.shard) and self.shard[0] <= self.shard[1]
        ):
            raise EvaluationError(
                f"--shard is {'/'.join(map(str, self.shard))}; the first of two is 1/2, the last 2/2."
            )
        for name in ("suites", "tasks", "methods", "keep", "layer", "pruned", "encoder_keep", "controls"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, (tuple, list)):
                raise EvaluationError(f"{flag(name)} is {value!r}; it is a tuple of values, of which there may be one.")
            if value is not None and not value and name != "controls":
                raise EvaluationError(f"{flag(name)} names nothing; give one value or several, separated by commas.")
        check_read(self.suite_options, self.suite_names)
        asked = [name for name in ("methods", *OF_METHODS) if getattr(self, name) is not None]
        if self.policy.scripted and (asked or set(self.controls or ()) - {"again"}):
            raise EvaluationError(
                f"--policy is {self.policy.name}, which sees no images, so nothing can be pruned or blanked; leave out "
                "--method, --keep, --layer, --pruned, --encoder-keep, --encoder-refresh and --controls."
            )
        self.arms()

    @property
    def suite_names(self) -> tuple[str, ...]:
        """The suites, each once, "libero" spelt out."""
        names = [one for name in self.suites for one in (LIBERO if name == "libero" else (name,))]
        return tuple(dict.fromkeys(names))

    @property
    def episodes_a_task(self) -> int:
        return PRESETS[self.preset].episodes if self.episodes is None else self.episodes

    @property
    def tasks_a_suite(self) -> int | None:
        """The number of a suite's first tasks that run; None: all, or those that are named."""
        return None if self.tasks is not None else PRESETS[self.preset].tasks

    @property
    def step_limit(self) -> int | None:
        """Steps after which an episode ends early; None: the suite's own limit alone."""
        return PRESETS[self.preset].max_steps if self.max_steps is None else self.max_steps

    @property
    def for_claims(self) -> bool:
        """True if the run is long enough, and its episodes whole."""
        return self.episodes_a_task >= CLAIM_EPISODES and self.step_limit is None

    def arms(self) -> tuple[Arm, ...]:
        """Return the arms, the baseline first.

        Raises:
            VLAPrunerError: a method, an option or a control is unknown.
        """
        if self.policy.scripted:
            return all_arms([], ("again",) if self.controls is None else self.controls)
        names = named_methods(self)
        methods = method_arms(
            names, self.keep, self.layer or LAYER, self.pruned, self.encoder_keep, self.encoder_refresh
        )
        return all_arms(methods, CONTROLS if self.controls is None else self.controls)


def named_methods(settings: Any) -> tuple[str, ...]:
    """Return the methods that run, of settings that have `methods` and all of `OF_METHODS`.

    Raises:
        OptionError: there are none, and one of these settings would be of no effect.
    """
    if settings.methods != NO_METHOD:
        return settings.methods or DEFAULT_METHODS
    given = [flag(name) for name in OF_METHODS if getattr(settings, name) is not None]
    if given:
        raise OptionError(
            f"--method is none, so {' and '.join(given)} would be of no effect; leave one or the other out."
        )
    return ()
