"""A method attached to a model: the public face of a session."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import partial
from typing import Any

from torch import Tensor, nn

from vla_pruner.accelerators import now
from vla_pruner.anatomy import norm_of
from vla_pruner.attach import attached
from vla_pruner.attach.compiled import Compiled, check_not_compiled, set_aside
from vla_pruner.attach.control_step import ControlStep
from vla_pruner.attach.encoder import refuse_with_encoder
from vla_pruner.attach.entries import follow_resets, watch_actions, watch_steps
from vla_pruner.attach.exported import ExportedStep, export_step
from vla_pruner.attach.family import Family
from vla_pruner.attach.hooks import HookWiring
from vla_pruner.attach.runner import Clock, Runner
from vla_pruner.attach.trial import Trial, Verdict, log
from vla_pruner.errors import OptionError, SessionError, UnsupportedModelError
from vla_pruner.methods.base import Method
from vla_pruner.methods.encoder_reuse import EncoderReuse
from vla_pruner.methods.memory import Memory
from vla_pruner.methods.numbers import plain
from vla_pruner.replacements import Replacements, undo


class Session:
    """A method attached to a model, made by `method.attach(model)`. A context manager; `detach()` leaves the model as
    it was, also after an exception. If the policy has a `reset()` of its own, calling that is calling `session.reset()`
    too.

    Each control step is `attach.runner.Runner`'s work; attach/README.md describes it.

    Attributes:
        method: the method that chooses the tokens.
        family: the adapter for the model's architecture.
    """

    _left: Compiled | None = None

    def __init__(self, method: Method, model: Any, family: Family, encoder: EncoderReuse | None = None) -> None:
        self.method = method
        self.family = family
        self._policy = model
        self._decoder = family.decoder
        self._runner = Runner(method, family, encoder)
        attached.check_free(self._decoder, model)
        check_not_compiled(model, family)
        self._wiring = family.wiring(self._runner) or HookWiring(self._runner, family)
        self._replaced = Replacements()
        try:
            set_aside(model, family, self._replaced)
            if self._runner.encoder is not None:
                self._runner.encoder.install()  # within what the family puts around the same calls
            family.install()
            if self._runner.reuse is not None:
                self._runner.reuse.install()
            self._wiring.install()
            watch_steps(self, family, self._runner.turn, self._replaced)
            if self._runner.reuse is not None or self._runner.encoder is not None:
                watch_actions(self, model, self._replaced)
            follow_resets(self, model, self._runner.turn, self._replaced)
        except BaseException:
            self._remove()
            raise
        self._runner.session = self
        attached.enter(self._decoder, self)

    def __repr__(self) -> str:
        step = self.step
        if step is None:
            done = "before the first control step"
        else:
            # The counters are on the CPU, and a shape is known: nothing on an accelerator is waited for.
            steps = sorted({count + 1 for count in step.memory.steps.tolist()})
            number = f"control step {steps[0]}" if len(steps) == 1 else f"control steps {steps[0]} to {steps[-1]}"
            tokens, kept = step.layout.tokens, step.kept
            amount = f"all {tokens}" if kept is None else f"{kept.shape[1]} of {tokens}"
            done = f"{number}, {amount} visual tokens kept"
        if self._runner.encoder is not None:
            done += f", {_encoded(self._runner.encoder.chosen)}"
        ended = "" if self.attached else ", detached"
        if self.verdict is not None:
            ended += f"; {self.verdict}"
        return f"<Session of {described(self.method)} on {type(self.family).__name__}: {done}{ended}>"

    def __enter__(self) -> Session:
        if not self.attached:
            raise SessionError("This session is detached; attach the method anew.")
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    @property
    def attached(self) -> bool:
        """False once it was detached."""
        return attached.session_on(self._decoder) is self

    def compile(self, backend: str = "inductor") -> None:
        """Compile the decoder, experts and vision encoders as static graphs, with the work of pruning; for the
        reference policy the whole control step.

        Each kind of call is compiled when it is first made, so the first steps of the first episode take long:
        unpruned and pruned prompts are graphs of their own, and so is every other length of the prompt. On CUDA they
        are captured as CUDA graphs. Compiled code lives as long as the session.

        Args:
            backend: as in `torch.compile`.

        Raises:
            SessionError: it is detached, or compiled already.
            UnsupportedModelError: the family's calls, or the method's work in them, cannot be compiled.
        """
        if not self.attached:
            raise SessionError("This session is detached; attach the method anew.")
        if self._runner.compiled is not None:
            raise SessionError("This session is compiled already.")
        refuse_with_encoder(
            self._runner.encoder,
            "compile()",
            "keys, values and outputs of the last control step are held, which a static graph would overwrite",
        )
        compiled = Compiled(self.family, backend, self._runner)
        compiled.install()
        self._runner.compiled = compiled

    def export(self, example: Mapping[str, Any], pruned: bool = True) -> ExportedStep:
        """Export one control step as a program of tensors (torch.export), for runtimes without Python. Scoring,
        choosing and gathering are part of it, and the memory is both an input and an output. The session is unchanged.

        The program does not know which steps of an episode run unpruned: `Method.schedule` is Python, so the caller
        decides. An unpruned step is a program of its own (`pruned=False`) that takes and returns the same history.

        Args:
            example: a step's inputs, by name, which fix all shapes. For the reference policies "images", "instruction"
                and "proprio"; for OpenVLA-OFT "input_ids", "pixel_values" and "proprio", as `predict_action` takes
                them; for a language model "inputs_embeds" (B, N, D), and "tokens", the number of decoded tokens (1).
            pruned: whether it is a pruned step.

        Raises:
            SessionError: the session is detached or compiled.
            UnsupportedModelError: the model or the method cannot be exported.
            OptionError, ObservationError: the example does not fit this model, or `pruned` is no bool.
        """
        if not self.attached:
            raise SessionError("This session is detached; attach the method anew.")
        if self._runner.compiled is not None:
            raise SessionError("This session is compiled; export a step of one that is not.")
        refuse_with_encoder(self._runner.encoder, "export(...)", "a program has no inputs for what the encoder holds")
        if not isinstance(pruned, bool):
            raise OptionError(f"pruned={pruned!r} was given; it is True or False.")
        with self._runner.turn.step():
            module = self._policy if isinstance(self._policy, nn.Module) else self._policy.module
            return export_step(self._runner, self.family, module, example, pruned)

    def detach_unless_faster(self) -> None:
        """Time the next control steps, unpruned and pruned in turns, and detach if pruning is not faster.

        Only calls of the policy that are exactly one control step are timed, after the warm-up of each episode. Until
        enough steps of each kind have been timed (three that are discarded, then ten), half of the steps that would be
        pruned run unpruned, and the host waits for the device at both ends of each step. The result is `verdict`, and
        is logged ("vla_pruner"); so is a warning if control steps run outside of such calls. A compiled policy stays
        compiled, without pruning, until `detach` is called.

        Raises:
            SessionError: the session is detached.
            UnsupportedModelError: no call of the model is a whole control step.
        """
        if not self.attached:
            raise SessionError("This session is detached; attach the method anew.")
        if not self.family.whole_steps:
            raise UnsupportedModelError(
                f"{type(self._policy).__name__} has no call that is a whole control step, so there is nothing to time; "
                "attach to the policy around it, or to a language model with generate(...)."
            )
        refuse_with_encoder(
            self._runner.encoder,
            "only_if_faster (detach_unless_faster())",
            "the unpruned steps that are timed would reuse patches, too",
        )
        device = norm_of(self._decoder).weight.device
        calls = " or ".join(dict.fromkeys(f"{name}(...)" for _, name in self.family.whole_steps))
        self._runner.trial = Trial(partial(now, device), calls)

    @property
    def verdict(self) -> Verdict | None:
        """The result of `detach_unless_faster`; None until it is known."""
        return None if self._runner.trial is None else self._runner.trial.verdict

    def timed_step(self, outermost: bool) -> AbstractContextManager[None]:
        """Return a context that times a policy's own call if it is the outermost one."""
        trial = self._runner.trial
        return nullcontext() if trial is None or not outermost else trial.step()

    def heed_trial(self) -> bool:
        """Detach after a control step if the trial has found that pruning is not faster; return True if it did."""
        trial = self._runner.trial
        if trial is None or trial.verdict is None or trial.told or not self.attached:
            return False
        trial.told = True
        method = type(self.method).__name__
        if trial.verdict.faster:
            log.info("%s prunes on: %s.", method, trial.verdict)
            return False
        compiled = self._runner.compiled
        self.detach()
        if compiled is not None:
            self._left = Compiled(self.family, compiled.backend)
            self._left.install(self._policy)
        log.warning("%s is detached, since pruning is not faster here: %s.", method, trial.verdict)
        return True

    def detach(self) -> None:
        """Leave the model as it was before. The results of the last control step can still be read. Detaching twice
        does nothing.

        Everything is taken away even if a part fails; then the first error is raised.
        """
        left, self._left = self._left, None
        if left is not None:
            left.remove()
        if self.attached:
            attached.leave(self._decoder)
            undo(self._remove, self._runner.settle)

    def reset(self, rows: list[int] | None = None) -> None:
        """Begin a new episode: forget the memory, for all rows or for the named rows of a batch.

        Raises:
            SessionError: rows are named before the first control step, a row is not there, or another thread is within
                a control step.
        """
        self._runner.turn.check()
        if rows is None:
            self._runner.forget()
            return
        if not isinstance(rows, list) or any(
            isinstance(row, bool) or not isinstance(row, int) for row in map(plain, rows)
        ):
            raise SessionError(f"reset(rows={rows!r}) was called; rows is a list of row numbers.")
        memory = self.memory
        if memory is None:
            raise SessionError("reset(rows=...) was called before the first control step; call reset() without rows.")
        if any(not 0 <= row < memory.rows for row in rows):
            raise SessionError(f"reset(rows={rows}) was called, but the batch has rows 0 to {memory.rows - 1}.")
        self.memory = memory.reset(rows)

    def forget_images(self) -> None:
        """Have the next control step reuse nothing of the images before it: the vision encoder encodes all patches
        (`EncoderReuse`), and the decoder computes all tokens (`VLACache`). The memory stays. Call it where the image
        changes as a whole within an episode. A control step that fails does so, and so does `act` if it refuses actions
        that are not finite; if you call the model itself and its actions are not, call this.

        Raises:
            SessionError: another thread is within a control step.
        """
        self._runner.turn.check()
        self._runner.forget_images()

    def moved(self, distance: float | Tensor) -> None:
        """Report how far the arm moved in the last control step, for methods that prune by it (`Method.motion`). Call
        it once after each step, before the next one: the code that commands the robot has the distance, and the model
        does not.

        Args:
            distance: (B,), or one number if there is one row: the length of the path of the whole action chunk, the sum
                of |p_{t+1} - p_t| over the arm's positions, in any unit.

        Raises:
            SessionError: the method reads no motion, there was no step, this is the second call after it, or
                `distance` is negative, not finite, or of another number of rows.
        """
        if not self.method.motion:
            raise SessionError(
                f"moved(...) was called, but {type(self.method).__name__} as it was made prunes whatever the arm does; "
                "leave the call out, or attach a method with a motion gate, such as TextQuery(gate=3)."
            )
        memory = self.memory
        if memory is None:
            raise SessionError("moved(...) was called before the first control step; call it after each.")
        self._runner.amend(memory.moved(distance))

    @property
    def kept(self) -> Tensor | None:
        """(B, k) int64, sorted ids of the visual tokens kept in the last control step; None if it was not pruned."""
        step = self.step
        return None if step is None or step.kept is None else self._runner.own(step.kept)

    @property
    def encoder(self) -> EncoderReuse | None:
        """The choice of the patches that the vision encoder encodes; None: all."""
        return None if self._runner.encoder is None else self._runner.encoder.options

    @property
    def encoded(self) -> tuple[Tensor | None, ...]:
        """Ids (I, k) int64, sorted, of the patches that the vision encoder encoded in the last control step, one for
        each of its calls with I images; None: all patches. Empty before the first control step and without `encoder`.
        """
        return () if self._runner.encoder is None else self._runner.encoder.chosen

    @property
    def scores(self) -> dict[str, Tensor]:
        """Scores (B, M) float32 of the last control step, those of "semantic" and "action" that the method reads.

        A token counts 0 in the action score of every layer that lacks it.
        """
        step = self.step
        if step is None:
            return {}
        found = {"semantic": step.semantic, "action": step.action}
        return {name: self._runner.own(score) for name, score in found.items() if score is not None}

    @property
    def memory(self) -> Memory | None:
        """Everything carried from step to step, the last control step included; None before the first one.

        A value: save it, hand it to another session, or put it back later (one per robot). Setting it replaces all
        history.

        Raises:
            SessionError: the value is no memory, or one of a method with another window; or another thread is within a
                control step.
        """
        return self._runner.memory

    @memory.setter
    def memory(self, memory: Memory | None) -> None:
        self._runner.memory = memory

    @property
    def policy(self) -> Any:
        """The model that the method was attached to, without wrappers of other libraries."""
        return self._policy

    @property
    def step(self) -> ControlStep | None:
        """The control step that is running, or the last one, to read: its layout, and what was kept at each layer."""
        return self._runner.step

    @property
    def clock(self) -> Clock | None:
        """None, or a function that is entered as `with clock("pruning")` around scoring, selecting and gathering, for
        timing.
        """
        return self._runner.clock

    @clock.setter
    def clock(self, clock: Clock | None) -> None:
        self._runner.clock = clock

    def _remove(self) -> None:
        compiled, self._runner.compiled, self._runner.session = self._runner.compiled, None, None
        parts = (compiled, self._replaced, self._wiring, self._runner.reuse, self.family, self._runner.encoder)
        undo(*(part.remove for part in parts if part is not None))


def _encoded(chosen: tuple[Tensor | None, ...]) -> str:
    """Return how many patches of each image were encoded."""
    counts = sorted({ids.shape[1] for ids in chosen if ids is not None})
    return f"{' or '.join(map(str, counts))} patches of each image encoded" if counts else "all patches encoded"


def described(method: Method) -> str:
    """Return a method with its `keep` and the options that are neither its defaults nor, where a preset brings others,
    that preset's.
    """
    options = []
    for field in fields(method):
        value = getattr(method, field.name)
        if field.name == "keep" or value != field.default or value != method.of_preset.get(field.name, value):
            options.append(f"{field.name}={value!r}")
    return f"{type(method).__name__}({', '.join(options)})"
