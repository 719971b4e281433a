"""GGUF model files, version 2 and 3, little-endian: a validating reader.

Format: docs/gguf.md of ggml. Opening a file reads no weights, and the strings of an array are decoded when they are
used. Reading a file that has changed since it was opened is an error.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np

from forge.errors import FormatError, ParameterError, UnsupportedError
from forge.formats.blocks import Bytes, Floats
from forge.formats.ggml import dequantize
from forge.formats.gguf_header import Header, StringArray, TensorInfo, Value, parse_header
from forge.formats.source import show

__all__ = ["GGUF", "StringArray", "TensorInfo", "Value", "read"]

_SHARD_NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.DOTALL)
_MAX_SHARDS = 65_535


class GGUF:
    """An open model file with all its shards: `path`, `version`, `metadata` (of the first shard), `tensors`."""

    def __init__(self, shards: list[Header]) -> None:
        self.path = shards[0].path
        self.version = shards[0].version
        self.metadata: Mapping[str, Value] = MappingProxyType(shards[0].metadata)
        self._shards = shards
        self._homes: dict[str, Header] = {}
        tensors: dict[str, TensorInfo] = {}
        for shard in shards:
            for name in shard.tensors.keys() & tensors.keys():
                raise FormatError(f"{shard.path}: tensor {show(name)} is in {self._homes[name].path.name} as well")
            tensors |= shard.tensors
            self._homes |= dict.fromkeys(shard.tensors, shard)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(tensors)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file. Arrays that were read before stay valid."""
        for shard in self._shards:
            shard.source.close()
        self.metadata, self.tensors = {}, {}
        self._homes, self._shards = {}, []

    def check_path(self) -> None:
        """Raises FormatError if another file has replaced this one, or a shard, since it was opened."""
        for shard in self._shards:
            shard.source.check_path()

    def tensor(self, name: str) -> TensorInfo:
        """The info of a tensor. Raises FormatError if the file lacks it."""
        if name not in self.tensors:
            raise FormatError(f"{self.path}: tensor {show(name)} is missing")
        return self.tensors[name]

    def raw(self, name: str, rows: slice = slice(None), out: Bytes | None = None) -> Bytes:
        """Blocks of a tensor as stored, uint8 (rows, row_bytes). They are read into `out` if it is given."""
        info = self.tensor(name)
        num_rows = math.prod(info.shape[:-1])
        width = info.nbytes // num_rows
        start, stop, _ = rows.indices(num_rows)
        if out is None:
            out = np.empty((max(stop - start, 0), width), np.uint8)
        elif out.shape != (stop - start, width) or out.dtype != np.uint8 or not out.flags.c_contiguous:
            raise ParameterError(
                f"out: expected C-contiguous uint8 {(stop - start, width)}, not {out.dtype} {out.shape}",
                parameter="out",
            )
        self._homes[name].source.read(info.offset + start * width, out)
        return out

    def load(self, name: str) -> Floats:
        """Weights of a tensor, float32 in its shape. UnsupportedError for a type that cannot be dequantized."""
        return self.load_rows(name, slice(None)).reshape(self.tensor(name).shape)

    def load_rows(self, name: str, rows: slice, out: Floats | None = None) -> Floats:
        """Weights of some rows of a tensor, float32 (rows, columns)."""
        try:
            return dequantize(self.raw(name, rows), self.tensors[name].type, out)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.path}: tensor {show(name)}: {error}") from None

    def get_int(self, key: str, default: int | None = None, *, min: int = 0, max: int = 2**63 - 1) -> int:
        """The integer of a key, or `default` if the key is missing. All getters raise FormatError for another value."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not min <= value <= max:
            raise self._wrong(key, f"an integer from {min} to {max}", value)
        return value

    def get_float(
        self, key: str, default: float | None = None, *, min: float = -math.inf, max: float = math.inf
    ) -> float:
        """The finite number of a key, which may be an integer."""
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self._wrong(key, "a finite number", value)
        if not min <= value <= max:
            raise self._wrong(key, f"a number from {min} to {max}", value)
        return float(value)

    def get_str(self, key: str, default: str | None = None) -> str:
        """The string of a key. Bytes that are not UTF-8 are U+FFFD."""
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, "a string", value)
        return value

    def _get(self, key: str, default: Value | None) -> Value:
        value = self.metadata.get(key, default)
        if value is None:
            raise FormatError(f"{self.path}: key {show(key)} is missing")
        return value

    def _wrong(self, key: str, expected: str, value: Value) -> FormatError:
        return FormatError(f"{self.path}: key {show(key)} should be {expected}, not {show(value)}")


def read(path: str | Path) -> GGUF:
    """Open a GGUF file. A sharded one is opened by its first shard (name-00001-of-00003.gguf).

    Raises FormatError for a file that is not readable, truncated, forged or foreign, and UnsupportedError for other
    versions, byte orders and tensor types.
    """
    path = Path(path)
    first = GGUF([parse_header(path)])
    count = first.get_int("split.count", 1, max=_MAX_SHARDS)
    if count < 2:
        return first
    number = first.get_int("split.no", max=count - 1) + 1
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or (int(name[2]), int(name[3])) != (number, count):
        raise FormatError(f"{path}: is shard {number} of {count} and should be named *-{number:05}-of-{count:05}.gguf")
    paths = [path.with_name(f"{name[1]}-{i + 1:05}-of-{count:05}.gguf") for i in range(count)]
    if number > 1:
        raise FormatError(f"{path}: is shard {number} of {count}: open the first, {paths[0].name}")
    whole = GGUF([*first._shards, *(_sibling(paths, i) for i in range(1, count))])
    expected = first.get_int("split.tensors.count", len(whole.tensors))
    if expected != len(whole.tensors):
        raise FormatError(f"{path}: the shards have {len(whole.tensors)} tensors and should have {expected}")
    return whole


def _sibling(paths: list[Path], index: int) -> Header:
    path = paths[index]
    if not path.exists():
        raise FormatError(f"{path}: shard {index + 1} of {len(paths)} is missing: put it beside {paths[0].name}")
    header = parse_header(path)
    shard = GGUF([header])
    found = shard.get_int("split.no") + 1, shard.get_int("split.count")
    if found != (index + 1, len(paths)):
        raise FormatError(f"{path}: says it is shard {found[0]} of {found[1]}: the shards do not belong together")
    return header
