"""Products of the normalized residual stream, and with a gated activation behind them: a launch each for one token."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.activation import gelu_mul, silu_mul
from forge.ops.linear import flushed_products, linear
from forge.ops.matmul import MAX_ROWS, is_tiled, tile_product
from forge.ops.matvec import fits, vector_linear
from forge.ops.norm import rmsnorm
from forge.ops.op import Array, Arrays, Case, op
from forge.ops.quant import FORMATS, QuantTensor, Stack

_GATED = {"silu": silu_mul, "gelu": gelu_mul}


def _inputs(rng: np.random.Generator, rows: int, weight: Any, scale: float = 1.0) -> Arrays:
    """Products near 1: of blocks, random ones are large, and the row is rounded to float16."""
    inner = weight.shape[1]
    x = rng.standard_normal((rows, inner)).astype(np.float32) * np.float32(scale)
    norm = (1 + 0.1 * rng.standard_normal(inner)).astype(np.float32)
    matrix = weight.dequantize() if isinstance(weight, QuantTensor | Stack) else weight
    return x, norm / np.float32(matrix.std() * np.sqrt(inner)), 1e-5, weight


def _floats(rng: np.random.Generator, inner: int, outer: int) -> Array:
    return rng.standard_normal((outer, inner)).astype(np.float32)


def _blocks(rng: np.random.Generator, name: str, inner: int, outer: int) -> QuantTensor:
    return QuantTensor.random(name, outer, inner, rng)


def _stack(rng: np.random.Generator, inner: int, *names: str) -> Stack:
    return Stack(tuple(_blocks(rng, name, inner, 6) for name in names))


def _rms_linear_cpu(x: Array, norm: Array, eps: float, weight: Any) -> Any:
    return linear.run_cpu(rmsnorm.run_cpu(x, norm, eps, out="act"), weight, None, None)


def _rms_linear_gpu(device: GPU, x: Any, norm: Any, eps: float, weight: Any) -> Any:
    parts = weight.parts if isinstance(weight, Stack) else (weight,)
    if len(x) != 1 or not all(fits(part, normalized=True) for part in parts):
        return device.launch(linear, (device.launch(rmsnorm, (x, norm, eps), {"out": "act"}), weight, None, None), {})
    y = device.empty((1, weight.shape[0]), np.float32)
    column = 0
    for part in parts:
        vector_linear(device, x, part, None, y[0, column : column + part.shape[0]], norm=norm, eps=eps)
        column += part.shape[0]
    return y


def _linear_case(name: str, rows: int, weight: Any, scale: float = 1.0) -> Case:
    return Case(name, lambda rng: _inputs(rng, rows, weight(rng), scale))


@op(
    "x:f32[T,E] norm:f32[E] eps:f32 weight:weight[N,E] -> y:f32[T,N]",
    cpu=_rms_linear_cpu,
    gpu=_rms_linear_gpu,
    rtol=1e-4,
    atol=1e-4,
    gpu_slack=lambda x, norm, eps, weight: flushed_products(rmsnorm.reference(x, norm, eps), weight),
    cases=[
        *(
            _linear_case(f"T{rows} E{inner} N{outer}", rows, lambda rng, n=outer, k=inner: _floats(rng, k, n))
            for rows, inner, outer in (
                *((1, 8, 1), (1, 31, 3), (1, 248, 65), (1, 256, 17), (1, 264, 9), (1, 576, 1100), (1, 1032, 5)),
                *((1, 2048, 3), (1, 2056, 6), (1, 4104, 5), (1, 8200, 2), (2, 64, 5), (17, 72, 5)),
            )
        ),
        *(_linear_case(f"{name} T1", 1, lambda rng, name=name: _blocks(rng, name, 512, 70)) for name in FORMATS),
        *(
            _linear_case(f"{name} T1 E2048", 1, lambda rng, name=name: _blocks(rng, name, 2048, 302))
            for name in FORMATS
        ),
        *(
            _linear_case(f"{name} T1 E{inner}", 1, lambda rng, name=name, k=inner: _blocks(rng, name, k, 3))
            for name in ("Q4_0", "Q8_0", "Q4_K")
            for inner in ((32, 4128) if name != "Q4_K" else (256, 4352))
        ),
        _linear_case("Q4_0 T1 E16416", 1, lambda rng: _blocks(rng, "Q4_0", 16_416, 2)),
        _linear_case("large values", 1, lambda rng: _floats(rng, 640, 3), 1e5),
        _linear_case("small values", 1, lambda rng: _floats(rng, 640, 3), 1e-4),
        _linear_case("stack T1", 1, lambda rng: _stack(rng, 256, "Q4_K", "Q6_K")),
        _linear_case("stack T2", 2, lambda rng: _stack(rng, 256, "Q4_K", "Q6_K")),
        Case(  # the norm's is [0.75, 2]
            "by hand",
            lambda rng: (
                np.array([[3, 4]], np.float32),
                np.array([1, 2], np.float32),
                3.5,
                np.array([[4, 5], [8, -1]], np.float32),
            ),
            expected=([[13, 4]],),
        ),
    ],
)
def rms_linear(x: Array, norm: Array, eps: float, weight: Any) -> Array:
    """rmsnorm(x) @ weight.T."""
    return np.asarray(linear.reference(rmsnorm.reference(x, norm, eps), weight, None, None))


def _linear_gated_cpu(x: Array, weight: Any, bias: Array | None, *, activation: str) -> Any:
    return _GATED[activation].run_cpu(linear.run_cpu(x, weight, bias, None))


def _linear_gated_gpu(device: GPU, x: Any, weight: Any, bias: Any, *, activation: str) -> Any:
    if not 1 < len(x) <= MAX_ROWS or isinstance(weight, Stack) or not is_tiled(weight):
        return device.launch(_GATED[activation], (device.launch(linear, (x, weight, bias, None), {}),), {})
    y = device.empty((len(x), weight.shape[0] // 2), device.dtype)
    tile_product(device, x, weight, bias, gated=y, activation=activation)
    return y


_STEEPEST = 1.13
"""The most that gelu grows where its argument grows by 1; silu by 1.1. Both stay below their argument."""


def _flushed_gated(x: Array, weight: Any, bias: Array | None, **_: Any) -> Array:
    """`flushed_products` of gate and up, behind activation(gate) * up."""
    gate, up = np.split(np.abs(linear.reference(x, weight, bias, None)), 2, axis=1)
    off_gate, off_up = np.split(flushed_products(x, weight), 2, axis=1)
    return np.asarray(_STEEPEST * off_gate * (up + off_up) + gate * off_up)


def _gated_product(name: str, rows: int, weight: Any, activation: str, *, bias: bool = False) -> Case:
    case = _gated_case(name, rows, weight, activation, bias=bias)

    def make(rng: np.random.Generator) -> Arrays:
        x, norm, _, matrix, more = case.make(rng)
        return x * norm, matrix, more

    return Case(case.name, make, case.options)


def _rms_gated_cpu(x: Array, norm: Array, eps: float, weight: Any, bias: Array | None, *, activation: str) -> Any:
    return _linear_gated_cpu(rmsnorm.run_cpu(x, norm, eps, out="act"), weight, bias, activation=activation)


def _rms_gated_gpu(device: GPU, x: Any, norm: Any, eps: float, weight: Any, bias: Any, *, activation: str) -> Any:
    if len(x) != 1 or isinstance(weight, Stack) or not fits(weight, normalized=True):
        return _linear_gated_gpu(
            device, device.launch(rmsnorm, (x, norm, eps), {"out": "act"}), weight, bias, activation=activation
        )
    y = device.empty((1, weight.shape[0] // 2), device.dtype)
    vector_linear(device, x, weight, bias, y[0], norm=norm, eps=eps, activation=activation)
    return y


def _gated_case(name: str, rows: int, weight: Any, activation: str = "silu", *, bias: bool = False) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        given = _inputs(rng, rows, weight(rng))
        return *given, rng.standard_normal(given[3].shape[0]).astype(np.float32) if bias else None

    return Case(f"{name} {activation}{' bias' * bias}", make, {"activation": activation})


@op(
    "x:f32[T,E] norm:f32[E] eps:f32 weight:weight[2*F,E] bias?:f32[2*F] activation=silu|gelu -> y:act[T,F]",
    cpu=_rms_gated_cpu,
    gpu=_rms_gated_gpu,
    rtol=1e-4,
    atol=1e-4,
    gpu_slack=lambda x, norm, eps, *rest, **_: _flushed_gated(rmsnorm.reference(x, norm, eps), *rest),
    cases=[
        *(
            _gated_case(
                f"T{rows} E{inner} F{width}",
                rows,
                lambda rng, f=width, k=inner: _floats(rng, k, 2 * f),
                activation,
                bias=activation == "gelu",
            )
            for rows, inner, width, activation in (
                *((1, 8, 1, "silu"), (1, 31, 3, "gelu"), (1, 256, 33, "gelu"), (1, 264, 7, "silu")),
                *((1, 576, 700, "silu"), (1, 1032, 5, "gelu"), (1, 2056, 3, "silu"), (1, 4104, 3, "gelu")),
                *((1, 8200, 2, "silu"), (2, 64, 5, "gelu"), (17, 72, 5, "silu"), (1, 2048, 302, "silu")),
            )
        ),
        *(
            _gated_case(
                f"{name} T1",
                1,
                lambda rng, name=name: _blocks(rng, name, 512, 140),
                activation,
                bias=activation == "gelu",
            )
            for name, activation in zip(FORMATS, 6 * ("silu", "gelu"), strict=True)
        ),
        *(
            _gated_case(f"{name} T1 E2048", 1, lambda rng, name=name: _blocks(rng, name, 2048, 302), activation)
            for name, activation in zip(FORMATS, 6 * ("silu", "gelu"), strict=True)
        ),
        *(
            _gated_case(f"{name} T1 E{inner}", 1, lambda rng, name=name, k=inner: _blocks(rng, name, k, 6))
            for name in ("Q4_0", "Q8_0", "Q4_K")
            for inner in ((32, 4128) if name != "Q4_K" else (256, 4352))
        ),
        _gated_case("Q4_0 T1 E16416", 1, lambda rng: _blocks(rng, "Q4_0", 16_416, 4)),
        _gated_case("Q4_K T3", 3, lambda rng: _blocks(rng, "Q4_K", 256, 6), "gelu", bias=True),
        _gated_case("stack T1", 1, lambda rng: _stack(rng, 256, "Q4_K", "Q6_K"), bias=True),
        Case(  # the norm's is [0.75, 2]; gates 200 and -200, ups 13 and 4
            "by hand",
            lambda rng: (
                np.array([[3, 4]], np.float32),
                np.array([1, 2], np.float32),
                3.5,
                np.array([[0, 50], [0, -50], [4, 5], [8, -1]], np.float32),
                np.array([100, -100, 0, 1], np.float32),
            ),
            {"activation": "silu"},
            expected=([[2600, 0]],),
        ),
    ],
)
def rms_gated(x: Array, norm: Array, eps: float, weight: Any, bias: Array | None, *, activation: str) -> Array:
    """activation(gate) * up: the halves of rmsnorm(x) @ weight.T + bias."""
    gate_up = linear.reference(rmsnorm.reference(x, norm, eps), weight, bias, None)
    return np.asarray(_GATED[activation].reference(gate_up))


@op(
    "x:act[T,E] weight:weight[2*F,E] bias?:f32[2*F] activation=silu|gelu -> y:act[T,F]",
    cpu=_linear_gated_cpu,
    gpu=_linear_gated_gpu,
    rtol=1e-4,
    atol=1e-4,
    gpu_slack=_flushed_gated,
    cases=[
        _gated_product("T1", 1, lambda rng: _floats(rng, 64, 6), "silu"),
        _gated_product("T2", 2, lambda rng: _floats(rng, 64, 10), "gelu", bias=True),
        _gated_product("T16", 16, lambda rng: _floats(rng, 1032, 70), "silu", bias=True),
        _gated_product("T40", 40, lambda rng: _floats(rng, 2056, 18), "gelu"),
        _gated_product("T40 E2552", 40, lambda rng: _floats(rng, 2552, 18), "silu", bias=True),
        _gated_product("Q4_K T5", 5, lambda rng: _blocks(rng, "Q4_K", 2048, 34), "silu", bias=True),
        _gated_product("Q8_0 T64", 64, lambda rng: _blocks(rng, "Q8_0", 96, 34), "gelu"),
        _gated_product("stack T3", 3, lambda rng: _stack(rng, 256, "Q4_K", "Q6_K"), "silu"),
        _gated_product("T3 E31", 3, lambda rng: _floats(rng, 31, 6), "silu"),
        _gated_product("T65", 65, lambda rng: _floats(rng, 64, 6), "silu"),
    ],
)
def linear_gated(x: Array, weight: Any, bias: Array | None, *, activation: str) -> Array:
    """activation(gate) * up: the halves of x @ weight.T + bias."""
    return np.asarray(_GATED[activation].reference(linear.reference(x, weight, bias, None)))
