"""A checkpoint that gives another's weights in other types, made when they are read: nothing is held twice."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from types import MappingProxyType

import numpy as np

from forge.backend import Backend
from forge.checkpoints.recipes import new_types
from forge.errors import UnsupportedError
from forge.formats.blocks import Bytes
from forge.formats.checkpoint import Checkpoint, TensorInfo
from forge.formats.ggml import GGMLType, nbytes
from forge.formats.quantize import REFUSED, fill, is_sound
from forge.formats.source import show
from forge.ops.quantize import quantize

_STEP_WEIGHTS, _GPU_STEP_WEIGHTS = 1 << 18, 1 << 25
"""Weights that are read and quantized at a time: by each thread of a CPU, or on a GPU, 64 MB of float16."""


class Retyped(Checkpoint):
    """A model with some tensors in other types. It closes the model that it is made of."""

    def __init__(
        self, model: Checkpoint, types: Mapping[str, GGMLType], parameter: str, backend: Backend | None = None
    ) -> None:
        """types: Of the tensors that change. parameter: What asked for them, in errors. backend: What quantizes, some
        rows at a time; None = NumPy, all rows that are read at once."""
        self._model, self._parameter, self._backend = model, parameter, backend
        self.path, self.paths, self.format, self.version = model.path, model.paths, model.format, model.version
        self.metadata, self.value_types = model.metadata, model.value_types
        changed = {
            name: TensorInfo(name, model.tensors[name].shape, type, nbytes(type, model.tensors[name].shape))
            for name, type in types.items()
        }
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({**model.tensors, **changed})

    def close(self) -> None:
        self._model.close()

    def check_path(self) -> None:
        self._model.check_path()

    def source(self, name: str) -> Checkpoint:
        return self._model

    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None:
        stored = self._model.tensors[info.name]
        if stored.type is info.type:
            self._model.raw(info.name, slice(start, start + len(out)), out)
            return
        step = len(out)
        if self._backend is not None:
            step = max((_GPU_STEP_WEIGHTS if self._backend.is_gpu else _STEP_WEIGHTS) // info.shape[-1], 1)
        rows = np.empty((min(step, len(out)), stored.nbytes // prod(stored.shape[:-1])), np.uint8)
        for first in range(0, len(out), max(step, 1)):
            blocks = out[first : first + step]
            part = self._model.raw(info.name, slice(start + first, start + first + len(blocks)), rows[: len(blocks)])
            try:
                self._convert(part, stored.type, info.type, blocks)
            except UnsupportedError as error:
                message = f"{self.path}: tensor {show(info.name)}: {error}"
                raise UnsupportedError(message, parameter=self._parameter) from None

    def _convert(self, rows: Bytes, stored: GGMLType, type: GGMLType, out: Bytes) -> None:
        backend = self._backend
        if not stored.in_files and type is GGMLType.Q4_1:
            _from_groups(rows, stored, out)
        elif backend is None or not backend.is_gpu:
            fill(rows, stored, type, out)
        else:
            with backend.active():
                blocks = quantize(backend.asarray(rows), stored=stored.name, type=type.name)
                np.copyto(out, backend.to_numpy(blocks))
        if not is_sound(out, type):
            raise UnsupportedError(REFUSED.format(type.name))


def quantized(model: Checkpoint, recipe: str, backend: Backend) -> Retyped:
    """A model in the types of a recipe, a name of `recipes.RECIPES`. Raises ParameterError for one that is quantized
    already."""
    changed = Retyped(model, new_types(model, recipe), "quantize", backend)
    before, after = (sum(info.nbytes for info in each.tensors.values()) / 1e9 for each in (model, changed))
    changed.notes = (f"quantize: {recipe}: {before:.2f} GB of weights as they are stored become {after:.2f} GB",)
    return changed


def _from_groups(rows: Bytes, type: GGMLType, out: Bytes) -> None:
    """Blocks of Q4_1 (rows, row_bytes) from those of `formats.int4`, whose codes lie in the same order."""
    groups = rows.reshape(-1, type.type_size)
    blocks = out.reshape(len(groups), -1, GGMLType.Q4_1.type_size)  # (groups, blocks of a group, bytes)
    scale, zero = groups[:, :2].copy().view("<f2"), groups[:, 2:4].copy().view("<u2")
    with np.errstate(over="ignore"):  # `is_sound` finds it
        minimum = (-scale.astype(np.float32) * zero).astype("<f2")
    blocks[..., :2] = groups[:, None, :2]
    blocks[..., 2:4] = minimum.view(np.uint8)[:, None]
    blocks[..., 4:] = groups[:, 4:].reshape(len(groups), -1, 16)
