"""Checkpoint folders that were spoilt: each loads and acts finitely, or is refused with an error of this package."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

import vla_pruner as vp
from vla_pruner.errors import VLAPrunerError

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
DEEP: Any = []
for _ in range(200):
    DEEP = [DEEP]
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 10**9, 2**70, 1.5, float("nan"), float("inf"), -1e308),
    *("", "x", "a" * 5000, "a\0b", "../../etc/passwd", "/etc/passwd", "os.system", "kernels-community/evil"),
    *([], {}, [1, 2, 3], ["x"] * 7, {"a": 1}, [[1.0]], [float("nan")] * 7, DEEP),
)


@dataclass(frozen=True)
class Base:
    """A folder that is whole.

    Attributes:
        name: of its content.
        folder: its path.
        load: loads it.
        instruction: for its policy.
    """

    name: str
    folder: Path
    load: Callable[[Path], Any]
    instruction: str = "pick up the cup"


def run(count: int, seed: int = 0) -> list[str]:
    """Spoil `count` folders, load them, and act.

    Returns:
        the faults: raw exceptions, and actions that are not finite, each with how to see it again.
    """
    faults = []
    with tempfile.TemporaryDirectory() as place:
        bases = [base for make in (_openvla, _reference, _pi0, _lerobot) for base in make(Path(place))]
        for number in range(count):
            generator = random.Random(f"{seed}/{number}")
            base = generator.choice(bases)
            folder = Path(place) / "spoilt"
            folder.mkdir()
            for item in base.folder.iterdir():
                (folder / item.name).symlink_to(item)
            what = spoil(folder, generator)
            fault = outcome(base, folder)
            if fault is not None:
                faults.append(f"{base.name}, number {number} of seed {seed}, {what}: {fault}")
            shutil.rmtree(folder)
    return faults


def outcome(base: Base, folder: Path) -> str | None:
    """Return the fault in a folder's loading and acting; None if there is none."""
    try:
        policy = base.load(folder)
        if type(getattr(getattr(policy, "processor", None), "tokenizer", None)).__name__ == "AbsentTokenizer":
            from vla_pruner.models.openvla.processing import StandInTokenizer

            policy.processor.tokenizer = StandInTokenizer(policy.config.text_config.vocab_size)
        side = getattr(policy, "image_size", 224)
        images = {camera: np.full((side, side, 3), 100, np.uint8) for camera in policy.cameras}
        proprio = None if policy.proprio_size is None else np.full(policy.proprio_size, 0.2, np.float32)
        action = policy.act(images, base.instruction, proprio)
    except VLAPrunerError as error:
        return None if 0 < len(str(error)) < 20_000 else f"a message of {len(str(error))} letters"
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return None if np.isfinite(action).all() else "the action is not finite"


def spoil(folder: Path, generator: random.Random) -> str:
    """Change one file of a folder of links, or the folder itself; return the change in words."""
    files = sorted(path for path in folder.iterdir() if path.is_file())
    file = generator.choice(files)
    ways: list[Callable[[Path, random.Random], str]] = [_bytes, _whole]
    if file.suffix == ".json":
        ways += [_json] * 6
    elif file.suffix == ".safetensors":
        ways += [_header] * 3
    elif file.suffix == ".pt":
        ways += [_tensors] * 4
    return f"{file.name} {generator.choice(ways)(file, generator)}"


def _put(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


def _bytes(file: Path, generator: random.Random) -> str:
    content = bytearray(file.read_bytes())
    for _ in range(generator.randrange(1, 5)):
        # The beginning of a file says what the file is.
        place = generator.randrange(min(len(content), generator.choice((16, 4000, len(content)))))
        content[place] = generator.randrange(256)
    end = len(content) if generator.random() < 0.7 else generator.randrange(len(content))
    _put(file, bytes(content[:end]))
    return f"with bytes changed, cut at {end}"


def _whole(file: Path, generator: random.Random) -> str:
    way = generator.choice(
        ("gone", "a folder", "a pipe", "a link to itself", "empty", "a pointer", "nested", "adapter")
    )
    if way == "adapter":
        content = json.dumps({"peft_type": "LORA", "base_model_name_or_path": generator.choice(VALUES)}, default=str)
        (file.parent / "adapter_config.json").write_text(content)
        return "beside an adapter_config.json"
    file.unlink()
    if way == "a folder":
        file.mkdir()
    elif way == "a pipe":
        os.mkfifo(file)
    elif way == "a link to itself":
        file.symlink_to(file)
    elif way != "gone":
        file.write_bytes({"empty": b"", "a pointer": POINTER, "nested": b"[" * 100_000}[way])
    return way


def _json(file: Path, generator: random.Random) -> str:
    values = json.loads(file.read_text())
    what = _change(values, generator)
    _put(file, json.dumps(values).encode())
    return what


def _change(values: Any, generator: random.Random) -> str:
    """Change one place of a JSON value, somewhere inside."""
    path = []
    here = values
    while True:
        keys = list(here) if isinstance(here, dict) else list(range(len(here)))
        if not keys:
            return "as it was"
        key = generator.choice(keys)
        path.append(str(key))
        inner = here[key]
        if not isinstance(inner, (dict, list)) or not inner or generator.random() < 0.3:
            break
        here = inner
    if generator.random() < 0.15:
        del here[key]
        return f"without {'.'.join(path)[:200]}"
    value = generator.choice(VALUES)
    here[key] = copy.deepcopy(value)
    return f"with {'.'.join(path)[:200]} = {str(value)[:60]!r}"


def _header(file: Path, generator: random.Random) -> str:
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    name = generator.choice(list(header))
    if generator.random() < 0.3:
        other = generator.choice((f"{name}.more", "a" * 10_000, "", "language_model.model.layers.999999.norm.weight"))
        header[other] = header.pop(name)
        what = f"with {name[:60]} called {other[:60]}"
    else:
        what = _change(header, generator)
    text = json.dumps(header).encode()
    _put(file, struct.pack("<Q", len(text)) + text + content[8 + size :])
    return f"whose header is {what}"


def _tensors(file: Path, generator: random.Random) -> str:
    state = torch.load(file, weights_only=True)
    name = generator.choice(list(state))
    tensor = state[name]
    ways: dict[str, Callable[[], Any]] = {
        "on meta": lambda: tensor.to("meta"),
        "sparse": lambda: tensor.to_sparse(),
        "int8": lambda: tensor.to(torch.int8),
        "complex": lambda: tensor.to(torch.complex64),
        "NaN": lambda: tensor * float("nan"),
        "a view of one number": lambda: torch.zeros(1).expand(10**9),
        "no tensor": lambda: "x",
        "of another shape": lambda: tensor.reshape(-1)[:1],
    }
    way = generator.choice([*ways, "gone", "numbered"])
    if way == "gone":
        del state[name]
    elif way == "numbered":
        state[7] = state.pop(name)
    else:
        state[name] = ways[way]()
    file.unlink()
    torch.save(state, file)
    return f"whose {name} is {way}"


def _openvla(place: Path) -> Iterator[Base]:
    from tests.openvla.tiny import random_openvla, write_checkpoint

    for name, options, shards in (("OpenVLA", {}, 1), ("OFT", {"oft": True}, 2)):
        policy = random_openvla("tiny", **options)
        yield Base(name, write_checkpoint(place / name, policy, shards=shards), vp.load_policy)


def _reference(place: Path) -> Iterator[Base]:
    from vla_pruner.models.reference import save_policy

    policy: Any = vp.random_policy("reference")
    save_policy(policy, place / "reference")
    yield Base("the reference policy", place / "reference", vp.load_policy, policy.instructions[0])


def _pi0(place: Path) -> Iterator[Base]:
    from vla_pruner.policies.pi0 import load_pi0

    original: Any = vp.random_policy("pi0", "tiny")
    original.module.save_pretrained(place / "pi0")
    statistics = {f"{part}_{name}": [1.0] * 7 for part in ("state", "actions") for name in ("mean", "std")}
    (place / "pi0" / "processor_config.json").write_text(json.dumps(statistics))

    def load(folder: Path) -> Any:
        policy = load_pi0(folder, cameras=original.cameras)
        policy.tokenizer = original.tokenizer
        return policy

    yield Base("pi0 of transformers", place / "pi0", load)


def _lerobot(place: Path) -> Iterator[Base]:
    """LeRobot's policies, if it is installed."""
    if find_spec("lerobot") is None:
        return
    from tests.lerobot.tiny import save_processors
    from vla_pruner.policies.lerobot_random import SIZES, built_with, random_lerobot

    for kind in ("pi0", "smolvla"):
        folder = place / f"lerobot_{kind}"
        module = random_lerobot(kind).module
        size = SIZES["smolvla" if kind == "smolvla" else "pi", "tiny"]
        with contextlib.redirect_stdout(io.StringIO()):
            module.save_pretrained(folder)
        save_processors(module, kind, folder)

        def load(folder: Path, kind: str = kind, size: Any = size) -> Any:
            with built_with(kind, size):
                return vp.load_policy(folder)

        yield Base(f"LeRobot's {kind}", folder, load)
