"""The common base of the two reference policies: their description, their words, and checks of their inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vla_pruner.errors import ObservationError
from vla_pruner.models.reference.tokenizer import encode
from vla_pruner.observations import Observation, array_of, check_images, check_instruction
from vla_pruner.wording import a_type


class TrainedPolicy(nn.Module):
    """A small policy that was trained on images of one size, a state, and the words of its tasks.

    Args:
        config: with `image_size`, `proprio_mean`, `action_dimensions`, `tasks`, `words` and `instruction_length`.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._instruction_ids: dict[str, list[int]] = {}

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        raise NotImplementedError

    @property
    def cameras(self) -> tuple[str, ...]:
        """Names of the images that `act` takes."""
        raise NotImplementedError

    @property
    def frame_shape(self) -> tuple[int, ...]:
        """Shape of one robot's images, as `predict_action` takes them."""
        raise NotImplementedError

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]:
        """The modules that turn pixels into patch features."""
        raise NotImplementedError

    @property
    def proprio_size(self) -> int:
        """The number of proprioception values that `act` takes."""
        return len(self.config.proprio_mean)

    @property
    def action_size(self) -> int:
        """Numbers in an action."""
        return self.config.action_dimensions

    @property
    def image_size(self) -> int:
        """The side of the images; no other size is accepted."""
        return self.config.image_size

    @property
    def instructions(self) -> tuple[str, ...]:
        """The instructions of the training."""
        return tuple(instruction for _, instruction in self.config.tasks)

    def example(self) -> Observation:
        """Return grey images of its size, its first instruction, and the mean state of its training."""
        side = self.image_size
        images = {camera: np.full((side, side, 3), 128, np.uint8) for camera in self.cameras}
        return Observation(images, self.instructions[0], np.asarray(self.config.proprio_mean, np.float32))

    def reset(self) -> None:
        """Begin a new episode. The policy itself has no memory."""

    def pixels(self, images: Tensor) -> Tensor:
        """(..., H, W, 3) uint8 -> (..., 3, H, W), normalised."""
        return (images.to(self.device).movedim(-1, -3).to(self.dtype) - 127.5) / 64.0

    def encode_instructions(self, instructions: Sequence[str]) -> Tensor:
        """Instructions -> (B, instruction_length) int64."""
        if len(self._instruction_ids) > 1000:
            self._instruction_ids.clear()  # a server's clients may send new ones forever
        for instruction in instructions:
            if instruction not in self._instruction_ids:
                ids = encode(instruction, self.config.words, self.config.instruction_length)
                self._instruction_ids[instruction] = ids
        return torch.tensor([self._instruction_ids[text] for text in instructions], device=self.device)

    def predict_action(
        self, images: np.ndarray | Tensor, instruction: str | Sequence[str], proprio: np.ndarray | Tensor
    ) -> np.ndarray:
        """One control step of B robots."""
        raise NotImplementedError

    def act(
        self, images: Mapping[str, Any], instruction: str, proprio: np.ndarray | Tensor | None = None
    ) -> np.ndarray:
        """One control step of one robot: one (H, W, 3) uint8 image by camera -> (chunk, action_dimensions) float32.
        Errors as in `predict_action`.
        """
        frame = self._frame(images)
        if proprio is None:
            raise ObservationError(f"The policy reads the robot's state; give proprio, ({self.proprio_size},) numbers.")
        return self._as_chunks(self.predict_action(frame, instruction, proprio))

    def act_batch(
        self,
        images: Sequence[Mapping[str, Any]],
        instructions: Sequence[str],
        proprio: Sequence[np.ndarray] | None = None,
    ) -> np.ndarray:
        """One control step of B robots: (B, chunk, action_dimensions) float32. Arguments as in `act`, one each; errors
        as there.
        """
        if proprio is None:
            raise ObservationError(
                f"The policy reads robots' states; give proprio, ({self.proprio_size},) numbers each."
            )
        rows = {"images": images, "instructions": instructions, "states": proprio}
        for what, given in rows.items():
            if isinstance(given, (str, bytes, Mapping)) or not isinstance(given, Sequence | np.ndarray | Tensor):
                raise ObservationError(f"act_batch takes a list of {what}, one for each robot; found {a_type(given)}.")
        counts = [len(given) for given in rows.values()]
        if len(set(counts)) > 1 or not counts[0]:
            told = ", ".join(f"{count} {what}" for what, count in zip(rows, counts, strict=True))
            raise ObservationError(f"act_batch was given {told}; give as many of each, for one robot or more.")
        frames = np.stack([np.asarray(self._frame(one)) for one in images])
        states = [_tensor("proprio is", one) for one in proprio]
        for row, state in enumerate(states):
            if tuple(state.shape) != (self.proprio_size,):
                raise ObservationError(
                    f"Proprio of row {row} must have shape ({self.proprio_size},); got {tuple(state.shape)}."
                )
        return self._as_chunks(self.predict_action(frames, list(instructions), torch.stack(states)))

    def _as_chunks(self, actions: np.ndarray) -> np.ndarray:
        """Return the result of `predict_action` with the actions of a chunk in the last dimension but one."""
        return actions

    def _frame(self, images: Mapping[str, Any]) -> Any:
        """Return one robot's images by camera as `predict_action` takes them."""
        check_images(images, self.cameras)
        if set(images) != set(self.cameras):
            raise ObservationError(
                f"The policy's cameras are {', '.join(map(repr, self.cameras))}; it was given {list(images)}."
            )
        frames = [_image(name, images[name], self.frame_shape[-3:]) for name in self.cameras]
        return frames[0] if len(self.frame_shape) == 3 else np.stack([np.asarray(frame) for frame in frames])

    def prepared(self, images: Any, instruction: Any, proprio: Any) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Check the arguments of `predict_action`.

        Returns:
            images (B, *frame_shape) uint8, instructions (B, instruction_length) int64 and states (B, P) on the device,
            and whether they are of a single robot that came without a batch.
        """
        frames, states = _tensor("The images are", images), _tensor("proprio is", proprio)
        single = frames.ndim == len(self.frame_shape)
        if single:
            if states.numel() != self.proprio_size:
                raise ObservationError(f"Proprio must have shape ({self.proprio_size},); got {tuple(states.shape)}.")
            frames, states = frames[None], states.reshape(1, -1)
        one = isinstance(instruction, (str, bytes)) or not isinstance(instruction, Iterable)
        instructions: list[Any] = [instruction] * (len(frames) if frames.ndim else 1) if one else list(instruction)
        for text in instructions:
            check_instruction(text)
        self._check_inputs(frames, instructions, states)
        ids = self.encode_instructions(instructions)
        # Copies of one kind, whatever the arguments: a compiled call would be compiled anew for another.
        laid_out = {"copy": True, "memory_format": torch.contiguous_format}
        return frames.to(self.device, **laid_out), ids, states.to(self.device, self.dtype, **laid_out), single

    def _check_inputs(self, images: Tensor, instructions: list[str], proprio: Tensor) -> None:
        shape = self.frame_shape
        if images.ndim and not len(images):
            raise ObservationError("There are images of no robot; give those of one or more.")
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape:
            raise ObservationError(
                f"Images must be uint8 of shape (B, {', '.join(map(str, shape))}); got {images.dtype} "
                f"{tuple(images.shape)}."
            )
        if tuple(proprio.shape) != (len(images), self.proprio_size):
            raise ObservationError(
                f"Proprio must have shape ({len(images)}, {self.proprio_size}); got {tuple(proprio.shape)}."
            )
        if proprio.is_complex():
            raise ObservationError(f"proprio is an array of numbers; found complex ones ({proprio.dtype}).")
        if not proprio.to(self.dtype).isfinite().all():
            dtype = str(self.dtype).removeprefix("torch.")
            raise ObservationError(
                f"proprio holds numbers that are not finite (NaN or infinity) in {dtype}; give finite ones."
            )
        if len(instructions) != len(images):
            raise ObservationError(f"Images of {len(images)} robots came with {len(instructions)} instructions.")


def _image(camera: str, value: Any, shape: tuple[int, ...]) -> Any:
    """Return an image as it is, or what numpy makes of one that is no array.

    Raises:
        ObservationError: it is no image of this shape (H, W, 3) and of uint8.
    """
    try:
        image = value if isinstance(value, Tensor) else np.asarray(value)
    except (TypeError, ValueError) as error:
        raise ObservationError(
            f"The image of {camera!r} is no array of numbers; found {type(value).__name__}."
        ) from error
    if image.dtype not in (np.uint8, torch.uint8) or tuple(image.shape) != shape:
        raise ObservationError(
            f"The image of {camera!r} has shape {tuple(image.shape)} and type {image.dtype}; the policy takes {shape} "
            "of uint8."
        )
    return image


def _tensor(what: str, value: Any) -> Tensor:
    try:
        return value if isinstance(value, Tensor) else torch.from_numpy(array_of(value))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ObservationError(f"{what} an array of numbers; found {type(value).__name__}.") from error
