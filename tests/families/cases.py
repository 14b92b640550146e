"""The families that run without LeRobot, as cases of the matrix: tiny models with random weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import vla_pruner as vp
from tests.attach.tiny import VISUAL, decode, make_cache, prompt, tiny_lm
from tests.families.matrix import Case

INSTRUCTIONS = ("pick up the black bowl", "open the drawer and look")


def images(scene: int, camera: int, size: int) -> np.ndarray:
    """(2, size, size, 3) uint8 noise, another for every scene, robot and camera."""
    return np.random.default_rng((scene, camera)).integers(0, 256, (2, size, size, 3), dtype=np.uint8)


def decoder_lm() -> Case:
    def step(model: Any, scene: int, rows: slice) -> Tensor:
        embeds = prompt(2, seed=scene)[0][rows]
        return decode(model, embeds, None, make_cache("dynamic", model), 3)[1]

    return Case("decoder_lm", tiny_lm, step, {"visual": VISUAL}, noisy=None)


def reference() -> Case:
    def step(model: Any, scene: int, rows: slice) -> Tensor:
        pictures = images(scene, 0, model.config.image_size)[rows]
        state = np.zeros((len(pictures), len(model.config.proprio_mean)), np.float32)
        head = model.language_model.lm_head
        return with_logits(head, lambda: model.predict_action(pictures, "reach the goal", state))

    return Case("reference", lambda: vp.reference_policy("autoregressive"), step)


def shallow(name: str, layers: int, **settings: Any) -> Any:
    """The first layers of a reference policy with random weights. A program is traced layer by layer, token by token.

    Args:
        name: of the policy.
        layers: of its decoder.
        **settings: other changes to its configuration, such as the number of action tokens.
    """
    deep: Any = vp.random_policy(name)
    policy = type(deep)(replace(deep.config, num_layers=layers, **settings)).eval()
    policy.load_state_dict(deep.state_dict(), strict=False)
    return policy


def small_reference() -> Case:
    """The autoregressive reference policy: four layers, 64 visual tokens and three action tokens of it."""
    return replace(reference(), build=lambda: shallow("reference", 4, action_dimensions=3))


def small_chunk() -> Case:
    """The two-camera reference policy, four layers of it."""
    return replace(chunk(), build=lambda: shallow("reference-chunk", 4))


def chunk() -> Case:
    """The two-camera reference policy; its chunk before it is clipped."""

    def step(model: Any, scene: int, rows: slice) -> Tensor:
        pictures = np.stack([images(scene, camera, model.image_size) for camera in range(2)], axis=1)[rows]
        state = np.zeros((len(pictures), model.proprio_size), np.float32)
        found: list[Tensor] = []
        handle = model.action_head.register_forward_hook(lambda _, __, actions: found.append(actions))
        try:
            model.predict_action(pictures, "reach the green ball", state)
        finally:
            handle.remove()
        return found[0]

    return Case("chunk", lambda: vp.random_policy("reference-chunk"), step, noisy=8)


def openvla(backend: str, **text: Any) -> Case:
    from vla_pruner.models.openvla import random_openvla

    def step(model: Any, scene: int, rows: slice) -> Tensor:
        pictures = images(scene, 0, 224)[rows]
        ids, mask = model.processor.tokenize([model.processor.prompt(text) for text in INSTRUCTIONS[rows]])
        pixels = model.processor.pixel_values([pictures])
        head = model.language_model.lm_head
        logits = with_logits(
            head, lambda: model.predict_action(ids, pixel_values=pixels, attention_mask=mask), last=False
        )
        # Prompts of unequal length end in different places, and the model computes a column for each of them.
        ends, place = mask.sum(1).unique(return_inverse=True)
        first = logits[torch.arange(len(ids)), place]
        return torch.cat([first[:, None], logits[:, len(ends) :]], dim=1)

    def build() -> Any:
        return random_openvla(size="tiny", attn_implementation=backend, **text)

    return Case(f"openvla-{backend}", build, step)


def openvla_oft(head: str | None, backend: str = "sdpa", **text: Any) -> Case:
    from vla_pruner.models.openvla import random_openvla

    def step(model: Any, scene: int, rows: slice) -> Tensor:
        pictures = [images(scene, camera, 224)[rows] for camera in range(len(model.cameras))]
        ids, mask = model.processor.tokenize([model.processor.prompt(text) for text in INSTRUCTIONS[rows]])
        state = np.linspace(-1, 1, 16).reshape(2, 8)[rows]
        noise = {}
        if head == "diffusion":
            draw = torch.randn(2, model.chunk, model.action_dim, generator=torch.Generator().manual_seed(scene))
            noise = {"noise": draw[rows]}
        pixels = model.processor.pixel_values(pictures)

        def act() -> Any:
            return model.predict_action(ids, pixel_values=pixels, attention_mask=mask, proprio=state, **noise)

        if head is None:
            return with_logits(model.language_model.lm_head, act, last=False)
        return torch.as_tensor(act()).reshape(len(ids), -1)

    def build() -> Any:
        return random_openvla(size="tiny", oft=True, head=head, attn_implementation=backend, denoising_steps=2, **text)

    return Case(f"openvla_oft-{head}-{backend}", build, step, noisy=60 if head == "diffusion" else 0)


def pi0(backend: str, layers: int = 6) -> Case:
    from transformers import GemmaConfig, PaliGemmaConfig, PI0Config, PI0ForConditionalGeneration

    def build() -> Any:
        sizes = {"num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 8}
        text = {"model_type": "gemma", "hidden_size": 32, "intermediate_size": 48, "vocab_size": 512, **sizes}
        vision = {"model_type": "siglip_vision_model", "hidden_size": 24, "intermediate_size": 32, "patch_size": 14}
        vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56}
        vlm = PaliGemmaConfig(text_config=text, vision_config=vision, image_token_index=500, projection_dim=32)
        expert = GemmaConfig(hidden_size=24, intermediate_size=32, vocab_size=512, **sizes)
        config = PI0Config(vlm_config=vlm, dit_config=expert, chunk_size=4, num_inference_steps=3)
        torch.manual_seed(3)
        model = PI0ForConditionalGeneration._from_config(config, attn_implementation=backend).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.copy_(torch.randn_like(parameter) * 1.6 * parameter.shape[1] ** -0.5)
        return model

    def step(model: Any, scene: int, rows: slice) -> Tensor:
        pictures = np.stack([images(scene, camera, 56) for camera in range(2)], axis=1)[rows]
        text = torch.arange(1, 7).repeat(2, 1)
        mask = torch.ones(2, 38, dtype=torch.int64)
        mask[1, -2:] = 0
        generator = torch.Generator().manual_seed(scene)
        return model.sample_actions(
            state=torch.ones(2, 32)[rows],
            input_ids=torch.cat([torch.full((2, 32), 500), text], dim=1)[rows],
            pixel_values=torch.from_numpy(pictures).permute(0, 1, 4, 2, 3) / 127.5 - 1,
            noise=torch.randn(2, 4, 32, generator=generator)[rows],
            attention_mask=mask[rows],
            pixel_attention_mask=torch.ones(2, 2, dtype=torch.bool)[rows],
        )

    return Case(f"pi0-{backend}", build, step)


def with_logits(head: Any, act: Any, last: bool = True) -> Tensor:
    """Return (B, n, V): the logits of the tokens that a step decodes, since actions alone would hide changes within a
    bin.
    """
    found: list[Tensor] = []
    handle = head.register_forward_hook(lambda _, __, logits: found.append(logits[:, -1:] if last else logits))
    try:
        act()
    finally:
        handle.remove()
    return torch.cat(found, dim=1)
