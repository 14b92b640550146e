"""Folders of EO-1 and VLA-JEPA are loaded without a network, with their backbone's files beside the weights."""

from __future__ import annotations

import importlib
import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")
pytest.importorskip("diffusers", reason="diffusers is not installed; make test-lerobot installs it")

import vla_pruner as vp
from vla_pruner.policies.base import example_of
from vla_pruner.policies.eo1_random import random_eo1_policy
from vla_pruner.policies.groot_random import tiny_qwen3_vl
from vla_pruner.policies.lerobot_backbones import FOLDER
from vla_pruner.policies.vla_jepa_random import random_vla_jepa_policy

NOWHERE = "nobody/no-such-model"
PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
)
KINDS = ("eo1", "vla_jepa")
each_kind = pytest.mark.parametrize("kind", KINDS)


def save_processor(kind, first, folder):
    """Save a processor of transformers with a tokenizer of bytes, whose special tokens begin at `first`."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLImageProcessor

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|endoftext|>", *letters]
    words += [f"<unused_{number}>" for number in range(first - len(words))]
    specials = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"]
    ids = {word: number for number, word in enumerate([*words, *specials])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split("", "isolated")]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": specials})
    transformers = importlib.import_module("transformers")
    name = "Qwen2_5_VL" if kind == "eo1" else "Qwen3VL"
    video = transformers.Qwen2VLVideoProcessor if kind == "eo1" else transformers.Qwen3VLVideoProcessor
    sizes = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    sizes["size"] = {"shortest_edge": 64 * 64, "longest_edge": 64 * 64}
    processor = getattr(transformers, f"{name}Processor")(
        image_processor=Qwen2VLImageProcessor(**sizes),
        tokenizer=fast,
        video_processor=video(**sizes),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a policy's folder, with its backbone's beside the weights, and the policy; by kind."""
    made = {}

    def save(kind):
        if kind in made:
            return made[kind]
        folder = tmp_path_factory.mktemp(kind) / "model"
        if kind == "eo1":
            policy = random_eo1_policy(image_min_pixels=64 * 64, image_max_pixels=64 * 64)
            first = 400
        else:
            policy = random_vla_jepa_policy()
            first = 500
        module = policy.module
        module.save_pretrained(folder)
        save_processor(kind, first, folder / FOLDER)
        config = module.config
        if kind == "eo1":
            config.vlm_base = str(folder / FOLDER)
        else:
            tiny_qwen3_vl().save_pretrained(folder / FOLDER)
        action = {"mean": 1.0, "std": 2.0, "min": -1.0, "max": 3.0}
        state = {"mean": 0.0, "std": 1.0}
        stats = {
            "action": {name: torch.full((7,), value) for name, value in action.items()},
            "observation.state": {name: torch.full((8,), value) for name, value in state.items()},
        }
        processors = importlib.import_module(f"lerobot.policies.{kind}.processor_{kind}")
        for pipeline in getattr(processors, f"make_{kind}_pre_post_processors")(config, stats):
            pipeline.save_pretrained(folder)
        edit(folder, PRE, lambda content: _name_nowhere(content["steps"]))
        edit(folder, "config.json", _name_nowhere_in_config)
        made[kind] = folder, module
        return made[kind]

    return save


def _name_nowhere(steps):
    for step in steps:
        if step.get("registry_name") == "eo1_qwen_processor":
            step["config"]["processor_name"] = NOWHERE


def _name_nowhere_in_config(content):
    for name in ("vlm_base", "qwen_model_name"):
        if name in content:
            content[name] = NOWHERE


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def act(policy, seed=0):
    seen = example_of(policy)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    images = {name: rng.integers(0, 256, (64, 64, 3), dtype=np.uint8) for name in seen.images}
    return policy.act(images, "put the bowl on the plate", seen.proprio)


@each_kind
def test_it_is_loaded_whole_and_acts_and_is_pruned(saved, kind):
    folder, module = saved(kind)
    policy = vp.load_policy(folder)
    assert type(policy.module) is type(module)
    weights = policy.module.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in module.state_dict().items())
    chunk = act(policy)
    assert chunk.shape == (policy.module.config.chunk_size, 7)
    assert np.isfinite(chunk).all()
    assert np.abs(act(policy, seed=1) - chunk).max() > 1e-4, "it must see its images"
    with vp.VLAPruner(keep=1.0, preset="paper").attach(policy):
        assert np.array_equal(act(policy), chunk)
    with vp.FastV(keep=0.25).attach(policy) as session:
        assert np.isfinite(act(policy)).all()
        assert session.kept.shape == (1, 32), "two views of 64 tokens"


@each_kind
def test_its_actions_are_lerobots_own(saved, kind):
    """LeRobot's policy, called with what its own preprocessor makes of the same images, gives the same chunk."""
    folder, module = saved(kind)
    policy = vp.load_policy(folder)
    given = []
    preprocess = policy.preprocessor
    policy.preprocessor = lambda observation: given.append(preprocess(observation)) or given[-1]
    chunk = act(policy)
    if kind == "vla_jepa":
        module.model.qwen.build_inputs = policy.module.model.qwen.build_inputs
        module.model.embodied_action_token_id = policy.module.model.embodied_action_token_id
        module.model.action_token_ids = policy.module.model.action_token_ids
    torch.manual_seed(0)
    plain = module.predict_action_chunk(given[0])
    scaled = torch.cat([policy.postprocessor(plain[:, step]) for step in range(plain.shape[1])])
    np.testing.assert_allclose(chunk, scaled.numpy(), rtol=1e-5, atol=1e-5)


@each_kind
def test_without_the_backbone_it_says_which_files_are_missing_and_where_they_go(saved, kind, tmp_path):
    folder = shutil.copytree(saved(kind)[0], tmp_path / "model")
    shutil.rmtree(folder / FOLDER)
    with pytest.raises(vp.CheckpointError, match=rf"tokenizer .* of {NOWHERE}, .*--local-dir {FOLDER}`\) and put"):
        vp.load_policy(folder)


@each_kind
def test_weights_that_are_missing_or_unexpected_are_listed(saved, kind, tmp_path):
    folder = shutil.copytree(saved(kind)[0], tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    missing = next(name for name in weights if name.endswith("layers.2.self_attn.k_proj.weight"))
    weights["model.surplus"] = weights.pop(missing)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(vp.CheckpointError, match=rf"Missing: {missing}\. Unexpected: model\.surplus"):
        vp.load_policy(folder)


TEMPLATE_FILE = f"{FOLDER}/chat_template.jinja"


@each_kind
@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (TEMPLATE_FILE, lambda _: "", "chat_template.jinja describes nothing that can be built"),
        (TEMPLATE_FILE, lambda text: text[: len(text) // 2], "chat_template.jinja describes nothing that can be built"),
        (TEMPLATE_FILE, lambda text: text.replace("<|image_pad|>", ""), "does not hold the image of a message once"),
        (TEMPLATE_FILE, lambda text: text.replace("part['text']", "'go'"), "does not hold the text of a message once"),
        (
            f"{FOLDER}/tokenizer.json",
            lambda text: text.replace('"added_tokens": [', '"added_tokens": [{"id": 1000000000},'),
            "has a token with the id 1000000000",
        ),
    ],
)
def test_a_backbones_processor_that_hides_what_it_is_given_is_refused(saved, kind, tmp_path, name, change, says):
    folder = shutil.copytree(saved(kind)[0], tmp_path / "model")
    before = (folder / name).read_text()
    (folder / name).write_text(change(before))
    assert (folder / name).read_text() != before
    with pytest.raises(vp.CheckpointError, match=says):
        vp.load_policy(folder)


def test_a_tokenizer_without_a_token_to_pad_with_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved("eo1")[0], tmp_path / "model")
    (folder / FOLDER / "tokenizer_config.json").write_text("{}")
    with pytest.raises(vp.CheckpointError, match="has no token to pad with"):
        vp.load_policy(folder)


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{actions}{e_actions}", r"without \{instruction\}"),
        ("{instruction}{e_actions}", r"without \{actions\}"),
        ("{what}", "KeyError"),
        (3, "AttributeError|prompt_template"),
    ],
)
def test_a_prompt_that_leaves_out_what_the_policy_reads_is_refused(saved, tmp_path, template, says):
    folder = shutil.copytree(saved("vla_jepa")[0], tmp_path / "model")
    edit(folder, "config.json", lambda content: content.update(prompt_template=template))
    with pytest.raises(vp.CheckpointError, match=says):
        vp.load_policy(folder)


@each_kind
def test_an_instruction_that_holds_an_image_is_refused(saved, kind):
    policy = vp.load_policy(saved(kind)[0])
    seen = example_of(policy)
    for word in ("<|image_pad|>", "<|video_pad|>"):
        with pytest.raises(vp.ObservationError, match=re.escape(f"holds '{word}', which stands for an image")):
            policy.act(seen.images, f"put {word} there", seen.proprio)


def test_a_preprocessor_that_fails_is_the_checkpoints_fault(saved):
    policy = vp.load_policy(saved("eo1")[0])
    step = next(step for step in policy.preprocessor.steps if hasattr(step, "_processor"))
    step._processor.chat_template = None
    with pytest.raises(vp.CheckpointError, match=r"own preprocessor failed on this observation \(ValueError"):
        act(policy)


def test_the_world_model_of_a_vla_jepa_is_left_out(saved, tmp_path):
    """Its weights are part of published checkpoints, and only training reads them."""
    folder = shutil.copytree(saved("vla_jepa")[0], tmp_path / "model")
    edit(folder, "config.json", lambda content: content.update(enable_world_model=True))
    weights = load_file(folder / "model.safetensors")
    weights |= {"model.video_encoder.norm.weight": torch.ones(3), "model.video_predictor.norm.weight": torch.ones(3)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    policy = vp.load_policy(folder)
    assert policy.module.model.video_encoder is None
    assert np.array_equal(act(policy), act(vp.load_policy(saved("vla_jepa")[0])))


def test_groot_is_refused_with_what_it_needs(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"type": "groot", "base_model_path": "nvidia/x"}))
    with pytest.raises(
        vp.UnsupportedModelError, match=r"second checkpoint.*base_model_path.*pruned=.drop.\)\.attach\(policy\)"
    ):
        vp.load_policy(tmp_path)
    plugin = pytest.importorskip("lerobot_policy_vla_pruner", reason="the plugin is not installed")
    modeling = importlib.import_module("lerobot_policy_vla_pruner.modeling_vla_pruner")
    with pytest.raises(vp.UnsupportedModelError, match="second checkpoint"):
        modeling.VLAPrunerPolicy.from_pretrained(tmp_path, config=plugin.VLAPrunerConfig(device="cpu"))


@each_kind
def test_the_plugin_loads_it(saved, kind):
    plugin = pytest.importorskip("lerobot_policy_vla_pruner", reason="the plugin is not installed")
    modeling = importlib.import_module("lerobot_policy_vla_pruner.modeling_vla_pruner")
    config = plugin.VLAPrunerConfig(device="cpu", keep=0.25)
    policy = modeling.VLAPrunerPolicy.from_pretrained(saved(kind)[0], config=config)
    assert type(policy.inner) is type(saved(kind)[1])
    assert policy.session.attached
    policy.session.detach()
