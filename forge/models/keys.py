"""The keys of a GGUF file below its architecture's prefix, checked."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.errors import FormatError, UnsupportedError
from forge.formats.checkpoint import Checkpoint
from forge.models.family import Arch

_MAX_LAYERS = 1024
MAX_COUNT = 2**31 - 1


class Keys:
    """Reads keys, for all layers or for each."""

    def __init__(self, file: Checkpoint, name: str, arch: Arch) -> None:
        self.file, self.name, self.arch = file, name, arch
        self.stored_layers = file.get_int(f"{name}.block_count", min=1, max=_MAX_LAYERS)
        """With those of multi-token prediction, which are not run."""
        prediction = file.get_int(f"{name}.nextn_predict_layers", 0, max=self.stored_layers - 1)
        self.layers = self.stored_layers - prediction

    def count(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
        """A whole number; a file may give it per layer, then all layers must agree."""
        found = self.counts(key, default, minimum=minimum, maximum=maximum)
        if len(set(found)) > 1:
            full = f"{self.name}.{key}"
            raise UnsupportedError(f"{self.file.path}: {full} differs between layers, which is not supported")
        return found[0]

    def counts(
        self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = MAX_COUNT
    ) -> tuple[int, ...]:
        """A whole number of each layer; a file may give one for all of them."""
        full = f"{self.name}.{key}"
        value = self.file.metadata.get(full)
        if not isinstance(value, np.ndarray):
            return (self.file.get_int(full, default, min=minimum, max=maximum),) * self.layers
        entries = tuple(int(entry) for entry in self.per_layer(full, value, "iu"))
        for entry in entries:
            if not minimum <= entry <= maximum:
                raise FormatError(f"{self.file.path}: key {full!r} should be from {minimum} to {maximum}, not {entry}")
        return entries

    def per_layer(self, key: str, entries: npt.NDArray[Any], kinds: str) -> npt.NDArray[Any]:
        """The entries of the layers that run; like llama.cpp, of an array with one for each layer in the file."""
        if entries.dtype.kind not in kinds:
            raise FormatError(f"{self.file.path}: key {key!r} should not hold {entries.dtype.name} numbers")
        if len(entries) != self.stored_layers:
            raise FormatError(
                f"{self.file.path}: key {key!r} has {len(entries)} entries for {self.stored_layers} layers"
            )
        return entries[: self.layers]

    def number(
        self, key: str, default: float | None = None, *, minimum: float = -math.inf, maximum: float = math.inf
    ) -> float:
        """A finite number within the bounds. Raises FormatError for another value, or for none without a default."""
        return self.file.get_float(f"{self.name}.{key}", default, min=minimum, max=maximum)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value, which a file may give as a number."""
        value = self.file.metadata.get(f"{self.name}.{key}", default)
        if not isinstance(value, int | float):
            raise FormatError(f"{self.file.path}: key '{self.name}.{key}' should be a truth value")
        return bool(value)
