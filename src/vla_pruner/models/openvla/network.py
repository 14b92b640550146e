"""OpenVLA on the installed transformers' Llama.

Facts from the official code (modeling_prismatic.py), checked against golden outputs of it. Two things differ: batches,
and an attention mask that always covers the whole sequence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from vla_pruner.caches import NAMES, cache_name
from vla_pruner.checkpoints.files import listed
from vla_pruner.errors import CheckpointError, ObservationError, VLAPrunerError
from vla_pruner.models.openvla import actions
from vla_pruner.models.openvla.configuration import OpenVLAConfig, tower_sizes
from vla_pruner.models.openvla.finite import check_inputs, checked, most_likely
from vla_pruner.models.openvla.prompt import Prompt, read_prompt
from vla_pruner.models.openvla.statistics import NO_STATISTICS
from vla_pruner.models.openvla.vision import Projector, VisionBackbone, unused_weights
from vla_pruner.wording import a_type


class LanguageModel(LlamaForCausalLM):
    """Llama whose positions stay exact in half precision, and which can omit its head over the vocabulary if only
    hidden states are needed.
    """

    def forward(self, *args: Any, headless: bool = False, **kwargs: Any) -> Any:
        """Run LlamaForCausalLM; with `headless` return the output of the decoder alone."""
        return self.model(*args, **kwargs) if headless else super().forward(*args, **kwargs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # `policy.to(torch.bfloat16)` rounds buffers too, without a warning. Rounded frequencies turn the last tokens of
        # the sequence by up to a radian.
        rotary = self.model.rotary_emb
        exact = {name: buffer for name, buffer in rotary.named_buffers() if not buffer.is_meta}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(rotary, name, buffer.to(rotary.get_buffer(name).device))
        return self


class OpenVLAForActionPrediction(PreTrainedModel):
    """OpenVLA: DINOv2 and SigLIP, a projector, and Llama 2, which decodes one token for each dimension of the action.

    The sequence is [BOS][visual tokens][rest of the prompt]. A control step is one call of `predict_action` or `act`;
    it calls each vision tower once, and the language model once for the prompt and once for every token but the last.

    Attributes:
        norm_stats: the datasets' statistics by `unnorm_key`, as published.
        unnorm_key: the dataset used if none is named; None: the only one.
        cameras: names of the images that `act` takes, in the order of the visual tokens.
        processor: the processor of images and instructions for `act`; the loader sets it.
        denoising_step: index of the running pass of the language model if a control step has several that each see the
            whole sequence (OFT's diffusion head); else None.
    """

    config_class = OpenVLAConfig
    config: OpenVLAConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _supports_sdpa = True
    _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "VisionTower", "Projector"]  # noqa: RUF012 transformers writes it so
    _skip_keys_device_placement = list(NAMES)  # noqa: RUF012

    def __init__(self, config: OpenVLAConfig) -> None:
        super().__init__(config)
        dino, siglip = tower_sizes(config)
        self._keys_to_ignore_on_load_unexpected = unused_weights(dino, siglip)
        self.vision_backbone = VisionBackbone(dino, siglip)
        self.projector = Projector(dino.width + siglip.width, config.text_config.hidden_size)
        self.language_model = LanguageModel(config.text_config)
        self._cache_name = cache_name(self.language_model)
        self.patches = dino.patches
        self.norm_stats: dict[str, Any] = config.norm_stats
        self.unnorm_key: str | None = None
        self.cameras: tuple[str, ...] = ("image",)
        self.processor: Any = None
        self.denoising_step: int | None = None
        self.post_init()

    @property
    def vision(self) -> VisionBackbone:
        """Both vision towers, under the name that the stage timer looks for."""
        return self.vision_backbone

    @property
    def vision_towers(self) -> tuple[nn.Module, ...]:
        """DINOv2 and SigLIP. Each is called once in a control step, with all rows and cameras as one batch."""
        return self.vision_backbone.featurizer, self.vision_backbone.fused_featurizer

    @property
    def visual_slice(self) -> slice:
        """The place of the visual tokens in the language model's sequence, camera after camera."""
        return slice(1, 1 + self.patches * len(self.cameras))

    @property
    def proprio_size(self) -> int | None:
        """The number of values in the robot's state that `act` takes; None: it takes none."""
        return None

    @property
    def action_size(self) -> int | None:
        """The number of values in an action; None if no dataset's statistics were chosen."""
        try:
            return self.get_action_dim()
        except VLAPrunerError:
            return None

    @property
    def llm_dim(self) -> int:
        """Width D of the language model."""
        return self.config.text_config.hidden_size

    @property
    def action_vocabulary(self) -> int:
        """The number of tokens up to the last action token; after it come only rows that fill the vocabulary up."""
        return self.config.text_config.vocab_size - self.config.pad_to_multiple_of

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_action_stats(self, unnorm_key: str | None = None) -> dict[str, Any]:
        """Statistics of the actions of one dataset. Errors as in `predict_action`."""
        return self.statistics("action", unnorm_key)

    def get_action_dim(self, unnorm_key: str | None = None) -> int:
        """Number of dimensions of an action. Errors as in `predict_action`."""
        stats = self.get_action_stats(unnorm_key)
        for name in ("q01", "min"):
            if isinstance(stats.get(name), Sized):
                return len(stats[name])
        raise CheckpointError(
            f"The statistics of the actions of {self.dataset(unnorm_key)!r} have neither q01 nor min with a number for "
            f"each dimension; found {', '.join(map(str, stats)) or 'nothing'}. Copy them from the published checkpoint."
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return the language model's output for images and prompt.

        Args:
            input_ids: (B, T) token ids, padded on either side; nothing is appended.
            attention_mask: (B, T), or None: padding tokens are padding.
            pixel_values: (B, 6 * cameras, 224, 224).
            kwargs: for the language model, for instance `output_hidden_states`.

        Returns:
            its output, for [BOS][visual tokens][rest of the prompt], padded on the right.
        """
        prompt = read_prompt(input_ids, attention_mask, self.config, ends_empty=False)
        embeds, mask = self._embed(prompt, self.visual_tokens(pixel_values, len(input_ids)))
        return self.language_model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=real_positions(mask), **kwargs
        )

    @torch.no_grad()
    def predict_action(
        self,
        input_ids: Tensor,
        unnorm_key: str | None = None,
        *,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        do_sample: bool = False,
        past_key_values: Any = None,
    ) -> np.ndarray:
        """Return the action, in the units of the dataset: one token for each of its dimensions.

        An end-of-sequence token among them does not end it, although the original's `generate` would stop early:
        decoding goes on, and such a token counts as the last bin, as every id below the action tokens.

        Args:
            input_ids: (B, T) token ids, padded on either side. Token 29871 is appended if it is not last.
            unnorm_key: dataset whose statistics scale the action; None only if there is one, or the loader chose.
            pixel_values: (B, 6 * cameras, 224, 224), for each camera DINOv2's three channels and then SigLIP's.
            attention_mask: (B, T), nonzero for real tokens; None: padding tokens are padding.
            do_sample: only False; the most likely token is taken.
            past_key_values: an empty cache to use; a new DynamicCache if None.

        Returns:
            (dim,) float64; (B, dim) for more than one row.

        Raises:
            ObservationError: an argument does not fit; the message says which.
            CheckpointError: the network gives numbers that are not finite, or the statistics do not fit.
        """
        if do_sample:
            raise ObservationError("do_sample=True was given; actions are decoded greedily, so give do_sample=False.")
        stats = self.get_action_stats(unnorm_key)
        count = self.get_action_dim(unnorm_key)
        tokens = self.decode_tokens(input_ids, pixel_values, attention_mask, count, past_key_values)
        normalized = actions.decode_bins(tokens, self.action_vocabulary, self.config.n_action_bins)
        found = actions.unnormalize(normalized, stats)
        return found[0] if len(found) == 1 else found

    @torch.no_grad()
    def decode_tokens(
        self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None, count: int, cache: Any = None
    ) -> Tensor:
        """Return (B, count) int64 on the CPU: the most likely tokens after the prompt. Arguments and errors as in
        `predict_action`.
        """
        prompt = read_prompt(input_ids, attention_mask, self.config)
        embeds, mask = self._embed(prompt, self.visual_tokens(pixel_values, len(input_ids)))
        rows, length = mask.shape
        mask = torch.cat([mask, mask.new_ones(rows, count - 1)], dim=1)
        positions = real_positions(mask)
        cache = DynamicCache(config=self.config.text_config) if cache is None else cache
        last = prompt.lengths - 1 + self.patches * len(self.cameras)
        columns, row_column = (None, None) if prompt.even else last.to(embeds.device).unique(return_inverse=True)
        logits = self.language_model(
            inputs_embeds=embeds,
            attention_mask=mask[:, :length],
            position_ids=positions[:, :length],
            **{self._cache_name: cache},
            use_cache=True,
            logits_to_keep=1 if columns is None else columns,
        ).logits
        logits = logits[:, -1] if row_column is None else logits[torch.arange(rows), row_column.to(logits.device)]
        token, found = most_likely(logits)
        decoded = [found]
        for end in range(length + 1, length + count):
            logits = self.language_model(
                input_ids=token[:, None].to(embeds.device),
                attention_mask=mask[:, :end],
                position_ids=positions[:, end - 1 : end],
                **{self._cache_name: cache},
                use_cache=True,
            ).logits
            token, found = most_likely(logits[:, -1])
            decoded.append(found)
        return checked(torch.stack(decoded, dim=1), self.language_model, pixel_values=pixel_values)

    def act(
        self,
        images: Mapping[str, np.ndarray],
        instruction: str,
        proprio: np.ndarray | None = None,
        unnorm_key: str | None = None,
    ) -> np.ndarray:
        """Return actions for one observation of one robot.

        Args:
            images: (H, W, 3) uint8, RGB, upright, by the names of `cameras`.
            instruction: the task in words.
            proprio: the robot's state in its own units, if the policy reads it.
            unnorm_key: as in `predict_action`.

        Returns:
            (chunk, dim) float64 in the units of the dataset; a chunk of 1 for OpenVLA.

        Raises:
            ObservationError: the cameras are not the policy's, or another argument does not fit.
            CheckpointError: the policy has no processor, or `predict_action` raises it.
        """
        if self.processor is None:
            raise CheckpointError(
                "The policy has no processor, so it cannot read images and words: load it with load_policy, set "
                "`policy.processor`, or call predict_action with what you prepared yourself."
            )
        if not isinstance(images, Mapping) or set(images) != set(self.cameras):
            names = ", ".join(map(repr, images)) if isinstance(images, Mapping) else a_type(images)
            raise ObservationError(
                f"The images are {names or 'none'}; this policy takes exactly "
                f"{', '.join(map(repr, self.cameras))}. Other names can be given to load_policy(cameras=...)."
            )
        input_ids, attention_mask = self.processor.tokenize([self.processor.prompt(instruction)])
        found = self.predict_action(
            input_ids,
            unnorm_key,
            pixel_values=self.processor.pixel_values([images[camera] for camera in self.cameras]),
            attention_mask=attention_mask,
            **self._state(proprio, unnorm_key),
        )
        return np.atleast_2d(found)

    def reset(self) -> None:
        """Begin a new episode. The policy itself has no memory; an attached session forgets its episode here.

        Attaching puts the session's own method in this one's place, so call it through the policy, or bind it
        (`reset = policy.reset`) after attaching.
        """

    def visual_tokens(self, pixel_values: Tensor | None, rows: int) -> Tensor:
        """Return the inputs of the language model for the images, (B, M, D). Arguments as in `predict_action`."""
        expected = (rows, 6 * len(self.cameras), *[self.config.image_sizes[0]] * 2)
        if not isinstance(pixel_values, Tensor) or tuple(pixel_values.shape) != expected:
            found = "none" if pixel_values is None else type(pixel_values).__name__
            found = f"the shape {tuple(pixel_values.shape)}" if isinstance(pixel_values, Tensor) else found
            raise ObservationError(
                f"pixel_values must be a tensor of the shape {expected}: a row for each prompt, and six channels for "
                f"each of the cameras {', '.join(self.cameras)}; found {found}."
            )
        if not pixel_values.is_floating_point():
            raise ObservationError(
                f"pixel_values is of {pixel_values.dtype}, but holds normalised colours in floating point: make "
                "it with policy.processor.pixel_values([image, ...]) from uint8 images."
            )
        check_inputs(pixel_values=pixel_values)
        weight = self.projector.fc1.weight
        return self.projector(self.vision_backbone(moved(pixel_values, weight.device, weight.dtype)))

    def _embed(self, prompt: Prompt, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return (B, S, D) embeddings and (B, S) mask of [BOS][visual tokens][rest of the prompt]."""
        return self.insert(self.embed_text(prompt), prompt, [features])

    def insert(self, text: Tensor, prompt: Prompt, inserted: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the sequence with (B, n, D) `inserted` between BOS and the rest: (B, S, D) embeddings and (B, S) mask.

        Args:
            text: (B, T, D) embeddings of the prompt.
            prompt: the prompt itself.
            inserted: the embeddings in between, in order.
        """
        between = [tokens.to(text.device, text.dtype) for tokens in inserted]
        mask = prompt.mask.to(text.device)
        seen = mask.new_ones(len(mask), sum(tokens.shape[1] for tokens in between))
        sequence = torch.cat([text[:, :1], *between, text[:, 1:]], dim=1)
        return sequence, torch.cat([mask[:, :1], seen, mask[:, 1:]], dim=1)

    def embed_text(self, prompt: Prompt) -> Tensor:
        """Return (B, T, D) embeddings of the prompt's tokens."""
        embedding: Any = self.get_input_embeddings()
        return embedding(moved(prompt.ids, embedding.weight.device))

    def _state(self, proprio: np.ndarray | None, unnorm_key: str | None) -> dict[str, Any]:
        """Return the arguments of `predict_action` for the robot's state."""
        if proprio is not None:
            raise ObservationError("OpenVLA does not read the robot's state; give no proprio.")
        return {}

    def statistics(self, part: Literal["action", "proprio"], unnorm_key: str | None = None) -> dict[str, Any]:
        """One dataset's statistics of actions or of states. ObservationError as in `predict_action`; CheckpointError if
        it has none.
        """
        key = self.dataset(unnorm_key)
        found = self.norm_stats[key].get(part) if isinstance(self.norm_stats[key], Mapping) else None
        if not isinstance(found, Mapping):
            has = ", ".join(map(str, self.norm_stats[key])) if isinstance(self.norm_stats[key], Mapping) else ""
            raise CheckpointError(
                f"The statistics of the dataset {key!r} have no {part!r}; found {has or 'nothing'}. The policy needs "
                "them to scale by: copy dataset_statistics.json from the published checkpoint."
            )
        return cast(dict[str, Any], found)

    def dataset(self, unnorm_key: str | None) -> str:
        """Return the dataset that `unnorm_key` means. Errors as in `predict_action`."""
        key = self.unnorm_key if unnorm_key is None else unnorm_key
        known = listed(self.norm_stats)
        if key is None:
            if not self.norm_stats:
                raise CheckpointError(f"The policy has no statistics, so {NO_STATISTICS}")
            if len(self.norm_stats) != 1:
                raise ObservationError(
                    f"The policy has statistics of several datasets; give unnorm_key, one of: {known} (to a command: "
                    "--option unnorm_key=NAME)."
                )
            return next(iter(self.norm_stats))
        if key not in self.norm_stats:
            raise ObservationError(f"unnorm_key={key!r} was given, but the policy has statistics of: {known}.")
        return key


def real_positions(mask: Tensor) -> Tensor:
    """Return (B, S) positions that count real tokens only, so that padding shifts nothing."""
    return (mask.cumsum(dim=1) - 1).clamp_min(0)


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Return `tensor` on the device and in the dtype that the weights on `device` need."""
    # Weights on "meta" are offloaded; their module's own hook moves its inputs.
    return tensor.to(device=None if device.type == "meta" else device, dtype=dtype)
