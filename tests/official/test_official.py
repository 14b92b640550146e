"""Scripts in the form of the official ones run on policies of this package with two more lines; an error ends them.

LIBERO is a package without physics here; test_libero.py uses the real one.
"""

from __future__ import annotations

import importlib
import runpy
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import vla_pruner as vp
from tests.docs.pages import page
from tests.official.scene import TWO_LINES, checkpoint, script, write_libero
from vla_pruner import official
from vla_pruner.errors import OptionError, SessionError, UnsupportedModelError
from vla_pruner.models.openvla.actions import libero_gripper
from vla_pruner.official import MissingName, installation
from vla_pruner.official.stand_ins import CONSTANTS, LIBERO_UTILS, OPENVLA_UTILS, ROBOT_UTILS
from vla_pruner.preprocessing.libero import libero_image
from vla_pruner.simulators import SimulatorUnavailable

if find_spec("libero") is not None:
    pytest.skip("the real LIBERO is installed here; test_libero.py runs in it", allow_module_level=True)
for needed in ("simplejpeg", "PIL"):
    pytest.importorskip(needed, reason="LIBERO's images need pillow and simplejpeg (extra libero-images)")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: checkpoint(root / name, oft=name == "oft") for name in ("openvla", "oft")}


@pytest.fixture
def libero(tmp_path, monkeypatch):
    """The modules of a package in LIBERO's place; it and the stand-ins are removed from the process afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(write_libero(tmp_path / "site")))
    monkeypatch.chdir(tmp_path)
    yield importlib.import_module("libero.libero.envs")
    if installation._current is not None:
        installation._current.remove()
    for name in set(sys.modules) - before:
        if name.partition(".")[0] == "libero":
            del sys.modules[name]


def run(path: Path, *flags: str) -> dict[str, Any]:
    argv, sys.argv = sys.argv, [str(path), *flags]
    try:
        return runpy.run_path(str(path), run_name="__main__")
    finally:
        sys.argv = argv


def evaluation() -> Any:
    assert installation._current is not None
    return installation._current.evaluation


@pytest.mark.parametrize(
    ("name", "counted", "kept"),
    [("openvla", (2, 10, 4), 64), ("oft", (1, 5, 2), 128)],
)
def test_a_script_runs_pruned_by_two_lines(name, counted, kept, folders, libero, tmp_path, capsys):
    run(script(name, tmp_path / "run"), "--pretrained_checkpoint", str(folders[name]))
    found = evaluation()
    assert (found.episodes, found.steps, found.pruned) == counted
    assert found.kept == kept
    printed = capsys.readouterr().out
    assert "exception" not in printed
    assert "Episode error" not in printed
    assert "Success: False" in printed
    (environment,) = libero.ControlEnv.made
    assert environment.options == ("/libero/bddl_files/object/soup.bddl", 256, 256)
    assert environment.log[:2] == [("seed", 0), ("reset",)]


@pytest.mark.parametrize("name", ["openvla", "oft"])
def test_the_actions_are_those_of_act(name, folders, libero, tmp_path):
    """The first chunk that reaches the environment equals that of `act` on images of this package's own chain."""
    trials = ("--num_trials_per_task", "1")
    run(script(name, tmp_path / "run"), "--pretrained_checkpoint", str(folders[name]), *trials)
    log = libero.ControlEnv.made[0].log
    steps = [entry[1] for entry in log if entry[0] == "step"]
    seen = libero.ControlEnv._see(None, len(log) - len(steps) + 2)  # after the two steps in which objects settle
    policy: Any = vp.load_policy(folders[name])
    cameras = ("agentview_image", "robot0_eye_in_hand_image")
    images = {to: libero_image(seen[camera]) for to, camera in zip(policy.cameras, cameras, strict=False)}
    turned = np.array([2 * np.arccos(0.8), 0.0, 0.0])
    state = np.concatenate([seen["robot0_eef_pos"], turned, seen["robot0_gripper_qpos"]])
    expected = policy.act(images, "Pick up the soup", state if name == "oft" else None)
    np.testing.assert_allclose(steps[2 : 2 + len(expected)], libero_gripper(expected), rtol=0, atol=1e-6)


def test_the_page_shows_the_lines_that_are_tested():
    assert f"```\n{TWO_LINES}```" in page("openvla.md")


def test_each_episode_warms_up_anew(folders, libero, tmp_path):
    path = script("openvla", tmp_path / "run")
    text = path.read_text()
    call = "action = get_action(cfg, model, observation, description, processor=processor)\n"
    assert call in text
    noted = call + " " * 16 + "KEPT.append(vla_pruner.official.installation._current.session.kept)\n"
    path.write_text(text.replace(call, noted).replace(TWO_LINES, TWO_LINES + "KEPT = []\n"))
    kept = run(path, "--pretrained_checkpoint", str(folders["openvla"]))["KEPT"]
    assert [found is not None for found in kept] == [False, False, False, True, True] * 2


def test_the_exit_code_tells_of_an_error(folders, libero, tmp_path):
    """A checkpoint that the script's flags do not describe, a wrong image and a simulator that fails are no failed
    episodes.
    """
    path = script("oft", tmp_path / "run")
    weights = ("--pretrained_checkpoint", str(folders["oft"]))
    with pytest.raises(SystemExit, match=r"num_images_in_input=1, and the checkpoint needs: .*--num_images_in_input 2"):
        run(path, *weights, "--num_images_in_input", "1")
    installation._current.remove()
    with pytest.raises(SystemExit, match=r"lose the first 4 of the chunk's 8 actions: give --num_open_loop_steps 8"):
        run(path, *weights, "--num_open_loop_steps", "4")
    installation._current.remove()
    libero.ControlEnv.fails_at = 9
    with pytest.raises(SystemExit, match=r"stops after 1 episode, 1 control step.*ValueError in step: the simulator"):
        run(path, *weights)


def test_a_refusal_within_an_episode_ends_the_run(folders, libero, tmp_path):
    path = script("openvla", tmp_path / "run")
    path.write_text(path.read_text().replace('"full_image": img', '"full_image": img / 255'))
    with pytest.raises(SystemExit, match=r"the run stops after 0 episodes.*in get_action"):
        run(path, "--pretrained_checkpoint", str(folders["openvla"]))


def test_the_process_ends_with_1_and_says_what_was_counted(folders, libero, tmp_path):
    path = script("openvla", tmp_path / "run")
    source = Path(vp.__file__).parents[1]
    command = [sys.executable, str(path), "--pretrained_checkpoint", str(folders["openvla"]), "--max_steps", "4"]
    environment = {"PYTHONPATH": f"{source}:{tmp_path / 'site'}", "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    good = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert good.returncode == 0, good.stderr
    last = good.stdout.splitlines()[-1]
    assert last == (
        "vla_pruner.official: 2 episodes, 8 control steps, 2 of them pruned (the last to 64 of 256 visual tokens)"
    )
    path.write_text(path.read_text().replace("get_action(cfg, model", "get_action(cfg, None"))
    bad = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert bad.returncode == 1
    assert "SessionError in get_action: get_action was given a NoneType that get_model did not return." in bad.stderr
    assert "Success" not in bad.stdout


def test_without_a_method_nothing_is_pruned(folders, libero, tmp_path, capsys):
    path = script("oft", tmp_path / "run", TWO_LINES.replace("vla_pruner.VLAPruner(keep=0.25)", "None"))
    run(path, "--pretrained_checkpoint", str(folders["oft"]))
    assert evaluation().session is None
    assert evaluation().summary() == "1 episode, 5 control steps, unpruned"


def test_a_loaded_policy_stands_for_the_checkpoint_and_is_left_as_it_was(libero, tmp_path):
    policy: Any = vp.random_policy("openvla-oft")
    with official.install(vp.VLAPruner(keep=0.25, preset="paper"), policy=policy) as installed:
        utils = importlib.import_module(ROBOT_UTILS)
        heads = importlib.import_module(OPENVLA_UTILS)
        cfg = SimpleNamespace(num_images_in_input=2, center_crop=True, unnorm_key="random")
        model = utils.get_model(cfg)
        assert model.llm_dim == policy.llm_dim
        assert heads.get_processor(cfg) is policy.processor
        assert heads.get_action_head(cfg, model.llm_dim) is policy.action_head
        assert heads.get_proprio_projector(cfg, model.llm_dim, proprio_dim=8) is policy.proprio_projector
        assert heads.get_noisy_action_projector(cfg, model.llm_dim) is None
        image = np.zeros((224, 224, 3), np.uint8)
        inputs = policy.processor("In: What action should the robot take to stop?\nOut:", image)
        inputs["pixel_values"] = torch.cat([inputs["pixel_values"]] * 2, dim=1)
        actions, hidden = model.predict_action(**inputs, unnorm_key="random", do_sample=False, proprio=np.zeros(8))
        assert actions.shape == (8, 7)
        assert hidden is None
        assert isinstance(model, official.OfficialModel)
        assert installed.session is not None
        assert installed.session.attached
    assert not installed.session.attached
    assert isinstance(policy.predict_action(**inputs, unnorm_key="random", proprio=np.zeros(8)), np.ndarray)
    assert not {ROBOT_UTILS, OPENVLA_UTILS, LIBERO_UTILS, CONSTANTS} & set(sys.modules)
    assert libero.OffScreenRenderEnv.reset is libero.ControlEnv.reset
    assert not hasattr(libero.ControlEnv.reset, "__wrapped__")


def test_names_that_no_stand_in_has_are_named(libero):
    with official.install(None):
        with pytest.raises(MissingName, match=r"robot_utils and has no get_minivla; it has .*get_action"):
            exec("from experiments.robot.robot_utils import get_minivla")
        constants = importlib.import_module(CONSTANTS)
        assert (constants.NUM_ACTIONS_CHUNK, constants.ACTION_DIM, constants.PROPRIO_DIM) == (8, 7, 8)
        assert not hasattr(constants, "__file__")


def test_a_control_step_needs_a_reset_before_it(libero):
    with official.install(None, policy=vp.random_policy("openvla-7b")):
        utils = importlib.import_module(ROBOT_UTILS)
        cfg = SimpleNamespace(center_crop=True, unnorm_key="random")
        with pytest.raises(SystemExit, match="before any environment was reset"):
            utils.get_action(cfg, utils.get_model(cfg), {}, "stop")


@pytest.mark.parametrize("how", ["session", "everything"])
def test_steps_behind_a_detached_method_are_not_counted_as_pruned(how, libero):
    policy = vp.random_policy("openvla-7b")
    cfg = SimpleNamespace(pretrained_checkpoint="", model_family="openvla", center_crop=True, unnorm_key=None)
    observation = {"full_image": np.zeros((224, 224, 3), np.uint8)}
    with official.install(vp.FastV(keep=0.5, layer=1), policy=policy) as installed:
        utils = importlib.import_module(ROBOT_UTILS)
        model = utils.get_model(cfg)
        installed.evaluation.begin_episode()
        utils.get_action(cfg, model, observation, "lift")
        installed.session.detach() if how == "session" else installed.remove()
        with pytest.raises(SystemExit, match="The method was detached while the script runs"):
            utils.get_action(cfg, model, observation, "lift")
        assert (installed.evaluation.steps, installed.evaluation.pruned) == (1, 1)


def test_install_refuses_what_it_cannot_stand_in_for(libero, monkeypatch):
    with pytest.raises(OptionError, match="install was given a str; give a method"):
        official.install("vla-pruner")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="install was given a policy and dtype, which are for loading one"):
        official.install(None, policy=object(), dtype="bfloat16")
    monkeypatch.setitem(sys.modules, ROBOT_UTILS, object())
    with pytest.raises(SessionError, match="put the two lines at the top of the script"):
        official.install(None)
    monkeypatch.delitem(sys.modules, ROBOT_UTILS)
    with official.install(None), pytest.raises(SessionError, match="is installed already"):
        official.install(None)
    monkeypatch.setitem(sys.modules, "libero.libero.envs", None)
    with pytest.raises(SimulatorUnavailable, match="LIBERO cannot be imported"):
        official.install(None)
    assert installation._current is None


@pytest.mark.parametrize(
    ("policy", "cfg", "error"),
    [
        ("openvla-oft", {}, "takes one action at a time: evaluate it with openvla-oft"),
        ("openvla-oft", {"num_images_in_input": 2, "use_film": True}, "use_film=True, and the checkpoint needs"),
        ("openvla-7b", {"model_family": "octo"}, "model_family='octo' was given"),
        ("reference", {}, "found a ReferencePolicy. Evaluate it with `vla-pruner eval`"),
    ],
)
def test_a_configuration_of_another_policy_is_refused(policy, cfg, error, libero):
    made = vp.random_policy(policy)
    refused = pytest.raises((OptionError, UnsupportedModelError), match=error)
    with official.install(None, policy=made) as installed, refused:
        installed.evaluation.load(SimpleNamespace(**cfg))


def test_quantization_and_denoising_are_the_scripts_and_options_win(libero, monkeypatch):
    asked: dict[str, Any] = {}

    def load(path: str, **options: Any) -> Any:
        asked.update(options, path=path)
        return vp.random_policy("openvla-7b")

    monkeypatch.setattr("vla_pruner.official.evaluation.load_policy", load)
    cfg = SimpleNamespace(pretrained_checkpoint="folder", load_in_8bit=True, use_diffusion=True)
    cfg.num_diffusion_steps_inference = 10
    with official.install(None, dtype="bfloat16", device="cpu") as installed:
        installed.evaluation.load(cfg)
    assert asked == {
        "path": "folder", "device": "cpu", "dtype": "bfloat16", "quantization": "int8", "denoising_steps": 10,
    }  # fmt: skip
