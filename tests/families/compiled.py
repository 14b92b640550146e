"""The properties of compiled sessions, whatever the family: see `tests/attach/test_compiled.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

import vla_pruner as vp
from tests.families.matrix import BOTH, Case, attached
from tests.state import whole_state


@dataclass
class Record:
    """The results of one control step of two rows."""

    output: Tensor
    kept: Tensor | None
    scores: dict[str, Tensor]
    memory: vp.Memory


def record(session: vp.Session, output: Tensor) -> Record:
    """Return the results of the last control step."""
    assert session.memory is not None
    return Record(output.clone(), session.kept, session.scores, session.memory)


def drive(
    session: vp.Session, step: Callable[[int], Tensor], after_first: Callable[[], Callable[[], None]] | None = None
) -> list[Record]:
    """Episodes with all that may happen between steps; scenes are numbers, and `step` runs one.

    Args:
        session: attached, nothing run yet.
        step: runs a control step of two rows.
        after_first: called after the first episode; what it returns is called at the end.
    """
    found: list[Record] = []

    def run(*scenes: int) -> None:
        for scene in scenes:
            found.append(record(session, step(scene)))
            if session.method.motion:
                session.moved(torch.tensor([0.5 + scene, 1.0 + scene]))

    run(0, 1, 2, 3)
    check = after_first() if after_first is not None else None
    saved = session.memory
    session.reset()
    run(4, 5, 6)
    session.reset(rows=[1])
    run(7, 8, 9)
    assert saved is not None
    # Of a layout and a dtype that no step leaves.
    spread = {name: torch.stack([value] * 2, dim=-1)[..., 0] for name, value in saved.state_dict().items()}
    session.memory = vp.Memory(**{**spread, "action": spread["action"].double()})
    run(10)
    session.memory = saved.put([0, 1], saved.take([1, 0]))
    run(11)
    if check is not None:
        check()
    return found


def graphs() -> int:
    """Return the number of graphs that torch has made since `counters.clear()`."""
    return counters["stats"]["unique_graphs"]


def assert_same(actual: list[Record], expected: list[Record], tolerance: float = 1e-5) -> None:
    """Fail unless both kept the same tokens, and all numbers agree."""
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert (one.kept is None) == (other.kept is None), index
        if one.kept is not None and other.kept is not None:
            assert torch.equal(one.kept, other.kept), index
        torch.testing.assert_close(one.output, other.output, rtol=tolerance, atol=10 * tolerance)
        assert set(one.scores) == set(other.scores), index
        pairs = [(one.scores[name], other.scores[name]) for name in one.scores]
        pairs += [(value, other.memory.state_dict()[name]) for name, value in one.memory.state_dict().items()]
        for left, right in pairs:
            torch.testing.assert_close(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_family(case: Case, method: vp.Method) -> None:
    """A compiled session acts as an uncompiled one, in graphs that the first episode makes; the model compiled as it is
    acts as before.
    """
    model = case.build()
    untouched = case.step(model, 0, BOTH)
    with method.attach(model, **case.options) as session:
        expected = episodes(session, case, model)
    before = whole_state(attached(model))
    with method.attach(model, **case.options) as session:
        session.compile("eager")
        counters.clear()
        actual = episodes(session, case, model)
    assert_same(actual, expected)
    assert any(one.kept is not None for one in actual), "it must prune, or this test could not fail"
    assert whole_state(attached(model)) == before
    with vp.compiled(model, "eager", **case.options):
        # While it is traced, transformers writes the causal mask out instead of leaving it to the kernel.
        torch.testing.assert_close(case.step(model, 0, BOTH), untouched, rtol=1e-4, atol=1e-4)
    assert whole_state(attached(model)) == before


def episodes(session: vp.Session, case: Case, model: Any) -> list[Record]:
    """Two episodes of three steps; the second makes no graphs."""
    found = []
    for first in (0, 3):
        made = graphs()
        session.reset()
        found += [record(session, case.step(model, first + scene, BOTH)) for scene in range(3)]
    assert graphs() == made
    return found
