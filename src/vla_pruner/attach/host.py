"""The interface between a model's calls and a control step: a wiring's reports to its host, and its questions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from vla_pruner.methods.base import Method

if TYPE_CHECKING:
    from vla_pruner.attach.control_step import ControlStep
    from vla_pruner.attach.family import Call
    from vla_pruner.attach.recorder import Attention
    from vla_pruner.attach.reuse import Reuse
    from vla_pruner.attach.shortening import Shortening
    from vla_pruner.attach.stages import Stage


class Host(Protocol):
    """Runs the control steps of a session. A wiring reports the model's calls to it, in this order:

    - `enter_decoder` or `enter_reader`: a call begins.
    - `see_embeddings`, `record_...`, `choose`: a layer of the call shows its input or its attention, or asks which
      tokens stay.
    - `leave_call`: the call came back.
    - `end_turn`: the call is over, whether it came back or failed.

    A call that is no part of a control step makes only two calls: `enter_aside` and `end_turn`.
    """

    @property
    def method(self) -> Method:
        """The method that chooses the tokens."""
        ...

    @property
    def stages(self) -> Mapping[int, Stage]:
        """The stages of the method by their layer, the first one first."""
        ...

    @property
    def reuse(self) -> Reuse | None:
        """The keys and values of the last control step, for methods that reuse them."""
        ...

    @property
    def step(self) -> ControlStep | None:
        """The control step that is running, or the last one."""
        ...

    @property
    def whole(self) -> bool:
        """True while a control step that is one graph runs, or is traced; it was opened before."""
        ...

    @property
    def aside(self) -> bool:
        """True while a call runs that is no part of a control step."""
        ...

    def open_step(self) -> ControlStep:
        """Return the control step that is running.

        Raises:
            SessionError: there is none.
        """
        ...

    def timed(self) -> AbstractContextManager[Any]:
        """Return a context for work that pruning adds."""
        ...

    def in_graph(self, name: str, function: Callable[..., Any], given: Tensor, *args: Any) -> Any:
        """Return `function(*args)`, as a compiled program if the session is compiled; see `Compiled.run`."""
        ...

    def enter_decoder(self, call: Call) -> bool:
        """Begin a call of the decoder; return whether it runs the prompt.

        Raises:
            SessionError: see `Runner.open_call`; or another thread is within a control step.
        """
        ...

    def enter_aside(self) -> None:
        """Begin a call of the decoder that is no part of a control step.

        Raises:
            SessionError: another thread is within a control step.
        """
        ...

    def enter_reader(self) -> None:
        """Begin a call of an expert.

        Raises:
            SessionError: no prompt came back before; or another thread is within a control step.
        """
        ...

    def leave_call(self) -> None:
        """End the call."""
        ...

    def end_turn(self) -> None:
        """End the turn of a call that came back or failed: other threads may begin one."""
        ...

    def see_embeddings(self, hidden: Tensor) -> None:
        """Note the first layer's input (B, N, D) of a prompt, for methods that compare tokens there."""
        ...

    def choose(self, hidden: Tensor, layer: int) -> Shortening | None:
        """Decide, at a pruning layer, the sequence from there on; None: nothing changes.

        Args:
            hidden: (B, n, D) hidden states as they enter the layer, of all positions that are live so far.
            layer: its index.
        """
        ...

    def record_semantic(self, layer: int, attention: Attention) -> None:
        """Record the attention of the layer before the pruning layer `layer`."""
        ...

    def record_decoder(self, layer: int, attention: Attention) -> None:
        """Record the attention of a layer of the decoder whose rows act."""
        ...

    def record_reader(self, layer: int, attention: Attention) -> None:
        """Record an expert's attention to the cache of the decoder's layer of this index."""
        ...


class Wiring(Protocol):
    """Connects a host to the calls of one model."""

    def install(self) -> None:
        """Put everything in place.

        Raises:
            UnsupportedModelError: the model cannot be shortened as it is.
        """
        ...

    def remove(self) -> None:
        """Leave the model as it was, also after an `install` that failed half-way."""
        ...
