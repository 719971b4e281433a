"""A checkpoint that gives another's weights as quantized blocks, made when they are read: nothing is held twice."""

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
from forge.formats.ggml import GGMLType, dequantize, nbytes
from forge.formats.quantize import REFUSED, fill, is_sound
from forge.formats.source import show
from forge.ops.quantize import quantize

_STEP_WEIGHTS, _GPU_STEP_WEIGHTS = 1 << 18, 1 << 25
"""Weights that are read and quantized at a time: by each thread of a CPU, or on a GPU, 64 MB of float16."""


class Quantized(Checkpoint):
    """A model whose weights have the types of a recipe. It closes the model that it is made of.

    Attributes:
        note: What became of the weights' size, in words.
    """

    def __init__(self, model: Checkpoint, recipe: str, backend: Backend) -> None:
        """recipe: A name of `recipes.RECIPES`. Raises ParameterError for a model that is quantized already."""
        self._model, self._backend = model, backend
        self.path, self.paths, self.format, self.version = model.path, model.paths, model.format, model.version
        self.metadata, self.value_types = model.metadata, model.value_types
        changed = {
            name: TensorInfo(name, model.tensors[name].shape, type, nbytes(type, model.tensors[name].shape))
            for name, type in new_types(model, recipe).items()
        }
        self.tensors: Mapping[str, TensorInfo] = MappingProxyType({**model.tensors, **changed})
        before, after = (sum(info.nbytes for info in each.tensors.values()) / 1e9 for each in (model, self))
        self.note = f"quantize: {recipe}: {before:.2f} GB of weights as they are stored become {after:.2f} GB"

    def close(self) -> None:
        self._model.close()

    def check_path(self) -> None:
        self._model.check_path()

    def _read(self, info: TensorInfo, start: int, out: Bytes) -> None:
        stored = self._model.tensors[info.name]
        if stored.type is info.type:
            self._model.raw(info.name, slice(start, start + len(out)), out)
            return
        step = max((_GPU_STEP_WEIGHTS if self._backend.is_gpu else _STEP_WEIGHTS) // info.shape[-1], 1)
        rows = np.empty((min(step, len(out)), stored.nbytes // prod(stored.shape[:-1])), np.uint8)
        for first in range(0, len(out), step):
            blocks = out[first : first + step]
            part = self._model.raw(info.name, slice(start + first, start + first + len(blocks)), rows[: len(blocks)])
            self._quantize(part, stored.type, info.type, blocks)
            if not is_sound(blocks, info.type):
                raise UnsupportedError(
                    f"{self.path}: tensor {show(info.name)}: {REFUSED.format(info.type.name)}", parameter="quantize"
                )

    def _quantize(self, rows: Bytes, stored: GGMLType, type: GGMLType, out: Bytes) -> None:
        backend = self._backend
        if not backend.is_gpu:
            fill(dequantize(rows, stored), type, out)
            return
        with backend.active():
            blocks = quantize(backend.asarray(rows), stored=stored.name, type=type.name)
            np.copyto(out, backend.to_numpy(blocks))
