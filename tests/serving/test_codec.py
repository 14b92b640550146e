"""The wire format: openpi's to the byte, and nothing that a stranger sends does harm."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgpack
import numpy as np
import pytest

from vla_pruner.client import codec
from vla_pruner.client.codec import pack, unpack
from vla_pruner.client.errors import CodecError
from vla_pruner.strangers import Unread

# Made by openpi-client 0.1.2 of {"observation/image": uint8 [[0, 1], [2, 3]], "x": float32 0.5, "prompt": "go"}.
OPENPI = bytes.fromhex(
    "83b16f62736572766174696f6e2f696d61676584c40b5f5f6e6461727261795f5fc3c40464617461c40400010203c4056474797065a37c7531"
    "c4057368617065920202a17883c40d5f5f6e7067656e657269635f5fc3c40464617461cb3fe0000000000000c4056474797065a33c6634a670"
    "726f6d7074a2676f"
)


def plain(value: Any, **options: Any) -> bytes:
    packed = msgpack.packb(value, **options)
    assert packed is not None
    return packed


def test_openpis_bytes() -> None:
    image = np.arange(4, dtype=np.uint8).reshape(2, 2)
    assert pack({"observation/image": image, "x": np.float32(0.5), "prompt": "go"}) == OPENPI
    found = unpack(OPENPI)
    assert np.array_equal(found["observation/image"], image)
    assert found["x"] == np.float32(0.5)
    assert type(found["x"]) is np.float32
    assert found["prompt"] == "go"


@pytest.mark.parametrize("dtype", ["?", "u1", "i2", "u4", "i8", "f2", "f4", "f8", ">i4", ">f8"])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)])
def test_arrays_come_back(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.asarray(np.random.default_rng(0).random(shape) * 100).astype(dtype)
    found = unpack(pack({"a": array}))["a"]
    assert np.array_equal(found, array)
    assert found.shape == shape
    assert found.dtype == array.dtype.newbyteorder("=")
    assert not found.flags.writeable


def test_plain_values_come_back_and_tuples_become_lists() -> None:
    message = {"a": [1, 2.5, None, True], "b": {"c": "é"}, "t": (1, 2), "s": np.str_("x"), "n": np.int64(3)}
    assert unpack(pack(message)) == {"a": [1, 2.5, None, True], "b": {"c": "é"}, "t": [1, 2], "s": "x", "n": 3}


@pytest.mark.parametrize(
    "value", [np.array([object()]), np.array([1j]), np.zeros(2, "i4,f4"), object(), {1, 2}, np.complex64(1), 2**70]
)
def test_what_is_no_number_is_not_packed(value: Any) -> None:
    with pytest.raises(CodecError):
        pack({"a": value})


def _changed(name: bytes, value: Any) -> bytes:
    whole: dict[Any, Any] = {b"__ndarray__": True, b"data": b"\0" * 8, b"dtype": "<f4", b"shape": [2]}
    whole[name] = value
    return plain({"a": whole})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (b"dtype", "|O8"),
        (b"dtype", "O"),
        (b"dtype", "i4,f4"),
        (b"dtype", "V8"),
        (b"dtype", "<M8[s]; rm"),
        (b"dtype", [["a", "<f4"]]),
        (b"dtype", None),
        (b"dtype", "f4" * 1000),
        (b"shape", [3]),
        (b"shape", [-2]),
        (b"shape", [2**40, 0]),
        (b"shape", [2.0]),
        (b"shape", [True, 2]),
        (b"shape", 2),
        (b"shape", [1] * 9),
        (b"shape", None),
        (b"data", "text"),
        (b"data", None),
        (b"data", b""),
    ],
)
def test_arrays_that_are_not_what_they_say(name: bytes, value: Any) -> None:
    with pytest.raises(CodecError, match=r"array of the message|An array of"):
        unpack(_changed(name, value))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x83",
        b"\xc1",
        OPENPI + b"\0",
        OPENPI[:-1],
        b"\x81\x91\x01\x02",  # a list as a key
        b"\x81\x80\x02",
        b"\xc7\x05\xff" + b"\0" * 5,  # a timestamp of no length that timestamps have
        plain({"a": {b"__npgeneric__": True, b"data": 300, b"dtype": "|u1"}}),
        plain({"a": {b"__npgeneric__": True, b"data": b"x", b"dtype": "<f4"}}),
        plain({"a": {b"__npgeneric__": True, b"data": "x", b"dtype": "<f4"}}),
        plain("\udc80", unicode_errors="surrogatepass"),
        b"\x91" * 5000 + b"\0",
        b"\xdd" + struct.pack(">I", 2**32 - 1),
        b"\xdf" + struct.pack(">I", 2**31),
        b"\xc6" + struct.pack(">I", 2**32 - 1) + b"abc",
    ],
)
def test_damaged_messages(data: bytes) -> None:
    with pytest.raises(CodecError):
        unpack(data)


def test_entries_are_limited_in_one_list_and_in_all() -> None:
    assert len(unpack(pack([0] * codec.MAX_LENGTH))) == codec.MAX_LENGTH
    with pytest.raises(CodecError, match="list or map of 8193 entries, and 8192 are read"):
        unpack(plain([0] * (codec.MAX_LENGTH + 1)))
    many = [[0] * codec.MAX_LENGTH] * (codec.MAX_ITEMS // codec.MAX_LENGTH + 1)
    with pytest.raises(CodecError, match="entries"):
        unpack(plain(many))


def test_little_cannot_announce_much() -> None:
    """Three bytes for 8192 entries, a thousand times inside one another, would take 64 MiB."""
    tracemalloc.start()
    try:
        for message in (b"\xdc\x20\x00" * 1000, b"\xde\x20\x00" * 1000, b"\x91" * 900 + b"\0"):
            with pytest.raises(CodecError, match=r"more entries of lists|inside one another"):
                unpack(message)
        with pytest.raises(CodecError, match="is of type"):
            unpack(plain({b"__ndarray__": True, b"data": b"", b"dtype": b"\0" * 2**20, b"shape": [1]}))
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()


MEBIBYTES = 16 * 2**20 - 100


class Counted(bytes):
    """A message that counts how often it is looked at."""

    looks = 0

    def __getitem__(self, place: Any) -> Any:
        self.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize(
    ("message", "text"),
    [
        (b"\xdd" + struct.pack(">I", MEBIBYTES) + b"\xc0" * MEBIBYTES, "list or map of"),
        (b"\xdf" + struct.pack(">I", MEBIBYTES // 2) + b"\xc0" * MEBIBYTES, "list or map of"),
        (b"\xdc\x20\x00" * 2000 + b"\xdc\x00\x00" * (MEBIBYTES // 3), "inside one another|entries"),
        (b"\xdc\x20\x00" * 2 + b"\xdc\x20\x00".join([b"\xc0" * 8192] * 2000), "entries"),
        (plain({"\x01" * MEBIBYTES: 1}), "a key of 16777116 bytes"),
        (plain({"k" * 257: 1}), "a key of 257 bytes, and keys of up to 256"),
        (plain({b"k" * 257: 1}), "a key of 257 bytes, and keys of up to 256"),
        (plain({"prompt": "a" * MEBIBYTES}), "text or extension of 16777116 bytes, and 65536 are read"),
        (plain([msgpack.ExtType(5, b"x" * (codec.MAX_TEXT + 1))]), "text or extension of 65537 bytes"),
    ],
    ids=["nils", "pairs", "deep", "wide", "key", "short-key", "bytes-key", "text", "extension"],
)
def test_what_is_refused_costs_little(message: bytes, text: str) -> None:
    """However long: no more heads are looked at than a message may have, and nothing is made of it."""
    counted = Counted(message)
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match=text) as error:
            unpack(counted)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()
    assert counted.looks <= 4 * codec.MAX_ITEMS
    assert len(str(error.value)) < 300


def test_the_longest_key_and_text_are_read() -> None:
    message = {"k" * codec.MAX_KEY: "a" * codec.MAX_TEXT}
    assert unpack(plain(message)) == message


@pytest.mark.parametrize(
    ("value", "what"),
    [
        (np.array(["j1", "joint 2"]), "an array of type <U7"),
        (np.array("push the puck"), "an array of type <U13"),
        (np.array([b"raw"]), "an array of type |S3"),
        (np.array(["2026-11-27"], "M8[s]"), "an array of type <M8[s]"),
        (np.array([5], "m8[us]"), "an array of type <m8[us]"),
        (np.zeros(2, "c8"), "an array of type <c8"),
        (msgpack.ExtType(5, b"x"), "a msgpack extension of type 5"),
        ({1: 2}, "a map with the key 1, which is not text"),
        ({b"key": 2}, "a map with the key b'key', which is not text"),
        ({None: 2}, "a map with the key None, which is not text"),
    ],
)
def test_what_the_protocol_has_no_use_for_is_passed_over(value: Any, what: str) -> None:
    """openpi's clients pack it so: the names of the joints are not needed, and the needed values stay right."""

    def as_openpi(array: Any) -> dict[bytes, Any]:
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}

    found = unpack(plain({"needed": np.ones(2), "other": [value]}, default=as_openpi))
    assert np.array_equal(found["needed"], np.ones(2))
    assert isinstance(found["other"][0], Unread)
    assert repr(found["other"][0]) == what


def test_a_timestamp_is_passed_over() -> None:
    stamp = msgpack.Timestamp(1, 2)
    assert unpack(plain({"stamp": stamp, "x": 1})) == {"stamp": stamp, "x": 1}


def test_the_dialect_of_msgpack_numpy_is_named() -> None:
    """Its clients could not read the answers."""
    array = {b"nd": True, b"type": "<f8", b"kind": b"", b"shape": (2,), b"data": b"\0" * 16}
    with pytest.raises(CodecError, match=r"packed by the package msgpack-numpy; .* openpi_client\.msgpack_numpy"):
        unpack(plain({"observation/state": array}))
    with pytest.raises(CodecError, match="msgpack-numpy"):
        unpack(plain({"observation/state": {b"nd": False, b"type": "<f8", b"data": b"\0" * 8}}))


@pytest.mark.parametrize(
    "value",
    [0, -1, 200, 70_000, 2**40, -200, -70_000, 0.5, "x" * 20, "x" * 40, "x" * 300, "x" * codec.MAX_TEXT, b"x" * 300],
)
def test_every_kind_of_value_is_stepped_over(value: Any) -> None:
    deep: Any = value
    for _ in range(codec.MAX_DEPTH - 2):
        deep = [deep]
    message = {"a": [value] * 20, "b": {str(key): value for key in range(20)}, "c": deep}
    assert unpack(plain(message)) == message
    with pytest.raises(CodecError, match="inside one another"):
        unpack(plain({"first": [value] * 20, "deep": [[deep]]}))


def test_ten_thousand_damaged_messages() -> None:
    """Nothing but a CodecError comes of them, and messages that pass are plain data that can be packed again."""
    random = np.random.default_rng(20261122)
    image = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    whole = pack({"image": image, "state": np.ones(4), "x": np.float32(1), "prompt": "go", "l": [1, [2, {"a": None}]]})
    passed = refused = 0
    for case in range(10_000):
        kind = case % 4
        data = bytearray(whole)
        if kind == 0:
            data = bytearray(random.bytes(int(random.integers(0, 80))))
        elif kind == 1:
            for place in random.integers(0, len(data), random.integers(1, 9)):
                data[place] = random.integers(0, 256)
        elif kind == 2:
            del data[random.integers(0, len(data)) :]
        else:
            start, size = random.integers(0, len(data)), random.integers(0, 40)
            data[start : start + size] = random.bytes(int(random.integers(0, 40)))
        try:
            found = unpack(bytes(data))
        except CodecError:
            refused += 1
            continue
        passed += 1
        if not _has_bytes(found):
            pack(found)
    assert passed > 200
    assert refused > 5000


def _has_bytes(value: Any) -> bool:
    """Return True for values that are received and not sent back: raw bytes, and values that the protocol does not
    use.
    """
    if isinstance(value, dict):
        return any(map(_has_bytes, value.values()))
    return any(map(_has_bytes, value)) if isinstance(value, list) else isinstance(value, (bytes, Unread))
