"""What crosses control steps: one value, with a leading row dimension, that can be saved, swapped and restored."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """Everything that is carried from one control step to the next, for B rows (robots).

    A memory is never changed in place: each operation returns a new one. It can therefore be handed to another
        session, kept per
    client by a server, or written to disk with `torch.save(memory.state_dict())`.

    Attributes:
        action: (B, window, M) float32, action scores of the last control steps, newest last. NaN where the token was
            unseen (pruned away) in that step. M visual tokens.
        last_seen: (B, M) float32, the score that each token had when it was last seen; 0 if it never was.
        age: (B, M) int64, control steps since then (0: seen in the last step).
        steps: (B,) int64 on the CPU, control steps since the row's episode began.
        episode: (B,) int64 on the CPU, how many episodes this row has begun before this one.
    """

    action: Tensor
    last_seen: Tensor
    age: Tensor
    steps: Tensor
    episode: Tensor

    @classmethod
    def empty(cls, rows: int, window: int, tokens: int, device: torch.device | str = "cpu", episode: int = 0) -> Memory:
        """The memory of `rows` robots at the start of an episode, for `tokens` visual tokens."""
        return cls(
            action=torch.full((rows, window, tokens), torch.nan, device=device),
            last_seen=torch.zeros(rows, tokens, device=device),
            age=torch.zeros(rows, tokens, dtype=torch.int64, device=device),
            steps=torch.zeros(rows, dtype=torch.int64),
            episode=torch.full((rows,), episode, dtype=torch.int64),
        )

    @property
    def rows(self) -> int:
        """Number of rows B."""
        return self.steps.shape[0]

    @property
    def tokens(self) -> int:
        """Number of visual tokens M."""
        return self.last_seen.shape[1]

    def push(self, scores: Tensor | None, seen: Tensor | None = None) -> Memory:
        """The memory after one more control step.

        Args:
            scores: (B, M) float32 action scores of the step, or None where the method reads none (only the count
                advances).
            seen: (B, M) bool, False where the token was pruned away and its score means nothing. None: all were seen.
        """
        steps = self.steps + 1
        if scores is None:
            return replace(self, steps=steps)
        if seen is None:
            seen = torch.ones_like(scores, dtype=torch.bool)
        marked = torch.where(seen, scores, torch.nan)
        return Memory(
            action=torch.cat([self.action[:, 1:], marked[:, None]], dim=1) if self.action.shape[1] else self.action,
            last_seen=torch.where(seen, scores, self.last_seen),
            age=torch.where(seen, 0, self.age + 1),
            steps=steps,
            episode=self.episode,
        )

    def reset(self, rows: list[int]) -> Memory:
        """The same memory, with the named rows at the start of a new episode."""
        index = torch.as_tensor(rows, dtype=torch.int64)
        fresh = Memory.empty(len(rows), self.action.shape[1], self.tokens, self.action.device)
        return self.put(rows, replace(fresh, episode=self.episode[index] + 1))

    def take(self, rows: list[int]) -> Memory:
        """The memory of the named rows only, in that order."""
        return Memory(**{f.name: _rows(getattr(self, f.name), rows) for f in fields(self)})

    def put(self, rows: list[int], memory: Memory) -> Memory:
        """The same memory, with the named rows replaced by those of `memory`, in that order."""
        updated = {}
        for field in fields(self):
            value = getattr(self, field.name).clone()
            value[torch.as_tensor(rows, device=value.device)] = getattr(memory, field.name).to(value)
            updated[field.name] = value
        return Memory(**updated)

    def to(self, device: torch.device | str) -> Memory:
        """The same memory with its scores on `device`; the counters stay on the CPU, where they are read without a
        wait.
        """
        return replace(
            self, action=self.action.to(device), last_seen=self.last_seen.to(device), age=self.age.to(device)
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The tensors by name, for `torch.save` or `safetensors`; `Memory(**state)` restores them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    return tensor[torch.as_tensor(rows, device=tensor.device)]
