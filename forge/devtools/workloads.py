"""What `forge tune` measures: calls of ops that launch a kernel at a shape, with random inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.config import EngineConfig
from forge.devtools.recorder import Recorder
from forge.devtools.usual import usual_models
from forge.devtools.variants import record_file
from forge.formats import ggml, gguf
from forge.ops.attention import AttentionSpec
from forge.ops.decode_attention import decode_attention
from forge.ops.kv_cache import KVPages
from forge.ops.linear import linear
from forge.ops.norm import Normed, norm
from forge.ops.op import Array, Op
from forge.ops.quant import Packed, QuantTensor, split
from forge.ops.rope import RopeArgs
from forge.tuning.spec import ANY, Shape
from forge.tuning.table import KERNELS

_DRAWN_ROWS = 512
"""Rows of a matrix that are drawn. The matrix repeats them, which changes nothing about the speed of a product."""
_NORM_ROWS = (8, 512)
_CONTEXTS = {16: ((1, 1024), (1, 8192), (8, 1024)), ANY: ((64, 1024),)}
"""Numbers of sequences and of their positions, by the class of the number of sequences."""
_TABLE_POSITIONS = 16_384
"""Positions of the page table, which is longer than the sequences, as in an engine."""


@dataclass(frozen=True, slots=True)
class Workload:
    """A call of an op. `make` gives new arrays with the same values each time."""

    op: Op
    make: Callable[[], tuple[Any, ...]]
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, device: GPU, args: tuple[Any, ...]) -> Any:
        """The op's results."""
        return device.launch(self.op, args, self.options)


def usual_shapes(device: GPU) -> list[tuple[str, dict[str, int | str]]]:
    """Kernels and shapes of usual models on a device."""
    return _shapes(device, usual_models())


def model_shapes(device: GPU, path: Path) -> list[tuple[str, dict[str, int | str]]]:
    """Kernels and shapes of a model on a device."""
    with gguf.read(path) as file:
        return _shapes(device, [file])


def _shapes(device: GPU, files: Iterable[gguf.GGUF]) -> list[tuple[str, dict[str, int | str]]]:
    """Kernels and shapes that the recorded warm-ups of files ask for, with the largest number of rows of a class."""
    recorder = Recorder(device.arch, device.num_cus)
    recorder.has_wgmma = device.has_wgmma
    for file in files:
        record_file(file, recorder)
    found = []
    for kernel, shape in recorder.tuning.asked:
        largest = KERNELS[kernel].named(KERNELS[kernel].class_of(shape))
        found.append((kernel, shape | {"rows": largest["rows"]} if "rows" in shape else shape))
    return found


def workloads(device: GPU, kernel: str, shape: Shape) -> list[Workload]:
    """Calls of ops that launch a kernel at a shape."""
    make = _Inputs(device)
    if kernel == "norm":
        width = int(shape["width"])
        return [Workload(norm, partial(make.normed_alone, rows, width), {"out": "act"}) for rows in _NORM_ROWS]
    if kernel == "attention_decode":
        options = {"style": "neox"}
        contexts = next(some for rows, some in _CONTEXTS.items() if int(shape["rows"]) <= rows)
        return [Workload(decode_attention, partial(make.attention, shape, *context), options) for context in contexts]
    glu = "silu" if shape.get("op") == "rms_gated" else "none"
    return [Workload(linear, partial(make.product, shape), {"glu": glu, "split_k": "never"})]


class _Inputs:
    """Random arrays on a device. Matrices are scaled so that products of rows near 1 are near 1."""

    def __init__(self, device: GPU) -> None:
        self.device = device

    def product(self, shape: Shape) -> tuple[Any, ...]:
        """Arguments of `linear`. Rows are a normalized stream where `op` is rms_linear or rms_gated, else an array."""
        outer, inner, op = int(shape["outer"]), int(shape["inner"]), shape.get("op", "linear")
        tokens = int(shape.get("tokens", 1))
        weight = self.matrix(str(shape.get("format", "F16")), 2 * outer if op == "rms_gated" else outer, inner)
        operand = self.normal(tokens, inner, dtype=np.float16) if op == "linear" else self.normed(tokens, inner)
        return operand, weight, None, None

    def normed(self, rows: int, width: int) -> Normed:
        return Normed(self.normal(rows, width), None, self.ones(width), None, 1e-5, True)

    def normed_alone(self, rows: int, width: int) -> tuple[Any, ...]:
        return (self.normed(rows, width),)

    def normal(self, *shape: int, dtype: Any = np.float32) -> Any:
        return self.device.asarray(_normal(shape, dtype))

    def ones(self, size: int) -> Any:
        return self.device.asarray(np.ones(size, np.float32))

    def matrix(self, kind: str, outer: int, inner: int) -> Any:
        planes = [None if plane is None else self.device.asarray(plane) for plane in _planes(kind, outer, inner)]
        return planes[0] if kind == "F16" else Packed(ggml.GGMLType[kind], (outer, inner), *planes)

    def attention(self, shape: Shape, sequences: int, length: int) -> tuple[Any, ...]:
        page, dim, kv_heads = EngineConfig().page_size, int(shape["dim"]), int(shape["kv_heads"])
        heads, pages = int(shape["packed"]) * kv_heads, -(-length // page)
        table = np.zeros((sequences, -(-_TABLE_POSITIONS // page)), np.int32)
        table[:, :pages] = np.arange(sequences * pages).reshape(sequences, pages)
        slot_mapping = (table[:, (length - 1) // page] * page + (length - 1) % page).astype(np.int32)
        lengths = np.full(sequences, length, np.int32)
        qkv = self.normal(sequences, (heads + 2 * kv_heads) * dim)
        rope = RopeArgs(None, None, None, self.normal(length, dim // 2, 2), None, 1e-6)
        cache = [self.normal(sequences * pages, page, kv_heads, dim, dtype=np.float16) for _ in range(2)]
        where = self.device.asarray(lengths), self.device.asarray(slot_mapping), KVPages(*cache)
        return qkv, rope, *where, self.device.asarray(table), AttentionSpec(dim**-0.5, 0, 0.0)


# A step is measured with many copies of the same arrays, which are drawn once.
@lru_cache(maxsize=8)
def _normal(shape: tuple[int, ...], dtype: Any) -> Array:
    return np.random.default_rng(0).standard_normal(shape, np.float32).astype(dtype)


@lru_cache(maxsize=1)
def _planes(kind: str, outer: int, inner: int) -> tuple[Array | None, ...]:
    """A float16 matrix, or the planes of one in blocks."""
    rng, count = np.random.default_rng(1), min(outer, _DRAWN_ROWS)
    repeats = (-(-outer // count), 1)
    if kind == "F16":
        drawn = (rng.standard_normal((count, inner), np.float32) * np.float32(inner**-0.5)).astype(np.float16)
        return (np.tile(drawn, repeats)[:outer],)
    few = QuantTensor.random(kind, count, inner, rng, scale=1e-4)
    return split(few.type, np.tile(few.blocks, repeats)[:outer])
