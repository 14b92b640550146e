"""LeRobot's SmolVLA (`SmolVLAPolicy`): a SmolVLM2 prefix and a flow-matching expert that reads its cache.

The prefix [image blocks][text][state] runs once per action chunk, the expert once per denoising step: some of its
layers attend to the prefix and itself, the others to the prefix alone, whose cached keys and values they project.
Action attention is that of the expert's rows in both kinds of layers, averaged over the denoising steps.

LeRobot computes the layers itself, out of their parts, so no hook on a layer ever runs. For every layer it calls
methods of one module; these are replaced on that instance.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.encoder import Encoder
from vla_pruner.attach.family import Call
from vla_pruner.attach.host import Host, Wiring
from vla_pruner.attach.recorder import Attention
from vla_pruner.attach.short_layers import LayerInput, ShortLayers
from vla_pruner.caches import PromptCache, cache_in, lent, with_cache
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.families.lerobot_common import LeRobotFamily
from vla_pruner.replacements import Replacements

METHODS = ("forward", "forward_attn_layer", "forward_cross_attn_layer", "eager_attention_forward")
"""The methods that LeRobot calls, once per call of the model or once per layer."""


class SmolVLA(LeRobotFamily):
    """LeRobot's `SmolVLAPolicy`; every chunk that it predicts is one control step."""

    classes = frozenset({("lerobot.policies.smolvla.modeling_smolvla", "SmolVLAPolicy")})
    prepare = "prepare_images"
    paired = "vlm_with_expert"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not self._policy.config.use_cache:
            raise UnsupportedModelError(
                "SmolVLAPolicy has use_cache=False, without which its expert sees no prefix; set use_cache=True."
            )
        self.both = self._inner.vlm_with_expert
        self.passes = _Passes()
        self._routed = False
        self.decoder = self.anatomy.decoder
        config = self.both.config
        size, vision = self._policy.config.resize_imgs_with_padding, config.vision_config
        self.encoder = Encoder(
            tower=self.anatomy.towers[0],
            layers=self.anatomy.towers[0].encoder.layers,  # type: ignore[union-attr]
            patch=vision.patch_size,
            seeing=(self._inner, self.embed),
            patches=None if size is None else (size[0] // vision.patch_size) * (size[1] // vision.patch_size),
            token_side=config.scale_factor,
            shown=lambda: self._in_order,
        )
        self._pixels_per_token = config.vision_config.patch_size * config.scale_factor

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        both = model.model.vlm_with_expert
        seeing = both.get_vlm_model()
        every, cross = both.self_attn_every_n_layers, "cross" in both.attention_mode
        layers = range(len(seeing.text_model.layers)) if cross else ()
        return Anatomy(
            decoder=seeing.text_model,
            experts=(both.lm_expert,),
            cross_layers=frozenset(index for index in layers if not (every > 0 and index % every == 0)),
            towers=(seeing.vision_model,),
            projectors=(seeing.connector,),
            loop=both,
        )

    @property
    def camera_tokens(self) -> tuple[int, ...] | None:
        size = self._policy.config.resize_imgs_with_padding
        return None if size is None else (self._tokens(*size),) * len(self.cameras)

    def block_lengths(self, images: list[Tensor]) -> list[int]:
        return [self._tokens(*image.shape[-2:]) for image in images]

    def around_block(self) -> tuple[int, int]:
        return (2, 1) if self._inner.add_image_special_tokens else (0, 0)

    @property
    def encoding(self) -> tuple[tuple[Any, str], ...]:
        # The embedding picks positions of patches by a mask, so sizes depend on data: it stays outside of graphs.
        towers: Any = self.anatomy.towers
        return tuple((tower.encoder, "forward") for tower in towers)

    def wiring(self, host: Host) -> Wiring:
        return SmolVLAWiring(host, self)

    def install(self) -> None:
        super().install()
        self._routed = True  # the wiring routes the loop's calls through `passes`

    def remove(self) -> None:
        super().remove()
        self._routed = False

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        def stands(seam: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if module is not self.decoder:
                # A copy: LeRobot removes what a denoising step adds to the cache, which would replace its tensors.
                kwargs = with_cache(kwargs, lent(cache_in(kwargs)))
            return around(partial(seam, original), *args, **kwargs)

        names = _names(self.both.forward)

        def route(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return self.passes(original, _given(names, args, kwargs))

        if not self._routed and module is self.decoder:
            replaced.put(self.both, "forward", route)
        replaced.put(self.passes, "prompt" if module is self.decoder else "expert", stands)

    def normed(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        attention: Any = layer.self_attn
        return super().normed(layer, hidden).to(attention.q_proj.weight.dtype)

    def rotated(self, attention: nn.Module, key: Tensor, position_embeddings: tuple[Tensor, ...]) -> Tensor:
        # LeRobot rotates by position ids, and heads come after positions.
        rope = sys.modules[type(self.both).__module__].apply_rope
        return rope(key.transpose(1, 2), *position_embeddings).transpose(1, 2)

    def edit_masks(self, layer: int, edit: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Have every mask (B, Q, W), prompt columns first, of the attention from `layer` on go through `edit`.

        For references that are computed without pruning; call it after the session's wiring is installed.

        Returns:
            A function that undoes it.
        """

        def attend(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            if given["layer_idx"] >= layer:
                given["attention_mask"] = edit(given["attention_mask"])
            return original(**given)

        replaced = Replacements()
        replaced.put(self.both, "forward_attn_layer", attend)
        replaced.put(self.both, "forward_cross_attn_layer", attend)
        return replaced.remove

    def _tokens(self, height: int, width: int) -> int:
        return (height // self._pixels_per_token) * (width // self._pixels_per_token)


class _Passes:
    """The two kinds of calls of the loop over the layers, each with its one sequence of embeddings first."""

    def __call__(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Route a call of the loop, `original(**given)`, through `prompt` or `expert`."""
        others = {name: value for name, value in given.items() if name != "inputs_embeds"}
        prefix, suffix = given["inputs_embeds"]
        if prefix is None:
            return self.expert(original, suffix, **others)
        return original(**given) if suffix is not None else self.prompt(original, prefix, **others)

    def prompt(self, original: Callable[..., Any], prefix: Tensor, **given: Any) -> Any:
        """Run the prefix."""
        return original(inputs_embeds=[prefix, None], **given)

    def expert(self, original: Callable[..., Any], suffix: Tensor, **given: Any) -> Any:
        """Run a denoising step."""
        return original(inputs_embeds=[None, suffix], **given)


def _names(method: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)


def _given(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call by name; a compiler could not trace `inspect`."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


class SmolVLAWiring:
    """Maps the methods that SmolVLA calls for each layer onto `ShortLayers`, and their attention onto the host.

    Args:
        host: called with every event.
        family: of the model.
    """

    def __init__(self, host: Host, family: SmolVLA) -> None:
        self._host = host
        self._family = family
        self._both = family.both
        self._names = {name: _names(getattr(family.both, name)) for name in METHODS}
        self._short = ShortLayers(host, family)
        self._replaced = Replacements()
        self._prompt_cache = PromptCache()
        self._semantic: dict[int, int] = {}
        self._action: frozenset[int] = frozenset()
        self._index = 0

    def install(self) -> None:
        """Replace the methods.

        Raises:
            UnsupportedModelError: the method reads action attention in layers that have no expert.
        """
        method = self._host.method
        for layer, stage in self._host.stages.items():
            if "semantic" in stage.method.needs:
                self._semantic[stage.method.semantic_layer] = layer
        if "action" in method.needs:
            both = self._both
            experts = both.get_model_layers([self._family.decoder, both.lm_expert])[1]
            wanted = method.action_layers(self._family.depth)
            self._action = frozenset(index for index in wanted if experts[index] is not None)
            if not self._action:
                raise UnsupportedModelError(
                    f"Action attention is to be read at layers {wanted}, but none of them has an expert layer in this "
                    f"model ({both.num_expert_layers} expert layers for {both.num_vlm_layers})."
                )
        if self._names["forward_attn_layer"] != self._names["forward_cross_attn_layer"]:
            raise UnsupportedModelError(
                "SmolVLA's two kinds of layers take other arguments than in LeRobot 0.6.1; install that version."
            )
        self._replaced.put(self._both, "forward", self._forward)
        self._replaced.put(self._both, "forward_attn_layer", self._attend)
        self._replaced.put(self._both, "forward_cross_attn_layer", self._attend)
        self._replaced.put(self._both, "eager_attention_forward", self._kernel)

    def remove(self) -> None:
        """Put the methods back."""
        self._replaced.remove()
        self._short.forget()
        self._prompt_cache.remember(None)

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = _given(self._names["forward"], args, kwargs)
        prefix = given["inputs_embeds"][0]
        self._short.forget()
        try:
            return self._run_expert(original, given) if prefix is None else self._run_prompt(original, given)
        finally:
            self._host.end_turn()

    def _run_expert(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Run a denoising step."""
        if self._host.step is not None:
            message = "A denoising step was given another cache than the prefix; steps cannot be interleaved."
            self._prompt_cache.check_same(cache_in(given), message)
        self._host.enter_reader()
        self._cut(cache_in(given))
        result = self._family.passes(original, given)
        self._host.leave_call()
        return result

    def _run_prompt(self, original: Callable[..., Any], given: dict[str, Any]) -> Any:
        """Run the prefix."""
        prefix, suffix = given["inputs_embeds"]
        if suffix is not None or cache_in(given) is not None:
            raise SessionError(
                "The prefix was run together with actions or with a cache; a session serves select_action and "
                "predict_action_chunk alone. Detach before training."
            )
        self._host.enter_decoder(Call(prefix.shape[1], None, prefix.shape[0], prefix.device))
        self._host.see_embeddings(prefix)
        outputs, cache = self._family.passes(original, given)
        self._prompt_cache.remember(cache)
        self._host.leave_call()
        hidden = self._short.leave_prompt(outputs[0], cache)
        return outputs if hidden is None else [hidden, *outputs[1:]], cache

    def _cut(self, cache: Any) -> None:
        """Cut the layers of the cache that are short back to the prompt."""
        for index in range(self._short.layer, self._family.depth):
            self._short.cut(index, cache)

    def _attend(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One layer's attention, self or cross: everything in front of it is made short here."""
        # Both kinds have the same arguments.
        given = _given(self._names["forward_attn_layer"], args, kwargs)
        self._index = index = given["layer_idx"]
        step = self._host.step
        if step is not None and index >= self._short.layer:
            (self._shorten if step.in_prompt() else self._read)(index, given)
        return original(**given)

    def _shorten(self, index: int, given: dict[str, Any]) -> None:
        """Before a layer of the prefix from the pruning layer on."""
        positions, mask = given["position_ids"], given["attention_mask"]
        layer = LayerInput(
            index=index,
            layer=given["model_layers"][0][index],
            hidden=given["inputs_embeds"][0],
            angles=self._short.once("angles", positions, lambda: (positions,)),
            positions=None,
            mask=self._short.once("mask", mask, lambda: mask[:, None]),
            causal=False,
            cache=cache_in(given),
        )
        if self._short.shorten(layer):
            # The loop over the layers goes on with the contents of this list.
            given["inputs_embeds"][0] = layer.hidden
            (given["position_ids"],) = layer.angles
            given["attention_mask"] = _flat(layer.mask)

    def _read(self, index: int, given: dict[str, Any]) -> None:
        """Before a layer of the expert that reads a layer of the cache which may be shortened."""
        mask, cache = given["attention_mask"], cache_in(given)
        short = self._short.read(index, self._short.once("mask", mask, lambda: mask[:, None]), cache)
        if short is not None:
            given["attention_mask"] = _flat(short)

    def _kernel(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        step = self._host.step
        if step is None:
            return output
        prompt = step.in_prompt()
        if self._index in (self._semantic if prompt else self._action):
            given = _given(self._names["eager_attention_forward"], args, kwargs)
            attention = Attention(
                query=given["query_states"].transpose(1, 2),
                key=given["key_states"].transpose(1, 2),
                mask=given["attention_mask"][:, None],
                causal=False,
                scaling=given["head_dim"] ** -0.5,
                softcap=None,
            )
            if prompt:
                self._host.record_semantic(self._semantic[self._index], attention)
            else:
                self._host.record_reader(self._index, attention)
        return output


def _flat(mask: Tensor | None) -> Tensor:
    """Return a mask (B, 1, Q, S) as LeRobot has it: (B, Q, S)."""
    assert mask is not None
    return mask[:, 0]
