"""Activations, and a sum. Gated ones take the fused gate-and-up product: its first half, activated, times the other."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, Case, op

_TANH_SCALE = np.sqrt(2 / np.pi)


def _case(rows: int, width: int, scale: float = 2.0) -> Case:
    return Case(
        f"{rows}x{width} scale {scale:g}",
        lambda rng: ((rng.standard_normal((rows, 2 * width)) * scale).astype(np.float32),),
    )


_CASES = [_case(1, 1), _case(1, 31), _case(3, 64), _case(2, 65), _case(5, 1536), _case(2, 40, 100.0)]


def _halves(gate_up: Array) -> tuple[Array, Array]:
    width = gate_up.shape[1] // 2
    return gate_up[:, :width], gate_up[:, width:]  # (T, F) each


def _bytes(gate_up: Array) -> int:
    return int(gate_up.nbytes * 3 // 2)


_BLOCK = 256


def _gated(device: GPU, kernel: str, gate_up: Any) -> Any:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = device.empty((rows, width), device.dtype)
    device.run("activation", kernel, (-(-width // (4 * _BLOCK)), rows), gate_up, y, width)
    return y


def _silu_mul_gpu(device: GPU, gate_up: Any) -> Any:
    return _gated(device, "silu_mul", gate_up)


def _gelu_mul_gpu(device: GPU, gate_up: Any) -> Any:
    return _gated(device, "gelu_mul", gate_up)


def _gelu_gpu(device: GPU, x: Any) -> Any:
    y = device.empty(x.shape, device.dtype)
    device.run("activation", "gelu", -(-x.size // _BLOCK), x, y, x.size)
    return y


def _soft_cap_gpu(device: GPU, x: Any, cap: float) -> Any:
    device.run("activation", "soft_cap", -(-x.size // _BLOCK), x, cap, x.size)
    return x


def _silu_mul_cpu(gate_up: Array) -> Array:
    gate, up = _halves(gate_up)
    y = np.maximum(gate, -80)  # exp(80) is finite in float32, and what it makes of a gate is 0 beside any other number
    np.negative(y, out=y)
    np.exp(y, out=y)
    y += 1
    np.divide(gate, y, out=y)
    y *= up
    return y


@op(
    "gate_up:f32[T,2*F] -> y:act[T,F]",
    cpu=_silu_mul_cpu,
    gpu=_silu_mul_gpu,
    cases=[
        *_CASES,
        Case("by hand", lambda rng: (np.array([[0, 200, -200, 3, 5, 7]], np.float32),), expected=([[0, 1000, 0]],)),
    ],
    bytes_moved=_bytes,
)
def silu_mul(gate_up: Array) -> Array:
    """silu(gate) * up with silu(x) = x / (1 + exp(-x)). arXiv:2002.05202"""
    gate, up = _halves(gate_up)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


@op(
    "x:f32[T,F] -> y:act[T,F]",
    gpu=_gelu_gpu,
    cases=[
        Case("random", lambda rng: (rng.standard_normal((3, 165)).astype(np.float32) * 3,)),
        Case("by hand", lambda rng: (np.array([[0, 20, -20]], np.float32),), expected=([[0, 20, 0]],)),
    ],
)
def gelu(x: Array) -> Array:
    """The tanh form of GELU, without a gate. arXiv:1606.08415"""
    return 0.5 * x * (1 + np.tanh(x.dtype.type(_TANH_SCALE) * (x + 0.044715 * x**3)))


def _gelu_mul_cpu(gate_up: Array) -> Array:
    gate, up = _halves(gate_up)
    y = gate * gate
    y *= 0.044715
    y += 1
    y *= gate
    y *= gate.dtype.type(_TANH_SCALE)
    np.tanh(y, out=y)
    y += 1
    y *= gate
    y *= 0.5
    y *= up
    return y


@op(
    "gate_up:f32[T,2*F] -> y:act[T,F]",
    cpu=_gelu_mul_cpu,
    gpu=_gelu_mul_gpu,
    cases=[
        *_CASES,
        Case("by hand", lambda rng: (np.array([[0, 20, -20, 3, 5, 7]], np.float32),), expected=([[0, 100, 0]],)),
    ],
    bytes_moved=_bytes,
)
def gelu_mul(gate_up: Array) -> Array:
    """gelu(gate) * up with the tanh form of GELU that Gemma uses. arXiv:1606.08415"""
    gate, up = _halves(gate_up)
    return gelu.reference(gate) * up


@op(
    "&x:f32[M,N] cap:f32 -> y:f32[M,N]",
    gpu=_soft_cap_gpu,
    cases=[
        Case("random", lambda rng: (rng.standard_normal((3, 165)).astype(np.float32) * 20, 30.0)),
        Case("by hand", lambda rng: (np.array([[0, 1e9, -1e9]], np.float32), 5.0), expected=([[0, 5, -5]],)),
    ],
)
def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap), in place: Gemma 2 bounds its logits so. arXiv:2408.00118"""
    x /= cap
    np.tanh(x, out=x)
    x *= cap
    return x


def _add_gpu(device: GPU, x: Any, delta: Any) -> Any:
    y = device.empty(x.shape, np.float32)
    device.run("activation", "add", -(-x.size // _BLOCK), x, delta, y, x.size)
    return y


@op(
    "x:f32[T,E] delta:f32[T,E] -> y:f32[T,E]",
    gpu=_add_gpu,
    cases=[
        Case("random", lambda rng: tuple(rng.standard_normal((2, 3, 300)).astype(np.float32))),
        Case(
            "by hand",
            lambda rng: (np.array([[1, 2]], np.float32), np.array([[3, -5]], np.float32)),
            expected=([[4, -3]],),
        ),
    ],
)
def add(x: Array, delta: Array) -> Array:
    """x + delta as a new array: the residual stream where a norm has yet to add to it, for looking inside."""
    return x + delta
