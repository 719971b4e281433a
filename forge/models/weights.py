"""Weights of a file as arrays for the model: shapes checked, every tensor accounted for.

On NumPy they are dequantized in parallel; a GPU keeps the blocks of the types it has kernels for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import groupby
from math import prod
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.backend.parallel import run_all
from forge.backend.threads import THREADS
from forge.config import Progress
from forge.errors import FormatError, OutOfMemoryError, UnsupportedError
from forge.formats.checkpoint import Checkpoint, TensorInfo
from forge.formats.ggml import BLOCK_FORMATS, GGMLType, nbytes
from forge.formats.quantize import REFUSED
from forge.models.arch import UNUSED_TENSORS
from forge.models.uploads import Run, Uploads, fill_host
from forge.ops.bfloat16 import bf16_to_f16
from forge.ops.expert_fetch import MAX_PARTS
from forge.ops.experts import EXPERT_WIDTH
from forge.ops.quant import FORMATS, Packed, Stack, split
from forge.ops.quantize import quantize_planes

_TASK_WEIGHTS = 1 << 22
"""Weights that a task dequantizes: threads share a large tensor."""
_FLOATS = {GGMLType.F32, GGMLType.F16, GGMLType.BF16}
_ALIGNMENT = 16
"""float32 numbers of a cache line, at which matrices start."""
_EXPERTS = re.compile(r"blk\.(\d{1,6})\.ffn_(?:gate|up|down|gate_up)_exps\.weight")
STAGING_ALIGNMENT = 256
"""Where the planes of experts begin that are copied from the host."""
STAGING_PADDING = MAX_PARTS * STAGING_ALIGNMENT


class Weights:
    """Takes the tensors of a model out of its file.

    Arrays that it returns are filled when its `with` block ends. Raises FormatError for a tensor that is missing, has
    another shape than the model's numbers say, or is left over.
    """

    def __init__(
        self,
        file: Checkpoint,
        backend: Backend,
        unused_layers: range,
        progress: Progress | None,
        cpu_experts: int = 0,
    ) -> None:
        """cpu_experts: As of `EngineConfig`."""
        self.file, self.backend = file, backend
        self.cpu_experts = min(cpu_experts, unused_layers.start) if backend.is_gpu else 0
        self._staging: Any = None
        self._uploads = Uploads(backend)
        self._refused: list[tuple[Any, UnsupportedError]] = []
        """On the device whether weights cannot become what they should, i32 (1,), and the error that says so."""
        self._unused_layers = unused_layers
        self._progress = progress
        self._taken: set[str] = set()
        self._arena: npt.NDArray[np.float32] | None = None
        self._used = 0
        self._parts: list[tuple[str, slice, npt.NDArray[np.float32]]] = []
        """Rows of tensors, and where they are dequantized to."""
        self._done = 0
        self._total = sum(info.nbytes for info in file.tensors.values() if len(info.shape) >= 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        parts, self._parts, self._arena, self._uploads = self._parts, [], None, Uploads(self.backend)  # errors keep it
        if kind is None:
            self._refuse_leftovers()
            for error in (error for refused, error in self._refused if self.backend.to_numpy(refused)[0]):
                raise error
            run_all(lambda part: self.file.load_rows(*part), parts, THREADS.count, self._report_part)

    def has(self, name: str) -> bool:
        return name in self.file.tensors

    def is_matrix(self, name: str) -> bool:
        return self.has(name) and len(self.file.tensors[name].shape) == 2

    def matrix(self, rows: Mapping[str, int], joined: str | None = None, *, cols: int) -> Any:
        """(sum of rows, cols): the named matrices stacked, so that one product computes them all.

        A file may hold them as one tensor, `joined`. On NumPy the result is float32. On a GPU it is Packed, float16, or
        a Stack of these.
        """
        rows = self.stored(rows, joined)
        for name, count in rows.items():
            self._take(name, (count, cols))
        if self.backend.is_gpu:
            parts = [self._joined(kept, tuple(group)) for kept, group in groupby(rows, self._kept_type)]
            self._report(sum(self.file.tensors[name].nbytes for name in rows))
            return parts[0] if len(parts) == 1 else Stack(tuple(parts))
        out = self._allocate(sum(rows.values()), cols)
        start = 0
        for name, count in rows.items():
            self._fill(name, out[start : start + count])
            start += count
        return out

    def experts(
        self, rows: Mapping[str, int], joined: str | None = None, *, count: int, cols: int, on_host: bool = False
    ) -> Any:
        """(count * sum of rows, cols): the named tensors (count, rows, cols) stacked for each expert.

        A file may hold them as one tensor, `joined`. They are one matrix as `matrix` gives it. Tensors that have
        different types on a GPU are a tuple of matrices, each of one tensor. on_host: For a GPU, but left in the host's
        memory.
        """
        rows = {joined: sum(rows.values())} if joined and self.has(joined) else rows
        for name, size in rows.items():
            self._take(name, (count, size, cols))
        if self.backend.is_gpu and cols % EXPERT_WIDTH:
            message = f"{self.file.path}: tensor {next(iter(rows))!r} has rows of {cols}: no multiple of {EXPERT_WIDTH}"
            raise UnsupportedError(message, parameter="device", hint='use device="cpu"')
        if self.backend.is_gpu:
            groups = [(kept, tuple(group)) for kept, group in groupby(rows, self._kept_type)]
            if len(groups) > 1:
                return tuple(self._joined(self._kept_type(name), [name], count, on_host=on_host) for name in rows)
            self._report(sum(self.file.tensors[name].nbytes for name in rows))
            return self._joined(*groups[0], count, on_host=on_host)
        out = self._allocate(count * sum(rows.values()), cols)
        start = 0
        for expert in range(count):
            for name, size in rows.items():
                self._fill(name, out[start : start + size], expert * size)
                start += size
        return out

    def staging(self) -> Any:
        """uint32, on the device: memory for the experts of any one layer that stay on the host."""
        if self._staging is None:
            words = staging_bytes(expert_bytes(self.file.tensors), self.cpu_experts) // 4
            self._staging = self.backend.empty((words,), np.uint32)
        return self._staging

    def stored(self, sizes: Mapping[str, int], joined: str | None) -> Mapping[str, int]:
        """Names and sizes of the tensors that the file has for these: the same, or `joined` alone.

        `joined` may be one of the names too: phi3's ffn_up holds gate and up. The size of the tensor then tells.
        """
        if joined is None:
            return sizes
        total = sum(sizes.values())
        separate = [name for name in sizes if name != joined and self.has(name)]
        if joined in sizes:
            is_joined = not separate and self.has(joined) and self.file.tensors[joined].shape[0] == total
            return {joined: total} if is_joined else sizes
        if not self.has(joined):
            if not separate:
                raise FormatError(f"{self.file.path}: tensor {joined!r} is missing, and so is {next(iter(sizes))!r}")
            return sizes
        if separate:
            raise FormatError(
                f"{self.file.path}: tensor {separate[0]!r} is in {joined!r} as well: convert the model again"
            )
        return {joined: total}

    def _kept_type(self, name: str) -> GGMLType:
        return kept_type(self.file.tensors[name].type)

    def _joined(self, kept: GGMLType, names: Sequence[str], count: int = 1, *, on_host: bool = False) -> Any:
        """The named matrices as one on the device, stacked for each of `count` experts. They have the same type there,
        `kept`. on_host: In the device's form, of NumPy's arrays."""
        infos = [self.file.tensors[name] for name in names]
        sizes = [prod(info.shape[:-1]) // count for info in infos]  # rows of one expert
        shape = count * sum(sizes), infos[0].shape[-1]
        runs = [
            Run(name, expert * size, size) for expert in range(count) for name, size in zip(names, sizes, strict=True)
        ]
        device = None if on_host else self.backend
        matrix: Any
        if kept is GGMLType.F16:
            matrix = (device.empty if device else np.empty)(shape, np.float16)
            planes = [matrix.view(np.uint8)]
        else:
            matrix = Packed.empty(kept, shape, device)
            planes = [plane for plane in matrix.planes if plane is not None]
            stored = {self.file.source(name).tensors[name].type for name in names}
            if device and len(stored) == 1 and stored <= _FLOATS:
                self._quantize(matrix, stored.pop(), names, runs)
                return matrix
        is_bf16 = all(info.type is GGMLType.BF16 for info in infos)
        is_converted = not on_host and is_bf16 and prod(shape) % 2 == 0  # on the device
        read = partial(self._read_rows, kept=GGMLType.BF16 if is_converted else kept)
        (fill_host if on_host else self._uploads.fill)(planes, runs, read)
        if is_converted:
            beyond = self._refusable(self._beyond_float16(" or ".join(map(repr, names))))
            bf16_to_f16(matrix.view(np.uint32).reshape(-1), beyond)
        return matrix

    def _quantize(self, matrix: Packed, stored: GGMLType, names: Sequence[str], runs: Sequence[Run]) -> None:
        """Fill a matrix of the device with what the device makes of rows as they are stored."""
        message = f"{self.file.path}: tensor {' or '.join(map(repr, names))}: {REFUSED.format(matrix.type.name)}"
        refused = self._refusable(UnsupportedError(message, parameter="quantize"))

        def read(name: str, rows: slice, out: Sequence[npt.NDArray[np.uint8]]) -> None:
            self.file.source(name).raw(name, rows, out[0])

        def use(rows: Any, where: slice) -> None:
            planes = [plane if plane is None else plane[where] for plane in matrix.planes]
            quantize_planes(rows, *planes, refused, stored=stored.name, type=matrix.type.name)

        self._uploads.convert(matrix.shape[1] * stored.type_size, runs, read, use)

    def _refusable(self, error: UnsupportedError) -> Any:
        """A number of the device, i32 (1,). Where it is 1 at the end the error is raised."""
        refused = self.backend.asarray(np.zeros(1, np.int32))
        self._refused.append((refused, error))
        return refused

    def _read_rows(self, name: str, rows: slice, planes: Sequence[npt.NDArray[np.uint8]], *, kept: GGMLType) -> None:
        """Some rows of a tensor as a GPU keeps them: the planes of Packed, or the bytes of floats."""
        if kept in BLOCK_FORMATS:
            filled = iter(planes)
            split(kept, self.file.raw(name, rows), [f and next(filled) for f in BLOCK_FORMATS[kept].planes])
        elif self.file.tensors[name].type is kept:
            self.file.raw(name, rows, planes[0])
        else:
            with np.errstate(over="ignore"):
                halves = self.file.load_rows(name, rows).astype(np.float16)
            if (halves.view(np.uint16) & 0x7FFF == 0x7C00).any():  # infinite; np.isinf takes five times as long
                raise self._beyond_float16(repr(name))
            planes[0][:] = halves.view(np.uint8)

    def _beyond_float16(self, tensor: str) -> UnsupportedError:
        message = f"{self.file.path}: tensor {tensor} has weights beyond float16"
        return UnsupportedError(message, parameter="device", hint='use device="cpu"')

    def vector(self, sizes: Mapping[str, int], joined: str | None = None) -> Any:
        """(sum of sizes,) float32 on the device: the named vectors, or `joined` where the file has that."""
        return self.array({name: (size,) for name, size in self.stored(sizes, joined).items()})

    def array(self, shapes: Mapping[str, tuple[int, ...]], factor: float = 1.0) -> Any:
        """float32 on the device: the named tensors, one behind the other, times the factor."""
        for name, shape in shapes.items():
            self._take(name, shape)
        return self._loaded(shapes, factor)

    def columns(self, shapes: Mapping[str, tuple[int, int]]) -> Any:
        """float32 on the device, flat: the named matrices beside each other."""
        for name, shape in shapes.items():
            self._take(name, shape)
        return self._beside(shapes)

    def _beside(self, shapes: Mapping[str, tuple[int, int]]) -> Any:
        return self.backend.asarray(np.concatenate([self.file.load(name) for name in shapes], axis=1).reshape(-1))

    def number(self, name: str) -> float:
        """The number that a tensor of one holds."""
        self._take(name, (1,))
        return float(self.file.load(name)[0])

    def check_finite(self, name: str) -> None:
        """Raises FormatError for a small tensor with infinite numbers or NaN, where no logit would show them."""
        if not np.isfinite(self.file.load(name)).all():
            raise FormatError(f"{self.file.path}: tensor {name!r} holds numbers that are not finite")

    def ignore(self, name: str) -> None:
        """A tensor may be there, and the model does not read it."""
        self._taken.add(name)

    def _loaded(self, shapes: Mapping[str, tuple[int, ...]], factor: float) -> Any:
        loaded = np.concatenate([self.file.load(name) for name in shapes])
        return self.backend.asarray(loaded if factor == 1.0 else loaded * np.float32(factor))

    def _allocate(self, rows: int, cols: int) -> npt.NDArray[np.float32]:
        """A matrix within one large array, which the system backs with huge pages: they read faster."""
        if self._arena is None:
            infos = (info for name, info in self.file.tensors.items() if _layer_of(name) < self._unused_layers.start)
            size = sum(-(-prod(info.shape) // _ALIGNMENT) * _ALIGNMENT for info in infos)
            try:
                self._arena = np.empty(size, np.float32)
            except MemoryError:  # tensors that are not read may be any size
                message = f"{self.file.path}: the system gives no {4 * size / 1e9:.2f} GB for the tensors"
                raise OutOfMemoryError(message) from None
        start = self._used
        self._used += -(-rows * cols // _ALIGNMENT) * _ALIGNMENT
        return self._arena[start : start + rows * cols].reshape(rows, cols)

    def _take(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.file.tensor(name).shape
        if found != shape:
            raise FormatError(f"{self.file.path}: tensor {name!r} has shape {found}, not {shape}")
        self._taken.add(name)

    def _fill(self, name: str, out: npt.NDArray[np.float32], first: int = 0) -> None:
        step = max(_TASK_WEIGHTS // out.shape[1], 1)
        for row in range(0, len(out), step):
            part = out[row : row + step]
            self._parts.append((name, slice(first + row, first + row + len(part)), part))

    def _refuse_leftovers(self) -> None:
        for name in self.file.tensors.keys() - self._taken:
            if not (UNUSED_TENSORS.fullmatch(name) or _layer_of(name) in self._unused_layers):
                raise FormatError(f"{self.file.path}: tensor {name!r} has no place in this architecture")

    def _report_part(self, part: tuple[str, slice, npt.NDArray[np.float32]]) -> None:
        self._report(nbytes(self.file.tensors[part[0]].type, part[2].shape))

    def _report(self, size: int) -> None:
        """Count bytes of the file that are loaded, and tell the progress function."""
        self._done += size
        if self._progress:
            self._progress("loading weights", self._done, self._total)


def _layer_of(name: str) -> int:
    """The layer that a tensor's name says; -1 outside of layers."""
    found = re.match(r"blk\.(\d{1,6})\.", name)
    return int(found[1]) if found else -1


def kept_type(type: GGMLType) -> GGMLType:
    """The type that a GPU keeps for a matrix of this type: the same if kernels read it, else float16."""
    return type if type.name in FORMATS else GGMLType.F16


def kept_bytes(info: TensorInfo) -> int:
    """Bytes of a matrix on a GPU."""
    return info.nbytes if kept_type(info.type) is info.type else 2 * prod(info.shape)


def expert_bytes(tensors: Mapping[str, TensorInfo]) -> dict[int, int]:
    """For each layer with experts the bytes that their matrices take on a GPU."""
    found: dict[int, int] = {}
    for name, info in tensors.items():
        if layer := _EXPERTS.fullmatch(name):
            found[int(layer[1])] = found.get(int(layer[1]), 0) + kept_bytes(info)
    return found


def staging_bytes(experts: Mapping[int, int], cpu_experts: int) -> int:
    """What the experts of the first layers take of a device if they stay on the host: the room of one layer. experts:
    Bytes by layer."""
    most = max((size for layer, size in experts.items() if layer < cpu_experts), default=-STAGING_PADDING)
    return -(-most // STAGING_ALIGNMENT) * STAGING_ALIGNMENT + STAGING_PADDING
