"""Everything that fixes the reference policy's shape, as one frozen value that is saved beside the weights."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

_MOST = 2**24


@dataclass(frozen=True)
class ReferenceConfig:
    """The shape of a `ReferencePolicy`.

    The prompt is [BOS][visual tokens][instruction][proprio]; the action's tokens follow, one a dimension. Every
    instruction is padded to `instruction_length` words with a learned pad word, so that all prompts are equally long
    and no batch needs a padding mask.
    """

    image_size: int = 112
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    hidden_size: int = 128
    num_layers: int = 8
    num_heads: int = 4
    num_key_value_heads: int = 4
    intermediate_size: int = 256
    rope_theta: float = 10_000.0
    instruction_length: int = 6
    proprio_mean: tuple[float, ...] = (0.0, 0.65, 0.2, 0.7)
    proprio_scale: tuple[float, ...] = (0.12, 0.12, 0.1, 0.25)
    action_dimensions: int = 4
    num_bins: int = 33
    words: tuple[str, ...] = ()
    """The instruction vocabulary, sorted; token ids follow BOS and PAD."""
    tasks: tuple[tuple[str, str], ...] = ()
    """(task, instruction) pairs that the weights were trained on."""

    @property
    def num_visual_tokens(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def visual(self) -> slice:
        """The place of the visual tokens in the prompt."""
        return slice(1, 1 + self.num_visual_tokens)

    @property
    def text(self) -> slice:
        """The place of the instruction in the prompt."""
        return slice(1 + self.num_visual_tokens, 1 + self.num_visual_tokens + self.instruction_length)

    @property
    def prompt_length(self) -> int:
        return 1 + self.num_visual_tokens + self.instruction_length + 1

    @property
    def first_action_token(self) -> int:
        """The token id of the lowest action bin; the bins end the vocabulary and are shared by all dimensions."""
        return 2 + len(self.words)

    @property
    def vocabulary_size(self) -> int:
        return self.first_action_token + self.num_bins

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReferenceConfig:
        """Make a configuration from the result of `to_dict`, after a trip through JSON."""
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        for name, value in values.items():
            check_setting(name, value)
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        if "tasks" in values:
            values["tasks"] = tuple((task, instruction) for task, instruction in values["tasks"])
        return cls(**values)


_TEXTS, _ROWS = ("words", "tasks", "cameras"), ("proprio_mean", "proprio_scale")


def check_setting(name: str, value: Any) -> None:
    """Refuse a setting that no reference policy can have: a ValueError names it."""
    if name in _TEXTS:
        rows: Any = value if isinstance(value, (list, tuple)) else [None]
        is_pair = name == "tasks"
        good = all(
            isinstance(row, (list, tuple)) and len(row) == 2 if is_pair else isinstance(row, str) for row in rows
        )
        good = good and all(isinstance(text, str) for row in rows for text in row)
        wanted = "pairs of texts" if is_pair else "texts"
    elif name in _ROWS:
        rows: Any = value if isinstance(value, (list, tuple)) and value else [None]
        good = all(type(number) in (int, float) and math.isfinite(number) for number in rows)
        good = good and (name != "proprio_scale" or all(number > 0 for number in rows))
        wanted = "finite numbers, and a scale above 0"
    elif name == "suite":
        good, wanted = isinstance(value, str), "a text"
    elif name == "rope_theta":
        good, wanted = type(value) in (int, float) and 0 < value < math.inf, "a finite number above 0"
    else:
        good, wanted = type(value) is int and 1 <= value <= _MOST, f"an int from 1 to {_MOST}"
    if not good:
        raise ValueError(f"{name} is {str(value)[:80]!r} and must be {wanted}")
