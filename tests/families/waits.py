"""No control step of a session may make the host wait for the device if the model itself does not; `tests/waits.py`
detects waits on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import vla_pruner as vp
from tests.families.matrix import BOTH, Case, attached
from tests.waits import StandIn, Wait, added
from vla_pruner.attach.compiled import Compiled

WINDOW = 1
FATES = ("drop", "freeze")
COMPILED = (False, True)

METHODS: dict[str, Callable[[int, str], vp.Method]] = {
    "VLA-Pruner": lambda first, pruned: vp.VLAPruner(
        keep=0.25, layer=first, window=WINDOW, pruned=pruned, preset="paper"
    ),
    "with semantic warm-up": lambda first, pruned: vp.VLAPruner(
        keep=0.25, layer=first, window=2, warmup="semantic", pruned=pruned, preset="paper"
    ),
    "by text": lambda first, pruned: vp.VLAPruner(
        keep=9, layer=first, window=WINDOW, semantic_queries="text", pruned=pruned
    ),
    "by the last row": lambda first, pruned: vp.VLAPruner(
        keep=9, layer=first, window=WINDOW, semantic_queries="last", pruned=pruned
    ),
    "before the decoder": lambda _, pruned: vp.VLAPruner(
        keep=0.25, layer=0, window=WINDOW, refresh_every=3, pruned=pruned, preset="paper"
    ),
    "FastV": lambda first, pruned: vp.FastV(keep=0.25, layer=first, pruned=pruned),
    "SparseVLM": lambda first, pruned: vp.SparseVLM(
        keep=0.75, layer=first, then=((first + 1, 0.5), (first + 2, 0.125)), pruned=pruned
    ),
    "TextQuery": lambda first, pruned: vp.TextQuery(keep=0.25, layer=first, gate=2, pruned=pruned),
    "DivPrune": lambda first, pruned: vp.DivPrune(keep=0.25, layer=first, pruned=pruned),
    "DART": lambda first, pruned: vp.DART(keep=0.25, layer=first, pruned=pruned),
    "CDPruner": lambda first, pruned: vp.CDPruner(keep=0.25, layer=first, pruned=pruned),
    "MaxMinDiversity": lambda first, pruned: vp.MaxMinDiversity(
        keep=0.25, layer=first, metric="euclidean", pruned=pruned
    ),
    "ActionOnly": lambda first, pruned: vp.ActionOnly(
        keep=0.25, layer=first, window=WINDOW, unseen="carry", pruned=pruned
    ),
    "SemanticOnly": lambda first, pruned: vp.SemanticOnly(keep=0.25, layer=first, pruned=pruned),
    "ScoreFusion": lambda first, pruned: vp.ScoreFusion(keep=0.25, layer=first, window=WINDOW, pruned=pruned),
    "ActionAndDiversity": lambda first, pruned: vp.ActionAndDiversity(
        keep=0.25, layer=first, window=WINDOW, pruned=pruned
    ),
    "RandomKeep": lambda first, pruned: vp.RandomKeep(keep=0.25, layer=first, pruned=pruned),
    "KeepFixed": lambda first, pruned: vp.KeepFixed(ids=(1, 5, 8), layer=first, pruned=pruned),
    "Unpruned": lambda _, pruned: vp.Unpruned(pruned=pruned),
}
REUSE = {"VLA-Cache": lambda first, _: vp.VLACache(keep=0.9, threshold=-0.99, layer=first)}


FEW = ("VLA-Pruner", "by text", "SparseVLM", "TextQuery")
"""Methods for families that see and decode like another family: every kind of evidence."""


def possible(family: str, method: str, pruned: str, compiled: bool) -> bool:
    """Return True if a case is run; only families without an expert can be pruned before the decoder."""
    if any(name in family for name in ("reference", "openvla-", "diffusion", "None", "qwen3_vl", "gemma3", "lerobot")):
        return method in FEW
    return method != "before the decoder" or "pi0" not in family


class Fed:
    """A model whose inputs are placed on the device first, as its users would do."""

    def __init__(self, model: Any, stand_in: StandIn) -> None:
        self._model, self._stand_in = model, stand_in

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        if name in ("module", "model"):
            return Fed(value, self._stand_in)
        calls = ("sample_actions", "predict_action_chunk")
        return self._with_placed(value) if name in calls else value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._with_placed(self._model)(*args, **kwargs)

    def _with_placed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fed(*args: Any, **kwargs: Any) -> Any:
            return call(*self._stand_in.place(args), **self._stand_in.place(kwargs))

        return fed


def check_no_wait(
    case: Case,
    method: str,
    pruned: str = "drop",
    compiled: bool = False,
    allowed: str = "",
    encoder: vp.EncoderReuse | None = None,
) -> None:
    """Assert that warm-up, pruned steps, a row that starts anew and a restored memory wait no more than the model does.

    Args:
        case: case of the family.
        method: one of `METHODS` or `REUSE`.
        pruned: fate of the other tokens.
        compiled: run the code of a compiled session around its graphs; within a graph nothing can wait, or it would
            break.
        allowed: part of the location of a wait that the method documents.
        encoder: the patches that the vision encoder encodes; it must reuse some.
    """
    model = case.build()
    first = max(case.first, 1)
    with StandIn() as stand_in, pytest.MonkeyPatch.context() as patch:
        stand_in.place(attached(model))
        fed = Fed(model, stand_in)

        def run(scene: int) -> list[Wait]:
            before = len(stand_in.waits)
            case.step(fed, scene, BOTH)
            return stand_in.waits[before:]

        def own() -> list[Wait]:
            run(0)  # makes what is kept afterwards, such as positions on the device
            return run(1)

        if compiled:
            patch.setattr(Compiled, "_program", lambda *_: _as_it_is)
            with vp.compiled(model, "eager", **case.options):
                untouched = own()
        else:
            untouched = own()
        with {**METHODS, **REUSE}[method](first, pruned).attach(model, encoder=encoder, **case.options) as session:
            if compiled:
                session.compile("eager")
            prunes, reuses = [], []
            for number in range(6):
                more = added(run(number), untouched)
                # The first step makes what is kept afterwards.
                more = [wait for wait in more if number and not (allowed and any(allowed in at for at in wait.stack))]
                assert not more, f"control step {number}: " + "\n".join(map(str, more))
                prunes.append(session.kept is not None)
                reuses += [ids is not None for ids in session.encoded]
                repr(session)
                if session.method.motion:
                    session.moved(torch.tensor([0.5 + number, 1.0 + number]))
                if number == 3:
                    session.reset(rows=[1])
                if number == 4:
                    session.memory = session.memory
    assert any(reuses) == (encoder is not None), "patches must be reused, or this test could not fail"
    assert any(prunes) == (method != "Unpruned"), "it must prune, or this test could not fail"


def _as_it_is(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return original(*args, **kwargs)
