"""The state that crosses control steps: one value with a leading row dimension, to be saved, swapped and restored."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from vla_pruner.errors import SessionError


@dataclass(frozen=True, eq=False)
class Memory:
    """Everything that is carried from one control step to the next, for B rows (robots).

    A memory is never changed in place: each operation returns a new one. It can therefore be handed to another session,
    kept per client by a server, or written to disk with `torch.save(memory.state_dict())`.

    Attributes:
        action: (B, window, M) float32, each visual token's action score as of each of the last control steps, newest
            last: the score of that step, or of the last step that saw the token.
        age: (B, window, M) int64, how many control steps old that score was then; 0 if the step itself saw it.
        semantic: (B, window, M) float32, the same of the semantic score; (B, 0, M) if the method needs none.
        steps: (B,) int64 on the CPU, control steps since the row's episode began.
        episode: (B,) int64 on the CPU, how many episodes this row has begun before this one.
        motion: (B, W) float32 on the CPU, how far the arm moved in each of the last W control steps, newest last; NaN
            if it was not reported. (B, 0) if the method reads no motion.
        streak: (B,) int64 on the CPU, how many control steps in a row were pruned, up to the last one.
    """

    action: Tensor
    age: Tensor
    semantic: Tensor
    steps: Tensor
    episode: Tensor
    motion: Tensor
    streak: Tensor

    @classmethod
    def empty(
        cls,
        rows: int,
        window: int,
        tokens: int,
        device: torch.device | str = "cpu",
        semantic: bool = False,
        motion: int = 0,
    ) -> Memory:
        """Return the memory of `rows` robots at the start of their first episode, for `tokens` visual tokens.

        Args:
            rows, window, tokens: B, the steps held, M.
            device: of the scores.
            semantic: whether semantic scores are held too.
            motion: W, control steps whose motion is held.
        """
        return cls(
            action=torch.zeros(rows, window, tokens, device=device),
            age=torch.ones(rows, window, tokens, dtype=torch.int64, device=device),
            semantic=torch.zeros(rows, window if semantic else 0, tokens, device=device),
            steps=torch.zeros(rows, dtype=torch.int64),
            episode=torch.zeros(rows, dtype=torch.int64),
            motion=torch.full((rows, motion), math.nan),
            streak=torch.zeros(rows, dtype=torch.int64),
        )

    @property
    def rows(self) -> int:
        """The number of rows B."""
        return self.steps.shape[0]

    @property
    def window(self) -> int:
        """The number of control steps whose scores are held."""
        return self.action.shape[1]

    @property
    def tokens(self) -> int:
        """The number of visual tokens M."""
        return self.action.shape[2]

    @property
    def holds_semantic(self) -> bool:
        """True if semantic scores are held."""
        return self.semantic.shape[1] > 0

    def push(
        self,
        scores: Tensor | None,
        seen: Tensor | None = None,
        semantic: Tensor | None = None,
        pruned: bool = False,
    ) -> Memory:
        """Return the memory after one more control step.

        Args:
            scores: (B, M) float32 action scores of the step, or None if the method reads none (only the count
                advances).
            seen: (B, M) bool, False if the token was pruned away, so that its score means nothing. None: all were seen.
            semantic: (B, M) float32 semantic scores of the step, if they are held.
            pruned: whether the step was pruned. The motion of the arm is set by `moved`.
        """
        return self.advance(self.scores_after(scores, seen, semantic), pruned)

    def advance(self, scores: Mapping[str, Tensor], pruned: bool) -> Memory:
        """Return the memory that `push` returns, given the result of `scores_after`: only the counters are left to
        advance.
        """
        motion = self.motion
        if motion.shape[1]:
            motion = torch.cat([motion[:, 1:], torch.full_like(motion[:, :1], math.nan)], dim=1)
        streak = self.streak + 1 if pruned else torch.zeros_like(self.streak)
        return replace(self, **scores, steps=self.steps + 1, motion=motion, streak=streak)

    def scores_after(
        self, scores: Tensor | None, seen: Tensor | None = None, semantic: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Return the fields that `push` changes on the device of the scores, by name. It may be part of a graph.
        Arguments are those of `push`.

        A score that is not finite, as a camera's NaN makes it, means nothing: the token counts as not seen, so that one
        bad frame does not spoil the choice of the next `window` control steps.
        """
        if scores is None or not self.window:
            return {}
        known = _known(scores, seen)
        age = torch.where(known, 0, self.age[:, -1] + 1)
        scores = torch.where(known, scores, self.action[:, -1])
        after = {
            "action": torch.cat([self.action[:, 1:], scores[:, None]], dim=1),
            "age": torch.cat([self.age[:, 1:], age[:, None]], dim=1),
        }
        if self.holds_semantic and semantic is not None:
            newest = torch.where(_known(semantic, seen), semantic, self.semantic[:, -1])
            after["semantic"] = torch.cat([self.semantic[:, 1:], newest[:, None]], dim=1)
        return after

    def moved(self, distance: float | Tensor) -> Memory:
        """Return the memory with the distances that the arms moved in the last control step.

        Args:
            distance: (B,), or one number if there is one row: finite, 0 or more, in any unit. Rows at the start of an
                episode have no last step, and their entries are ignored.

        Raises:
            SessionError: it is not such a distance, there is no last control step, or its distance is known already.
        """
        told = _distances(distance, self.rows)
        has_step = self.steps > 0
        if not has_step.any():
            raise SessionError("moved(...) was called before the first control step of an episode; call it after each.")
        if not self.motion[has_step, -1].isnan().all():
            raise SessionError("moved(...) was called twice after one control step; call it once after each.")
        newest = torch.where(has_step, told, self.motion[:, -1])
        return replace(self, motion=torch.cat([self.motion[:, :-1], newest[:, None]], dim=1))

    def reset(self, rows: list[int]) -> Memory:
        """Return the same memory, with the named rows at the start of a new episode."""
        fresh = Memory.empty(
            len(rows), self.window, self.tokens, self.action.device, self.holds_semantic, self.motion.shape[1]
        )
        return self.put(rows, replace(fresh, episode=self.take(rows).episode + 1))

    def take(self, rows: list[int]) -> Memory:
        """Return the memory of the named rows only, in that order."""
        return Memory(**{name: value[_index(rows, value)] for name, value in self.state_dict().items()})

    def put(self, rows: list[int], memory: Memory) -> Memory:
        """Return the same memory, with the named rows replaced by those of `memory`, in that order."""
        updated = {}
        for name, value in self.state_dict().items():
            updated[name] = value.clone()
            updated[name][_index(rows, value)] = getattr(memory, name).to(value)
        return Memory(**updated)

    def to(self, device: torch.device | str) -> Memory:
        """Return the same memory with its scores on `device`; the counters go to the CPU, to be read without a wait.

        All tensors then have the documented dtypes and are contiguous, as compiled code assumes.
        """

        def laid_out(name: str, value: Tensor) -> Tensor:
            dtype = torch.float32 if name in ("action", "semantic", "motion") else torch.int64
            place = device if name in ("action", "age", "semantic") else "cpu"
            return value.to(place, dtype).contiguous()

        return Memory(**{name: laid_out(name, value) for name, value in self.state_dict().items()})

    def state_dict(self) -> dict[str, Tensor]:
        """Return the tensors by name, for `torch.save` or `safetensors`; `Memory(**state)` restores them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _known(scores: Tensor, seen: Tensor | None) -> Tensor:
    finite = scores.isfinite()
    return finite if seen is None else seen & finite


def _index(rows: list[int], tensor: Tensor) -> Tensor:
    return torch.as_tensor(rows, dtype=torch.int64, device=tensor.device)


def _distances(distance: float | Tensor, rows: int) -> Tensor:
    """Return (B,) float32 on the CPU; raise SessionError unless they are distances of `rows` rows."""
    try:
        told = torch.as_tensor(distance, dtype=torch.float32).cpu()
    except (TypeError, ValueError, RuntimeError):
        raise SessionError(f"moved({distance!r}) was called; it takes how far the arm moved, as a number.") from None
    if told.dim() == 0 and rows == 1:
        told = told[None]
    if told.shape != (rows,):
        raise SessionError(
            f"moved(...) was given distances of shape {tuple(told.shape)}, but the batch has {rows} rows; give one "
            f"distance for each, of shape ({rows},)."
        )
    if not (told.isfinite() & (told >= 0)).all():
        raise SessionError(f"moved({told.tolist()}) was called; a distance is a finite number of 0 or more.")
    return told
