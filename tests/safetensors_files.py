"""Safetensors files, written by hand as the format says: right ones, and wrong ones by parts."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES = {"f8": "F64", "f4": "F32", "f2": "F16", "i8": "I64", "i4": "I32", "i2": "I16", "i1": "I8", "u1": "U8"}
DTYPES |= {"b1": "BOOL"}


def framed(header: bytes | str, data: bytes = b"") -> bytes:
    """A file of a header and of the bytes behind it."""
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + data


def safetensors_bytes(
    tensors: Mapping[str, NDArray[Any] | tuple[str, NDArray[Any]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """A file of arrays. `(dtype, bits)` gives a dtype that NumPy has not, as uint8 or uint16."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, value in tensors.items():
        dtype, array = value if isinstance(value, tuple) else (DTYPES[value.dtype.str[1:]], value)
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + array.nbytes],
        }
        data += array.tobytes()
    text = json.dumps(header)
    return framed(text + " " * (-len(text) % 8), data)


def write_model(directory: Path, shards: Mapping[str, Mapping[str, Any]]) -> Path:
    """A directory of shards by name, each of arrays, and their index."""
    directory.mkdir(parents=True, exist_ok=True)
    weight_map = {}
    for name, tensors in shards.items():
        (directory / name).write_bytes(safetensors_bytes(tensors))
        weight_map |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def ones(*shape: int) -> NDArray[np.float32]:
    return np.ones(shape, np.float32)


def split(directory: Path) -> None:
    """Make two shards and an index of a directory's model.safetensors."""
    data = (directory / "model.safetensors").read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    header = {name: entry for name, entry in json.loads(data[8 : 8 + length]).items() if name != "__metadata__"}
    tensors = {
        name: (
            entry["dtype"],
            np.frombuffer(data, np.uint8)[8 + length :][slice(*entry["data_offsets"])],
            entry["shape"],
        )
        for name, entry in header.items()
    }
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard, entries, end = f"model-{number:05}-of-00002.safetensors", {}, 0
        for name in part:
            dtype, stored, shape = tensors[name]
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end := end + len(stored)]}
        body = b"".join(tensors[name][1].tobytes() for name in part)
        (directory / shard).write_bytes(framed(json.dumps(entries), body))
        weight_map |= dict.fromkeys(part, shard)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
