"""Any decoder-only language model of transformers, driven with `inputs_embeds`.

A control step is one prefill and the tokens decoded after it. Action attention is that of the rows that emit the
tokens: the last prompt position, then every decoded one; so decode no more tokens than act, in no row of a batch.
Layers from the pruning layer on are short in the prefill and in every decode step.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy, norm_of
from vla_pruner.attach.family import Call, StepFunction
from vla_pruner.attach.layout import Layout, ensure
from vla_pruner.caches import cache_name
from vla_pruner.checks import is_count
from vla_pruner.errors import OptionError, SessionError
from vla_pruner.families.base import MROPE_TYPES, TransformersFamily, check_decoder, check_example, shape_of
from vla_pruner.families.wrappers import unwrapped

PADDING_SIDES = ("right", "left")
SPECULATIVE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")
"""The options of `generate` that try several tokens in one call."""


class DecoderLM(TransformersFamily):
    """Llama, Mistral, Gemma, Qwen and the text decoders of Qwen-VL, as bare model or with a language-model head.

    Args:
        model: the language model.
        visual: the place of the visual tokens in the prompt: a slice, or for several cameras a mapping of names to
            slices.
        padding_side: "right" (slices count from position 0), or "left" (they count from each row's first real token).
            Needed only if position 0 is masked: it could be left padding, or an absent camera.

    Raises:
        OptionError: `visual` is missing, empty, open-ended or overlapping.
    """

    def __init__(
        self, model: nn.Module, visual: slice | Mapping[str, slice] | None = None, padding_side: str | None = None
    ) -> None:
        self.decoder = check_decoder(_decoder_of(model), model)
        self._model: Any = model
        if padding_side not in (None, *PADDING_SIDES):
            raise OptionError(f"padding_side={padding_side!r} was given; it is 'right' or 'left'.")
        self._padding_side = padding_side
        spans = _check_visual(visual, model, getattr(self.decoder.config, "max_position_embeddings", None))
        self.cameras = tuple(spans)
        self._camera_tokens = tuple(span.stop - span.start for span in spans.values())
        self._positions = [p for span in spans.values() for p in range(span.start, span.stop)]
        self._last = max(self._positions)
        self._unmasked: tuple[tuple[Any, ...], Layout] | None = None
        self._on_device: dict[torch.device, Tensor] = {}
        if len(set(self._positions)) != len(self._positions):
            raise OptionError(f"visual={visual!r} was given; the cameras' slices must not overlap.")

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        decoder = _decoder_of(model)
        return hasattr(decoder, "layers") and hasattr(decoder, "embed_tokens")

    @property
    def anatomy(self) -> Anatomy:
        headed = self._model is not self.decoder and hasattr(self._model, "lm_head")
        return Anatomy(self.decoder, language_model=self._model if headed else None)

    @property
    def called(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride] a policy around it is not
        return type(self) is DecoderLM

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return ((self._model, "generate"),) if callable(getattr(self._model, "generate", None)) else ()

    def check_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("generation_config", args[1] if len(args) > 1 else None)

        def asked(name: str) -> Any:
            held = (getattr(config, name, None) for config in (given, getattr(self._model, "generation_config", None)))
            return kwargs.get(name, next((value for value in held if value is not None), None))

        if asked("use_cache") is False and asked("max_new_tokens") != 1:
            raise SessionError(
                "generate was called with use_cache=False, which runs the whole prompt again for every token, and each "
                "of these runs would be a control step of its own. Leave it out: the same tokens are decoded."
            )
        for name in SPECULATIVE:
            if asked(name) is not None:
                raise SessionError(
                    f"generate was called with {name}, which is speculative decoding: several positions a call, some "
                    "taken back. It is not supported together with pruning; leave it out, or detach first."
                )

    @property
    def camera_tokens(self) -> tuple[int, ...]:
        return self._camera_tokens

    def opens_step(self, call: Call) -> bool:
        return call.length > self._last

    def exported(self, example: Mapping[str, Any]) -> StepFunction:
        """Return a language model's control step: a prompt and the tokens decoded after it (the example's "tokens")."""
        model, decoder = self._model, self.decoder
        if not self.called or getattr(decoder.config, "model_type", "") in MROPE_TYPES:
            return super().exported(example)
        given = check_example(example, ("inputs_embeds",), ("tokens",))
        tokens, prompt = given.get("tokens", 1), given["inputs_embeds"]
        headed = self.anatomy.language_model is not None
        if not is_count(tokens, 1) or (tokens > 1 and not headed):
            raise OptionError(
                f"tokens={tokens!r} was given; it is how many tokens the step decodes, an int of 1 or more, and 1 for "
                "a model without a head."
            )
        weight = norm_of(decoder).weight
        if not isinstance(prompt, Tensor) or not prompt.is_floating_point() or not self._is_prompt(prompt.shape):
            found = f" and of {prompt.dtype}" if isinstance(prompt, Tensor) and not prompt.is_floating_point() else ""
            raise OptionError(
                f"inputs_embeds of the example is {shape_of(prompt)}{found}; it is a prompt of floats (B, N, "
                f"{len(weight)}) that holds all visual tokens, {self._last + 1} positions or more."
            )
        prompt = prompt.detach().to(weight.device, weight.dtype)
        rows, length, _ = prompt.shape
        name = cache_name(model)
        from transformers.cache_utils import DynamicCache

        def run(inputs_embeds: Tensor) -> Tensor:
            cache, embeds, found = DynamicCache(config=decoder.config), inputs_embeds, []
            for end in range(length, length + tokens):
                start = end - embeds.shape[1]
                output = model(
                    inputs_embeds=embeds,
                    # Not None, or transformers would read positions with gaps as several sequences.
                    attention_mask=torch.ones(rows, end, dtype=torch.int64, device=embeds.device),
                    position_ids=torch.arange(start, end, device=embeds.device).expand(rows, -1),
                    **{name: cache},
                    use_cache=True,
                    **({"logits_to_keep": 1} if headed else {}),
                )
                found.append(output.logits[:, -1] if headed else output.last_hidden_state[:, -1])
                if headed:
                    embeds = model.get_input_embeddings()(found[-1].argmax(dim=-1))[:, None]
            return torch.stack(found, dim=1)

        call = Call(length, None, rows, prompt.device)
        return StepFunction(run, {"inputs_embeds": prompt}, "logits" if headed else "hidden", call)

    def _is_prompt(self, shape: torch.Size) -> bool:
        """Return True if embeddings of this shape are a prompt (B, N, D) that holds all visual tokens."""
        width = norm_of(self.decoder).weight.shape[0]
        return len(shape) == 3 and shape[0] > 0 and shape[1] > self._last and shape[2] == width

    def layout(self, call: Call) -> Layout:
        if call.attention_mask is not None:
            return self._layout(call)
        # If all is real, nothing moves from step to step.
        key = (call.rows, call.length, call.device, torch.is_inference_mode_enabled())
        if self._unmasked is None or self._unmasked[0] != key:
            self._unmasked = key, self._layout(call)
        return self._unmasked[1]

    def _layout(self, call: Call) -> Layout:
        prompt = call.prompt()
        visual = self._positions_on(call.device).expand(call.rows, -1)
        if self._padding_side == "left":
            positions = torch.arange(call.length, device=call.device)
            visual = visual + torch.where(prompt, positions, call.length).amin(dim=1, keepdim=True)
            ensure((visual < call.length).all(), OVERRUN)
        elif self._padding_side is None and call.attention_mask is not None:
            # Left padding would shift the image away from the slices, without any error.
            ensure(prompt[:, 0].all(), LEFT_PADDED)
        return Layout(visual=visual, valid=prompt.gather(1, visual), prompt=prompt, cameras=self._camera_tokens)

    def _positions_on(self, device: torch.device) -> Tensor:
        """Return (M,) int64; copied to a device once, since a copy makes the host wait."""
        if device not in self._on_device:
            self._on_device[device] = torch.tensor(self._positions, device=device)
        return self._on_device[device]


LEFT_PADDED = (
    'Position 0 is masked in a row. If the batch is padded on the left, attach with padding_side="left": the '
    "visual slices then count from each row's first real token. If it is an absent camera, attach with "
    'padding_side="right".'
)
OVERRUN = "A row is padded so far on the left that its visual slices reach beyond the end of the prompt."


def _decoder_of(model: nn.Module) -> nn.Module:
    model = unwrapped(model)
    return model if hasattr(model, "layers") else getattr(model, "model", model)


def _check_visual(visual: Any, model: nn.Module, longest: int | None) -> dict[str, slice]:
    if visual is None:
        raise OptionError(
            f"{type(model).__name__} is a plain language model: say where its visual tokens are, for instance "
            "attach(model, visual=slice(1, 257))."
        )
    cameras = dict(visual) if isinstance(visual, Mapping) else {"image": visual}
    if not cameras:
        raise OptionError("visual={} was given; name at least one camera.")
    return {_check_name(name, visual): _check_span(span, visual, longest) for name, span in cameras.items()}


def _check_name(name: Any, visual: Any) -> str:
    if not isinstance(name, str):
        raise OptionError(f"visual={visual!r} was given; a mapping has the cameras' names, which are strings.")
    return name


def _check_span(span: Any, visual: Any, longest: int | None) -> slice:
    if not isinstance(span, slice) or span.step not in (None, 1):
        raise OptionError(
            f"visual={visual!r} was given; it is a slice without a step, or a mapping of names to slices."
        )
    try:
        start, stop = operator.index(span.start), operator.index(span.stop)
    except TypeError:
        start = stop = -1
    if isinstance(span.start, bool) or isinstance(span.stop, bool) or not 0 <= start < stop:
        raise OptionError(
            f"visual={visual!r} was given; a slice needs a start and a larger stop, both whole numbers from position 0."
        )
    if longest is not None and stop > longest:
        raise OptionError(
            f"visual={visual!r} was given, but this model's sequences have at most {longest} positions "
            "(max_position_embeddings); name the positions of the visual tokens alone."
        )
    return slice(start, stop)
