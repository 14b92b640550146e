"""Reuse inside a vision encoder: patches that are not chosen keep what they had in the last control step.

The chosen patches alone run through the layers. At each layer their keys and values replace the old ones among those of
all patches, which they attend to; behind the last layer their outputs replace the old ones among those of all patches.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.attach.adapters import Adapters
from vla_pruner.attach.arithmetic import autocast_on, own_arithmetic
from vla_pruner.attach.recorder import Recorder, kernel_of
from vla_pruner.checks import ATTENTION
from vla_pruner.errors import OptionError, SessionError, UnsupportedModelError
from vla_pruner.methods.base import Method, rows_at
from vla_pruner.methods.encoder_reuse import EncoderReuse
from vla_pruner.replacements import ATTACHED, WRITTEN, Replacements, undo
from vla_pruner.wording import a_type

LastAttention = Callable[[], tuple[Tensor, tuple[int, ...]] | None]
"""Returns the action scores (B, M) of the last control step and its visual tokens by camera; None if there are none."""


@dataclass(frozen=True)
class Encoder:
    """The parts of a vision encoder whose patches can keep what they had in the last control step.

    Attributes:
        tower: the module that is given pixels (..., 3, H, W), as its first argument or as `pixel_values`.
        layers: its transformer layers, in their order. Each is given (I, P, D) first, the patches of I images in raster
            order and nothing else, and returns the same shape.
        patch: side of a patch in pixels.
        seeing: owner and name of the method within which all images of a control step go through the tower.
        patches: P, if the model alone decides it.
        attend: name of the layers' own method that is given queries, keys and values (I, H, P, d); None: the layers
            have a `self_attn` of transformers.
        token_side: side of a visual token in patches.
        shown: called while `seeing` runs; returns the cameras in the order of the tower's calls (None: it is called
            once, with the images of all cameras, those of each robot side by side), and which cameras are absent, as a
            value that is another whenever others are. None: it is called once, and no camera is ever absent.
    """

    tower: nn.Module
    layers: Sequence[nn.Module]
    patch: int
    seeing: tuple[Any, str]
    patches: int | None = None
    attend: str | None = None
    token_side: int = 1
    shown: Callable[[], tuple[tuple[int, ...] | None, Hashable]] | None = None


@dataclass
class _Held:
    """Tensors that a call of the tower leaves to the same call in the next control step.

    Attributes:
        like: what must be the same for it to fit.
        tiles: (I, P, V) the pixels of each patch when it was last encoded.
        keys, values: (I, H, P, d) by layer.
        output: (I, P, D) of the last layer; None until the call came back.
    """

    like: tuple[Any, ...]
    tiles: Tensor
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    output: Tensor | None = None


class PatchReuse:
    """Carries `EncoderReuse` out on a model's vision encoder.

    What it holds belongs to the rows as they are: to reset rows or exchange their memory is to `forget`. Keys and
    values are never changed in place, and a control step whose images could not all be encoded forgets everything. So
    does one with an output that is not finite, which others would read for as long as it is held. On an accelerator
    the host does not look, since it would wait: they go when actions are refused (`attach.entries`), or with the next
    refresh.

    Args:
        options: the choice.
        encoder: the parts; see `encoder_of`.
        last_attention: of the session.

    Attributes:
        chosen: ids (I, k) of the patches encoded in the last control step, one for each call of the tower; None: all.

    Raises:
        BudgetError: `options.keep` is more patches than an image has.
        UnsupportedModelError: the encoder is compiled, or its attention backend is not supported.
    """

    def __init__(self, options: EncoderReuse, encoder: Encoder, last_attention: LastAttention) -> None:
        self.options = options
        self.chosen: tuple[Tensor | None, ...] = ()
        self._encoder = encoder
        self._last_attention = last_attention
        self._adapters = Adapters(encoder.layers, lambda: (encoder.tower,))
        self._replaced = Replacements()
        self._recorder = Recorder()
        self._handles: list[Any] = []
        self._held: list[_Held] = []
        self._steps = 0
        self._shown: Any = None
        self._seeing = self._spoilt = False
        self._attention: tuple[Tensor, tuple[int, ...]] | None = None
        self._call: tuple[_Held, Tensor | None] | None = None
        if encoder.patches is not None:
            options.budget(encoder.patches)
        _check_not_compiled(encoder.tower)
        if encoder.attend is None:
            for layer in encoder.layers:
                _check_backend(layer)

    def __deepcopy__(self, memo: Any) -> Any:
        raise SessionError(ATTACHED)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__deepcopy__(None)

    def install(self) -> None:
        """Put hooks, replacements and taps in place."""
        encoder = self._encoder
        self._replaced.put(*encoder.seeing, self._see)
        self._handles.append(encoder.tower.register_forward_pre_hook(self._enter_tower, with_kwargs=True))
        self._handles.append(encoder.layers[0].register_forward_pre_hook(self._enter_first, with_kwargs=True))
        self._handles.append(encoder.layers[-1].register_forward_hook(self._leave_last))
        for index, layer in enumerate(encoder.layers):
            if encoder.attend is not None:
                self._replaced.put(layer, encoder.attend, partial(self._attend, index))
            else:
                attention: Any = layer.self_attn
                backend = attention.config._attn_implementation
                kernel = partial(self._run_kernel, index, kernel_of(attention, backend))
                self._recorder.watch(attention, backend, _ignore, kernel)

    def remove(self) -> None:
        """Leave the model as it was."""
        handles, self._handles = self._handles, []
        undo(*(handle.remove for handle in handles), self._replaced.remove, self._recorder.remove)
        self.forget()

    def forget(self) -> None:
        """Forget the last control step: the next one encodes everything."""
        self._held.clear()
        self._steps, self._attention, self._call = 0, None, None

    def _see(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the method within which all images of a control step are encoded."""
        shown = None if self._encoder.shown is None else self._encoder.shown()
        if shown != self._shown or self.options.encodes_all(self._steps):
            self.forget()
        self._shown, self.chosen = shown, ()
        self._attention = self._last_attention() if self._held else None
        self._seeing, self._spoilt = True, False
        try:
            result = original(*args, **kwargs)
        except BaseException:
            self.forget()
            raise
        finally:
            self._seeing, self._call, self._attention = False, None, None
        self._steps += 1
        if self._spoilt:
            self.forget()
        return result

    def _enter_tower(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = None
        if not self._seeing:
            return  # called by hand, in no control step
        pixels = args[0] if args else kwargs["pixel_values"]
        if pixels.requires_grad and torch.is_grad_enabled():
            self.chosen = (*self.chosen, None)  # what is held has no gradient
            return
        held, ids = self._begin_call(pixels.flatten(0, -4), autocast_on(pixels.device))
        self.chosen = (*self.chosen, ids)
        if held is not None:
            self._call = held, ids

    @own_arithmetic
    def _begin_call(self, images: Tensor, autocast: torch.dtype | None) -> tuple[_Held | None, Tensor | None]:
        """Return what the call holds, None if it holds nothing, and the patches that it encodes, None for all.

        Args:
            images: (I, 3, H, W).
            autocast: the type of torch.autocast around the call; None without it.
        """
        tiles = cut(images.detach(), self._encoder.patch)
        patches, number = tiles.shape[1], len(self.chosen)
        k = self.options.budget(patches)
        if k == patches:
            return None, None
        weight = next(self._encoder.tower.parameters())
        placed = (weight.dtype, weight.device, autocast, self._adapters.state())
        like = (tiles.shape, tiles.dtype, images.shape, *placed)
        held = self._held[number] if number < len(self._held) else None
        if held is None or held.like != like:
            held = _Held(like, tiles)
            self._held[number : number + 1] = [held]
            return held, None
        change = (tiles - held.tiles).float().abs().mean(dim=2)
        ids = self.options.select(change, self._attention_to(images, number), k)
        held.tiles = _put(held.tiles, 1, ids[..., None], rows_at(tiles, ids))
        return held, ids

    def _attention_to(self, images: Tensor, number: int) -> Tensor | None:
        """Return the last step's action attention (I, P) to the visual token of each patch of the images."""
        if self._attention is None:
            return None
        scores, cameras = self._attention
        side = self._encoder.patch * self._encoder.token_side
        height, width = images.shape[-2] // side, images.shape[-1] // side
        order = None if self._shown is None else self._shown[0]
        if order is not None:
            camera = order[number]
            scores = scores[:, sum(cameras[:camera]) : sum(cameras[: camera + 1])]
        if scores.numel() != images.shape[0] * height * width:
            return None  # of another batch, as after a batch of another size
        times = self._encoder.token_side
        grid = scores.reshape(len(images), height, 1, width, 1).expand(-1, -1, times, -1, times)
        return grid.reshape(len(images), -1).to(images.device, non_blocking=True)

    def _enter_first(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self._call is None or self._call[1] is None:
            return None
        return (rows_at(args[0], self._call[1].to(args[0].device)), *args[1:]), kwargs

    def _leave_last(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._call is None:
            return None
        held, ids = self._call
        if output.device.type == "cpu" and not output.isfinite().all():  # elsewhere the host would wait for it
            self._spoilt = True
        if ids is None:
            held.output = output.detach()
            return None
        assert held.output is not None
        held.output = _put(held.output, 1, ids[..., None].to(output.device), output.detach())
        return held.output

    def _attend(self, index: int, run: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor) -> Any:
        """Run a layer's attention over the keys and values of all patches."""
        if self._call is not None:
            held, ids = self._call
            new_key, new_value = key.detach(), value.detach()
            if ids is None:
                held.keys[index], held.values[index] = new_key, new_value
            else:
                place = ids[:, None, :, None].to(key.device)
                key = held.keys[index] = _put(held.keys[index], 2, place, new_key)
                value = held.values[index] = _put(held.values[index], 2, place, new_value)
        return run(query, key, value)

    def _run_kernel(
        self,
        index: int,
        kernel: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **kwargs: Any,
    ) -> Any:
        ids = None if self._call is None else self._call[1]
        rows = mask if mask is None or ids is None else _rows_of(mask, ids.to(mask.device))
        return self._attend(index, lambda *given: kernel(module, *given, rows, **kwargs), query, key, value)


def encoder_of(family: Any, method: Method, options: object) -> Encoder:
    """Return the parts of a family's vision encoder for `EncoderReuse`.

    Raises:
        OptionError: `options` is no EncoderReuse, or the method reuses tokens itself.
        UnsupportedModelError: the family does not say where they are.
    """
    if not isinstance(options, EncoderReuse):
        raise OptionError(f"encoder={a_type(options)} was given; it is None or EncoderReuse(keep=0.25).")
    if method.fate.needs_last_step:
        raise OptionError(
            f"{type(method).__name__} reuses tokens of the last control step in the decoder and was given "
            "encoder=EncoderReuse(...), too; the two were not tested together. Choose a method that drops or freezes, "
            "or leave encoder out."
        )
    if family.encoder is None or not len(family.encoder.layers):
        raise UnsupportedModelError(
            f"encoder=EncoderReuse(...) was given, and {type(family).__name__} does not say where the patches of its "
            "vision encoder are; supported are LeRobot's SmolVLAPolicy, PI0Policy, PI05Policy and PI0FastPolicy, "
            "PI0ForConditionalGeneration of transformers, and the reference policies. Leave encoder out."
        )
    return family.encoder


def refuse_with_encoder(reuse: PatchReuse | None, what: str, why: str) -> None:
    """Raise UnsupportedModelError if patches are reused: `what` (a call) does not go with it, and `why`."""
    if reuse is not None:
        raise UnsupportedModelError(f"{what} does not go with encoder=EncoderReuse(...): {why}. Leave one of them out.")


def cut(images: Tensor, side: int) -> Tensor:
    """Cut images (I, C, H, W) into patches of `side` pixels: (I, P, C side side), in raster order; what is left over at
    the right and the bottom belongs to none.
    """
    count, channels, height, width = images.shape
    rows, columns = height // side, width // side
    whole = images[..., : rows * side, : columns * side]
    tiles = whole.reshape(count, channels, rows, side, columns, side).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(count, rows * columns, -1)


def _put(whole: Tensor, dim: int, places: Tensor, rows: Tensor) -> Tensor:
    """Return `whole` with `rows` in these places along a dimension."""
    return whole.scatter(dim, places.expand_as(rows), rows)


def _rows_of(mask: Tensor, ids: Tensor) -> Tensor:
    """Return the rows `ids` (I, k) of a mask (I or 1, H or 1, P, P): (I, H or 1, k, P)."""
    whole = mask.expand(len(ids), *mask.shape[1:])
    return whole.gather(2, ids[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))


def _ignore(_: Any) -> None:
    """Take no notice of an attention call."""


def _check_not_compiled(tower: nn.Module) -> None:
    for part in tower.modules():
        compiled = getattr(part, "_compiled_call_impl", None) is not None or hasattr(part, "_orig_mod")
        if compiled or hasattr(vars(part).get("forward"), WRITTEN):
            raise UnsupportedModelError(
                f"The vision encoder is compiled ({type(part).__name__}), so hooks on its layers would never run; "
                "attach with encoder=EncoderReuse(...) before it is compiled, or leave encoder out."
            )


def _check_backend(layer: nn.Module) -> None:
    attention: Any = layer.self_attn
    backend = attention.config._attn_implementation
    if backend not in ATTENTION:
        raise UnsupportedModelError(
            f"The vision encoder uses the attention backend {backend!r}; with encoder=EncoderReuse(...) supported are "
            f"{' and '.join(ATTENTION)}. Load the model with attn_implementation='sdpa', or leave encoder out."
        )
