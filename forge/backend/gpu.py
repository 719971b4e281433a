"""The base class of backends that run kernels, with checks of each launch: CuPy's, and the CPU harness of devtools."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import numpy as np

from forge.backend import edits, sources
from forge.backend.base import Backend, Launchable
from forge.config import Progress
from forge.errors import UnsupportedError
from forge.tuning import Choices
from forge.tuning.spec import Values

_MIN_COUNTERS = 4096
_MAX_BLOCKS = 65_535
"""Blocks of a grid in y and z, of all vendors. In x there may be 2**31 - 1."""


class GPU(Backend):
    """A device that runs kernels: an op's `gpu` function gets it first, then the op's own arguments."""

    dtype = np.dtype(np.float16)
    is_gpu = True
    is_asynchronous = True
    wave_size: int
    """Threads of a wave (NVIDIA: warp): 32 or 64."""
    num_cus: int
    """Compute units (NVIDIA: multiprocessors)."""
    has_wgmma = False
    """Whether matrix cores multiply matrices in LDS for four waves together: `include/tile_wgmma.hip`."""
    _counters: Any = None

    @cached_property
    def tuning(self) -> Choices:
        """What `choice` gives."""
        return Choices(self.arch)

    def choice(self, kernel: str, **shape: int | str) -> Values:
        """The block sizes, rows and splits that a kernel is launched with for a shape: see `forge.tuning`."""
        return self.tuning.of(kernel, shape)

    @property
    def has_blas(self) -> bool:
        """Whether `matmul` works here. Without it forge's kernels compute products of any size."""
        return True

    def launch(self, op: Launchable, args: tuple[Any, ...], options: Mapping[str, Any]) -> Any:
        """Run an op. Raises TypeError or ValueError where the arguments do not fit its declaration."""
        if op.run_gpu is None:
            raise UnsupportedError(f"op {op.name} has no kernel")
        op.check(args, dict(options))
        return op.run_gpu(self, *args, **options)

    def run(self, file: str, function: str, grid: int | tuple[int, ...], *args: Any, **defines: int | str) -> None:
        """Launch a kernel of `raw_kernels/<file>.hip` with so many blocks, in the variant of these -D values.

        Arrays go as pointers, None as a null pointer, numbers as the kernel's source declares them. Raises ValueError
        where the grid is larger than any GPU takes.
        """
        blocks = (grid,) if isinstance(grid, int) else grid
        if max(blocks[1:], default=0) > _MAX_BLOCKS:
            raise ValueError(f"{function}: a grid of {blocks} blocks has more than {_MAX_BLOCKS} in y or z")
        if 0 not in blocks:
            entry = sources.entry(edits.current(file, function), function, tuple(defines.items()))
            self._run(entry, (*blocks, *(1,) * (3 - len(blocks))), entry.bind(args))

    def tensor_map(self, array: Any, slots: int) -> Any:
        """uint64 (16,): what the bulk copy engine is told of pages (N, P, G, D), for boxes of 64 numbers of one head of
        so many positions; a matrix (N, K) is (1, N, 1, K). A device that `has_wgmma` has it.
        """
        return self.map_of(array.data.ptr, array.shape, slots)

    def map_of(self, address: int, shape: tuple[int, ...], slots: int) -> Any:
        """As `tensor_map`, of pages at an address."""
        raise NotImplementedError(f"{self.device} has no bulk copy engine")

    @abstractmethod
    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None: ...

    @contextmanager
    def guarded(self) -> Iterator[Callable[[], bool]]:
        """New arrays within the context hold bytes of 255 (NaN) until written, and lie between guard bands.

        The bands of each array hold other numbers, so that a kernel that copies from them is found out. Gives a
        function that says whether all bands are whole. A device that checks each launch has nothing to add.
        """
        yield lambda: True

    def scratch(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """Memory for one op's own use: the next op may overwrite it."""
        return self.empty(shape, dtype)

    def counters(self, count: int) -> Any:
        """uint32 zeros (count,) for one launch, which must leave zeros for the next one."""
        if self._counters is None or len(self._counters) < count:
            self._counters = self.asarray(np.zeros(max(count, _MIN_COUNTERS), np.uint32))
        return self._counters[:count]

    def seconds(self, run: Callable[[], object]) -> float:
        """Seconds that the device takes for what `run` queues: it runs twice, and the second run is timed."""
        raise NotImplementedError(f"{self.device} has no speed")

    @property
    def loaded(self) -> list[sources.Variant]:
        """The variants that were launched or prepared."""
        return []

    def build(self, variants: Iterable[sources.Variant], progress: Progress | None = None) -> None:
        """Compile variants in parallel, and load them."""
        raise NotImplementedError(f"{self.device} compiles what is launched")

    def resources(self, entry: sources.Entry) -> dict[str, int]:
        """What a kernel takes, by the vendor's names: registers and spills of a thread, bytes of LDS of a block."""
        raise NotImplementedError(f"{self.device} has no registers")

    def read_seconds(self, size: int) -> float:
        """Seconds to read so many bytes at the rate of a large copy, measured now."""
        raise NotImplementedError(f"{self.device} has no speed")

    @abstractmethod
    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        """out[:, column:column + N] = x @ weight.T, or += with accumulate: f16 (M, K), f16 (N, K) -> f32 (M, ...).

        Through the vendor's BLAS, for products of many rows.
        """
