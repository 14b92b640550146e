"""The tiny official LeRobot policies under the golden folder, and their users' calls."""

from __future__ import annotations

import json

import numpy as np
import torch

from vla_pruner.policies.lerobot import load_lerobot
from vla_pruner.policies.lerobot_random import PiSize, SmolVLASize, built_with

KINDS = ("pi0", "pi05", "smolvla")
"""The policies for which there are golden vectors."""
K = 3


def size_of(folder):
    """The sizes that a golden folder was made with; LeRobot's own config.json holds none of them."""
    arch = json.loads((folder / "arch.json").read_text())
    spec = arch["spec"]
    if "text" in spec:
        return SmolVLASize(
            text={**spec["text"], "vocab_size": arch["vocab"], "rms_norm_eps": 1e-6},
            vision={**spec["vis"], "image_size": arch["image_resolution"], "patch_size": arch["patch"]},
            scale_factor=arch["scale_factor"],
            layers=spec["nvlm"],
            specials=(290, 291, 292),
        )
    vision = dict(spec["vis"])
    vision["intermediate_size"] = vision.pop("mlp")
    return PiSize(spec["vlm"], spec["exp"], vision, arch["vocab"], arch["image_resolution"])


def load_tiny(golden, kind):
    """The golden checkpoint of this kind, as `load_lerobot` gives it."""
    folder = golden / f"lerobot_{kind}_tiny"
    with built_with(kind, size_of(folder)):
        return load_lerobot(folder)


def batch_of(arrays, rows=slice(None), cameras=("base", "wrist")):
    """Return a batch as LeRobot's preprocessor would hand it to the policy."""
    batch = {
        f"observation.images.{camera}": torch.tensor(arrays[f"image_{camera}"][rows]).permute(0, 3, 1, 2).float() / 255
        for camera in cameras
    }
    batch["observation.state"] = torch.tensor(arrays["state"][rows])
    batch["observation.language.tokens"] = torch.tensor(arrays["tokens"][rows])
    batch["observation.language.attention_mask"] = torch.tensor(arrays["token_mask"][rows])
    return batch


def chunk(policy, arrays, rows=slice(None), cameras=("base", "wrist"), **edits):
    """`predict_action_chunk` of the golden inputs, from the golden noise."""
    batch = {**batch_of(arrays, rows, cameras), **edits}
    return policy.predict_action_chunk(batch, noise=torch.tensor(arrays["noise"][rows]))


def random_batch(seed, rows=1, cameras=("base", "wrist"), side=112, state=8):
    """Another scene."""
    rng = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {
        f"image_{camera}": rng.integers(0, 256, (rows, side, side, 3), dtype=np.uint8) for camera in cameras
    }
    arrays["state"] = rng.normal(size=(rows, state)).astype(np.float32)
    arrays["tokens"] = rng.integers(3, 250, (rows, 16))
    arrays["token_mask"] = np.ones((rows, 16), dtype=bool)
    return batch_of(arrays, cameras=cameras)


def save_processors(module, kind, folder, vocabulary=300):
    """LeRobot's own processors, with a tokenizer of their own, saved beside the weights.

    Actions are un-normalised by mean 1 and deviation 2, or from quantiles 0 and 4.
    """
    import importlib

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {"<pad>": 0, **{letter: 1 + number for number, letter in enumerate(letters)}}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(folder / "tokenizer")
    processors = importlib.import_module(f"lerobot.policies.{kind}.processor_{kind}")
    known = processors.TokenizerProcessorStep

    def step(tokenizer_name, **options):
        return known(tokenizer_name=str(folder / "tokenizer"), **options)

    stats = {"mean": 1.0, "std": 2.0, "min": 0.0, "max": 4.0, "q01": 0.0, "q99": 4.0}
    action = {name: torch.full((7,), value) for name, value in stats.items()}
    processors.TokenizerProcessorStep = step
    try:
        both = getattr(processors, f"make_{kind}_pre_post_processors")(module.config, {"action": action})
    finally:
        processors.TokenizerProcessorStep = known
    for processor in both:
        processor.save_pretrained(folder)
