"""LeRobot's SmolVLA (`SmolVLAPolicy`): a SmolVLM2 prefix and a flow-matching expert that reads its cache.

The prefix [image blocks][text][state] runs once per action chunk, the expert once per denoising step: some of its
layers attend to the prefix and itself, the others to the prefix alone, whose cached keys and values they project.
Action attention is that of the expert's rows in both kinds of layers, averaged over the denoising steps.

LeRobot computes the layers itself, out of their parts, so no hook on a layer ever runs. What it does call for every
layer are methods of one module; these are replaced on that instance.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call, Wiring
from vla_pruner.attach.recorder import Attention
from vla_pruner.attach.step import Step
from vla_pruner.caches import cache_in
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.families.lerobot_common import LeRobotFamily
from vla_pruner.replacements import Replacements

if TYPE_CHECKING:
    from vla_pruner.attach.session import Session


class SmolVLA(LeRobotFamily):
    """LeRobot's `SmolVLAPolicy`; every chunk that it predicts is one control step."""

    classes = frozenset({("lerobot.policies.smolvla.modeling_smolvla", "SmolVLAPolicy")})
    prepare = "prepare_images"
    compilable = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        if not self._policy.config.use_cache:
            raise UnsupportedModelError(
                "SmolVLAPolicy has use_cache=False, without which its expert sees no prefix; set use_cache=True."
            )
        self.both = self._inner.vlm_with_expert
        self.decoder = self.anatomy.decoder
        config = self.both.config
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

    def wiring(self, session: Session) -> Wiring:
        return SmolVLAWiring(session, self)

    def edit_masks(self, layer: int, edit: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Have every mask (B, Q, W), prompt columns first, of the attention from `layer` on go through `edit`.

        For references that are computed without pruning; call it after the session's wiring is installed.

        Returns:
            What takes it away again.
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


class SmolVLAWiring:
    """Shortens the prefix and reads attention in the methods that SmolVLA calls for each layer.

    Args:
        session: told when a prefix runs and asked what to keep.
        family: whose model this is.
    """

    def __init__(self, session: Session, family: SmolVLA) -> None:
        self._session = session
        self._family = family
        self._both = family.both
        self._layer = session.method.layer
        self._rope: Callable[[Tensor, Tensor], Tensor] = sys.modules[type(self._both).__module__].apply_rope
        self._replaced = Replacements()
        self._semantic: dict[int, int] = {}
        self._action: frozenset[int] = frozenset()
        self._index = 0
        self._cache: Any = None
        self._short: dict[str, Tensor] = {}

    def install(self) -> None:
        """Replace the methods.

        Raises:
            UnsupportedModelError: the method reads action attention in layers that have no expert.
        """
        method = self._session.method
        for layer, stage in self._session.stages.items():
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
        self._replaced.put(self._both, "forward", self._forward)
        self._replaced.put(self._both, "forward_attn_layer", self._attend)
        self._replaced.put(self._both, "forward_cross_attn_layer", self._attend)
        self._replaced.put(self._both, "eager_attention_forward", self._kernel)

    def remove(self) -> None:
        """Put the methods back."""
        self._replaced.remove()
        self._short.clear()
        self._cache = None

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._session.turn.begin_call()
        try:
            return self._call(original, *args, **kwargs)
        finally:
            self._session.turn.end_call()

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        prefix, suffix = given["inputs_embeds"]
        self._short.clear()
        if prefix is None:
            self._check_cache(cache_in(given))
            step = self._session.step
            if step is None:
                return original(**given)
            step.check_thread()
            step.begin_call()
            result = original(**given)
            with self._session.timed():
                step.end_call()
            return result
        if suffix is not None or cache_in(given) is not None:
            raise SessionError(
                "The prefix was run together with actions or with a cache; a session serves select_action and "
                "predict_action_chunk alone. Detach before training."
            )
        with self._session.timed():
            self._session.open_call(Call(prefix.shape[1], None, prefix.shape[0], prefix.device))
        self._session.see_embeddings(prefix)
        step = self._session.step
        assert step is not None
        outputs, cache = original(**given)
        self._cache = weakref.ref(cache)
        step.end_call()
        step.prefilling, step.frozen_hidden = False, None
        if step.shortening is not None:
            outputs = [step.shortening.restore(outputs[0]), *outputs[1:]]
        return outputs, cache

    def _check_cache(self, cache: Any) -> None:
        if self._session.step is not None and (self._cache is None or cache is not self._cache()):
            raise SessionError("A denoising step was given another cache than the prefix; steps cannot be interleaved.")

    def _attend(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """One layer's attention, self or cross: everything in front of it is made short here."""
        given = inspect.signature(original).bind(*args, **kwargs).arguments
        self._index = index = given["layer_idx"]
        step = self._session.step
        if step is None or index < self._layer:
            return original(**given)
        with self._session.timed():
            if step.prefilling:
                self._shorten(index, given)
            else:
                self._read(index, given, step)
        return original(**given)

    def _shorten(self, index: int, given: dict[str, Any]) -> None:
        """Before a layer of the prefix from the pruning layer on."""
        step = self._session.step
        assert step is not None
        if index in self._session.stages:
            before = step.shortening_at(index - 1)
            hidden = given["inputs_embeds"][0]
            shortening = self._session.choose(hidden, index)
            if shortening is not None and shortening is not before:
                self._short.clear()
                # The loop over the layers goes on with what is in this list.
                given["inputs_embeds"][0], step.frozen_hidden = shortening.enter(hidden, step.frozen_hidden)
        shortening = step.shortening_at(index)
        if shortening is None:
            return
        positions, mask = given["position_ids"], given["attention_mask"]
        if step.frozen_hidden is not None:
            frozen = self._once("frozen", lambda: shortening.frozen_rows(positions))
            layer = given["model_layers"][0][index]
            cache_in(given).update(*self._keys_values(layer, step.frozen_hidden, frozen), index)
        given["position_ids"] = self._once("positions", lambda: shortening.live_rows(positions))
        given["attention_mask"] = self._once("mask", lambda: _flat(shortening.prefill_mask(mask[:, None], False, None)))

    def _read(self, index: int, given: dict[str, Any], step: Step) -> None:
        """Before a layer of the expert that reads a layer of the cache which may be shortened."""
        shortening = step.shortening_at(index)
        if shortening is None:
            return
        if index in self._session.stages:
            self._short.clear()
        mask = given["attention_mask"]
        given["attention_mask"] = self._once("mask", lambda: _flat(shortening.reader_mask(mask[:, None], None)))
        # Self-attention left the columns of the denoising step before; the model's own crop goes to the full length.
        cached, length = cache_in(given).layers[index], shortening.prefix.shape[1]
        if cached.keys.shape[-2] > length:
            cached.keys, cached.values = cached.keys[..., :length, :], cached.values[..., :length, :]

    def _kernel(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        step = self._session.step
        if step is None:
            return output
        wanted = self._index in (self._semantic if step.prefilling else self._action)
        if wanted:
            given = inspect.signature(original).bind(*args, **kwargs).arguments
            attention = Attention(
                query=given["query_states"].transpose(1, 2),
                key=given["key_states"].transpose(1, 2),
                mask=given["attention_mask"][:, None],
                causal=False,
                scaling=given["head_dim"] ** -0.5,
                softcap=None,
            )
            if step.prefilling:
                self._session.record_semantic(self._semantic[self._index], attention)
            else:
                self._session.record_reader(self._index, attention)
        return output

    def _keys_values(self, layer: Any, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What this layer of the prefix would cache for hidden states (B, F, D): (B, G, F, d) each."""
        attention = layer.self_attn
        normed = layer.input_layernorm(hidden).to(attention.q_proj.weight.dtype)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        key = self._rope(attention.k_proj(normed).view(shape), positions)
        return key.transpose(1, 2), attention.v_proj(normed).view(shape).transpose(1, 2)

    def _once(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returns, made once per call: every layer is given the same positions and the same mask."""
        if name not in self._short:
            self._short[name] = make()
        return self._short[name]


def _flat(mask: Tensor | None) -> Tensor:
    """A mask (B, 1, Q, S) as LeRobot has it: (B, Q, S)."""
    assert mask is not None
    return mask[:, 0]
