"""Inputs of every kind of policy, prepared on the host, and the call that is one control step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vla_pruner.benching.settings import BenchSettings
from vla_pruner.caches import cache_name
from vla_pruner.cost import ContextExpert, DecoderShape, Expert, FeatureExpert
from vla_pruner.errors import OptionError, UnsupportedModelError
from vla_pruner.feed import Feed, on_host
from vla_pruner.plugins import object_at
from vla_pruner.registry import ROWS, row_driving, row_of

INSTRUCTION = "pick up the red block and put it into the bowl"
LLAMA_TEXT, LLAMA_CAMERA, LLAMA_DECODED = 24, 256, 7
PI0_TEXT, PI05_TEXT, SMOLVLA_TEXT, PI0_FAST_TEXT = 48, 200, 48, 200
MOLMO_TEXT, EO1_TEXT, GROOT_TEXT, JEPA_TEXT = 100, 53, 28, 24
OPENVLA_TEXT = 25
VLM_TEXT = 24
_SIDE = 224


def feed(policy: Any, settings: BenchSettings, device: torch.device, run: bool = True) -> Feed:
    """Return the inputs of this policy.

    Args:
        policy: what a benchmark times.
        settings: of the benchmark.
        device: of the policy.
        run: whether a control step may run to count the tokens that it decodes, where their number depends on them;
            if not, `Feed.decoded` is the most that there can be.

    Raises:
        OptionError: `--prompt-tokens` leaves no text, or does not apply.
        UnsupportedModelError: no inputs are known for this policy.
    """
    made = feed_of(policy)(policy, settings, device)
    return made if made.count is None or not run else dataclasses.replace(made, decoded=made.count())


def feed_of(policy: Any) -> Callable[[Any, BenchSettings, torch.device], Feed]:
    """Return the function that makes the inputs of this policy.

    Raises:
        UnsupportedModelError: there is none.
    """
    row = row_of(policy)
    if row is None or row.bench is None:
        known = (row.policy.rpartition(":")[2] for row in ROWS if row.bench is not None)
        driving = row_driving(policy)
        fix = (
            "Give what vla_pruner.load_policy gives, or time the control steps of a policy of your own where they run: "
            "attach(policy, only_if_faster=True)."
        )
        if driving is not None:
            fix = f"Wrap it, since images are prepared there: bench({driving.policy.replace(':', '.')}(model))."
        raise UnsupportedModelError(
            f"A benchmark of {type(policy).__name__} is not known; known are {', '.join(dict.fromkeys(known))}. {fix}"
        )
    return object_at(row.bench.feed, "function")


def _other(settings: BenchSettings, visual: int, usual: int, least: int) -> int:
    """Return the number of positions of the prompt that are not visual tokens."""
    if settings.prompt_tokens is None:
        return usual
    other = settings.prompt_tokens - visual
    if other < least:
        raise OptionError(
            f"--prompt-tokens is {settings.prompt_tokens}, of which {visual} are visual and {least - 1} or more others "
            f"are not text; give {visual + least} or more."
        )
    return other


def _draw(settings: BenchSettings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


def _images(settings: BenchSettings, count: int, side: int) -> list[np.ndarray]:
    """Return (B, side, side, 3) uint8 of each camera."""
    draw = np.random.default_rng(settings.seed)
    return [draw.integers(0, 256, (settings.batch, side, side, 3), dtype=np.uint8) for _ in range(count)]


def llama(model: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the feed of a bare Llama, whose visual tokens are embeddings from position 1 on."""
    from transformers import DynamicCache

    rows, visual = settings.batch, LLAMA_CAMERA * (settings.cameras or 1)
    most = getattr(model.config, "max_position_embeddings", None)
    if isinstance(most, int) and most <= visual:
        raise UnsupportedModelError(
            f"A benchmark gives a language model {LLAMA_CAMERA} visual tokens a camera after its first position, and "
            f"this one has {most} positions; give one that has more, or llama:HIDDEN,LAYERS."
        )
    other = _other(settings, visual, LLAMA_TEXT, 2)
    length, tokens = visual + other, settings.decode_tokens or LLAMA_DECODED
    weight = model.get_input_embeddings().weight
    draw = _draw(settings)
    prompt = torch.randn(rows, length, weight.shape[1], generator=draw) * weight.float().std().cpu()
    prompt = prompt.to(device, weight.dtype)
    # An explicit mask: without one transformers may read positions with gaps as several sequences.
    mask = torch.ones(rows, length + tokens, dtype=torch.int64, device=device)
    positions = torch.arange(length + tokens, device=device).expand(rows, -1)

    name = cache_name(model)

    @torch.inference_mode()
    def step() -> Tensor:
        cache = DynamicCache(config=model.config)
        given: dict[str, Any] = {"inputs_embeds": prompt}
        start, end, chosen = 0, length, []
        for _ in range(tokens):
            output = model(
                **given,
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                **{name: cache},
                use_cache=True,
                logits_to_keep=1,
            )
            chosen.append(output.logits[:, -1].argmax(dim=-1))
            given = {"input_ids": chosen[-1][:, None]}
            start, end = end, end + 1
        return torch.stack(chosen, dim=1).cpu()

    return Feed(step, visual, other, decoded=tokens - 1, attach={"visual": slice(1, 1 + visual)})


def _openvla_inputs(policy: Any, settings: BenchSettings, usual: int, beside: int) -> tuple[int, int, Tensor, Tensor]:
    """Visual tokens, other tokens, ids (B, T) that end in OpenVLA's empty token, and pixels of all cameras.

    `beside`: positions that are neither visual nor of the text.
    """
    span = policy.visual_slice
    visual = span.stop - span.start
    other = _other(settings, visual, usual, beside + 3)
    draw = _draw(settings)
    ids = torch.randint(3, 30_000, (settings.batch, other - beside), generator=draw)
    ids[:, 0], ids[:, -1] = 1, 29871
    pixels = torch.randn(settings.batch, 6 * len(policy.cameras), _SIDE, _SIDE, generator=draw)
    return visual, other, ids, pixels


def _openvla_prepare(policy: Any, settings: BenchSettings) -> Any:
    images = _images(settings, len(policy.cameras), _SIDE)

    def prepare() -> Any:
        texts = [policy.processor.prompt(INSTRUCTION)] * settings.batch
        return policy.processor.tokenize(texts), policy.processor.pixel_values(images)

    return None if policy.processor is None else prepare


def openvla(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """OpenVLA."""
    visual, other, ids, pixels = _openvla_inputs(policy, settings, OPENVLA_TEXT, 0)
    key = next(iter(policy.norm_stats), None) if policy.unnorm_key is None else policy.unnorm_key
    tokens = settings.decode_tokens or policy.get_action_dim(key)
    mask = torch.ones_like(ids)

    def step() -> Tensor:
        return policy.decode_tokens(ids, pixels, mask, tokens)

    return Feed(step, visual, other, decoded=tokens - 1, prepare=_openvla_prepare(policy, settings))


def openvla_oft(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """OpenVLA-OFT without a diffusion head."""
    beside = (policy.proprio_projector is not None) + policy.diffusion + policy.action_tokens + 1
    visual, other, ids, pixels = _openvla_inputs(policy, settings, OPENVLA_TEXT + beside, beside)
    if policy.diffusion:
        raise UnsupportedModelError(
            "A benchmark of OpenVLA-OFT with a diffusion head is not supported; use an L1 head."
        )
    key = next(iter(policy.norm_stats)) if policy.unnorm_key is None else policy.unnorm_key
    size, mask = policy.proprio_size, torch.ones_like(ids)
    state = None if size is None else np.zeros((settings.batch, size))

    def step() -> Any:
        return policy.predict_action(ids, key, pixel_values=pixels, attention_mask=mask, proprio=state)

    return Feed(step, visual, other, uses_head=policy.action_head is None, prepare=_openvla_prepare(policy, settings))


def reference(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the feed of the autoregressive reference policy."""
    if settings.prompt_tokens is not None:
        raise OptionError("--prompt-tokens does not apply to the reference policy, whose prompt has one length.")
    config = policy.config
    (images,) = _images(settings, 1, config.image_size)
    example = policy.example()
    state = np.tile(example.proprio, (settings.batch, 1))
    visual = config.num_visual_tokens

    def step() -> Any:
        return policy.predict_action(images, example.instruction, state)

    return Feed(step, visual, config.prompt_length - visual, decoded=config.action_dimensions - 1)


def chunk(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the feed of the two-camera reference policy."""
    config = policy.config
    images = np.stack(_images(settings, len(config.cameras), config.image_size), axis=1)
    example = policy.example()
    state = np.tile(example.proprio, (settings.batch, 1))
    visual = config.num_visual_tokens

    def step() -> Any:
        return policy.predict_action(images, example.instruction, state)

    # The action rows are part of the one pass.
    return Feed(step, visual, config.prompt_length + config.chunk - visual, uses_head=False)


def pi0(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """pi0 of transformers."""
    from vla_pruner.policies.pi0 import prepare_image

    module, rows, cameras = policy.module, settings.batch, len(policy.cameras)
    config, dtype = module.config, module.action_out_proj.weight.dtype
    vision = config.vlm_config.vision_config
    visual = cameras * (vision.image_size // vision.patch_size) ** 2
    other = _other(settings, visual, PI0_TEXT, 1)
    steps = settings.denoise_steps or config.num_inference_steps
    draw = _draw(settings)
    text = torch.randint(3, min(400, config.vlm_config.text_config.vocab_size), (rows, other), generator=draw)
    ids = torch.cat([torch.full((rows, visual), config.vlm_config.image_token_id), text], dim=1)
    pixels = torch.randn(rows, cameras, 3, vision.image_size, vision.image_size, generator=draw)
    state = torch.zeros(rows, config.max_state_dim)
    noise = torch.randn(rows, config.chunk_size, config.max_action_dim, generator=draw).to(device, dtype)
    shown = torch.ones(rows, cameras, dtype=torch.bool, device=device)
    mask = torch.ones(rows, visual + other, dtype=torch.int64, device=device)
    images = _images(settings, cameras, vision.image_size)

    def step() -> Tensor:
        actions = module.sample_actions(
            state=state.to(device, dtype),
            input_ids=ids.to(device),
            pixel_values=pixels.to(device, dtype),
            noise=noise,
            attention_mask=mask,
            pixel_attention_mask=shown,
            num_steps=steps,
        )
        return on_host(actions)

    def prepare() -> Any:
        return [prepare_image(image, vision.image_size) for camera in images for image in camera]

    return Feed(step, visual, other, denoised=(config.chunk_size + 1, steps), uses_head=False, prepare=prepare)


def vlm(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the inputs of a vision-language model of transformers."""
    from vla_pruner.policies.vlm import ACTION_TOKENS

    rows, cameras, side = settings.batch, len(policy.cameras), policy.side
    visual = cameras * policy.tokens_per_image
    draw = _draw(settings)
    pixels = torch.randn(rows, cameras, 3, side, side, generator=draw)
    beside = policy.inputs(pixels, torch.zeros(rows, 0, dtype=torch.int64))["input_ids"].shape[1] - visual
    other = _other(settings, visual, VLM_TEXT + beside, beside + 1)
    text = torch.randint(3, 250, (rows, other - beside), generator=draw)
    tokens = settings.decode_tokens or ACTION_TOKENS

    def step() -> Tensor:
        return policy.decode(policy.inputs(pixels, text), tokens).cpu()

    return Feed(step, visual, other, decoded=tokens - 1)


def lerobot(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """LeRobot's policies."""
    module, rows = policy.module, settings.batch
    config, kind = module.config, module.config.type
    keys = list(config.image_features)
    shapes = [config.image_features[key].shape for key in keys]
    smol = kind == "smolvla"
    each, around = _lerobot_tokens(module, smol)
    visual = each * len(keys)
    decodes = kind == "pi0_fast"
    # The prompt of SmolVLA ends in the state, that of pi0-FAST in BOS.
    beside = around * len(keys) + (smol or decodes)
    texts = {"pi0": PI0_TEXT, "pi05": PI05_TEXT, "smolvla": SMOLVLA_TEXT, "pi0_fast": PI0_FAST_TEXT}
    usual = texts[kind] + beside
    other = _other(settings, visual, usual, beside + 1)
    draw = _draw(settings)
    batch: dict[str, Tensor] = {
        key: torch.rand(rows, *shape, generator=draw) for key, shape in zip(keys, shapes, strict=True)
    }
    batch["observation.state"] = torch.zeros(rows, config.robot_state_feature.shape[0])
    batch["observation.language.tokens"] = torch.randint(3, 250, (rows, other - beside), generator=draw)
    batch["observation.language.attention_mask"] = torch.ones(rows, other - beside, dtype=torch.bool)
    noise = torch.randn(rows, config.chunk_size, config.max_action_dim, generator=draw).to(device)
    noises = {} if decodes else {"noise": noise}

    @torch.no_grad()
    def step() -> Tensor:
        moved = {key: value.to(device) for key, value in batch.items()}
        return on_host(module.predict_action_chunk(moved, **noises))

    if decodes:
        # The head over the vocabulary runs outside of any module's call that is timed.
        most = config.max_decoding_steps - 1
        return Feed(step, visual, other, decoded=most, uses_head=False, count=lambda: _decoded(module, step))
    passes = config.num_steps if smol else config.num_inference_steps
    suffix = config.chunk_size + (kind == "pi0")
    return Feed(step, visual, other, denoised=(suffix, passes), uses_head=False)


def _decoded(module: Any, step: Callable[[], Any]) -> int:
    """Return the number of tokens that a pi0-FAST decodes after the first in this control step, which ends when all
    rows have ended.
    """
    inner, found = module.model, []
    original = inner.sample_actions_fast_kv_cache

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        found.append(original(*args, **kwargs))
        return found[-1]

    inner.sample_actions_fast_kv_cache = watched
    try:
        step()
    finally:
        del inner.sample_actions_fast_kv_cache
    # The places after the last token are zero, which is the id of padding.
    places = (found[0] != 0).any(dim=0).nonzero()
    return int(places.max()) if len(places) else 0


def molmoact2(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the inputs of LeRobot's MolmoAct2."""
    from vla_pruner.policies.molmoact2_random import PromptMaker

    module, rows, cameras = policy.module, settings.batch, len(policy.cameras)
    model = module._backbone()
    config = model.config
    maker, draw = PromptMaker(module, "cpu"), _draw(settings)
    side = config.vit_config.image_default_input_size[0]
    images = [list(torch.rand(cameras, 3, side, side, generator=draw)) for _ in range(rows)]
    visual = int((maker.batch(images[:1], [[]])["input_ids"] == config.image_patch_id).sum())
    beside = maker.batch(images[:1], [[]])["input_ids"].shape[1] - visual
    other = _other(settings, visual, MOLMO_TEXT + beside, beside + 1)
    texts = torch.randint(0, 250, (rows, other - beside), generator=draw).tolist()
    batch = maker.batch(images, texts)

    @torch.no_grad()
    def step() -> Tensor:
        moved = {key: value.to(device) for key, value in batch.items()}
        generator = torch.Generator(device).manual_seed(settings.seed)
        return on_host(module.predict_action_chunk(moved, generator=generator))

    passes = module.config.num_inference_steps or config.flow_matching_num_steps
    expert, text = config.action_expert_config, config.text_config
    width, up = expert.hidden_size // expert.num_heads, model.action_expert.blocks[0].mlp.up_proj
    shape = DecoderShape(
        expert.num_layers, expert.hidden_size, expert.num_heads, expert.num_heads, width, up.out_features
    )
    tokens, context = module.config.chunk_size, text.num_key_value_heads * text.head_dim
    reader = ContextExpert(shape, tokens, passes, context=context)
    return Feed(step, visual, other, denoised=(tokens, passes), expert=reader, uses_head=False)


def eo1(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the inputs of LeRobot's EO-1 with random weights. With LeRobot's own processor, which needs a tokenizer,
    the length of the prompt would not be known.

    Raises:
        UnsupportedModelError: the policy was not made by `random_policy`.
    """
    from vla_pruner.policies.eo1_random import EO1PromptMaker

    module, rows, maker = policy.module, settings.batch, policy.preprocessor
    if not isinstance(maker, EO1PromptMaker):
        raise UnsupportedModelError("A benchmark of EO-1 is of random weights: vla-pruner bench --model eo1.")
    draw = _draw(settings)
    images = [list(torch.rand(len(policy.cameras), 3, maker.side, maker.side, generator=draw)) for _ in range(rows)]
    states, chunk = torch.zeros(rows, 8), module.config.chunk_size
    token = module.model.vlm_backbone.config.image_token_id
    # The placeholders of actions are no part of the prompt.
    batch, visual, other = _prompts(settings, maker, images, states, token, draw, EO1_TEXT, behind=chunk)

    @torch.no_grad()
    def step() -> Tensor:
        torch.manual_seed(settings.seed)
        return on_host(module.predict_action_chunk(dict(batch)))

    shape = dataclasses.replace(DecoderShape.of(module.model.vlm_backbone.config.text_config), vocabulary=0)
    passes = module.config.num_denoise_steps
    expert = Expert(shape, chunk, passes)
    return Feed(step, visual, other, denoised=(chunk, passes), expert=expert, uses_head=False)


def groot(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the inputs of LeRobot's GR00T N1.7 with random weights. Its layers of self-attention over the features run
    once, outside of the passes that are timed as denoising.

    Raises:
        UnsupportedModelError: the policy was not made by `random_policy`.
    """
    from vla_pruner.policies.groot_random import GrootPromptMaker

    module, rows, maker = policy.module, settings.batch, policy.preprocessor
    if not isinstance(maker, GrootPromptMaker):
        raise UnsupportedModelError("A benchmark of GR00T is of random weights: vla-pruner bench --model groot.")
    draw, head = _draw(settings), module._groot_model.action_head
    (shape,) = {config.shape for config in module.config.image_features.values()}
    images = [list(torch.rand(len(policy.cameras), *shape, generator=draw)) for _ in range(rows)]
    states = torch.zeros(rows, module.config.robot_state_feature.shape[0])
    token = module._groot_model.backbone.model.config.image_token_id
    batch, visual, other = _prompts(settings, maker, images, states, token, draw, GROOT_TEXT)

    @torch.no_grad()
    def step() -> Tensor:
        torch.manual_seed(settings.seed)
        return on_host(module.predict_action_chunk(dict(batch)))

    transformer, backbone = head.model, module._groot_model.backbone.language_model
    heads, width, blocks = head.model.config.num_attention_heads, head.model.inner_dim, transformer.transformer_blocks
    up = blocks[0].ff.net[0].proj.out_features
    denoiser = DecoderShape(len(blocks), width, heads, heads, width // heads, up, matrices=2)
    tokens, passes = 1 + head.action_horizon, head.num_inference_timesteps
    last, context = len(backbone.layers) - 1, backbone.config.hidden_size
    expert = FeatureExpert(denoiser, tokens, passes, last=last, context=context)
    return Feed(step, visual, other, denoised=(tokens, passes), expert=expert, uses_head=False)


def vla_jepa(policy: Any, settings: BenchSettings, device: torch.device) -> Feed:
    """Return the inputs of LeRobot's VLA-JEPA with random weights. Its action head, which reads a few rows, is part of
    the rest of a step.

    Raises:
        UnsupportedModelError: the policy was not made by `random_policy`.
    """
    from vla_pruner.policies.vla_jepa_random import StandInQwen

    module, rows = policy.module, settings.batch
    config, inner = module.config, module.model
    if not isinstance(inner.qwen, StandInQwen):
        raise UnsupportedModelError("A benchmark of VLA-JEPA is of random weights: vla-pruner bench --model vla-jepa.")
    draw = _draw(settings)
    batch = {key: torch.rand(rows, *value.shape, generator=draw) for key, value in config.image_features.items()}
    ids = inner.qwen.build_inputs(
        images=[[image[0] for image in batch.values()]],
        instructions=[""],
        action_prompt=inner.replace_prompt,
        embodied_prompt=inner.embodied_replace_prompt,
    )["input_ids"]
    visual = int((ids == inner.qwen.model.config.image_token_id).sum())
    beside = ids.shape[1] - visual
    other = _other(settings, visual, JEPA_TEXT + beside, beside + 1)
    batch["observation.state"] = torch.zeros(rows, config.robot_state_feature.shape[0])
    task = ["a" * (other - beside)] * rows

    @torch.no_grad()
    def step() -> Tensor:
        torch.manual_seed(settings.seed)
        moved = {key: value.to(device) for key, value in batch.items()}
        return on_host(module.predict_action_chunk({**moved, "task": task}))

    return Feed(step, visual, other, uses_head=False)


def _prompts(
    settings: BenchSettings,
    maker: Any,
    images: list[list[Tensor]],
    states: Tensor,
    image_token: int,
    draw: torch.Generator,
    text: int,
    behind: int = 0,
) -> tuple[dict[str, Tensor], int, int]:
    """Return a batch of a policy whose prompts a stand-in for LeRobot's processor makes, and the numbers of a prompt's
    visual tokens and of its other ones.

    Args:
        maker: the stand-in.
        images: (3, H, W) in [0, 1], of each row and camera.
        states: (B, D).
        image_token: the id of a visual token.
        draw: draws the words.
        text: words, unless the settings say how long a prompt is.
        behind: ids at the end that are no part of the prompt.
    """
    ids = maker.batch(images[:1], [[]], states[:1])["input_ids"]
    visual = int((ids == image_token).sum())
    beside = ids.shape[1] - behind - visual
    other = _other(settings, visual, text + beside, beside + 1)
    words = torch.randint(0, 250, (len(images), other - beside), generator=draw).tolist()
    return maker.batch(images, words, states), visual, other


def _lerobot_tokens(module: Any, smol: bool) -> tuple[int, int]:
    """Visual tokens of a camera, and other tokens around them."""
    from vla_pruner.families import family_of

    family: Any = family_of(module)
    tokens = family.camera_tokens
    if tokens is None:
        raise UnsupportedModelError("SmolVLA without resize_imgs_with_padding has images of any size; set it.")
    return tokens[0], sum(family.around_block()) if smol else 0
