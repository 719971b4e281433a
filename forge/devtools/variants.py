"""Which kernel variants there are to compile: those that models launch, and those of the ops' cases."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, cast

import numpy as np

from forge.backend import Backend, sources
from forge.backend.gpu import GPU
from forge.config import EngineConfig
from forge.devtools.cases import all_cases
from forge.ops.attention import AttentionSpec, paged_attention
from forge.ops.decode_attention import decode_attention
from forge.ops.embed import embed
from forge.ops.kv_cache import KVPages
from forge.ops.linear import linear
from forge.ops.norm import rmsnorm
from forge.ops.project import rms_gated, rms_linear
from forge.ops.quant import FORMATS, Packed, QuantTensor, Stack
from forge.ops.rope import RopeArgs, rope_append_kv
from forge.tuning import Choices
from forge.tuning.table import KERNELS

_WIDEST = 16_384
"""Width of residual streams."""
HEAD_DIMS = (64, 80, 96, 128, 256)
"""Head sizes that kernels are built ahead for. Those of 160 (StableLM 2 12B) are compiled where they are used: decode
attention spills 4 scalar registers for them on gfx90a, which the table of resources does not allow."""


class Recorder(GPU):
    """Notes which variants ops launch, and launches none."""

    wave_size, num_cus = 32, 64

    def __init__(self) -> None:
        self.variants: dict[sources.Variant, None] = {}

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return np.empty(shape, dtype)

    def asarray(self, array: Any, dtype: Any = None) -> Any:
        return np.asarray(array, dtype)

    def read_seconds(self, size: int) -> float:
        raise NotImplementedError("nothing here has a speed")

    def matmul(self, x: Any, weight: Any, out: Any, column: int, *, accumulate: bool) -> None:
        pass

    def _run(self, entry: sources.Entry, grid: tuple[int, ...], args: list[Any]) -> None:
        self.variants[entry.variant] = None


def case_variants(*, groups: bool = False) -> list[sources.Variant]:
    """Those of all ops' cases, by name; groups: on a GPU that `has_wgmma`, which none of AMD's does."""
    device = Recorder()
    device.has_wgmma = groups
    for op, case in all_cases():
        if op.run_gpu:
            args = op.map(lambda arg, value: _on(device, arg.dtype, value), case.make(np.random.default_rng(0)))
            device.launch(op, args, case.options)
    return _sorted(device)


def model_variants() -> list[sources.Variant]:
    """Those that models of the supported families launch, by name: of any widths and block types, and of `HEAD_DIMS`.

    The sizes here are such that each op makes every choice it can make, on GPUs of AMD's of each architecture that the
    table of `tuning` tells apart; a test draws random ones.
    """
    device = Recorder()
    for own in sorted({own for kernel in KERNELS.values() for own in kernel.rows if not own.startswith("sm_")}):
        device.tuning = Choices("")
        device.tuning.architecture = own
        _launch_all(device)
    return _sorted(device)


def _launch_all(device: Recorder) -> None:
    for variant in case_variants():
        if not variant.defines:  # the same for any size
            device.variants[variant] = None
    for width in (*range(256, 4097, 256), 8192, 12_288, _WIDEST):
        for out in ("act", "f32"):
            device.launch(rmsnorm, (_f32(1, width), _f32(width), 1e-6), {"out": out})
    for weight in _weights(device):
        outer, inner = weight.shape
        device.launch(embed, (np.zeros(1, np.int32), weight, 1.0), {})
        for rows in (1, 8, 16, 32, 64, 65):
            x, norm = np.empty((rows, inner), np.float16), (_f32(rows, inner), _f32(inner), 1e-6)
            device.launch(linear, (x, weight, _f32(outer), None), {})
            if inner > _WIDEST or outer % 2:  # no model's residual stream, no gate and up
                continue
            device.launch(rms_linear, (*norm, weight), {})
            for activation in ("silu", "gelu"):
                device.launch(rms_gated, (*norm, weight, None), {"activation": activation})
    page_size = EngineConfig().page_size
    slot, spec = np.zeros(1, np.int32), AttentionSpec(1.0, 0, 0.0)
    for dim in HEAD_DIMS:
        kv = KVPages(*np.empty((2, 1, page_size, 1, dim), np.float16))
        for style in ("neox", "interleaved"):
            rope = RopeArgs(None, None, None, _f32(1, dim // 2, 2), None, 1e-6)
            device.launch(rope_append_kv, (_f32(1, 3 * dim), rope, slot, slot, kv), {"style": style})
            for heads, rows in itertools.product((1, 2, 3, 4), (1, 17)):
                qkv, numbers = _f32(rows, (heads + 2) * dim), np.zeros(rows, np.int32)
                arrays = qkv, rope, numbers, numbers, kv, numbers[:, None]
                device.launch(decode_attention, (*arrays, spec), {"style": style})
        q, starts = np.empty((2, 1, dim), np.float16), np.zeros(2, np.int32)
        device.launch(paged_attention, (q, kv, starts, slot, slot[:, None], spec), {})


def _weights(device: Recorder) -> Iterator[Any]:
    """One for each way in which a product of few rows is computed, of each kind of matrix."""
    for width in (512, 1024, 2048, 4096, 8192, 16_384, 16_392):
        for outer in (2, 4096, 8192):
            yield np.empty((outer, width), np.float16)
    yield np.empty((1, 511), np.float16)  # not whole groups of 8
    for name in FORMATS:
        block = QuantTensor.random(name, 1, 256, np.random.default_rng(0)).on(cast(Backend, device))
        assert isinstance(block, Packed)
        for units in (32, 64, 128, 256, 512, 520):
            for outer in (2, 4096, 8192):
                yield replace(block, shape=(outer, units * block.unit))  # what a launch depends on is the shape


def _on(device: Recorder, dtype: str, value: Any) -> Any:
    if isinstance(value, QuantTensor | Stack):
        return value.on(cast(Backend, device))
    if isinstance(value, np.ndarray) and dtype in ("act", "weight"):
        return value.astype(np.float16)
    return value


def _f32(*shape: int) -> Any:
    return np.empty(shape, np.float32)


def _sorted(device: Recorder) -> list[sources.Variant]:
    return sorted(device.variants, key=lambda variant: variant.name)
