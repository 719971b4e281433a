"""Normalization of the residual stream, and the normalized stream as an operand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import backend_of, register
from forge.backend.gpu import GPU
from forge.ops.matmul import Partials
from forge.ops.op import Array, op, record
from forge.ops.ordered import ORDERS, Ordered, empty

_BLOCK_THREADS = 256


@record("&x:f32[M,K] pending?:f32[M,K] weight:f32[K] bias?:f32[K] eps:f32 is_rms:bool")
@dataclass(frozen=True, slots=True)
class Normed:
    """The normalized rows of x, for an op that computes the norm itself or has it computed.

    x: float32 (M, K). pending: (M, K), an array or `Partials`, which is first added to x in place; None adds nothing.
    weight, bias: float32 (K,); an RMS norm has no bias. eps: what is added to the variance before the root.
    """

    x: Any
    pending: Any
    weight: Any
    bias: Any
    eps: float
    is_rms: bool

    @property
    def shape(self) -> tuple[int, int]:
        rows, width = self.x.shape
        return rows, width


register(Normed, lambda normed: backend_of(normed.x))


@op("normed:Normed out=act|f32 -> y:out[M,K]")
def norm(normed: Normed, *, out: str) -> Array:
    """RMS norm, x / sqrt(mean(x**2) + eps) * weight, or layer norm, (x - mean) / sqrt(var + eps) * weight + bias.

    Of each row, after what is pending is added to it. out="f32" is for results that go back to the residual stream:
    Gemma's overflow float16. Sources: arXiv:1910.07467, arXiv:1607.06450.
    """
    x = normed.x
    if normed.pending is not None:
        x += normed.pending
    if not normed.is_rms:
        x = x - np.mean(x, axis=1, keepdims=True)
    y = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + x.dtype.type(normed.eps)) * normed.weight
    return y if normed.bias is None else y + normed.bias


@norm.cpu
def _norm_cpu(normed: Normed, *, out: str) -> Array:
    if not normed.is_rms:
        return np.asarray(norm.reference(normed, out=out))
    x, weight, eps = normed.x, normed.weight, normed.eps
    if normed.pending is not None:
        x += normed.pending
    if len(x) == 1:  # one dot product instead of three passes
        row = x[0]
        scale = 1.0 / np.sqrt(np.dot(row, row) / row.size + eps)
        y = row * x.dtype.type(scale)
        y *= weight
        return np.asarray(y[None])
    return rms_norm(x, weight, eps)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """The RMS norm along the last axis, on NumPy."""
    mean_square = np.vecdot(x, x) / x.shape[-1]  # for each row what np.dot gives: it stands for the same row alone
    y = x * (1.0 / np.sqrt(mean_square + eps)).astype(x.dtype)[..., None]
    y *= weight
    return np.asarray(y)


@norm.gpu
def _norm_gpu(device: GPU, normed: Normed, *, out: str) -> Any:
    y = device.empty(normed.shape, device.dtype if out == "act" else np.float32)
    _launch(device, normed, y, OUT="f16" if out == "act" else "float")
    return y


def ordered(device: GPU, normed: Normed, orders: Sequence[str]) -> Ordered:
    """The normalized rows in one or both ORDERS."""
    y, rows = empty(device, normed.shape, orders)
    _launch(device, normed, y, OUT="f16", ORDERS=sum(1 << ORDERS.index(order) for order in orders))
    return rows


def _launch(device: GPU, normed: Normed, y: Any, **defines: int | str) -> None:
    x, pending = normed.x, normed.pending
    rows, width = x.shape
    function = "rmsnorm" if normed.is_rms else "layernorm"
    weights: tuple[Any, ...] = (normed.weight,) if normed.is_rms else (normed.weight, normed.bias)
    sizes: tuple[int, ...] = (rows,)
    if pending is not None:
        addends = pending.parts if isinstance(pending, Partials) else pending[None]  # (S, M, K)
        function, weights, sizes = f"add_{function}", (addends, *weights), (rows, len(addends))
    vector = 4 if width % 4 == 0 else 1
    max_threads = device.choice("norm", width=width)["MAX_THREADS"]
    threads = min(-(-width // vector // 64) * 64, max_threads)
    defines |= {
        "BLOCK": threads,
        "VECTOR": vector,
        "PIECES": -(-width // (vector * threads)),
    }
    device.run("norm", function, rows, x, *weights, y, width, normed.eps, *sizes, **defines)


@op("&x:f32[M,K] pending?:f32[M,K] -> y:act[M,K]")
def as_operand(x: Array, pending: Any) -> Array:
    """x as the operand of a product, without a norm, after what is pending is added to it in place."""
    if pending is not None:
        x += pending
    return x


@as_operand.gpu
def _as_operand_gpu(device: GPU, x: Any, pending: Any) -> Any:
    y = device.empty(x.shape, device.dtype)
    addends = pending.parts if isinstance(pending, Partials) else None if pending is None else pending[None]
    count = 0 if addends is None else len(addends)
    device.run("activation", "as_operand", -(-x.size // _BLOCK_THREADS), x, addends, y, x.size, count)
    return y
