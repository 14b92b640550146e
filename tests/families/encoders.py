"""The properties of `EncoderReuse`, checked through a policy's own call, for every family that says where the patches
of its vision encoder are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import vla_pruner as vp
from tests.families.matrix import BOTH, WINDOW, Case, attached
from tests.state import whole_state
from vla_pruner.families import family_of

SCENES = (0, 1, 2, 0)


class StalePatches:
    """While it is open, a vision encoder runs on all patches, and those named stale enter each layer, and leave the
    last one, as they did in the control step before.

    Args:
        layers: of the encoder.
    """

    def __init__(self, layers: Any) -> None:
        self._layers = layers
        self._stale: list[Tensor | None] = []
        self._call = -1
        self._before: dict[tuple[int, int], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> StalePatches:
        for index, layer in enumerate(self._layers):
            self._handles.append(layer.register_forward_pre_hook(partial(self._enter, index)))
        self._handles.append(self._layers[-1].register_forward_hook(self._leave))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, chosen: tuple[Tensor | None, ...], patches: int) -> None:
        """Begin a control step in which all but the patches (I, k) of each call are stale; None: none is."""
        self._call = -1
        self._stale = [
            None if ids is None else torch.ones(len(ids), patches, dtype=torch.bool).scatter(1, ids, False)
            for ids in chosen
        ]

    def _enter(self, index: int, module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        self._call += index == 0
        return (self._mixed(index, args[0]), *args[1:])

    def _leave(self, module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self._mixed(len(self._layers), output)

    def _mixed(self, index: int, hidden: Tensor) -> Tensor:
        stale = self._stale[self._call]
        if stale is not None:
            hidden = torch.where(stale[..., None], self._before[self._call, index], hidden)
        self._before[self._call, index] = hidden
        return hidden


def parts_of(case: Case, model: Any) -> Any:
    """Return the parts of the model's vision encoder."""
    return family_of(model, **case.options).encoder


def check_encode_all(case: Case) -> None:
    """keep = 1.0 changes no bit."""
    model = case.build()
    untouched = [case.step(model, scene, BOTH) for scene in SCENES]
    for method in (vp.Unpruned(), vp.VLAPruner(keep=1.0, window=WINDOW, preset="paper")):
        with method.attach(model, encoder=vp.EncoderReuse(keep=1.0), **case.options) as session:
            for scene, expected in zip(SCENES, untouched, strict=True):
                assert torch.equal(case.step(model, scene, BOTH), expected)
                assert set(session.encoded) == {None}


def check_equal_images(case: Case) -> None:
    """Images that did not change give what the whole encoder gives, whichever patches are encoded.

    Products of fewer rows are added up in another order, so the last bits may differ.
    """
    model = case.build()
    untouched = case.step(model, 0, BOTH)
    with vp.VLAPruner(keep=1.0, window=WINDOW, preset="paper").attach(
        model, encoder=vp.EncoderReuse(keep=0.25), **case.options
    ) as session:
        assert torch.equal(case.step(model, 0, BOTH), untouched)
        for _ in range(3):
            assert torch.allclose(case.step(model, 0, BOTH), untouched, rtol=1e-5, atol=1e-5)
            assert None not in session.encoded


def check_reference(case: Case, pruned: str, keep: float = 0.25) -> None:
    """The policy agrees with one whose whole encoder runs, with the other patches as in the step before; together with
    dropped or frozen tokens.
    """
    model = case.build()
    encoder = parts_of(case, model)
    untouched = [case.step(model, scene, BOTH) for scene in SCENES]
    method = vp.KeepFixed(ids=(0, 2, 5, 7), layer=max(1, case.first), pruned=pruned)
    for chosen_by in (method, vp.VLAPruner(keep=1.0, window=WINDOW, preset="paper")):
        reuse = vp.EncoderReuse(keep=keep, refresh_every=None)
        actual, encoded, rows = [], [], []
        with Lengths(encoder.layers) as lengths, chosen_by.attach(model, encoder=reuse, **case.options) as session:
            for scene in SCENES:
                actual.append(case.step(model, scene, BOTH))
                encoded.append(session.encoded)
                rows.append(lengths.taken())
        patches = rows[0][0]
        assert set(encoded[0]) == {None}
        assert set(rows[0]) == {patches}
        for chosen, seen in zip(encoded[1:], rows[1:], strict=True):
            assert {ids.shape[1] for ids in chosen} == set(seen) == {round(keep * patches)}
        assert any(not torch.equal(*pair) for pair in zip(encoded[1], encoded[2], strict=True)), "the choice must move"
        with StalePatches(encoder.layers) as reference, chosen_by.attach(model, **case.options):
            for scene, chosen, result in zip(SCENES, encoded, actual, strict=True):
                reference.begin(chosen, patches)
                assert (result - case.step(model, scene, BOTH)).abs().max() < 1e-4, (chosen_by, scene)
        assert (actual[1] - untouched[1]).abs().max() > 1e-3, "reuse must show, or this test could not fail"


class Lengths:
    """Notes the number of patches that each layer of a vision encoder computes."""

    def __init__(self, layers: Any) -> None:
        self._layers, self._found, self._handles = layers, list[int](), list[Any]()

    def __enter__(self) -> Lengths:
        for layer in self._layers:
            norm = layer.norm2 if hasattr(layer, "norm2") else layer.layer_norm2
            self._handles.append(norm.register_forward_pre_hook(lambda _, args: self._found.append(args[0].shape[1])))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def taken(self) -> list[int]:
        """Return those since it was last asked."""
        found, self._found = self._found, []
        return found


def check_episodes(case: Case) -> None:
    """A new episode, another memory and every n-th step begin with everything, whatever came before."""
    model = case.build()
    reuse = vp.EncoderReuse(keep=0.25, refresh_every=3)
    with vp.VLAPruner(keep=0.5, window=WINDOW, preset="paper").attach(model, encoder=reuse, **case.options) as session:

        def run(scenes: tuple[int, ...]) -> tuple[list[Tensor], list[bool]]:
            found, whole = [], []
            for scene in scenes:
                found.append(case.step(model, scene, BOTH))
                whole.append(None in session.encoded)
            return found, whole

        first, whole = run((0, 1, 2, 0, 1))
        assert whole == [True, False, False, True, False]
        session.reset()
        run((7, 8))
        session.reset()
        again, whole = run((0, 1, 2, 0, 1))
        assert whole == [True, False, False, True, False]
        assert all(map(torch.equal, first, again))
        session.memory = session.memory
        assert run((0, 1))[1] == [True, False]
        session.reset(rows=[1])
        assert run((0, 1))[1] == [True, False]


def check_motion(case: Case) -> None:
    """A report of the arm's motion is about the step before: nothing is forgotten for it."""
    model = case.build()
    method, reuse = vp.TextQuery(keep=0.5, layer=max(1, case.first), gate=3), vp.EncoderReuse(keep=0.25)
    with method.attach(model, encoder=reuse, **case.options) as session:
        whole = []
        for scene in SCENES:
            case.step(model, scene, BOTH)
            whole.append(None in session.encoded)
            session.moved(torch.ones(2))
    assert whole == [True, False, False, False]


def check_casts(case: Case) -> None:
    """Where torch.autocast begins or ends within an episode, everything is encoded; so it is if its type changes."""
    model = case.build()
    try:
        with torch.autocast("cpu", torch.bfloat16):
            case.step(model, 0, BOTH)
    except RuntimeError as error:
        pytest.skip(f"the untouched model does not run under autocast: {error}")
    casts = (None, None, torch.bfloat16, torch.bfloat16, torch.float16, None, None)
    with vp.VLAPruner(keep=1.0, window=WINDOW, preset="paper").attach(
        model, encoder=vp.EncoderReuse(keep=0.25), **case.options
    ) as session:
        whole, found = [], []
        for cast in casts:
            with torch.autocast("cpu", cast, enabled=cast is not None):
                found.append(case.step(model, 0, BOTH))
            whole.append(None in session.encoded)
    assert whole == [True, False, True, False, True, True, False]
    for place in (2, 4, 5):
        with torch.autocast("cpu", casts[place], enabled=casts[place] is not None):
            assert torch.equal(found[place], case.step(model, 0, BOTH)), casts[place]


def check_rows(case: Case) -> None:
    """A batch of two robots is two robots."""
    model = case.build()
    reuse = vp.EncoderReuse(keep=0.25)
    with vp.VLAPruner(keep=1.0, window=WINDOW, preset="paper").attach(model, encoder=reuse, **case.options) as session:
        together = [case.step(model, scene, BOTH) for scene in SCENES]
        for row in range(2):
            session.reset()
            for scene, both in zip(SCENES, together, strict=True):
                alone = case.step(model, scene, slice(row, row + 1))
                assert (alone[0] - both[row]).abs().max() < 1e-4, (row, scene)


def check_no_trace(case: Case) -> None:
    """Detaching leaves the model as it was, also after an exception within the encoder, behind which everything is
    encoded.
    """
    model = case.build()
    module, layers = attached(model), parts_of(case, model).layers
    untouched = case.step(model, 0, BOTH)
    before = whole_state(module)

    def fail(*_: Any) -> None:
        raise RuntimeError("robot fell over")

    method, reuse = vp.VLAPruner(keep=0.5, window=WINDOW, preset="paper"), vp.EncoderReuse(keep=0.25)
    with method.attach(model, encoder=reuse, **case.options) as session:
        assert whole_state(module) != before
        first = [case.step(model, scene, BOTH) for scene in (0, 1)]
        handle = layers[-1].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="fell over"):
            case.step(model, 1, BOTH)
        handle.remove()
        case.step(model, 1, BOTH)
        assert set(session.encoded) == {None}
        session.reset()
        assert all(map(torch.equal, first, (case.step(model, scene, BOTH) for scene in (0, 1))))
    assert whole_state(module) == before
    handle = layers[0].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="fell over"), method.attach(model, encoder=reuse, **case.options):
        try:
            case.step(model, 0, BOTH)
        finally:
            handle.remove()
    assert whole_state(module) == before
    assert torch.equal(case.step(model, 0, BOTH), untouched)


CHECKS = {
    "encode_all": check_encode_all,
    "equal_images": check_equal_images,
    "reference-drop": partial(check_reference, pruned="drop"),
    "reference-freeze": partial(check_reference, pruned="freeze", keep=0.5),
    "episodes": check_episodes,
    "motion": check_motion,
    "casts": check_casts,
    "rows": check_rows,
    "no_trace": check_no_trace,
}
