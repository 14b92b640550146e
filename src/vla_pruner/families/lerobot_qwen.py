"""The base of families of LeRobot policies around a Qwen-VL: the places of their visual tokens, and their refusals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from vla_pruner.anatomy import layers_of
from vla_pruner.attach.family import Call
from vla_pruner.attach.layout import Layout
from vla_pruner.errors import SessionError
from vla_pruner.families.base import TransformersFamily, check_decoder, is_one_of
from vla_pruner.families.lerobot_common import check_version, image_blocks, kind_of, refuse_training
from vla_pruner.replacements import Replacements


class LeRobotQwen(TransformersFamily):
    """A LeRobot policy whose prompt is run by transformers' Qwen-VL, each image between a start and an end token.

    LeRobot's processors put the views into an order of their own, so the images have no names and share one budget.
    """

    cameras = ()
    named: tuple[str, str] = ("", "")
    """Module and name of the policy's class."""

    def __init__(self, model: nn.Module) -> None:
        check_version(kind_of(model))
        self._policy: Any = model
        self.vlm = self.vlm_of(model)
        self.decoder = check_decoder(self.vlm.model.language_model, model)
        self._replaced = Replacements()
        self._views: int | None = None
        self._seen: tuple[Tensor, int] | None = None

    @staticmethod
    def vlm_of(model: Any) -> Any:
        """Return the `...ForConditionalGeneration` of a policy of this family."""
        raise NotImplementedError

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_one_of(model, {cls.named})

    @property
    def encoding(self) -> tuple[tuple[Any, str], ...]:
        return ()  # The lengths of the sequences that the encoder attends within are read from a tensor.

    @property
    def first_layer(self) -> int:
        return 1

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return (self._policy, "select_action"), (self._policy, "predict_action_chunk")

    def opens_step(self, call: Call) -> bool:
        return True

    def action_rows(self, layout: Layout) -> Tensor | None:
        return None

    def layout(self, call: Call) -> Layout:
        if self._seen is None or self._views is None:
            raise SessionError(
                "The prompt was run without images. Call select_action(batch) or predict_action_chunk(batch)."
            )
        (ids, count), self._seen = self._seen, None
        config, prompt = self.vlm.config, call.prompt()
        marks = config.image_token_id, config.vision_start_token_id
        visual, cameras = image_blocks(ids, count, self._views, marks, _UNEVEN)
        return Layout(visual=visual, valid=prompt.gather(1, visual), prompt=prompt, cameras=cameras)

    def install(self) -> None:
        self._replaced.put(self._policy, "forward", refuse_training)
        self._replaced.put(self.vlm.model, "get_image_features", self._see_images)
        self._replaced.put(self.vlm.model, "get_placeholder_mask", self._see_tokens)

    def remove(self) -> None:
        self._replaced.remove()
        self._views = self._seen = None

    def _see_images(
        self, original: Callable[..., Any], pixel_values: Tensor, image_grid_thw: Tensor, **kwargs: Any
    ) -> Any:
        self._views = len(image_grid_thw)
        return original(pixel_values, image_grid_thw, **kwargs)

    def _see_tokens(self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("video_features") is not None:
            raise SessionError(
                f"{type(self._policy).__name__} was given videos while a session is attached; give it images."
            )
        features = kwargs.get("image_features")
        if features is not None:
            # A shape says how many there are, without waiting for the device.
            self._seen = input_ids, len(features)
        return original(input_ids, *args, **kwargs)


class HooksAfterCalls:
    """Runs the hooks that a policy puts on the last layer for one call of its decoder after that call: it registers
    them anew each time, and a program would run those of the call in which it was traced.

    Args:
        decoder: whose calls are compiled.
        replaced: records what is replaced.
    """

    def __init__(self, decoder: nn.Module, replaced: Replacements) -> None:
        self._last: Any = layers_of(decoder)[-1]
        self._known = frozenset(self._last._forward_hooks)
        self._output: Any = None
        replaced.put(self._last, "forward", self._keep)

    def _keep(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._output = original(*args, **kwargs)
        return self._output

    def run(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `call(*args, **kwargs)`, which calls the decoder, with the hooks run after it.

        Raises:
            SessionError: one of them changes the layer's output.
        """
        hooks = self._last._forward_hooks
        new = {key: hooks.pop(key) for key in list(hooks) if key not in self._known}
        try:
            result = call(*args, **kwargs)
        finally:
            hooks.update(new)
        output, self._output = self._output, None
        for key, hook in new.items():
            given = ((), {}) if key in self._last._forward_hooks_with_kwargs else ((),)
            if hook(self._last, *given, output) is not None:
                raise SessionError(
                    "A hook on the decoder's last layer, registered after the policy was compiled, changes what the "
                    "layer returns; register it before, or take away what is compiled first."
                )
        return result


class RegistersHooks(LeRobotQwen):
    """A policy that registers hooks on its decoder's last layer for each call."""

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        if module is self.decoder:
            around = partial(HooksAfterCalls(self.decoder, replaced).run, around)
        super().put_around(module, around, replaced)


_UNEVEN = (
    "The rows of a batch have different numbers of visual tokens, or images of different sizes; give every row as many "
    "images, all of one size."
)
