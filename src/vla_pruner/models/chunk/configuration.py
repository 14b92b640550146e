"""Everything that fixes the shape of a two-camera reference policy, as one frozen value saved beside the weights."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from vla_pruner.models.reference.configuration import check_setting


@dataclass(frozen=True)
class ChunkConfig:
    """The shape of a `ChunkPolicy`.

    The sequence is [BOS][visual tokens of each camera][instruction][proprio][one row for each action of the chunk].
    Every instruction is padded to `instruction_length` words with a learned pad word, so that all sequences are equally
    long and no batch needs a padding mask.
    """

    suite: str = "metaworld"
    """The simulator that the weights were trained in."""
    cameras: tuple[str, ...] = ("image", "wrist_image")
    image_size: int = 128
    patch_size: int = 8
    vision_width: int = 128
    vision_layers: int = 2
    vision_heads: int = 4
    landmarks: int = 2
    """Kinds of things that the encoder marks in the images."""
    hidden_size: int = 256
    num_layers: int = 12
    num_heads: int = 4
    num_key_value_heads: int = 1
    intermediate_size: int = 640
    rope_theta: float = 10_000.0
    instruction_length: int = 6
    proprio_mean: tuple[float, ...] = (0.0, 0.65, 0.2, 0.7)
    proprio_scale: tuple[float, ...] = (0.12, 0.12, 0.1, 0.25)
    action_dimensions: int = 4
    chunk: int = 8
    """Actions in a chunk."""
    executed: int = 4
    """Actions of a chunk that are carried out before the policy looks again."""
    words: tuple[str, ...] = ()
    """The instruction vocabulary, sorted; token ids follow BOS and PAD."""
    tasks: tuple[tuple[str, str], ...] = ()
    """(task, instruction) pairs that the weights were trained on."""

    @property
    def patches(self) -> int:
        """Visual tokens of one camera."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_visual_tokens(self) -> int:
        """Visual tokens of all cameras."""
        return len(self.cameras) * self.patches

    @property
    def visual(self) -> dict[str, slice]:
        """The place of each camera's visual tokens in the sequence."""
        return {
            name: slice(1 + number * self.patches, 1 + (number + 1) * self.patches)
            for number, name in enumerate(self.cameras)
        }

    @property
    def prompt_length(self) -> int:
        """Positions before the action rows."""
        return 1 + self.num_visual_tokens + self.instruction_length + 1

    @property
    def vocabulary_size(self) -> int:
        return 2 + len(self.words)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ChunkConfig:
        """Make a configuration from the result of `to_dict`, after a trip through JSON.

        Raises:
            ValueError: a setting is unknown, or one that no policy can have.
        """
        unknown = set(values) - {field.name for field in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown settings {sorted(unknown)}")
        for name, value in values.items():
            check_setting(name, value)
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        if "tasks" in values:
            values["tasks"] = tuple((task, instruction) for task, instruction in values["tasks"])
        config = cls(**values)
        if not config.cameras or len(set(config.cameras)) < len(config.cameras):
            raise ValueError(f"cameras is {config.cameras} and must be different names")
        if config.executed > config.chunk:
            raise ValueError(f"executed is {config.executed}, and a chunk has {config.chunk} actions")
        if len(config.proprio_mean) != len(config.proprio_scale):
            raise ValueError("proprio_mean and proprio_scale must be equally long")
        return config
