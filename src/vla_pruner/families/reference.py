"""The reference policy (OpenVLA-shaped): image encoder, projector, Llama, action tokens decoded one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.encoder import Encoder
from vla_pruner.attach.family import Call, StepFunction
from vla_pruner.families.base import check_example, is_one_of, tiles
from vla_pruner.families.decoder_lm import DecoderLM


class Reference(DecoderLM):
    """`vla_pruner.reference_policy("autoregressive")`: [BOS][visual tokens][instruction][proprioception]
    and four decoded action tokens.
    """

    def __init__(self, model: nn.Module) -> None:
        policy: Any = model
        super().__init__(policy.language_model, visual=slice(1, 1 + policy.config.num_visual_tokens))
        self.eye = policy.vision
        self.seeing, self.acting = (policy, "embed_prompt"), (policy, "decode")
        self.encoder = trained_encoder(policy, policy.config.num_visual_tokens)
        self._policy, self._tokens = policy, policy.config.num_visual_tokens

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return ((self._policy, "predict_action"),)

    @property
    def anatomy(self) -> Anatomy:
        return replace(super().anatomy, towers=self._policy.vision_towers, projectors=(self._policy.projector,))

    def patches(self, pixels: Tensor) -> Tensor:
        # The policy normalises colours to (c - 127.5) / 64.
        return tiles(pixels * 64 + 127.5, self._tokens)

    def exported(self, example: Mapping[str, Any]) -> StepFunction:
        return trained_step(self._policy, example, self._policy.config.prompt_length)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_one_of(model, {("vla_pruner.models.reference.network", "ReferencePolicy")})


def trained_encoder(policy: Any, patches: int) -> Encoder:
    """Return the parts of a reference policy's vision encoder; `patches` is the number of patches of an image."""
    return Encoder(
        tower=policy.vision,
        layers=policy.vision.blocks,
        patch=policy.config.patch_size,
        seeing=(policy, "embed_prompt"),
        patches=patches,
        attend="attend",
    )


def trained_step(policy: Any, example: Mapping[str, Any], length: int) -> StepFunction:
    """Return a reference policy's control step: from images (B, ...) uint8, instruction ids and state to actions.

    Args:
        policy: the reference policy.
        example: arguments of `predict_action`.
        length: positions of its prompt.

    Raises:
        OptionError, ObservationError: the example does not fit the policy.
    """
    given = check_example(example, ("images", "instruction", "proprio"))
    frames, ids, states, _ = policy.prepared(given["images"], given["instruction"], given["proprio"])

    def run(images: Tensor, ids: Tensor, proprio: Tensor) -> Tensor:
        return policy.decode(policy.embed_prompt(images, ids, proprio))

    call = Call(length, None, len(frames), policy.device)
    return StepFunction(run, {"images": frames, "ids": ids, "proprio": states}, "actions", call)
