"""The text part of a batch: rows brought to one form whatever side they are padded on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vla_pruner.errors import ObservationError

EMPTY_TOKEN = 29871
"""The token that stands between the prompt and the action in training; the tokenizer does not write it."""


@dataclass(frozen=True)
class Prompt:
    """Token ids on the CPU, padded on the right.

    Attributes:
        ids: (B, T) int64.
        lengths: (B,) int64, real tokens of each row.
    """

    ids: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """(B, T) int64: 1 for real tokens."""
        return (torch.arange(self.ids.shape[1]) < self.lengths[:, None]).long()

    @property
    def even(self) -> bool:
        """Whether all rows are equally long."""
        return bool((self.lengths == self.ids.shape[1]).all())

    def followed_by(self, tokens: list[int], pad: int) -> Prompt:
        """Each row with `tokens` after its last real token."""
        tail = torch.tensor(tokens)
        rows = [torch.cat([row[:length], tail]) for row, length in zip(self.ids, self.lengths, strict=True)]
        return Prompt(pad_sequence(rows, batch_first=True, padding_value=pad), self.lengths + len(tokens))


def read_prompt(input_ids: Tensor, attention_mask: Tensor | None, pad: int, ends_empty: bool = True) -> Prompt:
    """The prompt of `input_ids` (B, T), padded on either side.

    Args:
        input_ids: (B, T) token ids, the first real one BOS.
        attention_mask: (B, T), nonzero for real tokens; if None, whatever is not the padding token is real.
        pad: id of the padding token.
        ends_empty: add the empty token to rows that do not end in it.

    Raises:
        ObservationError: the shapes do not fit, or a row is empty.
    """
    if input_ids.dim() != 2:
        raise ObservationError(f"input_ids is (batch, tokens); found the shape {tuple(input_ids.shape)}.")
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ObservationError(
            f"attention_mask has the shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}; they "
            "must be equal. Where the empty token (29871) was appended by hand, append a 1 to the mask too, or neither."
        )
    # On the host: lengths decide shapes. Nothing was queued on the device yet, so nobody waits for long.
    ids = input_ids.detach().cpu()
    real = ids != pad if attention_mask is None else attention_mask.detach().cpu() != 0
    rows = [row[kept] for row, kept in zip(ids, real, strict=True)]
    if not rows or any(len(row) == 0 for row in rows):
        raise ObservationError("A row of input_ids has no real token; every row needs a prompt.")
    if ends_empty:
        rows = [row if row[-1] == EMPTY_TOKEN else torch.cat([row, row.new_tensor([EMPTY_TOKEN])]) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return Prompt(pad_sequence(rows, batch_first=True, padding_value=pad), lengths)
