"""One control step, with what pruning does in it, as a program of tensors: what `Session.export` returns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vla_pruner.attach.family import Family, StepFunction
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.selection import PLAIN_FORMS
from vla_pruner.wording import a_type, install

if TYPE_CHECKING:
    from torch.export import ExportedProgram

    from vla_pruner.attach.runner import Opened, Runner

HISTORY, NEXT = "history_", "next_"
"""Names of what crosses control steps begin with the first; as outputs with both."""


@dataclass(frozen=True)
class ExportedStep:
    """One control step as a program that knows no Python: what it takes and gives are tensors of fixed shapes.

    Attributes:
        program: as torch.export has it, in torch's core operators. Called as `program.module()(**inputs)`; it returns a
            dict of `outputs`.
        inputs: an example of everything it takes, by name and in order: the policy's inputs, and the history.
        outputs: names of what it gives, in order: the policy's output, "kept" ((B, k) int64, sorted ids of the visual
            tokens that stay) where the step is pruned, and the history after the step ("next_history_...").
    """

    program: ExportedProgram
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]

    def start(self) -> dict[str, Tensor]:
        """The history of an episode that begins; empty where the method remembers nothing."""
        held = {name.removeprefix(HISTORY): value for name, value in self.inputs.items() if name.startswith(HISTORY)}
        if not held:
            return {}
        rows, window, tokens = held["action"].shape
        return self.history(Memory.empty(rows, window, tokens, held["action"].device, semantic="semantic" in held))

    def history(self, memory: Memory | None) -> dict[str, Tensor]:
        """What a session remembers (`session.memory`; None before its first step), as inputs of the program.

        Raises:
            SessionError: it is no memory, or one of other rows, visual tokens or control steps than the program's.
        """
        if memory is None:
            return self.start()
        if not isinstance(memory, Memory):
            raise SessionError(f"history was given {a_type(memory)}; give session.memory.")
        given = _history_of(memory)
        held = {name: given[name] for name in self.inputs if name.startswith(HISTORY)}
        for name, value in held.items():
            if value.shape != self.inputs[name].shape:
                raise SessionError(
                    f"The memory's {name.removeprefix(HISTORY)!r} has the shape {tuple(value.shape)}, and the program "
                    f"takes {tuple(self.inputs[name].shape)}: rows, control steps and visual tokens are fixed in it. "
                    "Give the memory of a session like the one that was exported, or export a step of that session."
                )
        return held

    def next(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The history after a step, out of what the program gave: inputs of the next step.

        Raises:
            SessionError: something of it is missing.
        """
        names = [name for name in self.inputs if name.startswith(HISTORY)]
        missing = [NEXT + name for name in names if not isinstance(outputs, Mapping) or NEXT + name not in outputs]
        if missing:
            raise SessionError(f"next was given no {', '.join(missing)}; give what the program returned.")
        return {name: outputs[NEXT + name] for name in names}

    def save_onnx(self, file: str | PathLike[str], **options: Any) -> None:
        """Write the program as ONNX; inputs and outputs have their names and their order there.

        Args:
            file: where.
            **options: of `torch.onnx.export`, such as opset_version.

        Raises:
            UnsupportedModelError: what writes ONNX is not installed.
        """
        lacking = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
        if lacking:
            raise UnsupportedModelError(f"To write ONNX, install {' and '.join(lacking)}: {install('export')}.")
        torch.onnx.export(
            self.program,
            (),
            file,
            kwargs=self.inputs,
            input_names=list(self.inputs),
            output_names=list(self.outputs),
            dynamo=True,
            verbose=False,
            **options,
        )


def export_step(
    runner: Runner, family: Family, model: nn.Module, example: Mapping[str, Any], pruned: bool
) -> ExportedStep:
    """One control step of a session as a program; arguments and errors as of `Session.export`."""
    if runner.reuse is not None:
        raise UnsupportedModelError(
            f"{type(runner.method).__name__} reuses keys and values of the last control step, which are no input of a "
            'program; export a method with pruned="drop" or "freeze".'
        )
    function = family.exported(example)
    memory = runner.memory
    with runner.opened_for_export(function.call, pruned) as opened:
        empty = opened.memory
        if memory is None or (memory.rows, memory.tokens) != (empty.rows, empty.tokens):
            memory = empty
        held = _history_of(memory.to(function.call.device))
        names = [name for name in held if runner.method.history and held[name].numel()]
        # Copies, since what was made in inference mode is none of a program's.
        inputs = {**function.inputs, **{name: held[name].clone() for name in names}}
        step = _Step(model, function, opened)
        try:
            with torch.no_grad(), _attributes_kept(model):
                program = torch.export.export(step, (), dict(inputs), strict=False)
                program = program.run_decompositions(_decompositions())
        except (SessionError, UnsupportedModelError):
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"A control step of {type(runner.method).__name__} cannot be exported ({_first_line(error)}). A method "
                "that is exported reads no tensor's value in Python: no item(), no branch on one."
            ) from error
    foreign = sorted({str(node.target) for node in program.graph.nodes if str(node.target).startswith("vla_pruner.")})
    if foreign:
        raise UnsupportedModelError(
            f"{type(runner.method).__name__} draws or reads on the host ({', '.join(foreign)}), which no program can; "
            "export another method."
        )
    returned: Any = program.call_spec.out_spec  # of a dict
    return ExportedStep(program, inputs, tuple(returned.context))


class _Step(nn.Module):
    """What is traced: the policy's step between opening and closing a control step of the session."""

    def __init__(
        self,
        model: nn.Module,
        function: StepFunction,
        opened: Opened,
    ) -> None:
        super().__init__()
        self.model = model
        self._function = function
        self._opened = opened

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        given = {name: value for name, value in inputs.items() if not name.startswith(HISTORY)}
        history = {name.removeprefix(HISTORY): value for name, value in inputs.items() if name.startswith(HISTORY)}
        # Of copies no number is known while they are traced: whoever reads one on the host fails, and bakes nothing in.
        unknown = {name: value.clone() for name, value in self._opened.memory.state_dict().items()}
        memory = Memory(**{**unknown, **history})
        self._opened.begin(memory, memory.steps)
        found = {self._function.output: self._function.run(**given)}
        kept, after = self._opened.finish()
        if kept is not None:
            found["kept"] = kept
        if "steps" in history:
            after["steps"] = history["steps"] + 1
        found |= {NEXT + HISTORY + name: after[name] for name in history}
        return found


@contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Has a model afterwards the very attributes that it has now: torch.export puts equal ones in their places."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _history_of(memory: Memory) -> dict[str, Tensor]:
    """What of a memory crosses control steps on the device, by the names of a program's inputs."""
    device = memory.action.device
    found = {"action": memory.action, "age": memory.age, "semantic": memory.semantic, "steps": memory.steps.to(device)}
    return {HISTORY + name: value for name, value in found.items()}


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """torch's own, and those of what other runtimes lack."""
    aten, table = torch.ops.aten, torch.export.default_decompositions()
    for name, form in PLAIN_FORMS.items():
        table[getattr(torch.ops.vla_pruner, name).default] = form
    table[aten.sort.stable] = _stable_sort
    table[aten.sort.default] = lambda values, dim=-1, descending=False: _stable_sort(
        values, stable=True, dim=dim, descending=descending
    )
    table[aten.searchsorted.Tensor] = _searchsorted
    return table


def _stable_sort(
    values: Tensor, *, stable: bool | None = True, dim: int = -1, descending: bool = False
) -> tuple[Tensor, Tensor]:
    """`torch.sort`, by counting what comes before each value: runtimes that sort break ties as they like."""
    if values.shape[dim] <= 1:
        return values.clone(), torch.zeros_like(values, dtype=torch.int64)
    line = values.transpose(dim, -1)
    mine, other = line.unsqueeze(-1), line.unsqueeze(-2)
    # No runtime need compare narrow numbers.
    if line.dtype in (torch.int8, torch.uint8, torch.int16, torch.bool):
        mine, other = mine.int(), other.int()
    places = torch.arange(line.shape[-1], device=line.device)
    ahead = other > mine if descending else other < mine
    earlier = (other == mine) & (places < places[:, None])
    rank = (ahead | earlier).to(torch.int64).sum(dim=-1)
    order = torch.zeros_like(rank).scatter(-1, rank, places.expand_as(rank))
    return line.gather(-1, order).transpose(dim, -1), order.transpose(dim, -1)


def _searchsorted(
    sorted_sequence: Tensor, values: Tensor, *, out_int32: bool = False, right: bool = False, **_: Any
) -> Tensor:
    """`torch.searchsorted` of rows, by counting what is smaller."""
    line, mine = sorted_sequence.unsqueeze(-2), values.unsqueeze(-1)
    before = line <= mine if right else line < mine
    return before.to(torch.int32 if out_int32 else torch.int64).sum(dim=-1)


def _first_line(error: Exception) -> str:
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {told[:200]}" if told else type(error).__name__
