"""The text part of a batch: rows brought to one form, whichever side they are padded on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vla_pruner.errors import ObservationError
from vla_pruner.models.openvla.configuration import OpenVLAConfig

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
        """True if all rows are equally long."""
        return bool((self.lengths == self.ids.shape[1]).all())

    def followed_by(self, tokens: list[int], pad: int) -> Prompt:
        """Return each row with `tokens` after its last real token."""
        tail = torch.tensor(tokens)
        rows = [torch.cat([row[:length], tail]) for row, length in zip(self.ids, self.lengths, strict=True)]
        return Prompt(pad_sequence(rows, batch_first=True, padding_value=pad), self.lengths + len(tokens))


def read_prompt(
    input_ids: Tensor, attention_mask: Tensor | None, config: OpenVLAConfig, ends_empty: bool = True
) -> Prompt:
    """Return the prompt of `input_ids` (B, T), padded on either side.

    Args:
        input_ids: (B, T) token ids, the first real one BOS.
        attention_mask: (B, T), nonzero for real tokens; if None, every token but the padding token is real.
        config: the model's, with the ids of BOS and of padding, and the vocabulary.
        ends_empty: add the empty token to rows that do not end in it.

    Raises:
        ObservationError: the shapes do not fit, a row is empty or does not begin with BOS, or an id belongs to no
            token.
    """
    _check_tensor("input_ids", input_ids)
    if attention_mask is not None:
        _check_tensor("attention_mask", attention_mask)
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ObservationError(
            f"input_ids is (batch, tokens) of integers; found the shape {tuple(input_ids.shape)} of {input_ids.dtype}."
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ObservationError(
            f"attention_mask has the shape {tuple(attention_mask.shape)} and input_ids {tuple(input_ids.shape)}; they "
            "must be equal. Where the empty token (29871) was appended by hand, append a 1 to the mask too, or neither."
        )
    # On the host: lengths decide shapes. Nothing was queued on the device yet, so the wait is short.
    ids = input_ids.detach().cpu().long()
    pad, bos, vocabulary = config.pad_token_id, config.text_config.bos_token_id, config.text_config.vocab_size
    real = ids != pad if attention_mask is None else attention_mask.detach().cpu() != 0
    rows = [row[kept] for row, kept in zip(ids, real, strict=True)]
    if not rows or any(len(row) == 0 for row in rows):
        raise ObservationError("A row of input_ids has no real token; every row needs a prompt.")
    if any(row[0] != bos for row in rows):
        found = ", ".join(str(int(row[0])) for row in rows if row[0] != bos)
        raise ObservationError(
            f"A prompt begins with token {bos} (BOS), after which the images go; found a row that begins with {found}. "
            f"Put {bos} in front, as the policy's processor does; where rows are padded with another token than {pad}, "
            "give attention_mask."
        )
    if any(row.min() < 0 or row.max() >= vocabulary for row in rows):
        raise ObservationError(
            f"input_ids holds ids that are no token's; the vocabulary has 0 to {vocabulary - 1}. Use the tokenizer of "
            "the checkpoint."
        )
    if ends_empty:
        rows = [row if row[-1] == EMPTY_TOKEN else torch.cat([row, row.new_tensor([EMPTY_TOKEN])]) for row in rows]
    lengths = torch.tensor([len(row) for row in rows])
    return Prompt(pad_sequence(rows, batch_first=True, padding_value=pad), lengths)


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ObservationError(f"{name} is a tensor (batch, tokens); found {type(value).__name__}.")
