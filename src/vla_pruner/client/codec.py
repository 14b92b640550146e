"""openpi's msgpack format, to the byte: maps, lists, numbers, text, and numpy arrays as small maps with bytes keys.

An incoming message is data and never code: there is no pickle, and arrays are of numbers alone. The heads of a message
are read first, and one that is too deep, has too many entries or is too long is refused there, before anything is made
of it.
"""

from __future__ import annotations

import math
import re
from typing import Any

import msgpack
import numpy as np

from vla_pruner.client.errors import CodecError
from vla_pruner.strangers import Unread, shown

MAX_ITEMS = 100_000
"""Entries of all lists and maps of one message together. Numbers of an array are not entries."""
MAX_LENGTH = 8_192
"""Entries of one list or map."""
MAX_DEPTH = 32
"""Lists and maps inside one another."""
MAX_TEXT, MAX_KEY = 65_536, 256
"""Bytes of a text (in UTF-8) or a msgpack extension, and of a map's key."""
MAX_DIMENSIONS, MAX_SIZE = 8, 2**31 - 1
"""The largest number of an array's dimensions, and of elements in each of them."""

_NUMBERS = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_OTHERS = re.compile(r"[<>|=]?([USmMc][0-9]{0,9})(\[[0-9a-zA-Zμ]{1,9}\])?")
_TEXT = re.compile(r"[<>|=]?U[0-9]{1,9}")
_ARRAY, _SCALAR = b"__ndarray__", b"__npgeneric__"


def pack(value: Any) -> bytes:
    """Return a message.

    Args:
        value: maps with text keys, lists, text, numbers, and numpy arrays and scalars. Tuples become lists.

    Raises:
        CodecError: it holds something else, or an array of objects, records or complex numbers.
    """
    try:
        return msgpack.packb(value, default=_packable)  # type: ignore[return-value]
    except CodecError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise CodecError(f"The message cannot be packed: {error}.") from error


def unpack(data: bytes) -> Any:
    """Return the content of a message; arrays are read-only views of `data` in the machine's own byte order. Values
    that are not of the protocol are `Unread`.

    Raises:
        CodecError: it is damaged, too deep, has too many entries or is too long, or an array does not fit its header.
    """
    _check_heads(data)
    try:
        return msgpack.unpackb(
            data,
            object_hook=_map,
            ext_hook=_extension,
            strict_map_key=False,
            max_array_len=MAX_LENGTH,
            max_map_len=MAX_LENGTH,
            max_str_len=MAX_TEXT,
            max_ext_len=MAX_TEXT,
        )
    except CodecError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        reason = str(error) or type(error).__name__
        raise CodecError(f"The message is not msgpack as openpi's clients send it: {reason}.") from error


_WIDTHS = dict(zip(range(0xCA, 0xD9), (4, 8, 1, 2, 4, 8, 1, 2, 4, 8, 2, 3, 5, 9, 17), strict=True))
"""Bytes after the head of numbers and small extensions."""
_LENGTHS = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xC7: 1, 0xC8: 2, 0xC9: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Bytes of the length that bytes, extensions and text begin with."""
_COUNTS: dict[int, tuple[int, int]] = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}
"""Bytes of the number of entries of lists and maps, and values in an entry."""


def _check_heads(data: bytes) -> None:
    """Read the heads alone, and no more of them than a message may have. msgpack finds damage of any other kind."""
    place, items = 0, 0
    left, maps = [1], [False]  # values to come of each list or map that is open, and which of them are maps
    while left and place < len(data):
        if not left[-1]:
            left.pop()
            maps.pop()
            continue
        is_key = maps[-1] and not left[-1] % 2
        left[-1] -= 1
        head, place = data[place], place + 1
        if 0x80 <= head < 0xA0 or head in _COUNTS:
            small = 0, 1 if head >= 0x90 else 2
            width, values = _COUNTS.get(head, small)
            count = int.from_bytes(data[place : place + width], "big") if width else head & 15
            place += width
            items += count
            if is_key:
                raise CodecError("A map of the message has a list or map as a key; keys are text.")
            if count > MAX_LENGTH:
                raise CodecError(
                    f"The message has a list or map of {count} entries, and {MAX_LENGTH} are read; send numbers as "
                    "arrays."
                )
            if items > MAX_ITEMS:
                raise CodecError(
                    f"The message has more than {MAX_ITEMS} entries in its lists and maps; send numbers as arrays."
                )
            left.append(values * count)
            maps.append(values == 2)
            if len(left) > MAX_DEPTH + 1:
                raise CodecError(f"The message has more than {MAX_DEPTH} lists and maps inside one another.")
            if sum(left) > len(data) - place:
                raise CodecError("The message announces more entries of lists and maps than it has bytes.")
            continue
        size = 0
        if 0xA0 <= head < 0xC0:
            size = head & 31
        elif head in _LENGTHS:
            width = _LENGTHS[head]
            size = int.from_bytes(data[place : place + width], "big")
            place += width + (0xC7 <= head <= 0xC9)
        else:
            place += _WIDTHS.get(head, 0)
        place += size
        if is_key and size > MAX_KEY:
            raise CodecError(f"A map of the message has a key of {size} bytes, and keys of up to {MAX_KEY} are read.")
        if size > MAX_TEXT and not 0xC4 <= head <= 0xC6:  # arrays are made of bytes
            raise CodecError(
                f"The message has a text or extension of {size} bytes, and {MAX_TEXT} are read; send numbers as arrays."
            )


def _packable(value: Any) -> Any:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise CodecError(
            f"A {type(value).__name__} cannot be packed; a message holds maps, lists, text, numbers and numpy arrays."
        )
    if value.dtype.kind in "VOc":
        raise CodecError(f"Arrays of {value.dtype} cannot be packed; send booleans, whole numbers or floats.")
    if isinstance(value, np.ndarray):
        return {_ARRAY: True, b"data": value.tobytes(), b"dtype": value.dtype.str, b"shape": value.shape}
    return {_SCALAR: True, b"data": value.item(), b"dtype": value.dtype.str}


def _map(values: dict[Any, Any]) -> Any:
    if _ARRAY in values:
        return _array(values)
    if _SCALAR in values:
        return _scalar(values)
    if b"nd" in values:
        raise CodecError(
            "The message is packed by the package msgpack-numpy; this protocol has openpi's format of arrays, which "
            "openpi_client.msgpack_numpy and vla_pruner.client pack."
        )
    for key in values:
        if not isinstance(key, str):
            return Unread(f"a map with the key {shown(key)}, which is not text")
    return values


def _array(fields: dict[Any, Any]) -> np.ndarray | Unread:
    name = fields.get(b"dtype")
    if isinstance(name, str) and _OTHERS.fullmatch(name):
        return Unread(f"an array of type {name}")
    data, dtype, shape = fields.get(b"data"), _dtype(name), fields.get(b"shape")
    if not isinstance(data, bytes):
        raise CodecError("An array of the message has no bytes as its data.")
    sizes: list[Any] = shape if isinstance(shape, list) else [None]
    if len(sizes) > MAX_DIMENSIONS or not all(type(size) is int and 0 <= size <= MAX_SIZE for size in sizes):
        raise CodecError(
            f"An array of the message has the shape {shown(shape)}; a shape is a list of up to {MAX_DIMENSIONS} sizes "
            "of 0 or more."
        )
    expected = math.prod(sizes) * dtype.itemsize
    if expected != len(data):
        raise CodecError(
            f"An array of shape {tuple(sizes)} and type {dtype.name} takes {expected} bytes; the message has "
            f"{len(data)} of it."
        )
    found = np.ndarray(buffer=data, dtype=dtype, shape=sizes)
    if dtype.isnative:
        return found
    swapped = found.astype(dtype.newbyteorder("="))
    swapped.setflags(write=False)
    return swapped


def _scalar(fields: dict[Any, Any]) -> Any:
    data, name = fields.get(b"data"), fields.get(b"dtype")
    if isinstance(name, str) and _TEXT.fullmatch(name) and isinstance(data, str):
        return data
    dtype = _dtype(name)
    wanted = {"b": (bool,), "i": (int,), "u": (int,), "f": (float, int)}[dtype.kind]
    if type(data) not in wanted:
        raise CodecError(f"A number of the message is of type {dtype.name}, but its value is {shown(data)}.")
    try:
        with np.errstate(over="ignore"):  # a float that is too large becomes infinite, as in an array
            return dtype.newbyteorder("=").type(data)
    except (OverflowError, ValueError) as error:
        raise CodecError(f"A number of the message does not fit its type: {error}.") from error


def _dtype(name: Any) -> np.dtype:
    # Text that numpy would read as records or objects never reaches it.
    if not isinstance(name, str) or not _NUMBERS.fullmatch(name):
        raise CodecError(
            f"An array of the message is of type {shown(name)}; supported are booleans, whole numbers of 1 to 8 bytes "
            "and floats of 2 to 8."
        )
    return np.dtype(name)


def _extension(code: int, data: bytes) -> Unread:
    return Unread(f"a msgpack extension of type {code}")
