"""Llama's tokenizer, read from a checkpoint's own files as they are, with every version of transformers.

transformers 5 builds Llama's tokenizer anew from the vocabulary if it is loaded by name, and requires trust in remote
code if a published OpenVLA config.json lies beside it. Reading tokenizer.json as it is avoids both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from vla_pruner.checkpoints.files import described_by, is_file, read_json, reason, shown
from vla_pruner.errors import CheckpointError

_DEFAULTS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_NAMES = (*_DEFAULTS, "pad_token")


class Tokenizer(Protocol):
    """The part of a transformers tokenizer's interface that is used."""

    @property
    def bos_token_id(self) -> Any:
        """Id of the token that begins every sequence."""

    def __call__(self, text: Any, *, add_special_tokens: bool) -> Any:
        """Return a mapping with `input_ids`, without special tokens if they are not to be added."""


class StandInTokenizer:
    """One token for each byte of the text: for models with random weights that come without a tokenizer.

    It is never used for a real checkpoint, which would read gibberish. Ids are those that Llama's vocabulary has for
    single bytes, 3 to 258, so they are deterministic and never action tokens.

    Args:
        vocab_size: of the model; at least 259.
    """

    bos_token_id = 1

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 259:
            raise ValueError(f"A token for each byte needs a vocabulary of 259; found {vocab_size}.")
        self.vocab_size = vocab_size

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Return `input_ids` of one text."""
        ids = [3 + byte for byte in text.encode()]
        return {"input_ids": [self.bos_token_id, *ids] if add_special_tokens else ids}


class SentencePieceTokenizer:
    """Llama's tokenizer from tokenizer.model, by the sentencepiece library. CheckpointError if damaged."""

    def __init__(self, path: Path) -> None:
        try:
            from sentencepiece import SentencePieceProcessor  # pyright: ignore[reportMissingImports]
        except ModuleNotFoundError as error:
            raise CheckpointError(
                f"{path.parent} has tokenizer.model and no tokenizer.json, which needs sentencepiece: "
                "`pip install sentencepiece`, or copy tokenizer.json there from the checkpoint that this one was "
                "trained from."
            ) from error
        self._pieces = SentencePieceProcessor()
        try:
            self._pieces.Load(str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} is damaged ({reason(error)}). Download it again.") from error
        self.bos_token_id = self._pieces.bos_id()

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """Return `input_ids` of one text."""
        return {"input_ids": self._pieces.Encode(text, add_bos=add_special_tokens)}


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a checkpoint folder: tokenizer.json if it is there, else tokenizer.model.

    Returns:
        a `PreTrainedTokenizerFast` of transformers, or a `SentencePieceTokenizer`.

    Raises:
        CheckpointError: there is none, it is damaged, or has no token that begins a sequence.
    """
    folder = Path(folder)
    path = folder / "tokenizer.json"
    if is_file(path):
        with described_by(path):
            return _fast_tokenizer(path)
    path = folder / "tokenizer.model"
    if is_file(path):
        return SentencePieceTokenizer(path)
    raise CheckpointError(
        f"{folder} has neither tokenizer.json nor tokenizer.model. Copy them there from the checkpoint that this one "
        "was trained from, or give a tokenizer."
    )


def _fast_tokenizer(path: Path) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    names = dict(_DEFAULTS)
    for file in ("special_tokens_map.json", "tokenizer_config.json"):
        names.update(_special_tokens(path.with_name(file)))
    try:
        tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=str(path))
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"{path} is damaged ({reason(error)}). Download it again.") from error
    vocabulary = tokenizer.get_vocab()
    if names["bos_token"] not in vocabulary:
        raise CheckpointError(
            f"{path} has no token {names['bos_token']!r}, which begins every prompt; it is not Llama 2's tokenizer. "
            "Copy tokenizer.json and tokenizer_config.json there from the checkpoint that this one was trained from."
        )
    # Only tokens that exist: naming another would add it, beyond the model's vocabulary.
    tokenizer.add_special_tokens({name: token for name, token in names.items() if token in vocabulary})
    return tokenizer


def _special_tokens(path: Path) -> dict[str, str]:
    """Names of the special tokens in a file, empty if it is absent. Nothing else of the file is read."""
    if not is_file(path):
        return {}
    found = read_json(path)
    names = {}
    for name in _NAMES:
        token = found.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and not isinstance(token, str):
            raise CheckpointError(
                f"{path} is damaged (its {name} is {shown(repr(token))}, no text). Download it again."
            )
        if token:
            names[name] = token
    return names


def check_ids(ids: list[int], vocab_size: int) -> None:
    """Refuse a prompt's token ids that the model does not have.

    Raises:
        CheckpointError: the tokenizer is of another model.
    """
    strange = [number for number in ids if type(number) is not int or not 0 <= number < vocab_size]
    if strange:
        raise CheckpointError(
            f"The tokenizer gives the id {shown(repr(strange[0]))}, and the model has {vocab_size} tokens: it is "
            "another model's. Copy tokenizer.json there from the checkpoint that this one was trained from."
        )
