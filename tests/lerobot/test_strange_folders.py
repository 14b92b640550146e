"""LeRobot's folders from strangers: steps that run commands, statistics of datasets, configs that lie."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")

import vla_pruner as vp
from tests.lerobot.tiny import save_processors
from vla_pruner.policies.lerobot import load_lerobot, random_lerobot
from vla_pruner.policies.lerobot_random import SIZES, built_with

PRE, POST = "policy_preprocessor.json", "policy_postprocessor.json"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvla") / "model"
    module = random_lerobot("smolvla").module
    module.save_pretrained(folder)
    save_processors(module, "smolvla", folder)
    return folder


@pytest.fixture
def folder(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


def load(folder, **options):
    with built_with("smolvla", SIZES["smolvla", "tiny"]):
        return load_lerobot(folder, **options)


def add_step(folder, step, name=PRE):
    pipeline = json.loads((folder / name).read_text())
    pipeline["steps"].insert(0, step)
    (folder / name).write_text(json.dumps(pipeline))


@pytest.mark.parametrize("name", [PRE, POST])
@pytest.mark.parametrize(
    "step",
    [
        {"class": "subprocess.Popen", "config": {"args": ["mkdir", "ran"]}},
        {"class": "lerobot.processor.pipeline.Path", "config": {}},
        {"class": "lerobot.processor.hil_processor.subprocess.Popen"},
        {"class": "lerobot_policy_evil.Step"},
        {"class": "lerobot.policies.groot.processor_groot.GrootN17PackInputsStep"},
        {"registry_name": "reward_classifier_processor", "config": {"pretrained_path": "evil/evil"}},
        {"registry_name": "action_tokenizer_processor", "config": {"action_tokenizer_name": "evil/evil"}},
        {"registry_name": "none_of_these"},
        {"registry_name": ["a"]},
        {"class": 3},
        {},
    ],
)
def test_steps_that_are_not_lerobots_own_are_refused_by_name(folder, monkeypatch, step, name):
    monkeypatch.chdir(folder)
    add_step(folder, step, name)
    found = next((str(step[key]) for key in ("registry_name", "class") if key in step), "None").strip("[]'")
    with pytest.raises(vp.CheckpointError, match=rf"{name} has a step that .*{found}.*trust_processors=True"):
        load(folder)
    assert not (folder / "ran").exists()


def test_a_trusted_folder_may_name_others(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "strangers_step.py").write_text(
        "from lerobot.processor import RenameObservationsProcessorStep\n"
        "class Step(RenameObservationsProcessorStep): used = True\n"
    )
    monkeypatch.syspath_prepend(str(folder))
    add_step(folder, {"class": "strangers_step.Step", "config": {"rename_map": {}}})
    with pytest.raises(vp.CheckpointError, match=r"strangers_step\.Step"):
        load(folder)
    for unclear in ("false", "no", None, 2):
        with pytest.raises(vp.OptionError, match="it is True or False"):
            load(folder, trust_processors=unclear)
    assert load(folder, trust_processors=True).preprocessor.steps[0].used


def test_a_state_file_elsewhere(folder):
    add_step(folder, {"registry_name": "normalizer_processor", "state_file": "../other.safetensors"})
    with pytest.raises(vp.CheckpointError, match=rf"{PRE} has a step with the state_file '\.\./other\.safetensors'"):
        load(folder, trust_processors=True)


@pytest.mark.parametrize("content", ["{", "[" * 100_000, "[]", '{"steps": 3}', '{"steps": [1]}', "{}"])
def test_processors_that_are_damaged(folder, content):
    (folder / POST).write_text(content)
    with pytest.raises(vp.CheckpointError, match=POST):
        load(folder)


def rename(folder, pattern, new):
    """Give each statistic another name."""
    for file in folder.glob(pattern):
        save_file({new(name): value for name, value in load_file(file).items()}, file)


def act(policy):
    torch.manual_seed(0)
    images = {camera: np.zeros((100, 80, 3), np.uint8) for camera in policy.cameras}
    return policy.act(images, "pick up the cup", np.linspace(-1, 1, 8))


@pytest.mark.parametrize("between", [".buffer.", ".buffer_", "."])
def test_statistics_by_dataset_have_to_be_chosen(folder, between):
    units = act(load(folder))
    rename(folder, "*.safetensors", lambda name: f"so100{between}{name}" if name.startswith("action.") else name)
    with pytest.raises(
        vp.CheckpointError, match=rf"{POST} is to scale 'action', .*so100{between}action.*unnorm_key='so100'"
    ):
        load(folder)
    with pytest.raises(vp.OptionError, match=r"unnorm_key='so101' was given; .* by the datasets so100\."):
        load(folder, unnorm_key="so101")
    np.testing.assert_array_equal(act(load(folder, unnorm_key="so100")), units)


def test_each_dataset_scales_as_its_own(folder):
    units = act(load(folder))
    for file in folder.glob("policy_*.safetensors"):
        values = load_file(file)
        own = {f"so100.buffer.{name}": value for name, value in values.items()}
        other = {f"so100-red.buffer.{name}": 3 * value for name, value in values.items()}
        save_file(own | other, file)
    with pytest.raises(vp.CheckpointError, match=r"so100-red\.buffer\.action, so100\.buffer\.action"):
        load(folder)
    np.testing.assert_array_equal(act(load(folder, unnorm_key="so100")), units)
    np.testing.assert_allclose(act(load(folder, unnorm_key="so100-red")), 3 * units, rtol=1e-5, atol=1e-5)


def test_statistics_of_states_by_dataset(folder):
    file = next(folder.glob("policy_preprocessor*.safetensors"))
    state = {"mean": torch.full((8,), 2.0), "std": torch.full((8,), 4.0)}
    values = load_file(file)
    save_file(values | {f"observation.state.{name}": value for name, value in state.items()}, file)
    units = act(load(folder))
    save_file(values | {f"so100.buffer.observation.state.{name}": value for name, value in state.items()}, file)
    with pytest.raises(vp.CheckpointError, match=rf"{PRE} is .*'observation\.state'.*so100\.buffer\.observation"):
        load(folder)
    np.testing.assert_array_equal(act(load(folder, unnorm_key="so100")), units)


def test_states_have_the_size_of_what_was_fine_tuned_on(folder):
    """lerobot/smolvla_libero has such states: the config says 6, from smolvla_base, and the statistics 8."""
    values = {name: torch.linspace(1, 2, 8) for name in ("mean", "std")}
    file = next(folder.glob("policy_preprocessor*.safetensors"))
    save_file(load_file(file) | {f"observation.state.{name}": value for name, value in values.items()}, file)
    units = act(load(folder))
    for name in ("config.json", PRE):
        content = (folder / name).read_text()
        changed = re.sub(r'("observation\.state": \{\s*"type": "STATE",\s*"shape": \[\s*)8', r"\g<1>6", content)
        assert changed != content
        (folder / name).write_text(changed)
    policy = load(folder)
    assert policy.proprio_size == 8
    np.testing.assert_array_equal(act(policy), units)
    save_file(load_file(file) | {"observation.state.std": torch.ones(6)}, file)
    with pytest.raises(vp.CheckpointError, match=r"std of 'observation\.state' of the shape \(6,\)"):
        load(folder)
    save_file(load_file(file) | {f"observation.state.{name}": torch.ones(5000) for name in values}, file)
    with pytest.raises(vp.CheckpointError, match=r"mean of 'observation\.state' of the shape \(5000,\)"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("action.std", torch.full((7,), float("nan")), "std of 'action' that is not finite"),
        ("action.mean", torch.full((7,), float("inf")), "mean of 'action' that is not finite"),
        ("action.std", torch.ones(3), r"std of 'action' of the shape \(3,\); the policy's is \(7,\)"),
        ("action.std", torch.full((7,), -1.0), "that no data can have"),
        ("action.std", None, "has no std of 'action', which it scales by"),
    ],
)
def test_statistics_that_scale_nothing(folder, name, value, message):
    file = next(folder.glob("policy_postprocessor*.safetensors"))
    values = load_file(file)
    values = {**values, name: value} if value is not None else {key: values[key] for key in values if key != name}
    save_file(values, file)
    with pytest.raises(vp.CheckpointError, match=rf"{POST} has .*{message}|{POST} {message}"):
        load(folder)


def test_statistics_of_something_else(folder):
    rename(folder, "policy_*.safetensors", lambda name: name.replace("action", "gripper"))
    with pytest.raises(vp.CheckpointError, match=r"statistics of gripper instead; .* pass for units\. Save the proc"):
        load(folder)


def test_networks_that_are_not_finite_never_act(folder):
    policy = load(folder)
    with torch.no_grad():
        policy.module.model.action_out_proj.bias[0] = torch.nan
    with pytest.raises(vp.CheckpointError, match=r"numbers that are not finite .*though its inputs are finite"):
        act(policy)
    policy.module.save_pretrained(folder)
    with pytest.raises(vp.CheckpointError, match=r"hold numbers that are not finite.*action_out_proj\.bias"):
        load(folder)


def test_a_folder_of_another_size_is_never_built(folder, monkeypatch):
    """LeRobot makes sizes that its code knows; here the published ones, of which nothing is built but on "meta"."""
    from vla_pruner.policies import lerobot

    monkeypatch.setattr(lerobot, "_checked", lambda *_: pytest.fail("the policy was built"))
    with built_with("smolvla", SIZES["smolvla", "full"]), pytest.raises(vp.CheckpointError, match="Of another shape: "):
        load_lerobot(folder)


def test_backbones_are_not_fetched_to_look_at_shapes(folder, monkeypatch):
    """smolvla_base says load_vlm_weights: LeRobot would fetch the backbone, and transformers refuses that on "meta"."""
    import importlib
    from types import SimpleNamespace

    from vla_pruner.policies import lerobot

    module = importlib.import_module("lerobot.policies.smolvla.smolvlm_with_expert")
    forbidden = SimpleNamespace(from_pretrained=lambda *_, **__: pytest.fail("the backbone was fetched"))
    monkeypatch.setattr(module, "AutoModelForImageTextToText", forbidden)
    config = lerobot.read_config(folder, ["--load_vlm_weights=true"])
    assert config.load_vlm_weights
    with built_with("smolvla", SIZES["smolvla", "tiny"]):
        described = lerobot._described(lerobot.policy_class("smolvla"), folder, config)
    assert next(described.parameters()).is_meta
    assert config.load_vlm_weights


def test_an_adapter_is_seen_before_anything_is_built(folder, monkeypatch):
    from vla_pruner.policies import lerobot

    monkeypatch.setattr(lerobot, "policy_class", lambda *_: pytest.fail("the policy was built"))
    (folder / "adapter_config.json").write_text("{}")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    with pytest.raises(vp.CheckpointError, match=r"adapter_config\.json says that this folder is a PEFT adapter"):
        load(folder)


def test_a_whole_folder_offline_blames_what_cannot_be_fetched(folder, monkeypatch):
    import importlib
    from types import SimpleNamespace

    def offline(name):
        raise OSError("We couldn't connect to 'https://huggingface.co'\nand more")

    module = importlib.import_module("lerobot.policies.smolvla.smolvlm_with_expert")
    monkeypatch.setattr(module, "AutoConfig", SimpleNamespace(from_pretrained=offline))
    with pytest.raises(vp.CheckpointError) as refusal:
        load_lerobot(folder)
    text = str(refusal.value)
    assert "SmolVLM2-500M-Video-Instruct" in text
    assert "couldn't connect" in text
    assert "safetensors" not in text


@pytest.mark.parametrize(("name", "value"), [("chunk_size", 10**9), ("num_steps", 0), ("max_action_dim", "x")])
def test_configs_that_cannot_be(folder, name, value):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, name: value}))
    with pytest.raises(vp.CheckpointError, match=rf"config\.json has {name} "):
        load(folder)


def test_the_plugin_looks_first(folder, monkeypatch):
    plugin = pytest.importorskip("lerobot_policy_vla_pruner.modeling_vla_pruner")
    from lerobot_policy_vla_pruner import VLAPrunerConfig

    monkeypatch.chdir(folder)
    add_step(folder, {"class": "os.mkdir", "config": {"path": "ran"}})
    with pytest.raises(vp.CheckpointError, match=r"os\.mkdir.*--policy\.trust_processors=true"):
        plugin.VLAPrunerPolicy.from_pretrained(str(folder), config=VLAPrunerConfig(device="cpu"))
    assert not (folder / "ran").exists()
