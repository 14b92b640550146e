"""The properties of every model family with every method, checked through the policy's own call.

A family joins with a `Case`: `test_matrix.py` runs them here, `tests/lerobot/test_matrix.py` if LeRobot is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vla_pruner as vp
from tests.state import whole_state
from vla_pruner.anatomy import entry_of, layers_of
from vla_pruner.auditing.reference import FullLength
from vla_pruner.families import family_of

KEEPS = (0.5, 0.125)
WINDOW = 1


@dataclass(frozen=True)
class Case:
    """A tiny model of one family.

    Attributes:
        name: of the family.
        build: makes the model.
        step: runs one control step on `rows` (a slice of two robots) of a scene (a number; each looks different) and
            returns everything that the step computed from the image and that must agree (B, ...).
        options: of `attach`.
        noisy: positions at the prompt's end that depend on more than the scene's images (noisy actions); None if the
            whole prompt does.
        first: the lowest layer after the first at which it can be pruned.
    """

    name: str
    build: Callable[[], Any]
    step: Callable[[Any, int, slice], Tensor]
    options: dict[str, Any] = field(default_factory=dict)
    noisy: int | None = 0
    first: int = 1

    def __str__(self) -> str:
        return self.name


def methods(keep: float, pruned: str) -> list[vp.Method]:
    """The methods of the matrix."""
    return [
        vp.VLAPruner(keep=keep, pruned=pruned, window=WINDOW, preset=PRESET[pruned]),
        vp.DART(keep=keep, pruned=pruned),
        vp.CDPruner(keep=keep, pruned=pruned),
        vp.RandomKeep(keep=keep, pruned=pruned),
        vp.Unpruned(pruned=pruned),
    ]


@dataclass(frozen=True)
class Progressive(vp.VLAPruner):
    """VLA-Pruner's rule at two layers: every kind of evidence, on the tokens that the first of them left."""

    then: tuple[int, float] = (4, 0.25)

    def stages(self) -> tuple[vp.Method, ...]:
        rule = {"window": WINDOW, "pruned": self.pruned}
        first, (layer, keep) = vp.VLAPruner(keep=self.keep, layer=self.layer, **rule, preset="paper"), self.then
        return first, vp.VLAPruner(keep=keep, layer=layer, **rule, preset="paper")


def progressive(depth: int, pruned: str, first: int = 1) -> list[vp.Method]:
    """Methods of several pruning layers from `first` on, for a decoder of `depth`."""
    last = depth - 1
    return [
        Progressive(keep=0.5, layer=first, then=(last, 0.25), window=WINDOW, pruned=pruned, preset="paper"),
        vp.SparseVLM(keep=0.75, layer=first, then=((first + 1, 0.5), (last, 0.125)), pruned=pruned),
    ]


BOTH = slice(0, 2)
POLICIES = ("drop", "freeze")
PRESET = {"drop": "paper", "freeze": "recommended"}
"""The preset of `VLAPruner` that has each fate, so that tests of both fates are tests of both presets."""


def check_keep_all(case: Case, pruned: str) -> None:
    """keep = 1.0 changes no bit, past the warm-up too."""
    model = case.build()
    scenes = range(WINDOW + 2)
    untouched = [case.step(model, scene, BOTH) for scene in scenes]
    assert (untouched[0] - untouched[1]).abs().max() > 1e-3, "scenes must show, or this test could not fail"
    for method in methods(1.0, pruned):
        with method.attach(model, **case.options) as session:
            for scene in scenes:
                assert torch.equal(case.step(model, scene, BOTH), untouched[scene]), (method, scene)
                assert session.kept is None


def check_layout(case: Case) -> None:
    """The family's visual tokens are exactly the positions that depend on the images."""
    model = case.build()
    seen: list[Tensor] = []
    with vp.Unpruned().attach(model, **case.options) as session:
        first = entry_of(layers_of(family_of(model, **case.options).decoder)[0])
        handle = first.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        starts = []
        for scene in (0, 1):
            starts.append(len(seen))
            case.step(model, scene, BOTH)
        handle.remove()
        layout = session.step.layout  # type: ignore[union-attr]
    length = layout.length - (case.noisy or 0)
    changed = (seen[starts[0]] != seen[starts[1]]).any(-1)
    visual = torch.zeros_like(changed).scatter(1, layout.visual, True)
    assert torch.equal(changed[:, :length], visual[:, :length])
    assert sum(layout.cameras) == layout.tokens == visual[0].sum()


def check_reference(case: Case, keep: float, pruned: str) -> None:
    """The pruned model agrees with the whole sequence, with the tokens masked or frozen; and the layers are short."""
    model = case.build()
    untouched = case.step(model, WINDOW, BOTH)
    for method in methods(keep, pruned):
        with method.attach(model, **case.options) as session:
            for scene in range(WINDOW):
                case.step(model, scene, BOTH)
            lengths, actual = prompt_lengths(model, case, WINDOW)
            kept, layout = session.kept, session.step.layout  # type: ignore[union-attr]
        full, dropped = layout.length, 0
        if isinstance(method, vp.Unpruned):
            assert kept is None
            assert torch.equal(actual, untouched)
        else:
            assert kept is not None
            assert kept.shape == (2, round(keep * layout.tokens))
            dropped = layout.tokens - kept.shape[1]
            with FullLength(model, layout, kept, layer=method.layer, pruned=pruned, **case.options):
                expected = case.step(model, WINDOW, BOTH)
            assert (actual - expected).abs().max() < 1e-4, method
            assert (actual - untouched).abs().max() > 1e-3, "pruning must show, or this test could not fail"
        depth = len(lengths)
        assert lengths == [full] * method.layer + [full - dropped] * (depth - method.layer), method


def check_progressive(case: Case, pruned: str) -> None:
    """The same of several pruning layers, with the action score; rows of a batch are single robots."""
    model = case.build()
    depth = family_of(model, **case.options).depth
    untouched = case.step(model, WINDOW, BOTH)
    for method in progressive(depth, pruned, case.first):
        with method.attach(model, **case.options) as session:
            for scene in range(WINDOW):
                case.step(model, scene, BOTH)
            lengths, actual = prompt_lengths(model, case, WINDOW)
            kept, step = session.kept, session.step
            scores = session.scores
            session.reset()
            alone = [case.step(model, scene, slice(1, 2)) for scene in range(WINDOW + 1)][-1]
        assert kept is not None
        assert step is not None
        layout, stages = step.layout, kept_at(step)
        assert torch.equal(stages[method.stages()[-1].layer], kept)
        expected_lengths = [layout.length] * depth
        for stage in method.stages():
            count = layout.length - layout.tokens + stage.budget(layout.tokens)
            expected_lengths[stage.layer :] = [count] * (depth - stage.layer)
        assert lengths == expected_lengths, method
        first, *later = stages.items()
        reference = FullLength(model, layout, first[1], layer=first[0], then=dict(later), pruned=pruned, **case.options)
        reader = vp.ActionOnly(keep=1.0)
        with reader.attach(model, **case.options) as session, reference:
            expected = case.step(model, WINDOW, BOTH)
            seen = session.scores["action"]
        assert (actual - expected).abs().max() < 1e-4, method
        assert (actual - untouched).abs().max() > 1e-3, "pruning must show, or this test could not fail"
        assert (alone[0] - actual[1]).abs().max() < 1e-4, method
        if "action" in method.needs:
            assert (scores["action"] - seen).abs().max() < 1e-5, method


def kept_at(step: Any) -> dict[int, Tensor]:
    """(B, k) ids of the visual tokens that stay, by pruning layer."""
    found = {}
    for layer, short in step.shortenings.items():
        live = torch.zeros_like(step.layout.prompt).scatter(1, short.kept, True).gather(1, step.layout.visual)
        found[layer] = torch.nonzero(live)[:, 1].view(len(live), -1)
    return found


def check_no_trace(case: Case, pruned: str) -> None:
    """Detaching leaves the model as it was, also after an exception in the middle of a step."""
    model = case.build()
    module = attached(model)
    untouched = case.step(model, 0, BOTH)
    before = whole_state(module)
    for method in methods(0.5, pruned):
        with method.attach(model, **case.options):
            assert whole_state(module) != before
            for scene in range(WINDOW + 1):
                case.step(model, scene, BOTH)
        assert whole_state(module) == before, method

        def fail(*_: Any) -> None:
            raise RuntimeError("robot fell over")

        with pytest.raises(RuntimeError, match="fell over"), method.attach(model, **case.options):
            case.step(model, 0, BOTH)
            handle = layers_of(family_of(model, **case.options).decoder)[-1].mlp.register_forward_pre_hook(fail)
            try:
                case.step(model, 1, BOTH)
            finally:
                handle.remove()
        assert whole_state(module) == before, method
        assert torch.equal(case.step(model, 0, BOTH), untouched), method


def check_checkpointing(case: Case) -> None:
    """With gradient checkpointing a step is refused in training mode, where layers keep no cache, and only there."""
    model = case.build()
    module = attached(model)
    method = vp.FastV(keep=0.5)
    with method.attach(model, **case.options):
        expected = case.step(model, 0, BOTH)
    decoder = family_of(model, **case.options).decoder
    for part in decoder.modules():
        if hasattr(part, "gradient_checkpointing"):
            part.gradient_checkpointing = True
    with method.attach(model, **case.options) as session:
        decoder.train()  # around it, some versions of some models ask for what training alone needs
        with pytest.raises(vp.SessionError, match=r"training mode with gradient checkpointing.*model\.eval\(\)"):
            case.step(model, 0, BOTH)
        module.eval()
        assert not session.memory.steps.any(), "no control step came of it"  # type: ignore[union-attr]
        assert torch.equal(case.step(model, 0, BOTH), expected)


def check_autocast(case: Case, pruned: str) -> None:
    """Under autocast the model runs in fewer digits and the choice in float32: keep = 1.0 changes no bit, and the
    pruned model agrees with the full-length reference.

    Methods take turns between the types, and between the fates, so that every pair of method, type and family is tried.
    """
    frozen = POLICIES.index(pruned)
    model = case.build()
    scenes = range(WINDOW + 1)
    try:
        with torch.autocast("cpu", torch.float16):
            half = [case.step(model, scene, BOTH) for scene in scenes]
    except RuntimeError as error:
        pytest.skip(f"the model itself does not run under autocast on this version of transformers ({error})")
    with torch.autocast("cpu", torch.bfloat16):
        untouched = {torch.float16: half, torch.bfloat16: [case.step(model, scene, BOTH) for scene in scenes]}
    for number, dtype in enumerate(untouched):
        with torch.autocast("cpu", dtype):
            for method in methods(1.0, pruned)[(number + frozen) % 2 :: 2]:
                with method.attach(model, **case.options):
                    for scene, expected in enumerate(untouched[dtype]):
                        assert torch.equal(case.step(model, scene, BOTH), expected), method
    with torch.autocast("cpu", torch.bfloat16):
        for method in chosen_apart(case, model, pruned)[frozen::2]:
            with method.attach(model, **case.options) as session:
                for scene in scenes:
                    case.step(model, scene, BOTH)
                assert session.kept is not None, method
                scores = [*session.scores.values(), session.memory.action]  # type: ignore[union-attr]
            for score in scores:
                assert score.dtype == torch.float32
                # Were they computed in bfloat16, all of them would be equal to their roundings.
                assert not score.any() or not torch.equal(score, score.bfloat16().float()), method
    # In bfloat16 two ways to compute the same decode other tokens now and then.
    with torch.autocast("cpu", torch.float16):
        for method in methods(0.5, pruned)[:2]:
            with method.attach(model, **case.options) as session:
                actual = [case.step(model, scene, BOTH) for scene in scenes][-1]
                kept, layout = session.kept, session.step.layout  # type: ignore[union-attr]
            assert kept is not None
            with FullLength(model, layout, kept, layer=method.layer, pruned=pruned, **case.options):
                expected = case.step(model, WINDOW, BOTH)
            assert (actual - expected).abs().max() < 2e-2 * expected.abs().max(), method
            assert (actual - half[WINDOW]).abs().max() > 0.1, "pruning must show, or this test could not fail"


def chosen_apart(case: Case, model: Any, pruned: str) -> list[vp.Method]:
    """Return every method, each of which fails if it chooses or rates under autocast."""
    then = ((case.first + 1, 0.25),)
    found: list[vp.Method] = [
        vp.VLAPruner(keep=0.5, window=WINDOW, pruned=pruned, preset="paper"),
        vp.FastV(keep=0.5, pruned=pruned),
        vp.DivPrune(keep=0.5, pruned=pruned),
        vp.DART(keep=0.5, pruned=pruned),
        vp.CDPruner(keep=0.5, pruned=pruned),
        vp.MaxMinDiversity(keep=0.5, metric="euclidean", pruned=pruned),
        vp.SparseVLM(keep=0.5, layer=case.first, then=then, pruned=pruned),
        vp.TextQuery(keep=0.5, layer=case.first, pruned=pruned),
        vp.ActionOnly(keep=0.5, window=WINDOW, pruned=pruned),
        vp.ScoreFusion(keep=0.5, window=WINDOW, pruned=pruned),
        vp.ActionAndDiversity(keep=0.5, window=WINDOW, pruned=pruned),
    ]
    family = family_of(model, **case.options)
    if family.first_layer == 0:
        found.append(vp.VLAPruner(keep=0.5, window=WINDOW, pruned=pruned, layer=0, refresh_every=9, preset="paper"))
    if family.eye is not None:
        found.append(vp.VLACache(keep=0.9, threshold=-0.99))
    return [_apart(method) for method in found]


def _apart(method: vp.Method) -> vp.Method:
    def watched(name: str) -> Callable[..., Any]:
        original = getattr(type(method), name)

        def call(self: vp.Method, *args: Any) -> Any:
            assert not torch.is_autocast_enabled("cpu"), name
            return original(self, *args)

        return call

    names = ("select", "raters", "text_relevance", "reuses")
    kind = type(type(method).__name__, (type(method),), {name: watched(name) for name in names})
    return kind(**{field.name: getattr(method, field.name) for field in fields(method)})


def check_episodes(case: Case, pruned: str) -> None:
    """An episode is the same whatever came before it."""
    model = case.build()
    for method in methods(0.125, pruned):
        with method.attach(model, **case.options) as session:
            first = [case.step(model, scene, BOTH) for scene in range(WINDOW + 2)]
            session.reset()
            for scene in (7, 8):
                case.step(model, scene, BOTH)
            restart(session, 2)
            again = [case.step(model, scene, BOTH) for scene in range(WINDOW + 2)]
            for one, other in zip(first, again, strict=True):
                assert torch.equal(one, other), method


def check_rows(case: Case, pruned: str) -> None:
    """A batch of two robots is two robots."""
    model = case.build()
    for method in methods(0.125, pruned):
        with method.attach(model, **case.options) as session:
            together = [case.step(model, scene, BOTH) for scene in range(WINDOW + 2)]
            kept = session.kept
            for row in range(2):
                restart(session, 1)
                alone = [case.step(model, scene, slice(row, row + 1)) for scene in range(WINDOW + 2)]
                if kept is not None:
                    assert session.kept is not None
                    assert torch.equal(session.kept[0], kept[row]), method
                for one, both in zip(alone, together, strict=True):
                    assert (one[0] - both[row]).abs().max() < 1e-4, method


def restart(session: vp.Session, rows: int) -> None:
    """A new episode. RandomKeep draws anew in each: for it, the first one again."""
    tokens = session.step.layout.tokens  # type: ignore[union-attr]
    session.reset()
    if isinstance(session.method, vp.RandomKeep):
        session.memory = vp.Memory.empty(rows, session.method.history, tokens)


def attached(model: Any) -> nn.Module:
    """The module that hooks go on."""
    return model if isinstance(model, nn.Module) else model.module


def prompt_lengths(model: Any, case: Case, scene: int) -> tuple[list[int], Tensor]:
    """Return the positions that each decoder layer computed in a control step's first prompt, and the step's result."""
    layers = layers_of(family_of(model, **case.options).decoder)
    lengths: list[list[int]] = [[] for _ in layers]
    handles = [
        layer.mlp.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[-2]))
        for layer, seen in zip(layers, lengths, strict=True)
    ]
    try:
        result = case.step(model, scene, BOTH)
    finally:
        for handle in handles:
            handle.remove()
    return [seen[0] for seen in lengths], result
