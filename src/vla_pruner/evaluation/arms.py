"""The arms of an evaluation: the unpruned policy, methods, and the controls that every table needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from vla_pruner.errors import OptionError
from vla_pruner.evaluation.errors import EvaluationError
from vla_pruner.evaluation.options import ArmOptions
from vla_pruner.evaluation.units import Unit
from vla_pruner.fate import WITHIN_A_STEP, Fate
from vla_pruner.method_names import attached, encoders_of, methods_of, with_encoders
from vla_pruner.methods import EncoderReuse, Method, RandomKeep
from vla_pruner.methods.schedule import Schedule
from vla_pruner.plugins import source_of

BASELINE, AGAIN, BLANK = "unpruned", "unpruned-again", "blank-image"
CONTROLS = ("again", "random", "blank")


@dataclass(frozen=True)
class Arm:
    """One way to run the policy.

    Attributes:
        key: unique; its name in records and files.
        title: its name in tables.
        kind: "baseline", "method", or the control: "again", "random", "blank".
        method: the method that is attached; None runs the untouched model.
        random: of a method, the key of the control that draws as many tokens at random; None: there is none.
        encoder: the patches that the vision encoder encodes; None: all.
        options: what makes the method again; None: there is no method.
    """

    key: str
    title: str
    kind: str
    method: Method | None = None
    random: str | None = None
    encoder: EncoderReuse | None = None
    options: ArmOptions | None = None

    @property
    def is_blank(self) -> bool:
        """True if the policy is shown black images."""
        return self.kind == "blank"

    @property
    def source(self) -> dict[str, str] | None:
        """The origin of the method, if it is not of this package."""
        return None if self.method is None else source_of(type(self.method))

    @property
    def noise_stream(self) -> int:
        """The stream of a flow's noise: the unpruned policy's second run has its own, all other arms share one."""
        return 1 if self.kind == "again" else 0

    def attach(self, policy: Any, unit: Unit) -> AbstractContextManager[Any]:
        """Return a context manager that gives a session, or None for the untouched model.

        A method that draws at random gets a seed of its own for each unit, so that no draw repeats.
        """
        return attached(self.method, policy, unit.noise_seed(0), self.encoder)

    def to_json(self) -> dict[str, Any]:
        """Return everything that makes this arm the same in another run; for a method from outside of this package with
        its origin, as of `plugins.source_of`.
        """
        found: dict[str, Any] = {"key": self.key, "title": self.title, "kind": self.kind, "method": repr(self.method)}
        if self.encoder is not None:
            found["encoder"] = repr(self.encoder)
        if self.random is not None:
            found["random"] = self.random
        if self.source is not None:
            found["source"] = self.source
        if self.options is not None:
            found["options"] = dataclasses.asdict(self.options)
        return found


def method_arms(
    methods: Sequence[str],
    keep: Sequence[float | int] | None,
    layers: Sequence[int],
    pruned: Sequence[str] | None,
    encoder_keep: Sequence[float | int] | None = None,
    encoder_refresh: int | None = None,
) -> list[Arm]:
    """One arm for each method, keep, layer, fate of the other tokens and budget of the vision encoder; arguments and
    errors as of `methods_of` and `encoders_of`.
    """
    encoders = encoders_of(encoder_keep, encoder_refresh)
    return [
        _arm("method", made.method, encoder, made.name, made.options)
        for made, encoder in with_encoders(methods_of(methods, keep, layers, pruned), encoders)
    ]


def _arm(kind: str, method: Any, encoder: EncoderReuse | None, name: str, own: Sequence[str]) -> Arm:
    reuse = (None, None) if encoder is None else (encoder.keep, encoder.refresh_every)
    options = ArmOptions(name, method.keep, str(method.pruned), method.layer, tuple(own), *reuse)
    title = options.title.replace(" warmup_steps=", " after ") if kind == "random" else options.title
    return Arm(title.replace(" ", "-").replace("=", ""), title, kind, method, encoder=encoder, options=options)


def all_arms(methods: Sequence[Arm], controls: Sequence[str]) -> tuple[Arm, ...]:
    """Return the unpruned policy first, then the methods, then the controls.

    The random control is one for each budget, layer and fate of the methods, and prunes the same steps: it warms up as
    long as the method does, and refreshes as often, with the same patches of the vision encoder. It has no motion gate.

    Raises:
        EvaluationError: a control is unknown, or two arms have one name or do the same.
    """
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        raise EvaluationError(f"--controls is {', '.join(unknown)}; it is none, or some of {', '.join(CONTROLS)}.")
    chosen, randoms = list(methods), []
    if "random" in controls:
        for place, arm in enumerate(chosen):
            if not isinstance(arm.method, RandomKeep):
                randoms.append(_random(arm.method, arm.encoder))
                chosen[place] = dataclasses.replace(arm, random=randoms[-1].key)
    arms = [Arm(BASELINE, "unpruned", "baseline"), *chosen]
    if "again" in controls:
        arms.append(Arm(AGAIN, "unpruned again", "again"))
    arms += randoms
    if "blank" in controls:
        arms.append(Arm(BLANK, "blank image", "blank"))
    different: dict[str, Arm] = {}
    for arm in arms:
        same = different.setdefault(arm.key, arm)
        if (same.method, same.encoder) != (arm.method, arm.encoder):
            raise EvaluationError(f"Two different arms are both called {arm.title!r}; leave one of them out.")
    called: dict[tuple[str, ...], Arm] = {}
    for arm in different.values():
        # By their words: keep=1, one token, equals keep=1.0, all of them.
        same = called.setdefault((arm.kind, repr(arm.method), repr(arm.encoder)), arm)
        if same is not arm:
            # It would run twice, and the p values be corrected for one method more than there is.
            raise EvaluationError(f"{same.title!r} and {arm.title!r} are the same method; leave one of them out.")
    return tuple(different.values())


def _random(method: Any, encoder: EncoderReuse | None) -> Arm:
    schedule: Schedule = method.schedule
    warm_up, refresh = schedule.warm_up or 0, schedule.refresh_every
    if type(method).prunes is not Method.prunes:
        # A rule of its own, which the schedule does not have: such a method waits at least for its history.
        warm_up = max(warm_up, method.history)
    # There is no draw of tokens to reuse: tokens that stay readable without being computed are frozen.
    fate = method.fate if method.fate in WITHIN_A_STEP else Fate.FREEZE
    control = RandomKeep(keep=method.keep, layer=method.layer, pruned=fate, warmup_steps=warm_up, refresh_every=refresh)
    own = [f"warmup_steps={warm_up}"] if warm_up else []
    if refresh is not None:
        own.append(f"refresh_every={refresh}")
    return _arm("random", control, encoder, "random", own)


def check_layers(arms: Sequence[Arm], policy: Any) -> None:
    """Attach every arm once, so that one that does not fit the model is refused before anything runs.

    Raises:
        VLAPrunerError: the arm's method does not fit.
    """
    for arm in arms:
        if arm.method is None:
            continue
        try:
            with arm.method.attach(policy, encoder=arm.encoder):
                pass
        except OptionError as error:
            raise EvaluationError(f"The arm {arm.title!r} does not fit this policy: {error}") from error
