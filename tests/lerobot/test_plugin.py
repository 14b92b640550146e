"""`lerobot-eval` runs a pruned policy with flags alone: its own main function, on a toy environment."""

from __future__ import annotations

import json
import shutil
import sys

import pytest

pytest.importorskip("lerobot", reason="lerobot is not installed; make test-lerobot installs it")
pytest.importorskip("lerobot_policy_vla_pruner", reason="the plugin is not installed; make test-lerobot installs it")

from lerobot.scripts import lerobot_eval
from lerobot.utils.import_utils import register_third_party_plugins

import tests.lerobot.toy_env as toy
import vla_pruner as vp
from tests.lerobot.tiny import KINDS, load_tiny, save_processors, size_of
from vla_pruner.errors import CheckpointError
from vla_pruner.policies.lerobot_random import built_with

each_kind = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def evaluate(golden, tmp_path, monkeypatch):
    """Run `lerobot-eval` with flags on a golden checkpoint; return its results and the policies that it made."""

    def run(kind, *flags):
        source, folder = golden / f"lerobot_{kind}_tiny", tmp_path / kind
        if not folder.exists():
            shutil.copytree(source, folder, copy_function=shutil.copyfile)
            save_processors(load_tiny(golden, kind).module, kind, folder)
        made, make_policy = [], lerobot_eval.make_policy
        output = tmp_path / "output"

        def make(*args, **kwargs):
            made.append(make_policy(*args, **kwargs))
            return made[-1]

        monkeypatch.setattr(lerobot_eval, "make_policy", make)
        monkeypatch.setattr(lerobot_eval, "init_logging", lambda: None)
        monkeypatch.setattr(lerobot_eval, "write_video", lambda *args, **kwargs: None)
        flags = [flag.replace("FOLDER", str(folder)) for flag in flags]
        command = ["--env.type=vla_pruner_toy", "--eval.n_episodes=2", "--eval.batch_size=1", f"--output_dir={output}"]
        monkeypatch.setattr(sys, "argv", ["lerobot-eval", *command, "--policy.device=cpu", *flags])
        with built_with(kind, size_of(source)):
            lerobot_eval.main()
        return json.loads((output / "eval_info.json").read_text())["overall"], made[0]

    return run


@each_kind
def test_lerobot_eval_prunes(evaluate, kind):
    steps = "num_steps" if kind == "smolvla" else "num_inference_steps"
    plain, _ = evaluate(kind, "--policy.path=FOLDER", "--policy.n_action_steps=1", f"--policy.{steps}=2")
    inner = json.dumps({"n_action_steps": 1, steps: 2})
    checkpoint = ("--policy.type=vla_pruner", "--policy.pretrained_path=FOLDER", f"--policy.inner={inner}")
    whole, policy = evaluate(kind, *checkpoint, "--policy.method=unpruned")
    assert policy.session.kept is None
    assert whole["avg_sum_reward"] == plain["avg_sum_reward"], "the same episodes, action for action"

    pruned, policy = evaluate(
        kind, *checkpoint, "--policy.keep=0.25", '--policy.options={"window": 2, "unseen": "carry"}'
    )
    assert pruned["avg_sum_reward"] != plain["avg_sum_reward"]
    assert policy.session.method == vp.VLAPruner(keep=0.25, window=2, unseen="carry")
    assert policy.session.kept.shape == (1, 32)
    # Two episodes of four control steps: the policy's reset was the session's.
    assert policy.session.memory.steps.tolist() == [toy.STEPS]
    assert policy.session.memory.episode.tolist() == [1]
    assert type(policy.inner).__name__ in ("PI0Policy", "PI05Policy", "SmolVLAPolicy")
    assert policy.inner.config.n_action_steps == 1


def test_flags(evaluate):
    checkpoint = ("--policy.type=vla_pruner", "--policy.pretrained_path=FOLDER")
    _, policy = evaluate(
        "pi0", *checkpoint, "--policy.method=random", '--policy.keep={"base": 5, "wrist": 0.5}', "--policy.layer=2"
    )
    assert policy.session.method == vp.RandomKeep(keep={"base": 5, "wrist": 0.5}, layer=2)
    assert policy.session.kept.shape == (1, 5 + 32)
    _, policy = evaluate("pi0", *checkpoint, "--policy.method=random", "--policy.keep=7", "--policy.pruned=freeze")
    assert policy.session.method == vp.RandomKeep(keep=7, pruned="freeze")
    _, policy = evaluate("pi0", *checkpoint, "--policy.method=fastv:layer=2:keep=9")
    assert policy.session.method == vp.FastV(keep=9, layer=2)
    assert policy.session.kept.shape == (1, 9)


def test_every_method_that_has_a_name_is_one_of_the_plugin():
    from lerobot_policy_vla_pruner import VLAPrunerConfig

    from vla_pruner.method_names import known_methods, methods_of

    for name in known_methods():
        assert VLAPrunerConfig(device="cpu", method=name).build_method() == methods_of([name])[0].method
    for name in ("unpruned", "none"):
        assert VLAPrunerConfig(device="cpu", method=name).build_method() == vp.Unpruned()


def test_a_method_of_the_users_own(tmp_path, monkeypatch):
    from lerobot_policy_vla_pruner import VLAPrunerConfig

    (tmp_path / "own_for_lerobot.py").write_text(
        "from dataclasses import dataclass\nimport vla_pruner as vp\n"
        "@dataclass(frozen=True)\nclass Mine(vp.FastV):\n    power: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = VLAPrunerConfig(device="cpu", method="own_for_lerobot:Mine:power=2", keep=7).build_method()
    assert (type(made).__name__, made.keep, made.power) == ("Mine", 7, 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--policy.keep=2.5",), "keep=2.5"),
        (("--policy.keep=much",), "keep='much'"),
        (("--policy.method=random", '--policy.keep={"base": -1}'), "-1"),
        (("--policy.method=fastw",), "it is one of action-and-diversity"),
        (("--policy.method=no_such_module:Mine",), "no_such_module cannot be imported"),
        (("--policy.method=text-query", '--policy.options={"gate": 3}'), "how far the arm moves"),
        (("--policy.pruned=burn",), "burn"),
        (("--policy.layer=-1",), "layer=-1"),
        (('--policy.options={"windows": 2}',), "windows"),
        (('--policy.options={"warmup": "never"}',), "warmup='never'"),
    ],
)
def test_flags_that_are_wrong_stop_before_an_environment_is_made(evaluate, monkeypatch, capsys, flags, message):
    monkeypatch.setattr(lerobot_eval, "make_env", lambda *args, **kwargs: pytest.fail("an environment was made"))
    with pytest.raises(SystemExit):
        evaluate("pi0", "--policy.type=vla_pruner", "--policy.pretrained_path=FOLDER", *flags)
    assert message in capsys.readouterr().err


def test_a_config_that_is_wrong_in_a_script():
    from lerobot_policy_vla_pruner import VLAPrunerConfig

    with pytest.raises(vp.VLAPrunerError, match=r"keep=2\.5"):
        VLAPrunerConfig(device="cpu", keep=2.5)


def test_a_revision_is_refused(evaluate):
    checkpoint = ("--policy.type=vla_pruner", "--policy.pretrained_path=FOLDER")
    with pytest.raises(CheckpointError, match="newest revision"):
        evaluate("pi0", *checkpoint, "--policy.pretrained_revision=main")


def test_without_a_checkpoint(evaluate):
    with pytest.raises(CheckpointError, match=r"--policy\.pretrained_path"):
        evaluate("pi0", "--policy.type=vla_pruner")


def test_what_a_pruned_policy_does_not_do(evaluate, tmp_path):
    _, policy = evaluate("pi0", "--policy.type=vla_pruner", "--policy.pretrained_path=FOLDER")
    with pytest.raises(vp.UnsupportedModelError, match="train the checkpoint"):
        policy.get_optim_params()
    with pytest.raises(vp.UnsupportedModelError, match="train the checkpoint"):
        policy.config.get_optimizer_preset()
    with pytest.raises(vp.UnsupportedModelError, match="inner"):
        policy.save_pretrained(tmp_path / "saved")
    with pytest.raises(vp.UnsupportedModelError, match="train the checkpoint"):
        policy({})


def test_lerobot_finds_the_plugin(caplog):
    with caplog.at_level("INFO"):
        register_third_party_plugins()
    assert "Imported third-party plugin: lerobot_policy_vla_pruner" in caplog.text
