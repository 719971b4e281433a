"""Low-rank adapters of a product: a step's rows may have different ones, or none, and the matrix stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops import fixed
from forge.ops.activation import act_and_mul
from forge.ops.op import Array, op, record

_BLOCK_THREADS, _COLUMNS = 256, 4
_SHRINK_ROWS = ((64, 1), (1 << 31, 8))
_EXPAND_ROWS = ((8, 1), (64, 4), (1 << 31, 8))
"""Up to so many rows of a step, how many a block has. Those of a decode step seldom share an adapter, those of a prompt
do."""
RANK_MULTIPLE = 8
"""Ranks are filled up with zeros to multiples of this: kernels load so many numbers at once."""


@record("a:act[L,P*C,K] b:act[L,N,C] scales:f32[L] starts:i32[P]")
@dataclass(frozen=True, slots=True)
class LowRank:
    """The adapters of one product of P matrices that are stacked: L of them, in slots, all of the rank C.

    a: (L, P * C, K), for each matrix C rows. b: (L, N, C). scales: float32 (L,). starts: int32 (P,), the first row of
    each matrix among the N. A slot without an adapter of a matrix has zeros for it.
    """

    a: Any
    b: Any
    scales: Any
    starts: Any

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in (self.a, self.b, self.scales, self.starts))


@op("x:act[M,K] slots:i32[M] adapters:LowRank &y:f32[M,N] order=any|fixed", rtol=1e-4, atol=1e-4)
def lora(x: Array, slots: Array, adapters: LowRank, y: Array, *, order: str) -> None:
    """y += scale * B (A x) of each row's slot, in place; a row with slot -1 stays as it is. Source: arXiv:2106.09685.

    order: "fixed": A row's result has the same bits whatever rows stand beside it.
    """
    rank = adapters.b.shape[2]
    ends = [*adapters.starts[1:], y.shape[1]]
    for row, slot in enumerate(slots):
        if slot >= 0:
            h = (adapters.a[slot] @ x[row]).reshape(-1, rank)  # (P, C)
            for part, start, end in zip(h, adapters.starts, ends, strict=True):
                y[row, start:end] += adapters.scales[slot] * (adapters.b[slot, start:end] @ part)


@lora.cpu
def _lora_cpu(x: Array, slots: Array, adapters: LowRank, y: Array, *, order: str) -> None:
    rank = adapters.b.shape[2]
    ends = [*adapters.starts[1:], y.shape[1]]
    for slot in np.unique(slots[slots >= 0]):
        (rows,) = np.nonzero(slots == slot)
        h = _product(adapters.a[slot], x[rows], order) * adapters.scales[slot]  # (rows, P * C)
        added = np.empty((len(rows), y.shape[1]), y.dtype)
        for part, (start, end) in enumerate(zip(adapters.starts, ends, strict=True)):
            of_part = np.ascontiguousarray(h[:, part * rank : (part + 1) * rank])
            added[:, start:end] = _product(adapters.b[slot, start:end], of_part, order)
        y[rows] += added


def _product(matrix: Array, x: Array, order: str) -> Array:
    """x @ matrix.T."""
    return fixed.product(matrix, x) if order == "fixed" else np.asarray(x @ matrix.T)


@lora.gpu
def _lora_gpu(device: GPU, x: Any, slots: Any, adapters: LowRank, y: Any, *, order: str) -> None:
    """Two launches: h = A x, (M, P * C), then y += scale * B h. Either order is fixed: a row's sums are its own."""
    _expand(device, "lora_expand", _shrink(device, x, slots, adapters), slots, adapters, y, y, y.shape[1])


@op("x:act[M,K] slots:i32[M] adapters:LowRank y:f32[M,N] order=any|fixed activation=silu|gelu -> z:act[M,N/2]")
def lora_glu(x: Array, slots: Array, adapters: LowRank, y: Array, *, order: str, activation: str) -> Array:
    """activation(gate) * up of what `lora` makes of y, whose halves are gate and up."""
    adapted = y.copy()
    lora.reference(x, slots, adapters, adapted, order=order)
    return np.asarray(act_and_mul.reference(adapted, activation=activation))


@lora_glu.cpu
def _lora_glu_cpu(x: Array, slots: Array, adapters: LowRank, y: Array, *, order: str, activation: str) -> Array:
    adapted = y.copy()
    lora.run_cpu(x, slots, adapters, adapted, order=order)
    return np.asarray(act_and_mul.run_cpu(adapted, activation=activation))


@lora_glu.gpu
def _lora_glu_gpu(device: GPU, x: Any, slots: Any, adapters: LowRank, y: Any, *, order: str, activation: str) -> Any:
    rows, width = y.shape[0], y.shape[1] // 2
    h, z = _shrink(device, x, slots, adapters), device.empty((rows, width), device.dtype)
    _expand(device, "lora_expand_glu", h, slots, adapters, y, z, width, int(activation == "gelu"))
    return z


def _shrink(device: GPU, x: Any, slots: Any, adapters: LowRank) -> Any:
    """A x of the rows' slots, float32 (M, P * C)."""
    (rows, inner), ranks = x.shape, adapters.a.shape[1]
    h, tokens = device.empty((rows, ranks), np.float32), _tokens(rows, _SHRINK_ROWS)
    grid, how = (ranks // _COLUMNS, -(-rows // tokens)), {"TOKENS": tokens, "VECTOR": 8 if inner % 8 == 0 else 1}
    device.run("lora", "lora_shrink", grid, x, slots, adapters.a, h, rows, inner, ranks, **how)
    return h


def _expand(
    device: GPU, kernel: str, h: Any, slots: Any, adapters: LowRank, y: Any, out: Any, width: int, *more: int
) -> None:
    """A thread has one of `width` numbers of the result."""
    rows, tokens = len(y), _tokens(len(y), _EXPAND_ROWS)
    grid = (-(-width // _BLOCK_THREADS), -(-rows // tokens))
    numbers = adapters.b, adapters.scales, adapters.starts, y, *(() if out is y else (out,))
    sizes = rows, y.shape[1], adapters.b.shape[2], len(adapters.starts), *more
    device.run("lora", kernel, grid, h, slots, *numbers, *sizes, TOKENS=tokens, VECTOR=8)


def _tokens(rows: int, table: tuple[tuple[int, int], ...]) -> int:
    return next(tokens for most, tokens in table if rows <= most)
