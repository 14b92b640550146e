"""The life of a control step: its legal transitions, the only writers of its fields, and its part in a compiled
program's key.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import pytest
import torch

import vla_pruner as vp
from tests.attach.tiny import CACHE, VISUAL, decode, make_cache, prompt, tiny_lm
from vla_pruner.attach import runner
from vla_pruner.attach.control_step import ControlStep, Phase
from vla_pruner.attach.graph_key import not_in_key
from vla_pruner.attach.layout import Layout
from vla_pruner.caches import cache_of

PACKAGE = Path(vp.__file__).parent


def layout() -> Layout:
    """Two rows of six positions, of which two to four are visual."""
    real = torch.ones(2, 6, dtype=torch.bool)
    return Layout(torch.tensor([[2, 3, 4]] * 2), real[:, :3], real, cameras=(3,))


def opened(kind: type[ControlStep] = ControlStep, **options: Any) -> ControlStep:
    return kind(layout(), vp.Memory.empty(2, 0, 3), budgets={1: (2,)}, **options)


def acting() -> ControlStep:
    step = opened()
    step.leave_call()
    return step


def closed() -> ControlStep:
    step = acting()
    step.close()
    return step


def test_a_whole_life():
    step = opened()
    assert (step.phase, step.running, step.reads, step.in_prompt()) == (Phase.PROMPT, True, True, True)
    step.leave_call()
    assert (step.phase, step.running, step.reads, step.in_prompt()) == (Phase.ACTING, False, False, False)
    for _ in range(2):
        step.enter_call()
        assert (step.phase, step.running, step.reads) == (Phase.ACTING, True, True)
        step.leave_call()
    step.repeat_prompt(6)
    assert (step.phase, step.running) == (Phase.PROMPT, True)
    step.leave_call()
    step.finish({})
    step.close()
    step.close()
    assert (step.phase, step.reads) == (Phase.CLOSED, False)


def test_a_failed_call_leaves_the_step_unfinished_and_may_be_made_again():
    step = acting()
    step.enter_call()
    assert step.running
    step.enter_call()
    step.leave_call()
    assert not step.running


ILLEGAL = {
    "a token before the prompt came back": (opened, lambda step: step.enter_call(), "no control step is open"),
    "the prompt again before it came back": (opened, lambda step: step.repeat_prompt(6), "no control step is open"),
    "an end before the prompt came back": (opened, lambda step: step.finish({}), "no control step is open"),
    "another prompt": (acting, lambda step: step.repeat_prompt(5), "has 6 positions, but it was run again with 5"),
    "a return without a call": (acting, lambda step: step.leave_call(), "never began"),
    "a choice while acting": (acting, lambda step: step.begin_choice(1), "while the prompt runs"),
    "a token of a closed step": (closed, lambda step: step.enter_call(), "was closed"),
    "the prompt of a closed step": (closed, lambda step: step.repeat_prompt(6), "was closed"),
    "a layer of a closed step": (closed, lambda step: step.in_prompt(), "was closed"),
    "a choice of a closed step": (closed, lambda step: step.begin_choice(1), "was closed"),
    "a return to a closed step": (closed, lambda step: step.leave_call(), "was closed"),
    "the end of a closed step": (closed, lambda step: step.finish({}), "was closed"),
}


@pytest.mark.parametrize("name", ILLEGAL)
def test_an_illegal_transition_raises_and_changes_nothing(name):
    make, transition, message = ILLEGAL[name]
    step = make()
    before = (step.phase, step.running, step.chosen, step.graph_key)
    with pytest.raises(vp.SessionError, match=message):
        transition(step)
    assert (step.phase, step.running, step.chosen, step.graph_key) == before


def test_tokens_are_chosen_once_and_only_where_fewer_stay():
    step = opened()
    assert [step.begin_choice(1), step.begin_choice(1)] == [True, False]
    assert not opened(prunes=False).begin_choice(1)
    step = ControlStep(layout(), vp.Memory.empty(2, 0, 3), budgets={1: (3,)})
    assert not step.begin_choice(1)
    assert step.chosen == (1,)


def test_a_memory_that_is_set_within_a_control_step_ends_it():
    model = tiny_lm(num_hidden_layers=2)
    method = vp.FastV(keep=0.25, layer=1)
    token = torch.ones(2, 1, dtype=torch.int64)
    with method.attach(model, visual=VISUAL) as session, torch.no_grad():
        expected = decode(model, prompt()[0], None, make_cache("dynamic", model), 1)[1]
        out = model(inputs_embeds=prompt()[0], use_cache=True)
        session.memory = session.memory
        assert session.kept is not None, "what the step left can still be read"
        with pytest.raises(vp.SessionError, match=r"session\.memory was set in the middle of it"):
            model(input_ids=token, **{CACHE: cache_of(out)})
        handle = model.model.layers[0].register_forward_pre_hook(lambda *_: setattr(session, "memory", None))
        with pytest.raises(vp.SessionError, match=r"session\.memory was set in the middle of it"):
            model(inputs_embeds=prompt()[0])
        handle.remove()
        assert torch.equal(decode(model, prompt()[0], None, make_cache("dynamic", model), 1)[1], expected)


# The key of a compiled program.


@dataclass
class Turned(ControlStep):
    """A control step with one more field, which nothing else uses."""

    turned: bool = False


def test_a_field_that_is_added_is_part_of_the_key():
    keys = [opened(Turned, turned=turned).graph_key for turned in (False, True, False)]
    assert keys[0] == keys[2] != keys[1]


# Importing the compiler warns of itself.
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_program_is_compiled_for_each_value_of_a_field_that_is_added(monkeypatch):
    class Turning(Turned):
        made = 0

        def __post_init__(self) -> None:
            super().__post_init__()
            type(self).made += 1
            self.turned = type(self).made > 2

    monkeypatch.setattr(runner, "ControlStep", Turning)
    model = tiny_lm(num_hidden_layers=2)
    programs = []
    with vp.RandomKeep(keep=0.25, layer=1).attach(model, visual=VISUAL) as session, torch.no_grad():
        session.compile("eager")
        for _ in range(4):
            model(inputs_embeds=prompt()[0], use_cache=False)
            programs.append(session._runner.compiled.programs)  # type: ignore[union-attr]
    assert programs == [1, 1, 2, 2]


def test_a_field_of_which_nothing_is_known_is_refused_until_it_opts_out():
    @dataclass
    class Odd(ControlStep):
        odd: object = field(default_factory=object)

    @dataclass
    class Told(ControlStep):
        odd: object = field(default_factory=object, metadata=not_in_key("no program reads it"))

    with pytest.raises(TypeError, match="compiled program depends on of a object"):
        _ = opened(Odd).graph_key
    assert opened(Told).graph_key == opened(Told).graph_key == opened().graph_key


def test_the_key_follows_everything_that_a_call_decides():
    step = opened(action_rows=torch.tensor([[5]] * 2))
    keys = [step.graph_key]
    hidden = torch.randn(2, 6, 8)
    for change in (
        lambda: step.see_embeddings(vp.DivPrune(), hidden),
        lambda: step.see_embeddings(vp.SparseVLM(), hidden),
        lambda: step.see_embeddings(vp.CDPruner(), hidden),
        lambda: step.begin_choice(1),
        lambda: step.shorten(1, torch.tensor([[0, 2]] * 2), readable=True),
        lambda: step.enter(step.shortening, hidden),  # type: ignore[arg-type]
        lambda: step.leave_call(),
        lambda: step.finish({"action": torch.zeros(2, 1, 3)}),
        lambda: step.close(),
    ):
        change()
        keys.append(step.graph_key)
    assert len(set(keys)) == len(keys)
    one, two = opened(), opened()
    two.begin_choice(1)
    two.shorten(1, torch.tensor([[0, 2]] * 2), readable=False)
    one.begin_choice(1)
    one.shorten(1, torch.tensor([[0, 2]] * 2), readable=True)
    assert one.graph_key != two.graph_key


def test_what_is_measured_between_programs_makes_no_new_one():
    step = acting()
    key = step.graph_key
    step.enter_call()
    step.call.add(torch.ones(2, 6), 0)  # type: ignore[union-attr]
    step.leave_call()
    assert step.action is not None
    step.settle()
    assert step.graph_key == key


# The writers of a control step.

NAMES = {one.name for one in fields(ControlStep)}
MUTATORS = {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}


def writes(source: str, everywhere: bool) -> Iterator[int]:
    """Yield the lines that change a field of what may be a control step: something of a field's name is assigned or
    mutated.

    Args:
        source: of a module.
        everywhere: whether any object with such a field may be a control step; else only one that is named a step.
    """

    def is_field(node: ast.expr) -> bool:
        if not isinstance(node, ast.Attribute) or node.attr not in NAMES:
            return False
        owner = node.value
        name = owner.id if isinstance(owner, ast.Name) else owner.attr if isinstance(owner, ast.Attribute) else ""
        return name.lstrip("_").endswith("step") or (everywhere and name != "self")

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Attribute, ast.Subscript)) and isinstance(node.ctx, (ast.Store, ast.Del)):
            target: ast.expr = node
            while isinstance(target, ast.Subscript):
                target = target.value
            if is_field(target):
                yield node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            if is_field(node.func.value):
                yield node.lineno
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("setattr", "delattr"):
            words = {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}
            if words & NAMES:
                yield node.lineno


def test_nothing_but_a_control_step_writes_its_fields():
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        if inside.as_posix() != "attach/control_step.py":
            near = inside.parts[0] in ("attach", "families")
            found += [f"{inside}:{line}" for line in writes(path.read_text(encoding="utf-8"), near)]
    # The memory of a runner is a property that closes the step.
    assert found == ["attach/session.py:" + str(line_of("attach/session.py", "self._runner.memory = memory"))]


def line_of(path: str, text: str) -> int:
    lines = (PACKAGE / path).read_text(encoding="utf-8").splitlines()
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return number


def test_a_write_is_found_however_it_is_written():
    source = (
        "step.phase = 1\nself._step.kept = 2\nstep.shortenings[3] = 4\nstep.steps += 5\nhost.step.chosen.add(6)\n"
        "setattr(one, 'frozen_hidden', 7)\ndel step.call\none.prunes, two = 8, 9\nself.kept = 10\nx = step.kept\n"
    )
    assert sorted(writes(source, True)) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert sorted(writes(source, False)) == [1, 2, 3, 4, 5, 6, 7]
