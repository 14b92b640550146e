"""LeRobot's MolmoAct2 (`MolmoAct2Policy`): a Molmo prompt and a flow-matching expert that reads its cache.

The prompt [BOS][views][text] runs once per action chunk, and each of its layers caches keys and values, which the
expert projects once. In every denoising step a block of the expert attends to its own rows, and then to the keys and
values of the decoder's layer of the same index. Action attention is that of the expert's rows in this second attention,
averaged over the denoising steps.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy, layers_of
from vla_pruner.attach.family import Call, Family
from vla_pruner.attach.hooks import HookWiring
from vla_pruner.attach.host import Host, Wiring
from vla_pruner.attach.layout import Layout
from vla_pruner.attach.recorder import Attention
from vla_pruner.attach.short_layers import ShortLayers
from vla_pruner.errors import SessionError, UnsupportedModelError
from vla_pruner.families.base import BACKENDS, is_one_of
from vla_pruner.families.lerobot_common import (
    IMAGES,
    check_version,
    image_blocks,
    kind_of,
    refuse_training,
)
from vla_pruner.replacements import Replacements
from vla_pruner.versions import check_transformers

MODULE = "lerobot.policies.molmoact2.modeling_molmoact2"
_DISCRETE = (
    "MolmoAct2 with inference_action_mode='discrete' decodes its actions as tokens past the layers' own calls, over "
    "one mask for all of them, which is not supported together with pruning; set inference_action_mode='continuous'."
)
_DEPTH = (
    "This MolmoAct2 reasons about depth (action_expert_depth_gate): its expert is gated by the mean over the values of "
    "all tokens, those that pruning takes away among them, so it is not supported; use a checkpoint without the gate."
)
_DECODES = ("_consume_generation_tokens", "_run_ar_decode_step", "_run_depth_decode_step", "_generate_depth_prefix")
_GRAPHS = (("action_cuda_graph_manager", "can_use_action_flow"), ("depth_decode_cuda_graph_manager", "can_use"))


class MolmoAct2(Family):
    """LeRobot's `MolmoAct2Policy` with continuous actions; every chunk that it predicts is one control step.

    Its own CUDA graphs would replay the choice of tokens that was made during capture, so they are disabled.
    """

    def __init__(self, model: nn.Module) -> None:
        check_version(kind_of(model))
        check_transformers()
        self._policy: Any = model
        self._model, self._backbone = self._policy._hf_model(), self._policy._backbone()
        if self._backbone.action_expert is None:
            raise UnsupportedModelError(_DISCRETE)
        self.decoder = self._backbone.transformer
        self.expert = self._backbone.action_expert
        if self.backend not in BACKENDS:
            raise UnsupportedModelError(
                f"MolmoAct2Policy uses the attention backend {self.backend!r}; supported are {' and '.join(BACKENDS)}. "
                "Load the model with attn_implementation='sdpa'."
            )
        self.kernel = _sdpa if self.backend == "sdpa" else None
        self._check_config()
        config = self._policy.config
        self._keys = list(config.image_keys or sorted(config.image_features))
        self.cameras = tuple(key.removeprefix(IMAGES).removeprefix("observation.") for key in self._keys)
        self._replaced = Replacements()
        self._shown: tuple[int, ...] | None = None
        self._views: int | None = None
        self._seen: tuple[Tensor, int] | None = None
        self._tokens: int | None = None
        self._routed = False

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_one_of(model, {(MODULE, "MolmoAct2Policy")})

    @staticmethod
    def anatomy_of(model: Any) -> Anatomy:
        """Return the parts of a `MolmoAct2Policy`."""
        backbone = model._backbone()
        expert = backbone.action_expert
        blocks = () if expert is None else layers_of(expert)
        return Anatomy(
            decoder=backbone.transformer,
            experts=(expert,),
            towers=(backbone.vision_backbone,),
            expert_calls=((expert, "prepare_context"), *((block, "forward") for block in blocks)),
            patched=True,
        )

    @property
    def anatomy(self) -> Anatomy:
        return self.anatomy_of(self._policy)

    @property
    def first_layer(self) -> int:
        return 1

    @property
    def encoding(self) -> tuple[tuple[Any, str], ...]:
        # The pooling after it picks tokens by a mask, so sizes depend on data: it stays outside of graphs.
        return ((self._backbone.vision_backbone, "encode_image"),)

    @property
    def camera_tokens(self) -> tuple[int, ...] | None:
        # The processor decides the number, and the model does not know it: as many as in the last prompt.
        return None if self._tokens is None else (self._tokens,) * len(self.cameras)

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return (self._policy, "select_action"), (self._policy, "predict_action_chunk")

    def wiring(self, host: Host) -> Wiring:
        return MolmoAct2Wiring(host, self)

    def opens_step(self, call: Call) -> bool:
        return True

    def action_rows(self, layout: Layout) -> Tensor | None:
        return None

    def layout(self, call: Call) -> Layout:
        if self._seen is None or self._views is None:
            raise SessionError(
                "The prompt was run without images. Call select_action(batch) or predict_action_chunk(batch)."
            )
        (ids, count), config = self._seen, self._backbone.config
        marks = config.image_patch_id, config.image_end_token_id
        visual, blocks = image_blocks(ids, count, self._views, marks, _UNEVEN)
        self._tokens = blocks[0]
        counts = [0] * len(self.cameras)
        for camera in self._order(len(blocks)):
            counts[camera] = self._tokens
        prompt = call.prompt()
        return Layout(
            visual=visual,
            valid=prompt.gather(1, visual),
            prompt=prompt,
            cameras=tuple(counts),
            absent=frozenset(camera for camera, tokens in enumerate(counts) if not tokens),
        )

    def keys_values(
        self, layer: nn.Module, hidden: Tensor, position_embeddings: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        attention: Any = layer.self_attn
        norm: Any = layer.attn_norm
        normed = hidden if self.decoder.config.norm_after else norm(hidden)
        _, key, value = attention.att_proj(normed).split(attention.fused_dims, dim=-1)
        shape = (*hidden.shape[:-1], -1, attention.head_dim)
        by_head = attention.qk_norm_type == "qwen3"
        if attention.k_norm is not None and not by_head:
            key = attention.k_norm(key)
        key = key.view(shape)
        if attention.k_norm is not None and by_head:
            key = attention.k_norm(key)
        key = key.transpose(1, 2)
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        return rotate(key, key, *position_embeddings)[1], value.view(shape).transpose(1, 2)

    def denoise(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a denoising step, `original(*args, **kwargs)`, within what a session does around it."""
        return original(*args, **kwargs)

    def put_around(self, module: nn.Module, around: Callable[..., Any], replaced: Replacements) -> None:
        if module is not self.expert:
            super().put_around(module, around, replaced)
        elif self._routed:
            replaced.put(self, "denoise", lambda _, original, *args, **kwargs: around(original, *args, **kwargs))
        else:
            self._set_graphs_aside(replaced)
            replaced.put(module, "forward_with_context", around)

    def edit_expert_masks(self, layer: int, edit: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        """Make every mask (B, 1, 1, N) of the expert's attention to the prompt from `layer` on go through `edit`.

        For references that are computed without pruning.

        Returns:
            a function that removes the edit.
        """

        def attend(original: Callable[..., Any], *args: Any, attn_mask: Tensor, **kwargs: Any) -> Any:
            return original(*args, attn_mask=edit(attn_mask), **kwargs)

        replaced = Replacements()
        for block in layers_of(self.expert)[layer:]:
            replaced.put(block.cross_attn, "_attention", attend)
        return replaced.remove

    def install(self) -> None:
        self._routed = True  # the wiring leads denoising steps through `denoise`
        put = self._replaced.put
        put(self._policy, "forward", refuse_training)
        put(self._policy, "_model_inputs", self._see_batch)
        put(self._policy, "_resolve_inference_action_mode", self._check_mode)
        put(self._backbone, "merge_visual_inputs", self._see_images)
        put(self._backbone, "build_input_embeddings", self._see_prompt)
        for name in _DECODES:
            if hasattr(self._model, name):
                put(self._model, name, _refuse_decoding)
        self._set_graphs_aside(self._replaced)

    def remove(self) -> None:
        self._replaced.remove()
        self._shown = self._views = self._seen = self._tokens = None
        self._routed = False

    def _set_graphs_aside(self, replaced: Replacements) -> None:
        for name, can_use in _GRAPHS:
            for owner in (self._backbone, self._model):
                manager = getattr(owner, name, None)
                if manager is not None:
                    replaced.put(manager, can_use, _no_graph)

    def _order(self, views: int) -> tuple[int, ...]:
        """Return the indices of the cameras of the prompt's images, in their order."""
        shown, self._shown = self._shown, None
        if shown is None or len(shown) != views:
            # Without a batch (a direct call of the model) the images are taken to be those of the config.
            shown = tuple(range(len(self.cameras)))
        if len(shown) != views:
            raise SessionError(
                f"The prompt holds {views} images, but the policy's cameras are {', '.join(map(repr, self.cameras))}."
            )
        return shown

    def _see_batch(self, original: Callable[..., Any], batch: Any) -> Any:
        self._check_config()
        self._shown = tuple(camera for camera, key in enumerate(self._keys) if key in batch)
        return original(batch)

    def _see_images(self, original: Callable[..., Any], **kwargs: Any) -> Any:
        if kwargs.get("pixel_values_videos") is not None:
            raise SessionError("MolmoAct2 was given videos while a session is attached; give it images.")
        grids = kwargs.get("image_grids")
        self._views, self._seen = None if grids is None else len(grids), None
        return original(**kwargs)

    def _see_prompt(self, original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        embeddings, features = original(input_ids, *args, **kwargs)
        # A shape says how many there are, without waiting for the device.
        self._seen = None if features is None else (input_ids, len(features))
        return embeddings, features

    def _check_mode(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        mode = original(*args, **kwargs)
        if mode == "discrete":
            raise UnsupportedModelError(_DISCRETE)
        return mode

    def _check_config(self) -> None:
        if self._policy.config.inference_action_mode == "discrete":
            raise UnsupportedModelError(_DISCRETE)
        if self._backbone.action_expert_depth_gate is not None or self._backbone.config.enable_depth_reasoning:
            raise UnsupportedModelError(_DEPTH)


class MolmoAct2Wiring(HookWiring):
    """Hooks on the decoder as in other families, and on the expert's attention to the prompt, a method of its own.

    Args:
        host: receives every call.
        family: the model's family.
    """

    def __init__(self, host: Host, family: MolmoAct2) -> None:
        super().__init__(host, family)
        self._molmo = family
        self._expert = family.expert
        self._reader = ShortLayers(host, family)
        self._replaced = Replacements()
        self._action: frozenset[int] = frozenset()

    def install(self) -> None:
        super().install()
        self._replaced.put(self._expert, "forward_with_context", self._denoise)
        for index, block in enumerate(layers_of(self._expert)):
            if index in self._action or index >= self._reader.layer:
                self._replaced.put(block.cross_attn, "_attention", partial(self._attend, index))

    def remove(self) -> None:
        self._replaced.remove()
        self._reader.forget()
        super().remove()

    def _tap_action(self) -> None:
        self._action = frozenset(self._host.method.action_layers(len(layers_of(self._expert))))

    def _denoise(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._reader.forget()
        return self._run_reader(partial(self._molmo.denoise, original), *args, **kwargs)

    def _attend(
        self, index: int, original: Callable[..., Any], query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None
    ) -> Any:
        """Run the attention of the expert's rows (B, T, H, d) to the prompt's (B, S, H, d), and record it."""
        short = None if attn_mask is None else self._reader.read(index, attn_mask, None)
        mask = attn_mask if short is None else short
        output = original(query, key, value, attn_mask=mask)
        if index in self._action:
            attention = Attention(
                query=query.transpose(1, 2),
                key=key.transpose(1, 2),
                mask=mask,
                causal=False,
                scaling=query.shape[-1] ** -0.5,
                softcap=None,
            )
            self._host.record_reader(index, attention)
        return output


def _sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute attention as MolmoAct2's own code does if its config says "sdpa"."""
    repeat = sys.modules[type(module).__module__].repeat_kv
    groups = module.num_key_value_groups
    output = nn.functional.scaled_dot_product_attention(
        query,
        repeat(key, groups),
        repeat(value, groups),
        attn_mask=attention_mask,
        dropout_p=kwargs.get("dropout", 0.0),
        is_causal=attention_mask is None,
    )
    return output.transpose(1, 2).contiguous(), None


def _no_graph(original: Callable[..., Any], *args: Any, **kwargs: Any) -> bool:
    return False


def _refuse_decoding(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise SessionError(
        "MolmoAct2 was asked to decode tokens (discrete actions, or reasoning about depth) while a session is "
        "attached; ask it for continuous actions without depth, or detach first."
    )


_UNEVEN = (
    "The rows of a batch have different numbers of visual tokens, or an image of one lies in several pieces; give "
    "every row as many images, each in one piece (the processor's crop mode 'resize')."
)
