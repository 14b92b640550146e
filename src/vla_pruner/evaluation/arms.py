"""The arms of an evaluation: the unpruned policy, methods, and the controls that every table needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from vla_pruner.benching.settings import FRESH, method_class, method_name
from vla_pruner.errors import BudgetError
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.units import Unit
from vla_pruner.methods import Method, RandomKeep

BASELINE, AGAIN, BLANK = "unpruned", "unpruned-again", "blank-image"
CONTROLS = ("again", "random", "blank")


@dataclass(frozen=True)
class Arm:
    """One way to run the policy.

    Attributes:
        key: unique; what records and files call it.
        title: what tables call it.
        kind: "baseline", "method", or which control: "again", "random", "blank".
        method: what is attached; None runs the untouched model.
        random: of a method, the key of the control that draws as many tokens at random; None: there is none.
    """

    key: str
    title: str
    kind: str
    method: Method | None = None
    random: str | None = None

    @property
    def is_blank(self) -> bool:
        """Whether the policy is shown black images."""
        return self.kind == "blank"

    @property
    def noise_stream(self) -> int:
        """The unpruned policy's second run starts its flow from other noise; all other arms share theirs."""
        return 1 if self.kind == "again" else 0

    def attach(self, policy: Any, unit: Unit) -> AbstractContextManager[Any]:
        """A context manager that gives a session, or None for the untouched model.

        A method that draws at random gets a seed of its own for each unit, so that no draw repeats.
        """
        method = self.method
        if method is None:
            return nullcontext(None)
        if isinstance(method, RandomKeep):
            method = dataclasses.replace(method, seed=(method.seed + unit.noise_seed(0)) % 2**31)
        return method.attach(policy)

    def to_json(self) -> dict[str, Any]:
        """What makes this arm the same in another run."""
        return {"key": self.key, "title": self.title, "kind": self.kind, "method": repr(self.method)} | (
            {} if self.random is None else {"random": self.random}
        )


def method_arms(
    methods: Sequence[str], keep: Sequence[float | int], layers: Sequence[int], pruned: Sequence[str]
) -> list[Arm]:
    """One arm for each method, keep, layer and fate of the other tokens.

    Args:
        methods: names, each with options of its own where wanted: "vla-pruner:unseen=carry:window=5".

    Raises:
        BudgetError, EvaluationError: there is no such method, or it has no such option or value.
    """
    arms = []
    for text in methods:
        name, *options = text.split(":")
        kind = method_class(name)
        extra = dict(_option(kind, option) for option in options)
        for layer in layers:
            for fate in pruned:
                for amount in keep:
                    made: Any = {"keep": amount, "layer": layer, "pruned": fate, **extra}
                    if layer == 0 and hasattr(kind, "refresh_every"):
                        made.setdefault("refresh_every", FRESH)
                    title = " ".join([method_name(kind), f"{amount:g}", fate, f"K={layer}", *options])
                    arms.append(Arm(title.replace(" ", "-").replace("=", ""), title, "method", kind(**made)))
    return arms


def _option(kind: type[Method], text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    taken = ("keep", "layer", "pruned")
    known = [field.name for field in dataclasses.fields(kind) if field.name not in taken]
    if not equals or name not in known:
        raise EvaluationError(
            f"--method has the option {text!r}; {method_name(kind)} takes {', '.join(f'{word}=...' for word in known)} "
            "after its name, separated by colons."
        )
    for read in (int, float):
        try:
            return name, read(value)
        except ValueError:
            continue
    return name, value


def all_arms(methods: Sequence[Arm], controls: Sequence[str]) -> tuple[Arm, ...]:
    """The unpruned policy first, then the methods, then the controls.

    The random control is one for each budget, layer and fate of the methods, and prunes the same steps: it warms up as
    long as the method does.

    Raises:
        EvaluationError: a control is unknown.
    """
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise EvaluationError(f"--controls is {', '.join(unknown)}; it is none, or some of {', '.join(CONTROLS)}.")
    chosen, randoms = list(methods), []
    if "random" in controls:
        for place, arm in enumerate(chosen):
            if not isinstance(arm.method, RandomKeep):
                randoms.append(_random(arm.method))
                chosen[place] = dataclasses.replace(arm, random=randoms[-1].key)
    arms = [Arm(BASELINE, "unpruned", "baseline"), *chosen]
    if "again" in controls:
        arms.append(Arm(AGAIN, "unpruned again", "again"))
    arms += randoms
    if "blank" in controls:
        arms.append(Arm(BLANK, "blank image", "blank"))
    return tuple({arm.key: arm for arm in arms}.values())


def _random(method: Any) -> Arm:
    # Methods with a history wait for it, except where VLAPruner fills it up while it prunes.
    history = 0 if getattr(method, "warmup", None) == "semantic" else method.history
    warm_up = max(history, getattr(method, "warmup_steps", 0))
    # It has no refreshes: where a method looks at everything now and then, the table's pruned steps show it.
    control = RandomKeep(keep=method.keep, layer=method.layer, pruned=method.pruned, warmup_steps=warm_up)
    title = f"random {method.keep:g} {method.pruned} K={method.layer}"
    if warm_up:
        title += f" after {warm_up}"
    return Arm(title.replace(" ", "-").replace("=", ""), title, "random", control)


def check_layers(arms: Sequence[Arm], policy: Any) -> None:
    """Attach every arm once, so that one that does not fit the model is refused before anything runs.

    Raises:
        VLAPrunerError: the arm's method does not fit.
    """
    for arm in arms:
        if arm.method is None:
            continue
        try:
            with arm.method.attach(policy):
                pass
        except BudgetError as error:
            raise EvaluationError(f"The arm {arm.title!r} does not fit this policy: {error}") from error
