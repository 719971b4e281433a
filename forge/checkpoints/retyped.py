"""A checkpoint whose tensors have other types: each row is converted when it is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType

from forge.errors import ParameterError, UnsupportedError
from forge.formats.blocks import Bytes
from forge.formats.checkpoint import Checkpoint, TensorInfo
from forge.formats.ggml import GGMLType, nbytes
from forge.formats.quantize import QUANTIZERS, quantize
from forge.formats.source import show

_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
    "IQ4_NL": 25,
    "BF16": 32,
    "MXFP4": 38,
}
"""`general.file_type` of a file of one type, by llama.cpp's table: of several the smallest mixture."""
_QUANTIZATION_VERSION = 2

_ALWAYS_FLOAT32 = re.compile(r".*_norm\.weight|.*\.ffn_gate_inp(_shexp)?\.weight|position_embd\.weight|.*(?<!\.weight)")
"""Matrices that llama.cpp's converter writes as float32: norms, routers, positions, and what is no weight."""


class Retyped(Checkpoint):
    """A model with its matrices in one type, or as they are (None), and the keys that say so. It closes the model.

    Attributes:
        kept: How many matrices have not the type that was asked for, as their rows are no multiple of its blocks: they
            are float16.
        twice: The quantized types whose weights were quantized anew.
    """

    def __init__(self, model: Checkpoint, type: GGMLType | None) -> None:
        self._model = model
        self.path, self.paths, self.format, self.version = model.path, model.paths, model.format, model.version
        self.value_types = model.value_types
        self.kept = 0
        found: dict[str, TensorInfo] = {}
        twice = Counter[GGMLType]()
        for name, info in model.tensors.items():
            chosen = info.type if type is None else self._chosen(info, type)
            found[name] = TensorInfo(name, info.shape, chosen, nbytes(chosen, info.shape))
            if min(info.type.block_size, chosen.block_size) > 1 and chosen != info.type:
                twice[info.type] += 1
        self.twice = tuple(twice)
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(found)
        number = _FILE_TYPES.get((type or _usual(found)).name)
        numbers = {"general.quantization_version": _QUANTIZATION_VERSION}
        numbers |= {} if number is None else {"general.file_type": number}
        self.metadata = MappingProxyType({"general.name": model.path.name, **model.metadata, **numbers})

    def _chosen(self, info: TensorInfo, type: GGMLType) -> GGMLType:
        if len(info.shape) < 2 or _ALWAYS_FLOAT32.fullmatch(info.name):
            return GGMLType.F32
        if info.shape[-1] % type.block_size:
            self.kept += 1
            return GGMLType.F16
        return type

    def close(self) -> None:
        self._model.close()

    def check_path(self) -> None:
        self._model.check_path()

    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None:
        rows = slice(start, start + len(out))
        if self._model.tensors[info.name].type == info.type:
            self._model.raw(info.name, rows, out)
            return
        try:
            quantize(self._model.load_rows(info.name, rows), info.type, out)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.path}: tensor {show(info.name)}: {error}") from None


def _usual(tensors: Mapping[str, TensorInfo]) -> GGMLType:
    """The type of the most bytes."""
    sizes = Counter[GGMLType]()
    for info in tensors.values():
        sizes[info.type] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else GGMLType.F32


def type_named(name: str) -> GGMLType:
    """The type of a name, in any case. Raises ParameterError for one that nothing writes."""
    known = {type.name: type for type in QUANTIZERS if type.name in _FILE_TYPES}
    if name.upper() not in known:
        raise ParameterError(f"type must be one of {', '.join(known)}, not {name!r:.40}", parameter="type")
    return known[name.upper()]
