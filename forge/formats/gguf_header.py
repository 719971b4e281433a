"""The header of one GGUF file: key-values and tensor infos, validated against the file's size.

No memory is allocated in proportion to a number in the file before the file is known to hold as many bytes.
"""

from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.errors import UnsupportedError
from forge.formats.checkpoint import StringArray, TensorInfo, Value
from forge.formats.ggml import TYPE_OF_NUMBER, nbytes
from forge.formats.source import U64, Cursor, Source, guess, show

# Most bytes of a header, even in a sparse file of terabytes. Large vocabularies take 12 MB.
MAX_HEADER_BYTES = 64 << 20
MAX_COUNT = 1 << 16  # key-values, tensors: twenty times the numbers of the largest models
MAX_KEY_BYTES = 65_535
MAX_NAME_BYTES = 64
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

BOOL, STRING, ARRAY = 7, 8, 9
NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    BOOL: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_U32, _ARRAY_HEAD, _COUNTS = Struct("<I"), Struct("<IQ"), Struct("<QQ")

# Fewest bytes of a key-value (length, key, type, value) and of a tensor info (length, name, shape, type, offset).
_MIN_KEY_VALUE = 8 + 1 + 4 + 1
_MIN_TENSOR_INFO = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True, slots=True)
class Header:
    """The parsed header of one file, and the open file. `end` is the first byte behind the header.

    `types` are the numbers of the types of `metadata`'s values.
    """

    path: Path
    source: Source
    version: int
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    end: int
    types: dict[str, int] = field(default_factory=dict)


def parse_header(path: Path) -> Header:
    """Open and validate a file. Raises FormatError or UnsupportedError with the file's name."""
    source = Source(path)
    cursor = Cursor(source, MAX_HEADER_BYTES)
    version = _version(cursor)
    num_tensors, num_keys = cursor.numbers(_COUNTS, "the header")
    least = num_tensors * _MIN_TENSOR_INFO + num_keys * _MIN_KEY_VALUE
    if least > cursor.left or max(num_tensors, num_keys) > MAX_COUNT:
        raise cursor.error(f"{num_tensors} tensors and {num_keys} keys are more than {cursor.left} bytes may hold")
    metadata: dict[str, Value] = {}
    types: dict[str, int] = {}
    for i in range(num_keys):
        key = cursor.name(MAX_KEY_BYTES, f"key {i + 1} of {num_keys}")
        if key in metadata:
            raise cursor.error(f"key {show(key)} is there twice")
        where = f"key {show(key)}"
        types[key] = cursor.number(_U32, where)
        metadata[key] = _value(cursor, types[key], where)
    alignment = _alignment(cursor, metadata)
    infos: dict[str, TensorInfo] = {}
    for i in range(num_tensors):
        info = _tensor_info(cursor, f"tensor {i + 1} of {num_tensors}")
        if info.name in infos:
            raise cursor.error(f"tensor {show(info.name)} is there twice")
        infos[info.name] = info
    start = -(-cursor.position // alignment) * alignment
    return Header(path, source, version, metadata, _place(cursor, infos, start, alignment), cursor.position, types)


def _version(cursor: Cursor) -> int:
    cursor.fill(min(32, cursor.stop))
    magic = bytes(cursor.data[:32])
    if not magic.startswith(b"GGUF"):
        raise cursor.error(f"is not a GGUF file; it looks like {guess(magic, cursor.path)}")
    cursor.take(4, "the magic number")
    version = cursor.number(_U32, "the version")
    if version in (2, 3):
        return version
    if version & 0xFFFF == 0 and version:
        raise UnsupportedError(f"{cursor.path}: is big-endian: convert the model again, as little-endian")
    raise UnsupportedError(f"{cursor.path}: is GGUF version {version}, only 2 and 3 are known: convert the model again")


def _value(cursor: Cursor, type: int, where: str, depth: int = 0) -> Value:
    if type == STRING:
        return str(cursor.bytes(where), "utf-8", "replace")
    if type != ARRAY:
        value: Value = _numbers(cursor, type, 1, where)[0].item()
        return value
    item, count = cursor.numbers(_ARRAY_HEAD, where)
    if item == STRING:
        return _strings(cursor, count, where)
    if item != ARRAY:
        return _numbers(cursor, item, count, where)
    if depth == MAX_ARRAY_DEPTH - 1:
        raise cursor.error(f"{where} has arrays nested deeper than {MAX_ARRAY_DEPTH}")
    if count * _ARRAY_HEAD.size > cursor.left:
        raise cursor.error(f"{where} claims {count} arrays beyond the end of the file: it is truncated or forged")
    return [_value(cursor, ARRAY, where, depth + 1) for _ in range(count)]


def _numbers(cursor: Cursor, type: int, count: int, where: str) -> NDArray[Any]:
    """Numbers of an array: a read-only view of the file's bytes, not always aligned."""
    if type not in NUMBERS:
        raise cursor.error(f"{where} has the unknown value type {type}")
    dtype = np.dtype(NUMBERS[type])
    start = cursor.take(count * dtype.itemsize, where)
    if type == BOOL and np.ndarray(count, np.uint8, cursor.data, start).max(initial=0) > 1:
        raise cursor.error(f"{where} is a boolean that is neither 0 nor 1")
    return np.ndarray(count, dtype, cursor.data, start)


def _strings(cursor: Cursor, count: int, where: str) -> StringArray:
    start = position = cursor.position
    data, length_at, last, known = cursor.data, U64.unpack_from, cursor.stop - 8, cursor.filled - 8
    if count * 8 <= cursor.left:
        for _ in range(count):
            if position > known:
                if position > last:
                    break
                cursor.fill(position + 8)
                known = cursor.filled - 8
            position += 8 + length_at(data, position)[0]
        else:
            cursor.take(position - start, where)
            return StringArray(data, start, position, count)
    raise cursor.error(f"{where} claims {count} strings beyond the end of the file: it is truncated or forged")


def _alignment(cursor: Cursor, metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
        raise cursor.error(f"key 'general.alignment' should be a power of 2 to {MAX_ALIGNMENT}, not {show(alignment)}")
    return alignment


def _tensor_info(cursor: Cursor, where: str) -> TensorInfo:
    """Parse a tensor info. Its `offset` still counts from the start of the data section."""
    name = cursor.name(MAX_NAME_BYTES, where)
    where = f"tensor {show(name)}"
    num_dims = cursor.number(_U32, where)
    if not 1 <= num_dims <= MAX_DIMS:
        raise cursor.error(f"{where} has {num_dims} dimensions, allowed are 1 to {MAX_DIMS}")
    shape = cursor.numbers(Struct(f"<{num_dims}Q"), where)[::-1]
    if not 1 <= prod(shape) < 1 << 63:
        raise cursor.error(f"{where} has the impossible shape {shape}")
    number = cursor.number(_U32, where)
    if number not in TYPE_OF_NUMBER:
        raise UnsupportedError(f"{cursor.path}: {where} has the unknown type {number}")
    type = TYPE_OF_NUMBER[number]
    if shape[-1] % type.block_size:
        raise cursor.error(f"{where} has rows of {shape[-1]}, no multiple of {type.name}'s block of {type.block_size}")
    return TensorInfo(name, shape, type, nbytes(type, shape), cursor.number(U64, where))


def _place(cursor: Cursor, infos: dict[str, TensorInfo], start: int, alignment: int) -> dict[str, TensorInfo]:
    """Infos with offsets from the start of the file. Raises unless tensors are aligned, in the file and disjoint."""
    placed: dict[str, TensorInfo] = {}
    for name, info in infos.items():
        offset = start + info.offset
        if info.offset % alignment:
            raise cursor.error(f"tensor {show(name)} at offset {info.offset} is not aligned to {alignment} bytes")
        if offset + info.nbytes > cursor.source.size:
            raise cursor.error(
                f"tensor {show(name)} ends at byte {offset + info.nbytes} and the file at {cursor.source.size}: "
                "it is truncated; download it again"
            )
        placed[name] = TensorInfo(name, info.shape, info.type, info.nbytes, offset)
    end, before = start, ""
    for info in sorted(placed.values(), key=lambda info: info.offset):
        if info.offset < end:
            raise cursor.error(f"tensors {show(before)} and {show(info.name)} overlap")
        end, before = info.offset + info.nbytes, info.name
    return placed
