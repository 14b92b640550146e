"""Messages to the policy server that were spoilt: each is answered by finite actions, or refused with a short error of
this package. They go through decoder, reader and engine, as on the server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgpack
import numpy as np

import vla_pruner as vp
from tests.serving.robots import observation
from vla_pruner.client.codec import unpack
from vla_pruner.errors import VLAPrunerError
from vla_pruner.serving.engine import Answer, Engine, Job, Robot
from vla_pruner.serving.observations import reader_of
from vla_pruner.serving.settings import ServerSettings

LONGEST_ERROR = 6_000
"""Characters; the server tells its clients a thousand of them."""

ODD: tuple[Callable[[np.random.Generator], Any], ...] = (
    lambda _: None,
    lambda _: True,
    lambda _: float("nan"),
    lambda _: 2**64 - 1,
    lambda _: -(2**63),
    lambda _: b"\0" * 100,
    lambda _: "\ud7ff\U000e0001\x1b[2J\n" * 40,
    lambda _: "a" * 65_537,
    lambda _: ["a" * 60_000] + [""] * 900,
    lambda _: [[[[]]]] * 9,
    lambda _: {1: 2, b"x": 3},
    lambda _: {"a": {"b": [1.5, None]}},
    lambda _: {"k" * 300: 1},
    lambda _: msgpack.Timestamp(1, 2),
    lambda _: msgpack.ExtType(7, b"x" * 40),
    lambda _: np.array(["j1", "joint 2"]),
    lambda _: np.array(["2026-11-27"], "M8[D]"),
    lambda _: np.float16(1),
    lambda _: np.array(5, "u1"),
    lambda _: np.full(4, np.inf),
    lambda random: random.normal(0, 1e3, int(random.integers(0, 1100))),
    lambda random: [float(value) for value in random.normal(0, 1, int(random.integers(0, 9)))],
    lambda random: random.integers(0, 256, tuple(random.integers(0, 70, int(random.integers(0, 5))))).astype(np.uint8),
    lambda random: random.integers(0, 256, (int(random.integers(1, 40)), 64, 3), dtype=np.uint8),
    lambda random: random.integers(0, 256, (64, 64, 3), dtype=np.uint8),
    lambda random: {"__proto__": int(random.integers(9)), "observation/image": None},
)
FIELDS: tuple[tuple[bytes, Any], ...] = (
    *((b"dtype", one) for one in ("|O8", "<f8", ">u2", "V8", "<U2", "i4,f4", "", None, 5)),
    *((b"shape", one) for one in ([], [-1], [2**40, 0], [1] * 9, [4], [2.0], None, "x")),
    *((b"data", one) for one in (b"", b"x", "text", None, [1])),
)
HEADS = (b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xdb\x00\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xc1")


def run(count: int, seed: int = 0) -> list[str]:
    """Send `count` spoilt messages.

    Args:
        count: how many.
        seed: of the changes; each message depends on it and on its number alone.

    Returns:
        the faults of those that were neither answered nor refused: raw exceptions, actions that are not finite, and
            errors that are long.
    """
    policy: Any = vp.random_policy("reference", "tiny")
    reader = reader_of(policy)
    engine = Engine(policy, vp.VLAPruner(keep=0.25, preset="paper"), reader, ServerSettings())
    faults: list[str] = []
    engine.open()
    try:
        robots = [Robot(number) for number in range(4)]
        for number in range(count):
            random = np.random.default_rng((seed, number))
            try:
                seen = reader.read(unpack(_spoilt(policy, random)))
                robot = robots[number % len(robots)]
                if seen.reset or seen.instruction != robot.instruction:
                    robot.begin_episode()
                (found,) = engine.run([Job(robot, seen)])
                if isinstance(found, Answer):
                    fault = None if np.isfinite(found.actions).all() else "actions that are not finite"
                else:
                    fault = _fault(found)
            except Exception as error:
                fault = _fault(error)
            if fault is not None:
                faults.append(f"message {number} of seed {seed}: {fault}")
    finally:
        engine.close()
    return faults


def _fault(error: Exception) -> str | None:
    # The engine reports in these words an error of the policy that is none of this package.
    if not isinstance(error, VLAPrunerError) or str(error).startswith("The policy failed with"):
        return f"{type(error).__name__}: {str(error)[:300]}"
    return f"an error of {len(str(error))} characters" if len(str(error)) > LONGEST_ERROR else None


def _spoilt(policy: Any, random: np.random.Generator) -> bytes:
    whole: dict[Any, Any] = observation(policy, int(random.integers(3)), int(random.integers(6)))
    kind = int(random.integers(5))
    if kind == 0:  # some bytes of the beginning, where the heads are, or of all
        data = bytearray(_packed(whole))
        for place in random.integers(0, len(data) if random.integers(2) else 60, int(random.integers(1, 9))):
            data[place] = random.integers(0, 256)
        return bytes(data)
    if kind == 1:  # cut, doubled, or with a head put between
        data = bytearray(_packed(whole))
        place = int(random.integers(0, len(data)))
        piece = HEADS[random.integers(len(HEADS))] if random.integers(2) else random.bytes(int(random.integers(0, 40)))
        data[place : place + int(random.integers(0, 40))] = piece
        return bytes(data if random.integers(2) else data[: int(random.integers(0, len(data)))])
    if kind == 2:  # an array with a false header
        key = ("observation/image", "observation/state")[random.integers(2)]
        fields = _fields(np.asarray(whole[key]))
        name, value = FIELDS[random.integers(len(FIELDS))]
        return _packed({**whole, key: {**fields, name: value}})
    keys = [*whole, "reset", "observation", "other", "\x1b[31m", 5]
    for _ in range(int(random.integers(1, 4))):  # other values, keys that are missing, and further ones
        key = keys[random.integers(len(keys))]
        if random.integers(6) == 0:
            whole.pop(key, None)
        else:
            whole[key] = ODD[random.integers(len(ODD))](random)
    return _packed(whole if random.integers(9) else [whole])


def _packed(value: Any) -> bytes:
    packed = msgpack.packb(value, default=_fields, strict_types=False)
    assert packed is not None
    return packed


def _fields(value: Any) -> dict[bytes, Any]:
    """Return arrays and numbers, of any type, as openpi's clients pack them."""
    if isinstance(value, np.ndarray):
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
