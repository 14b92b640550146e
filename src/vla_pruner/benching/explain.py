"""Explanation of what a session prunes, what it leaves alone, and its share of a control step (`vp.explain`)."""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any

import torch

from vla_pruner.anatomy import layers_of, norm_of
from vla_pruner.attach.compiled import why_not_compiled
from vla_pruner.attach.session import Session, described
from vla_pruner.attach.stages import budgets_of, stages_of
from vla_pruner.benching.feeds import feed
from vla_pruner.benching.settings import BenchSettings
from vla_pruner.benching.subject import Subject
from vla_pruner.cost import DecoderShape, StepShape, decoder_flops
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.plugins import class_at
from vla_pruner.registry import row_driving, row_of
from vla_pruner.wording import a_type, ordinal, span

FATES = {
    "drop": "gone from there on",
    "freeze": "readable from there on, but no longer computed",
    "reuse": "readable with what they were in the last control step",
}


@dataclass(frozen=True)
class Explanation:
    """The result of `explain`; `print` it, or read the fields.

    Attributes:
        method: the method with its options, as it runs on this model.
        model: the model's class and family.
        pruned: for each pruning layer, how many tokens stay and what becomes of the others.
        steps: which control steps are pruned.
        untouched: parts on which no method saves computation here.
        refused: what this model or this method does not allow, each with its reason.
        share: the pruned layers' share of an unpruned control step's FLOPs; of the prompt's FLOPs if the rest of a
            control step is not known (`whole_step`). None until the length of a prompt is known.
        ceiling: unpruned FLOPs over pruned ones, without the cost of choosing.
        whole_step: whether `share` and `ceiling` are of a whole control step.
        verdict: the result of `only_if_faster` in words; None without it.
    """

    method: str
    model: str
    pruned: tuple[str, ...]
    steps: str
    untouched: tuple[str, ...]
    refused: tuple[tuple[str, str], ...]
    share: float | None
    ceiling: float | None
    whole_step: bool
    verdict: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the fields as a dict for `json.dump`."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines = [f"{self.method} on {self.model}", *(f"  pruned     {line}" for line in self.pruned)]
        lines.append(f"  steps      {self.steps}")
        lines += [f"  untouched  {line}" for line in self.untouched]
        if self.share is None or self.ceiling is None:
            lines.append("  share      not known before a control step has run")
        elif self.whole_step:
            lines.append(
                f"  share      {self.share:.0%} of the FLOPs of a control step; at most {self.ceiling:.2f}x in FLOPs"
            )
        else:
            lines.append(
                f"  share      {self.share:.0%} of the FLOPs of the prompt's decoder layers, at most "
                f"{self.ceiling:.2f}x in those; the step has more parts, whose FLOPs are not known here, and gains less"
            )
        lines += [f"  refused    {what}: {why}" for what, why in self.refused]
        if self.verdict is not None:
            lines.append(f"  timed      {self.verdict}")
        return "\n".join(lines)


def explain(session: Session) -> Explanation:
    """Explain what a session prunes and where, what is refused on its model and why, and its share of a control step.

    FLOPs come from the formulas in `vla_pruner.cost`, for one robot; they are not milliseconds. No control step is
    run. A policy that decodes until it has ended (pi0-FAST) is counted with as many tokens as it may decode. If no
    benchmark knows the policy's inputs (a language model, `attach(vlm)`), the FLOPs are those of the last control
    step's prompt in the decoder alone.

    Raises:
        OptionError: `session` is not a session.
    """
    if not isinstance(session, Session):
        raise OptionError(f"explain was given {a_type(session)}; give what method.attach(model) returned.")
    family, method = session.family, session.method
    stages, tokens = stages_of(method, family), _tokens(session)
    layers, kept = list(stages), None
    if tokens is not None:
        absent = frozenset() if session.step is None else session.step.layout.absent
        kept = [sum(budget) for budget in budgets_of(stages, tokens, absent, family.camera_tokens).values()]
    share, ceiling, whole = _share(session, layers, kept, tokens)
    anatomy = family.anatomy
    shorter = method.schedule.warm_up is not None and not method.fate.readable
    length = "gets shorter" if shorter else "keeps its length"
    untouched = []
    if anatomy.towers and session.encoder is None:
        untouched.append("the vision encoder, which sees every patch")
    if layers[0]:
        run = "runs" if layers[0] == 1 else "run"
        untouched.append(f"decoder {span('layer', 0, layers[0])}, which {run} on every token")
    if anatomy.experts:
        untouched.append(f"the expert's own rows in every denoising step; its attention to the prompt {length}")
    elif anatomy.acting_rows > 1:
        untouched.append(f"the chunk's own rows in every denoising step; their attention to the prompt {length}")
    elif not family.one_pass:
        untouched.append(f"decoding, which reads all weights for each token; its attention to the prompt {length}")
    return Explanation(
        method=described(method),
        model=f"{type(session.policy).__name__} ({type(family).__name__})",
        pruned=(*_pruned(layers, kept, tokens, family, method), *_reused(session)),
        steps=_steps(method) if session.attached else "none is pruned any more: the session is detached",
        untouched=tuple(untouched),
        refused=tuple(_refused(session)),
        share=share,
        ceiling=ceiling,
        whole_step=whole,
        verdict=None if session.verdict is None else str(session.verdict),
    )


def _tokens(session: Session) -> tuple[int, ...] | None:
    """Return the visual tokens of each camera; None if they are not known yet."""
    return session.family.camera_tokens if session.step is None else session.step.layout.cameras


def _pruned(layers: list[int], kept: list[int] | None, tokens: Any, family: Any, method: Any) -> list[str]:
    if method.schedule.warm_up is None:
        return ["nothing"]
    found = []
    for number, layer in enumerate(layers):
        amount = "fewer" if kept is None or tokens is None else f"{kept[number]} of {sum(tokens)}"
        found.append(
            f"from decoder layer {layer} of {family.depth} on, {amount} visual tokens stay; the others are "
            f"{FATES[method.pruned]}"
        )
    return found


def _reused(session: Session) -> list[str]:
    """Return the sentence on the vision encoder, if it reuses patches."""
    encoder = session.encoder
    if encoder is None:
        return []
    patches = session.family.encoder.patches if session.family.encoder is not None else None
    amount = f"{encoder.keep!r}" if patches is None else f"{encoder.budget(patches)} of {patches}"
    every = "" if encoder.refresh_every is None else f" and every {ordinal(encoder.refresh_every)} after it"
    return [
        f"in the vision encoder, {amount} patches of each image run through the layers, and the others stay as in the "
        f"last control step; the first step of an episode{every} encodes all"
    ]


def _steps(method: Any) -> str:
    schedule = method.schedule
    if schedule.warm_up is None:
        return "none is pruned"
    words = []
    if schedule.warm_up:
        several = f"{schedule.warm_up} of an episode are"
        words.append(f"the first {'of an episode is' if schedule.warm_up == 1 else several} not pruned")
    if schedule.refresh_every is not None:
        words.append(f"every {ordinal(schedule.refresh_every)} of an episode, from the first on, is not pruned")
    if schedule.gate is not None:
        words.append("those after a short path of the arm are not pruned (session.moved)")
    return "; ".join(words) or "all are pruned"


def _refused(session: Session) -> list[tuple[str, str]]:
    family, found = session.family, []
    if family.first_layer:
        why = "what acts after the prompt counts on a first layer that ran on every token"
        found.append((f"layers below {family.first_layer}", why))
    if family.eye is None:
        found.append(("reuse (VLA-Cache)", "it is not known which pixels a visual token covers here"))
    reason = why_not_compiled(family, session.method)
    if reason is not None:
        found.append(("compile", reason))
    if session.encoder is not None:
        found.append(("compile", "the vision encoder holds what a static graph would overwrite"))
    elif family.encoder is None and family.anatomy.towers:
        found.append(("reuse in the vision encoder", "it is not known where the patches of this one are"))
    if not family.cameras:
        takes = "cameras" in inspect.signature(type(family)).parameters
        fix = "attach(model, cameras=(...))" if takes else "its images have an order of their own"
        found.append(("keep per camera", f"this model does not name its cameras; {fix}"))
    return found


def _share(
    session: Session, layers: list[int], kept: list[int] | None, tokens: tuple[int, ...] | None
) -> tuple[float | None, float | None, bool]:
    if tokens is None or kept is None or session.method.schedule.warm_up is None:
        return None, None, False
    first, *then = zip(layers, kept, strict=True)
    budget: dict[str, Any] = {"kept": first[1], "layer": first[0], "pruned": session.method.pruned, "then": then}
    subject = _subject(session, len(tokens))
    if subject is not None and subject.control_step.visual == sum(tokens):
        encoded = subject.encoded(session.encoder)
        whole = subject.control_step.flops(None, first[0])
        total, reached = sum(whole.values()), whole["prompt, layers pruned"]
        reached += whole["vision"] if encoded is not None else 0.0
        left = sum(subject.control_step.flops(**budget, encoded=encoded).values())
        return reached / total, total / left, True
    if session.step is None:
        return None, None, False
    decoder = session.family.decoder
    shape = dataclasses.replace(DecoderShape.of(decoder.config), layers=len(layers_of(decoder)), vocabulary=0)
    step = StepShape(sum(tokens), session.step.layout.length - sum(tokens), 1)
    share = 1 - first[0] / shape.layers
    return share, decoder_flops(shape, step).total / decoder_flops(shape, step, **budget).total, False


def _subject(session: Session, cameras: int) -> Subject | None:
    """Return the policy's control step as the benchmark measures it; None if no benchmark knows the policy."""
    policy: Any = session.policy
    row = None if row_of(policy) is not None else row_driving(policy)
    if row is not None:
        drives = class_at(row.policy)
        named = "cameras" in inspect.signature(drives).parameters
        policy = drives(policy, **({"cameras": [f"camera {n + 1}" for n in range(cameras)]} if named else {}))
    weight = norm_of(session.family.decoder).weight
    # Operations are counted, not bytes, so the type of the weights makes no difference.
    settings = BenchSettings(type(policy).__name__, loaded=True)
    try:
        with torch.no_grad():
            return Subject(policy, feed(policy, settings, weight.device, run=False), settings, weight.device)
    except (UnsupportedModelError, OptionError):
        return None
