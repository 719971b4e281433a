"""What a model is read through, whatever files it lies in: `Checkpoint`.

Its words are those of GGUF: llama.cpp's keys and names of tensors, ggml's types. A reader of another format translates
into them.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError, ParameterError, UnsupportedError
from forge.formats.blocks import Bytes, Floats
from forge.formats.ggml import GGMLType, dequantize
from forge.formats.source import U64, show


class StringArray:
    """The strings of an array, decoded during iteration. Bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, data: memoryview, start: int, stop: int, count: int) -> None:
        self._data, self._start, self._stop, self._count = data, start, stop, count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[str]:
        data, position, length_at = bytes(self._data[self._start : self._stop]), 0, U64.unpack_from
        for _ in range(self._count):
            start = position + 8
            position = start + length_at(data, position)[0]
            yield str(data[start:position], "utf-8", "replace")

    def packed(self) -> memoryview:
        """The strings as the file has them: each behind its length of 8 bytes."""
        return self._data[self._start : self._stop]

    def __repr__(self) -> str:
        return f"<{self._count} strings>"


Value = bool | int | float | str | StringArray | NDArray[Any] | list["Value"]


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor. `shape` has the slowest dimension first.

    `offset` counts bytes from the start of the file that it lies in; 0 = it is put together when it is read.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    nbytes: int
    offset: int = 0


class Checkpoint(ABC):
    """An open model: `path` of its first file or its directory, `metadata`, `tensors`.

    `format` is the name of what it lies in, with a `version` if formats of this name have one. `paths` are the files
    of its weights. `value_types` has GGUF's numbers of the types of values, where the file says them. `notes` are
    remarks on what was decided, a line each.
    """

    path: Path
    format: str
    version: int | None = None
    value_types: Mapping[str, int] = MappingProxyType({})
    notes: tuple[str, ...] = ()
    paths: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, TensorInfo]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None:
        """Close the files. Arrays that were read before stay valid."""

    @abstractmethod
    def check_path(self) -> None:
        """Raises FormatError if another file has replaced one of these at its path since it was opened."""

    @abstractmethod
    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None:
        """Fill `out`, uint8 (rows, row_bytes), with the rows of a tensor from row `start` on. Threads may call it."""

    def source(self, name: str) -> "Checkpoint":
        """What has a tensor as it is stored: the checkpoint itself, or one whose weights become others when they are
        read."""
        return self

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
        self._read(info, start, out)
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
