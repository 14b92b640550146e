"""LeRobot's EO-1 (`EO1Policy`): a Qwen2.5-VL whose own layers denoise the actions.

The prompt [images][text][state] runs once per action chunk. Then the same decoder runs the chunk's rows in every
denoising step, with the prompt's cache, from which the rows' keys and values of the previous step have been removed.
Action attention is that of these rows, averaged over the denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from vla_pruner.anatomy import Anatomy, layers_of
from vla_pruner.attach.hooks import Arguments, HookWiring
from vla_pruner.attach.host import Host, Wiring
from vla_pruner.attach.recorder import Attention
from vla_pruner.caches import cache_in, held, lent, with_cache
from vla_pruner.families.lerobot_qwen import LeRobotQwen
from vla_pruner.replacements import Replacements


class EO1(LeRobotQwen):
    """LeRobot's `EO1Policy`; every chunk that it predicts is one control step."""

    named = ("lerobot.policies.eo1.modeling_eo1", "EO1Policy")
    denoises = True

    @staticmethod
    def vlm_of(model: Any) -> Any:
        return model.model.vlm_backbone

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        """Return the parts of an `EO1Policy`."""
        seeing = model.model.vlm_backbone.model
        chunk = model.config.chunk_size
        return Anatomy(decoder=seeing.language_model, towers=(seeing.visual,), acting_rows=chunk)

    @property
    def anatomy(self) -> Anatomy:
        return self.anatomy_of(self._policy)

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        def decode(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if held(cache_in(kwargs)):
                # A copy: EO-1 removes what a denoising step adds to the cache, which would change its shapes.
                kwargs = with_cache(kwargs, lent(cache_in(kwargs)))
            return around(original, *args, **kwargs)

        replaced.put(module, "forward", decode)

    def wiring(self, host: Host) -> Wiring:
        return EO1Wiring(host, self)


class EO1Wiring(HookWiring):
    """Hooks on the decoder, whose calls with a filled cache take the place of an expert's calls in other families.

    Args:
        host: receives every call.
        family: the model's family.
    """

    def __init__(self, host: Host, family: EO1) -> None:
        super().__init__(host, family)
        self._denoises = False

    def _tap_action(self) -> None:
        layers = layers_of(self._family.decoder)
        for index in self._host.method.action_layers(len(layers)):
            self._recorder.watch(layers[index].self_attn, self._family.backend, partial(self._record, index))

    def _record(self, index: int, attention: Attention) -> None:
        if self._denoises:
            self._host.record_reader(index, attention)

    def _enter_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        self._denoises = bool(held(cache_in(kwargs)))
        if not self._denoises:
            return super()._enter_decoder(module, args, kwargs)
        message = "A denoising step was given another cache than the prompt; steps cannot be interleaved."
        self._prompt_cache.check_same(cache_in(kwargs), message)
        self._enter_reader(module, args, kwargs)
        return None

    def _enter_layer(
        self, index: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Arguments | None:
        if self._denoises:
            return self._enter_reader_layer(index, module, args, kwargs)
        return super()._enter_layer(index, module, args, kwargs)

    def _leave_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self._denoises:
            return super()._leave_decoder(module, args, output)
        self._denoises = False
        self._leave_reader(module, args, output)
        return None
