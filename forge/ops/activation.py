"""Activation functions, the soft cap of logits, and a sum."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.matmul import Partials
from forge.ops.op import Array, op

_TANH_SCALE = np.sqrt(2 / np.pi)
_BLOCK_THREADS = 256


@op("x:f32[T,F] -> y:act[T,F]")
def gelu(x: Array) -> Array:
    """GELU in its tanh form, for feed-forwards without a gate. Source: arXiv:1606.08415."""
    return 0.5 * x * (1 + np.tanh(x.dtype.type(_TANH_SCALE) * (x + 0.044715 * x**3)))


@gelu.gpu
def _gelu_gpu(device: GPU, x: Any) -> Any:
    y = device.empty(x.shape, device.dtype)
    device.run("activation", "gelu", -(-x.size // _BLOCK_THREADS), x, y, x.size)
    return y


@op("x:f32[T,F] -> y:act[T,F]")
def gelu_erf(x: Array) -> Array:
    """GELU as it is defined, by the error function, for feed-forwards without a gate. Source: arXiv:1606.08415."""
    return 0.5 * x * (1 + np.frompyfunc(math.erf, 1, 1)(x * x.dtype.type(np.sqrt(0.5))).astype(x.dtype))


@gelu_erf.cpu
def _gelu_erf_cpu(x: Array) -> Array:
    # erf by Abramowitz and Stegun, 7.1.26: off by 1.5e-7 at most
    z = np.abs(x) * np.float32(np.sqrt(0.5))
    t = 1 / (1 + np.float32(0.3275911) * z)
    y = np.zeros_like(x)
    for coefficient in (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592):
        y += np.float32(coefficient)
        y *= t
    z = np.minimum(z, 9)  # beyond it erf is 1
    y *= np.exp(-z * z)
    return np.where(x < 0, 0.5 * x * y, x - 0.5 * x * y)


@gelu_erf.gpu
def _gelu_erf_gpu(device: GPU, x: Any) -> Any:
    y = device.empty(x.shape, device.dtype)
    device.run("activation", "gelu_erf", -(-x.size // _BLOCK_THREADS), x, y, x.size)
    return y


@op("x:f32[T,F] alpha_n:f32 alpha_p:f32 beta:f32 eps:f32 -> y:act[T,F]")
def xielu(x: Array, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Array:
    """xIELU: a x**2 + b x where x > 0, else c (exp(min(x, eps)) - 1 - x) + b x. Source: arXiv:2411.13010.

    a = softplus(alpha_p), b = beta, c = beta + softplus(alpha_n): models learn them in this form.
    """
    positive, negative = softplus(alpha_p), beta + softplus(alpha_n)
    below = np.expm1(np.minimum(x, x.dtype.type(eps))) - x
    return np.where(x > 0, positive * x * x, negative * below).astype(x.dtype) + x.dtype.type(beta) * x


def softplus(x: float) -> float:
    """ln(1 + exp(x))."""
    return float(np.logaddexp(0.0, x))


@xielu.gpu
def _xielu_gpu(device: GPU, x: Any, alpha_n: float, alpha_p: float, beta: float, eps: float) -> Any:
    y = device.empty(x.shape, device.dtype)
    numbers = softplus(alpha_p), beta + softplus(alpha_n), beta, eps
    device.run("activation", "xielu", -(-x.size // _BLOCK_THREADS), x, y, *numbers, x.size)
    return y


@op("gate_up:f32[T,2*F] activation=silu|gelu -> y:act[T,F]")
def act_and_mul(gate_up: Array, *, activation: str) -> Array:
    """activation(gate) * up, where gate and up are the halves of one product (arXiv:2002.05202).

    silu(x) = x / (1 + exp(-x)). GELU is in its tanh form, which Gemma uses.
    """
    gate, up = _halves(gate_up)  # (T, F) each
    if activation == "gelu":
        return gelu.reference(gate) * up
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


@act_and_mul.cpu
def _act_and_mul_cpu(gate_up: Array, *, activation: str) -> Array:
    gate, up = _halves(gate_up)
    if activation == "gelu":
        y = gate * gate
        y *= 0.044715
        y += 1
        y *= gate
        y *= gate.dtype.type(_TANH_SCALE)
        np.tanh(y, out=y)
        y += 1
        y *= gate
        y *= 0.5
    else:
        # exp(80) is finite in float32; silu of a smaller gate is 0 beside any other number.
        y = np.maximum(gate, -80)
        np.negative(y, out=y)
        np.exp(y, out=y)
        y += 1
        np.divide(gate, y, out=y)
    y *= up
    return y


@act_and_mul.gpu
def _act_and_mul_gpu(device: GPU, gate_up: Any, *, activation: str) -> Any:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    y = device.empty((rows, width), device.dtype)
    grid = (-(-width // (4 * _BLOCK_THREADS)), rows)
    device.run("activation", "act_and_mul", grid, gate_up, y, width, int(activation == "gelu"))
    return y


def _halves(gate_up: Array) -> tuple[Array, Array]:
    width = gate_up.shape[1] // 2
    return gate_up[:, :width], gate_up[:, width:]


@op("&x:f32[M,N] cap:f32 -> y:f32[M,N]")
def soft_cap(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap), in place: Gemma 2 bounds its logits this way. Source: arXiv:2408.00118."""
    x /= cap
    np.tanh(x, out=x)
    x *= cap
    return x


@soft_cap.gpu
def _soft_cap_gpu(device: GPU, x: Any, cap: float) -> Any:
    device.run("activation", "soft_cap", -(-x.size // _BLOCK_THREADS), x, cap, x.size)
    return x


@op("x:f32[T,E] addend:f32[T,E] -> y:f32[T,E]")
def add(x: Array, addend: Any) -> Array:
    """x + addend as a new array: a hook sees the residual stream while a pending addend stays apart from it.

    addend: An array or `Partials`.
    """
    return np.asarray(x + addend)


@add.gpu
def _add_gpu(device: GPU, x: Any, addend: Any) -> Any:
    y = device.empty(x.shape, np.float32)
    addends = addend.parts if isinstance(addend, Partials) else addend[None]
    device.run("activation", "add", -(-x.size // _BLOCK_THREADS), x, addends, y, x.size, len(addends))
    return y


@op("&x:f32[T,E] addend?:f32[T,E] factor:f32")
def add_and_scale(x: Array, addend: Array | None, factor: float) -> None:
    """x becomes (x + addend) * factor, in place: Gemma 4 scales the residual stream behind each layer."""
    if addend is not None:
        x += addend
    x *= x.dtype.type(factor)


@add_and_scale.gpu
def _add_and_scale_gpu(device: GPU, x: Any, addend: Any, factor: float) -> None:
    device.run("activation", "add_and_scale", -(-x.size // _BLOCK_THREADS), x, addend, factor, x.size)


@op("x:act[T,X] product:f32[T,Q] gates:i32 -> y:act[T,X]")
def sigmoid_gate(x: Array, product: Array, gates: int) -> Array:
    """x times sigmoid(gate), where the gates are the last numbers of the product's rows: one for each number of x, or
    for each head of it. The gate of attention's results: arXiv:2505.06708."""
    gate = product[:, product.shape[1] - gates :, None]
    with np.errstate(over="ignore"):
        return (x.reshape(len(x), gates, -1) / (1 + np.exp(-gate))).reshape(x.shape)


@sigmoid_gate.gpu
def _sigmoid_gate_gpu(device: GPU, x: Any, product: Any, gates: int) -> Any:
    """product may be `Partials`: the kernel sums them."""
    rows, width = x.shape
    parts = product.parts if isinstance(product, Partials) else product[None]  # (S, T, Q)
    y = device.empty(x.shape, device.dtype)
    grid = (-(-width // _BLOCK_THREADS), rows)
    sizes = width, width // gates, parts.shape[2] - gates, parts.shape[2], rows, len(parts)
    device.run("activation", "sigmoid_gate", grid, x, parts, y, *sizes)
    return y
