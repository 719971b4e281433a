"""Normalization of the float32 residual stream into the precision of matrix inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.matmul import Slices
from forge.ops.op import Array, Arrays, Case, op


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def _cases(*, bias: bool = False, delta: bool = False, **options: Any) -> list[Case]:
    """Widths around wave and tile edges, one row and many, tiny and huge values."""

    def make(rows: int, width: int, scale: float) -> Callable[[np.random.Generator], Arrays]:
        def build(rng: np.random.Generator) -> Arrays:
            x = [_normal(rng, rows, width, scale=scale) for _ in range(2 if delta else 1)]
            weights = [1 + _normal(rng, width, scale=0.1) for _ in range(2 if bias else 1)]
            return (*x, *weights, 1e-5)

        return build

    sizes = [(1, 1), (1, 31), (3, 64), (2, 65), (5, 576), (1, 1025), (2, 8192)]
    named = [(f"{rows}x{width}", make(rows, width, 1.0)) for rows, width in sizes]
    named += [("large values", make(2, 640, 1e5)), ("small values", make(2, 640, 1e-4))]
    suffix = "".join(f" {value}" for value in options.values())
    return [Case(name + suffix, build, options) for name, build in named]


def _f32(*values: float) -> Array:
    return np.array(values, np.float32)


# 3, 4 have the mean square 12.5; with eps = 3.5 the divisor is 4
_RMS_BY_HAND = Case(
    "by hand",
    lambda rng: (_f32(3, 4)[None], _f32(1, 2), 3.5),
    {"out": "act"},
    expected=(np.array([[0.75, 2.0]], np.float32),),
)
# 1, 3 have mean 2 and variance 1; with eps = 3 the divisor is 2
_LAYER_BY_HAND = Case(
    "by hand",
    lambda rng: (_f32(1, 3)[None], _f32(1, 2), _f32(0, 10), 3.0),
    expected=(np.array([[-0.5, 11.0]], np.float32),),
)


def _run(device: GPU, function: str, x: Any, *rest: Any, eps: float, out: str = "act", delta: Any = None) -> Any:
    rows, width = x.shape
    sizes: tuple[int, ...] = ()
    if delta is not None:
        parts = delta.parts if isinstance(delta, Slices) else delta[None]  # (S, T, E)
        rest, sizes = (parts, *rest), (rows, len(parts))
    y = device.empty(x.shape, device.dtype if out == "act" else np.float32)
    vector = 4 if width % 4 == 0 else 1
    most = device.choice("norm", width=width)["MAX_THREADS"]
    threads = min(-(-width // vector // 64) * 64, most)
    defines: dict[str, int | str] = {
        "BLOCK": threads,
        "OUT": "f16" if out == "act" else "float",
        "VECTOR": vector,
        "PIECES": -(-width // (vector * threads)),
    }
    device.run("norm", function, rows, x, *rest, y, width, eps, *sizes, **defines)
    return y


def _rmsnorm_gpu(device: GPU, x: Any, weight: Any, eps: float, *, out: str) -> Any:
    return _run(device, "rmsnorm", x, weight, eps=eps, out=out)


def _add_rmsnorm_gpu(device: GPU, residual: Any, delta: Any, weight: Any, eps: float) -> Any:
    return _run(device, "add_rmsnorm", residual, weight, eps=eps, delta=delta)


def _layernorm_gpu(device: GPU, x: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _run(device, "layernorm", x, weight, bias, eps=eps)


def _add_layernorm_gpu(device: GPU, residual: Any, delta: Any, weight: Any, bias: Any, eps: float) -> Any:
    return _run(device, "add_layernorm", residual, weight, bias, eps=eps, delta=delta)


def _rmsnorm_cpu(x: Array, weight: Array, eps: float, *, out: str = "act") -> Array:
    if len(x) == 1:  # one dot product instead of three passes
        row = x[0]
        scale = 1.0 / np.sqrt(np.dot(row, row) / row.size + eps)
        y = row * x.dtype.type(scale)
        y *= weight
        return y[None]
    mean_square = np.einsum("te,te->t", x, x) / x.shape[1]
    y = x * (1.0 / np.sqrt(mean_square + eps)).astype(x.dtype)[:, None]
    y *= weight
    return y


@op(
    "x:f32[T,E] weight:f32[E] eps:f32 out=act|f32 -> y:out[T,E]",
    cpu=_rmsnorm_cpu,
    gpu=_rmsnorm_gpu,
    cases=[*_cases(out="act"), *_cases(out="f32"), _RMS_BY_HAND],
)
def rmsnorm(x: Array, weight: Array, eps: float, *, out: str = "act") -> Array:
    """x / sqrt(mean(x**2) + eps) * weight, per row. arXiv:1910.07467

    out="f32" for what goes back to the residual stream: Gemma's overflows float16.
    """
    return x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + eps) * weight


@op(
    "x:f32[T,E] weight:f32[E] bias?:f32[E] eps:f32 -> y:act[T,E]",
    cases=[*_cases(bias=True), _LAYER_BY_HAND],
    gpu=_layernorm_gpu,
)
def layernorm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias, per row. arXiv:1607.06450"""
    centred = x - np.mean(x, axis=1, keepdims=True)
    y = centred / np.sqrt(np.mean(centred * centred, axis=1, keepdims=True) + x.dtype.type(eps)) * weight
    return y if bias is None else y + bias


def _add_rmsnorm_cpu(residual: Array, delta: Array, weight: Array, eps: float) -> Array:
    residual += delta
    return _rmsnorm_cpu(residual, weight, eps)


@op(
    "&residual:f32[T,E] delta:f32[T,E] weight:f32[E] eps:f32 -> y:act[T,E]",
    cpu=_add_rmsnorm_cpu,
    gpu=_add_rmsnorm_gpu,
    cases=_cases(delta=True),
)
def add_rmsnorm(residual: Array, delta: Array, weight: Array, eps: float) -> Array:
    """residual += delta, in place; then rmsnorm of it."""
    residual += delta
    return np.asarray(rmsnorm.reference(residual, weight, eps))


@op(
    "&residual:f32[T,E] delta:f32[T,E] weight:f32[E] bias?:f32[E] eps:f32 -> y:act[T,E]",
    cases=_cases(bias=True, delta=True),
    gpu=_add_layernorm_gpu,
)
def add_layernorm(residual: Array, delta: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """residual += delta, in place; then layernorm of it."""
    residual += delta
    return np.asarray(layernorm.reference(residual, weight, bias, eps))
