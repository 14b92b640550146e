"""Helpers of the tests of `vla_pruner.official`: checkpoints as the scripts name them, the scripts with their two
lines, and a package without physics in LIBERO's place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from tests.openvla.tiny import random_openvla, write_checkpoint

SCRIPTS = Path(__file__).parent / "scripts"
TWO_LINES = "import vla_pruner.official\nvla_pruner.official.install(vla_pruner.VLAPruner(keep=0.25))\n"


def checkpoint(folder: Path, oft: bool) -> Path:
    """Write a tiny random policy in the published layout, with a tokenizer of single bytes."""
    policy: Any = random_openvla(oft=oft)
    statistics = {"libero_object_no_noops" if oft else "libero_object": policy.norm_stats["random"]}
    write_checkpoint(folder, policy)
    (folder / "dataset_statistics.json").write_text(json.dumps(statistics))
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def script(name: str, folder: Path, lines: str = TWO_LINES) -> Path:
    """Write a script of `scripts/` with the lines at its top."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run_libero_eval.py"
    path.write_text(lines + (SCRIPTS / f"{name}.py").read_text(encoding="utf-8"), encoding="utf-8")
    return path


def write_libero(folder: Path) -> Path:
    """Write a package `libero` whose environment draws noise and is never solved."""
    package = folder / "libero" / "libero"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text("def get_libero_path(key):\n    return f'/libero/{key}'\n")
    (package / "benchmark.py").write_text(
        "from types import SimpleNamespace\n"
        "class Suite:\n"
        "    def get_task(self, number):\n"
        "        return SimpleNamespace(language='Pick up the soup', problem_folder='object', bddl_file='soup.bddl')\n"
        "    def get_task_init_states(self, number):\n"
        "        return list(range(50))\n"
        "def get_benchmark_dict():\n"
        "    return {'libero_object': Suite}\n"
    )
    (package / "envs.py").write_text(
        "import numpy as np\n"
        "class ControlEnv:\n"
        "    made = []\n"
        "    def __init__(self, bddl_file_name, camera_heights, camera_widths):\n"
        "        self.options = bddl_file_name, camera_heights, camera_widths\n"
        "        self.log = []\n"
        "        ControlEnv.made.append(self)\n"
        "    def seed(self, seed):\n"
        "        self.log.append(('seed', seed))\n"
        "    def reset(self):\n"
        "        self.log.append(('reset',))\n"
        "        return self._see(0)\n"
        "    def set_init_state(self, state):\n"
        "        self.log.append(('state', state))\n"
        "        return self._see(state)\n"
        "    def step(self, action):\n"
        "        self.log.append(('step', action))\n"
        "        if len(self.log) == ControlEnv.fails_at:\n"
        "            raise ValueError('the simulator diverged')\n"
        "        return self._see(len(self.log)), 0.0, False, {}\n"
        "    def _see(self, seed):\n"
        "        random = np.random.default_rng(seed)\n"
        "        images = ('agentview_image', 'robot0_eye_in_hand_image')\n"
        "        seen = {name: random.integers(0, 256, (256, 256, 3), dtype=np.uint8) for name in images}\n"
        "        return seen | {'robot0_eef_pos': random.uniform(-.3, .3, 3), 'robot0_gripper_qpos': np.zeros(2),\n"
        "                       'robot0_eef_quat': np.array([0.6, 0.0, 0.0, 0.8])}\n"
        "ControlEnv.fails_at = None\n"
        "class OffScreenRenderEnv(ControlEnv):\n"
        "    pass\n"
    )
    return folder
