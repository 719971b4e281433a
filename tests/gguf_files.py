"""GGUF files written by hand from Python data, so that tests can also write what no proper writer would."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)
_FORMS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}
_TENSOR_TYPES = {np.dtype(np.float32): (0, 4), np.dtype(np.float16): (1, 2)}


@dataclass
class Typed:
    """A metadata value of a chosen type; an array if `value` is a list or tuple."""

    type: int
    value: Any


@dataclass
class Blocks:
    """A tensor as raw bytes: ggml type number, shape in NumPy's order, and the data."""

    type: int
    shape: Sequence[int]
    data: bytes
    offset: int | None = None  # instead of the next free one


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def scalar(type: int, value: Any) -> bytes:
    return string(value) if type == STR else struct.pack("<" + _FORMS[type], value)


def array(type: int, values: Sequence[Any], count: int | None = None) -> bytes:
    head = struct.pack("<IQ", type, len(values) if count is None else count)
    if type == ARR:
        return head + b"".join(array(_type_of(v[0]) if len(v) else I32, v) for v in values)
    if type not in (STR, BOOL):
        return head + struct.pack(f"<{len(values)}{_FORMS[type]}", *values)
    return head + b"".join(scalar(type, v) for v in values)


def _type_of(value: Any) -> int:
    kinds: list[tuple[type | tuple[type, ...], int]] = [
        (bool, BOOL),
        (int, I64 if isinstance(value, int) and not 0 <= value < 1 << 32 else U32),
        (float, F32),
        ((str, bytes), STR),
        ((list, tuple), ARR),
    ]
    return next(number for kind, number in kinds if isinstance(value, kind))


def key_value(key: str | bytes, value: Any) -> bytes:
    """The bytes of one entry; `bytes` as a value are what follows the key, taken as they are."""
    if isinstance(value, bytes):
        return string(key) + value
    kind = value.type if isinstance(value, Typed) else None
    value = value.value if isinstance(value, Typed) else value
    if isinstance(value, np.ndarray):
        value, kind = value.tolist(), {"f": F32, "i": I32, "u": U32, "b": BOOL}[value.dtype.kind]
    if isinstance(value, list | tuple):
        item = kind if kind is not None else _type_of(value[0])
        return string(key) + struct.pack("<I", ARR) + array(item, value)
    kind = _type_of(value) if kind is None else kind
    return string(key) + struct.pack("<I", kind) + scalar(kind, value)


def tensor_info(name: str | bytes, dims: Sequence[int], type: int, offset: int, num_dims: int | None = None) -> bytes:
    """`dims` in the file's order, fastest first."""
    num_dims = len(dims) if num_dims is None else num_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", num_dims, *dims, type, offset)


def header(num_tensors: int, num_keys: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, num_tensors, num_keys)


def gguf_bytes(
    metadata: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]] = (),
    tensors: Mapping[str, Any] | Sequence[tuple[str | bytes, Any]] = (),
    version: int = 3,
    alignment: int = 32,
    num_tensors: int | None = None,
    num_keys: int | None = None,
) -> bytes:
    """A GGUF file. A tensor is a float32 or float16 array, or `Blocks`; counts can be forged."""
    entries = list(metadata.items() if isinstance(metadata, Mapping) else metadata)
    named = list(tensors.items() if isinstance(tensors, Mapping) else tensors)
    if alignment != 32 and "general.alignment" not in dict(entries):
        entries.append(("general.alignment", Typed(U32, alignment)))
    infos, data = b"", b""
    for name, tensor in named:
        if isinstance(tensor, np.ndarray):
            number, size = _TENSOR_TYPES[tensor.dtype]
            tensor = Blocks(number, tensor.shape, tensor.tobytes())
            assert len(tensor.data) == prod(tensor.shape) * size
        data += bytes(-len(data) % alignment)
        offset = len(data) if tensor.offset is None else tensor.offset
        infos += tensor_info(name, tuple(reversed(tensor.shape)), tensor.type, offset)
        data += tensor.data
    head = header(
        len(named) if num_tensors is None else num_tensors, len(entries) if num_keys is None else num_keys, version
    )
    head += b"".join(key_value(key, value) for key, value in entries) + infos
    return head + bytes(-len(head) % alignment) + data if data else head


def write_gguf(path: Path, *args: Any, **kwargs: Any) -> Path:
    """`gguf_bytes` in a file; returns the path."""
    path.write_bytes(gguf_bytes(*args, **kwargs))
    return path
