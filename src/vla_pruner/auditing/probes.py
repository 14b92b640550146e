"""Watching a model while it acts: inputs and outputs of modules. Each probe leaves no trace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import layers_of, norm_of


class Probe:
    """Base of the probes: a context manager around hooks."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    def __enter__(self) -> Any:
        try:
            self.install()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def install(self) -> None:
        """Put the hooks in place."""
        raise NotImplementedError

    def before(self, module: nn.Module, hook: Any) -> None:
        """Have `hook(input tensor)` run before each call."""

        def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hook(_first_tensor((*args, *kwargs.values())))

        self._handles.append(module.register_forward_pre_hook(call, with_kwargs=True))

    def after(self, module: nn.Module, hook: Any) -> None:
        """Have `hook(output tensor)` run after each call."""

        def call(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hook(_first_tensor(output if isinstance(output, (tuple, list)) else (output,)))

        self._handles.append(module.register_forward_hook(call))


class TowerProbe(Probe):
    """Counts the images that each vision tower sees.

    Args:
        towers: the vision towers.
        patched: as of `Anatomy`.

    Attributes:
        images: for each tower, every image (C, H, W) that is not of one colour: some policies get a blank image for an
            absent camera.
        blank: for each tower, the number of the others.
    """

    def __init__(self, towers: Iterable[nn.Module], patched: bool = False) -> None:
        super().__init__()
        self._towers = list(towers)
        self._patched = patched
        self.images: list[list[Tensor]] = [[] for _ in self._towers]
        self.blank = [0 for _ in self._towers]

    def install(self) -> None:
        for index, tower in enumerate(self._towers):

            def call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], index: int = index) -> None:
                pixels, *others = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
                self._see(index, self._images(pixels.detach(), others))

            self._handles.append(tower.register_forward_pre_hook(call, with_kwargs=True))

    def _images(self, pixels: Tensor, others: list[Tensor]) -> Iterable[Tensor]:
        return pixels.reshape(-1, 1, *pixels.shape[-2:]) if self._patched else _images(pixels, others)

    def _see(self, index: int, images: Iterable[Tensor]) -> None:
        for image in images:
            if bool((image != image[:, :1, :1]).any()):
                self.images[index].append(image.clone())
            else:
                self.blank[index] += 1


class LengthProbe(Probe):
    """Records the sequence lengths that each layer of a decoder computes.

    Args:
        decoder: the decoder.
        acting_rows: as of `Anatomy`.

    Attributes:
        lengths: a set for each layer.
    """

    def __init__(self, decoder: Any, acting_rows: int = 1) -> None:
        super().__init__()
        self._acting = acting_rows
        self._layers = list(layers_of(decoder))
        self.lengths: list[set[int]] = [set() for _ in self._layers]

    def install(self) -> None:
        for layer, seen in zip(self._layers, self.lengths, strict=True):
            self.before(layer.mlp, lambda hidden, seen=seen: seen.add(hidden.shape[-2]))

    @property
    def prompts(self) -> list[set[int]]:
        """`lengths` without those of calls after the prompt."""
        return [{length for length in seen if length > self._acting} for seen in self.lengths]


class HiddenProbe(Probe):
    """Records the final hidden states of the decoder and of the experts that read its cache, call by call.

    Attributes:
        calls: (B, Q, D) each, float32 on the CPU (a model may be spread over devices), with whether it is the
            decoder's.
    """

    def __init__(self, family: Any) -> None:
        super().__init__()
        self._family = family
        self.calls: list[tuple[bool, Tensor]] = []

    def install(self) -> None:
        self.after(norm_of(self._family.decoder), lambda hidden: self._keep(True, hidden))
        for reader in self._family.readers:
            self.after(norm_of(reader), lambda hidden: self._keep(False, hidden))

    def _keep(self, is_decoder: bool, hidden: Tensor) -> None:
        self.calls.append((is_decoder, hidden.detach().to("cpu", torch.float32, copy=True)))


def _images(pixels: Tensor, others: list[Tensor]) -> Iterable[Tensor]:
    """Return the images (C, H, W) of a vision tower's call; or (C, 1, n) if the tower takes the patches (N, C x time x
    area) of all images together with each image's (time, height, width) in patches.
    """
    if pixels.dim() > 2:
        return pixels.reshape(-1, *pixels.shape[-3:])
    grids = next(tensor for tensor in others if tensor.dim() == 2 and tensor.shape[1] == 3)
    each = pixels.split(grids.prod(dim=1).tolist())
    return [patches.reshape(len(patches), 3, -1).transpose(0, 1).reshape(3, 1, -1) for patches in each]


def _first_tensor(values: Iterable[Any]) -> Tensor:
    return next(value for value in values if isinstance(value, torch.Tensor))
