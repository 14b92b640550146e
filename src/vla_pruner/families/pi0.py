"""pi0 as transformers ships it (`PI0ForConditionalGeneration`): a PaliGemma prefix and a flow-matching expert that
reads its cache.

The prefix [visual tokens][text] runs once per action chunk, the expert once per denoising step over the prefix' keys
and values, layer by layer. Action attention is that of the expert's action rows, averaged over the denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vla_pruner.anatomy import Anatomy
from vla_pruner.attach.family import Call
from vla_pruner.attach.layout import Layout, ensure
from vla_pruner.errors import SessionError
from vla_pruner.families.base import TransformersFamily, check_cameras, check_decoder, is_one_of, siglip_encoder
from vla_pruner.replacements import Replacements


class PI0(TransformersFamily):
    """transformers' `PI0ForConditionalGeneration`; `sample_actions(...)` is one control step.

    Args:
        model: the policy.
        cameras: names of the cameras, in the order of `pixel_values`. Needed only if `keep` is given per camera.
    """

    def __init__(self, model: nn.Module, cameras: Sequence[str] | None = None) -> None:
        policy: Any = model
        self._policy, self._pi0 = policy, policy.model
        anatomy = self.anatomy
        self.decoder = check_decoder(anatomy.decoder, model)
        self.readers = tuple(check_decoder(expert, model) for expert in anatomy.experts)
        vision = policy.config.vlm_config.vision_config
        self._tokens_per_image = (vision.image_size // vision.patch_size) ** 2
        self.encoder = siglip_encoder(
            anatomy.towers[0], (self._pi0, "embed_prefix"), vision, shown=lambda: (None, self._masked)
        )
        self._image_token = policy.config.vlm_config.image_token_id
        self._is_image: Tensor | None = None
        self._shown: Tensor | None = None
        self._absent: frozenset[int] = frozenset()
        self._masked: tuple[tuple[int, int], ...] = ()
        self._replaced = Replacements()
        self.cameras = () if cameras is None else check_cameras(cameras)

    @property
    def anatomy(self) -> Anatomy:
        return anatomy_of(self._policy)

    @classmethod
    def matches(cls, model: nn.Module) -> bool:
        return is_one_of(model, {("transformers.models.pi0.modeling_pi0", "PI0ForConditionalGeneration")})

    @property
    def whole_steps(self) -> tuple[tuple[Any, str], ...]:
        return ((self._policy, "sample_actions"),)

    def opens_step(self, call: Call) -> bool:
        return True

    def layout(self, call: Call) -> Layout:
        if self._is_image is None or self._shown is None:
            raise SessionError(
                "The prefix was called without images; call sample_actions(...) with pixel_values and input_ids."
            )
        is_image, prompt = self._is_image.expand(call.rows, -1), call.prompt()
        count, each = self._shown.shape[1], self._tokens_per_image
        if self.cameras and count != len(self.cameras):
            raise SessionError(
                f"The cameras {self.cameras} were named, but pixel_values holds {count} per row. Name as many as there "
                "are images, in their order: load_policy(..., cameras=(...)); or name none: attach(policy.module)."
            )
        given = (is_image & prompt).sum(dim=1)
        ensure((given == each * self._shown.sum(dim=1).to(given.device)).all(), OTHER_TOKENS)
        # A row with an absent camera has fewer image tokens and more padding: padding stands in for the missing ones,
        # so that every row drops equally many positions and none of them is text.
        rank = torch.where(is_image & prompt, 0, torch.where(prompt, 2, 1))
        order = torch.sort(rank, dim=1, stable=True).indices
        # Image tokens come camera by camera, those of absent cameras left out.
        absent_last = torch.sort((~self._shown).int(), dim=1, stable=True).indices
        block = absent_last.argsort(dim=1)
        place = (block[..., None] * each + torch.arange(each, device=block.device)).flatten(1)
        fits = place < call.length
        visual = order.gather(1, place.clamp_max(call.length - 1).to(order.device))
        rank = rank.gather(1, visual)
        ensure((fits.to(rank.device) & (rank < 2)).all(), FEW_TOKENS)
        return Layout(visual=visual, valid=rank == 0, prompt=prompt, cameras=(each,) * count, absent=self._absent)

    def action_rows(self, layout: Layout) -> Tensor | None:
        return None

    def reader_rows(self, length: int, rows: int, device: torch.device) -> Tensor:
        # The suffix is [state][actions].
        return torch.arange(1, length, device=device).expand(rows, -1)

    def install(self) -> None:
        # The decoder only ever gets embeddings; the visual ones among them are known here.
        self._replaced.put(self._pi0, "embed_prefix", self._embed_prefix)

    def remove(self) -> None:
        self._replaced.remove()
        self._is_image = self._shown = None

    def _embed_prefix(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        input_ids = args[0] if args else kwargs["input_ids"]
        shown: Tensor = args[2] if len(args) > 2 else kwargs["pixel_attention_mask"]
        self._is_image, self._shown = input_ids == self._image_token, shown.bool()
        self._absent, self._masked = frozenset(), ()
        if shown.device.type == "cpu":  # elsewhere the host would wait for it
            self._absent = frozenset(torch.nonzero(~shown.bool().any(dim=0)).flatten().tolist())
            self._masked = tuple(map(tuple, torch.nonzero(~shown.bool()).tolist()))
        return original(*args, **kwargs)


def anatomy_of(model: Any) -> Anatomy:
    """Return the parts of a `PI0ForConditionalGeneration`."""
    vlm = model.model.vlm
    return Anatomy(
        decoder=vlm.language_model,
        experts=(model.model.dit,),
        towers=(vlm.vision_tower,),
        projectors=(vlm.multi_modal_projector,),
    )


OTHER_TOKENS = (
    "A row has another number of image tokens than its cameras that are not masked need; give each of these as many as "
    "the vision encoder makes of an image, and no text that holds one."
)
FEW_TOKENS = "A row has fewer image and padding tokens than the cameras need; pad all rows alike."
