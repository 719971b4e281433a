"""A checkpoint whose tensors have other types: each row is converted when it is read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import numpy as np

from forge import _files
from forge.checkpoints.recipes import check_recipe, new_types
from forge.errors import UnsupportedError
from forge.formats.blocks import Bytes
from forge.formats.checkpoint import Checkpoint, TensorInfo, Value
from forge.formats.ggml import GGMLType, nbytes
from forge.formats.quantize import quantize
from forge.formats.source import show

_FLOATS = {type.name: type for type in (GGMLType.F32, GGMLType.F16, GGMLType.BF16)}
_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q4_K": 14,
    "Q4_K_M": 15,
    "Q5_K": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "BF16": 32,
    "MXFP4": 38,
}
"""`general.file_type`, by llama.cpp's table: of a K type its smallest mixture."""
_QUANTIZATION_VERSION = 2

_ALWAYS_FLOAT32 = re.compile(r".*_norm\.weight|.*\.ffn_gate_inp(_shexp)?\.weight|position_embd\.weight|.*(?<!\.weight)")
"""Matrices that llama.cpp's converter writes as float32: norms, routers, positions, and what is no weight."""


class Retyped(Checkpoint):
    """A model with some tensors in other types, and the keys that say so. It closes the model.

    Matrices of GPTQ, AWQ and ONNX in 4 bits become Q4_1 where all types stay, as GGUF has no type of forge's own: the
    same codes and scales, and minima rounded to float16.

    Attributes:
        notes: Remarks on what was decided, a line each.
    """

    def __init__(self, model: Checkpoint, type: str | None) -> None:
        """type: A name that `check_type` gives, or None: all as they are. Raises ParameterError for weights that were
        quantized before, where they would be quantized again."""
        self._model = model
        self.path, self.paths, self.format, self.version = model.path, model.paths, model.format, model.version
        self.value_types = model.value_types
        self.notes: tuple[str, ...] = ()
        if type is None:
            types = {name: GGMLType.Q4_1 for name, info in model.tensors.items() if not info.type.in_files}
            if types:
                self.notes = (f"{len(types)} matrices are Q4_1, the nearest of GGUF's types to their 4 bits",)
        elif type in _FLOATS:
            types = dict(_floats(model, _FLOATS[type]))
        else:
            types = new_types(model, type, "type")
        found = {
            name: TensorInfo(name, info.shape, to, nbytes(to, info.shape))
            for name, info in model.tensors.items()
            for to in (types.get(name, info.type),)
        }
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType(found)
        folder = model.path if model.path.is_dir() else model.path.parent
        name = model.path.stem if model.format == "GGUF" else _files.model_name(folder).rpartition("/")[2]
        number = _FILE_TYPES.get(type or _usual(found).name)
        new: dict[str, Value] = {"general.quantization_version": _QUANTIZATION_VERSION}
        new |= {} if number is None else {"general.file_type": number}
        new |= {} if "general.name" in model.metadata else {"general.name": name}
        self.metadata = MappingProxyType({**model.metadata, **new})

    def close(self) -> None:
        self._model.close()

    def check_path(self) -> None:
        self._model.check_path()

    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None:
        rows = slice(start, start + len(out))
        before = self._model.tensors[info.name].type
        if before == info.type:
            self._model.raw(info.name, rows, out)
        elif not before.in_files and info.type is GGMLType.Q4_1:
            _from_groups(self._model.raw(info.name, rows), before, out)
        else:
            try:
                quantize(self._model.load_rows(info.name, rows), info.type, out)
            except UnsupportedError as error:
                raise UnsupportedError(f"{self.path}: tensor {show(info.name)}: {error}") from None


def check_type(name: object) -> str:
    """A name of a type, or of a mixture of types, in its own case. Raises ParameterError for another."""
    return check_recipe(name, "type", _FLOATS)


def _floats(model: Checkpoint, type: GGMLType) -> Iterator[tuple[str, GGMLType]]:
    """The types of all tensors, as llama.cpp's converter chooses them."""
    for name, info in model.tensors.items():
        yield name, GGMLType.F32 if len(info.shape) < 2 or _ALWAYS_FLOAT32.fullmatch(name) else type


def _usual(tensors: Mapping[str, TensorInfo]) -> GGMLType:
    """The type of the most bytes."""
    sizes = Counter[GGMLType]()
    for info in tensors.values():
        sizes[info.type] += info.nbytes
    return sizes.most_common(1)[0][0] if sizes else GGMLType.F32


def _from_groups(rows: Bytes, type: GGMLType, out: Bytes) -> None:
    """Blocks of Q4_1 (rows, row_bytes) from those of `formats.int4`, whose codes lie in the same order."""
    groups = rows.reshape(-1, type.type_size)
    blocks = out.reshape(len(groups), -1, GGMLType.Q4_1.type_size)  # (groups, blocks of a group, bytes)
    scale, zero = groups[:, :2].copy().view("<f2"), groups[:, 2:4].copy().view("<u2")
    minimum = (-scale.astype(np.float32) * zero).astype("<f2")
    blocks[..., :2] = groups[:, None, :2]
    blocks[..., 2:4] = minimum.view(np.uint8)[:, None]
    blocks[..., 4:] = groups[:, 4:].reshape(len(groups), -1, 16)
