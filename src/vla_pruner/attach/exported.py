"""Export of one control step, pruning included, as a program of tensors: `Session.export`."""

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
"""Prefixes of the tensors that cross control steps: inputs begin with the first, outputs with the second and first."""


@dataclass(frozen=True)
class ExportedStep:
    """One control step as a program that needs no Python: its inputs and outputs are tensors of fixed shapes.

    Attributes:
        program: from torch.export, in torch's core operators. Called as `program.module()(**inputs)`, it returns a dict
            of `outputs`.
        inputs: an example of every input, by name and in order: the policy's inputs, then the history.
        outputs: names of the outputs, in order: the policy's output, "kept" ((B, k) int64, sorted ids of the visual
            tokens that stay) if the step is pruned, and the history after the step ("next_history_...").
    """

    program: ExportedProgram
    inputs: dict[str, Tensor]
    outputs: tuple[str, ...]

    def start(self) -> dict[str, Tensor]:
        """Return the history at the beginning of an episode; empty if the method remembers nothing."""
        held = {name.removeprefix(HISTORY): value for name, value in self.inputs.items() if name.startswith(HISTORY)}
        if not held:
            return {}
        rows, window, tokens = held["action"].shape
        return self.history(Memory.empty(rows, window, tokens, held["action"].device, semantic="semantic" in held))

    def history(self, memory: Memory | None) -> dict[str, Tensor]:
        """Return the memory of a session (`session.memory`; None before its first step) as inputs of the program.

        Raises:
            SessionError: it is not a memory, or has other rows, visual tokens or control steps than the program's.
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
        """Return the history after a step, taken from the program's outputs, as inputs of the next step.

        Raises:
            SessionError: `outputs` lacks a part of the history.
        """
        names = [name for name in self.inputs if name.startswith(HISTORY)]
        missing = [NEXT + name for name in names if not isinstance(outputs, Mapping) or NEXT + name not in outputs]
        if missing:
            raise SessionError(f"next was given no {', '.join(missing)}; give what the program returned.")
        return {name: outputs[NEXT + name] for name in names}

    def save_onnx(self, file: str | PathLike[str], **options: Any) -> None:
        """Write the program as ONNX, with the same names and order of inputs and outputs.

        Args:
            file: path to write to.
            **options: of `torch.onnx.export`, such as opset_version.

        Raises:
            UnsupportedModelError: onnx or onnxscript is not installed.
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
    """Export one control step of a session as a program; arguments and errors as of `Session.export`."""
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
        # Copies, since a program cannot hold tensors that were made in inference mode.
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
    """The module that is traced: the policy's step between opening and closing a control step of the session."""

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
        # The values of copies are unknown during tracing: reading one on the host fails instead of baking it in.
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
    """Restore the very same attributes of a model at the end of the block: torch.export replaces them by equal ones."""
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)


def _history_of(memory: Memory) -> dict[str, Tensor]:
    """Return the tensors of a memory that cross control steps on the device, by the names of a program's inputs."""
    device = memory.action.device
    found = {"action": memory.action, "age": memory.age, "semantic": memory.semantic, "steps": memory.steps.to(device)}
    return {HISTORY + name: value for name, value in found.items()}


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return torch's own decompositions, with further ones for operators that other runtimes lack."""
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
    """Sort like `torch.sort`, by counting the values that come before each value, since the runtimes' own sorts break
    ties in any order.
    """
    if values.shape[dim] <= 1:
        return values.clone(), torch.zeros_like(values, dtype=torch.int64)
    line = values.transpose(dim, -1)
    mine, other = line.unsqueeze(-1), line.unsqueeze(-2)
    # Runtimes need not implement comparisons of narrow numbers.
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
    """Search rows like `torch.searchsorted`, by counting the smaller values."""
    line, mine = sorted_sequence.unsqueeze(-2), values.unsqueeze(-1)
    before = line <= mine if right else line < mine
    return before.to(torch.int32 if out_int32 else torch.int64).sum(dim=-1)


def _first_line(error: Exception) -> str:
    told = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {told[:200]}" if told else type(error).__name__
