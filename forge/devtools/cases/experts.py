"""Cases of mixtures of experts: what chooses them, and what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.devtools.cases.case import Case, normal
from forge.ops.experts import Experts, Router
from forge.ops.norm import Normed
from forge.ops.op import Array, Arrays
from forge.ops.quant import QuantTensor


def _normed(x: Array, weight: Array | None = None) -> Normed:
    ones = np.ones(x.shape[1], np.float32)
    return Normed(x, None, ones if weight is None else weight, None, 1e-5, True)


# The choice


def route_case(
    name: str,
    rows: int,
    inner: int,
    count: int,
    used: int,
    *,
    scores: str = "softmax",
    weights: str = "renormalized",
    extras: str = "",
    groups: tuple[int, int] = (1, 1),
    distinct: int = 0,
    order: str = "any",
) -> Case:
    """extras: of "bias", "selection", "scale". distinct: Experts repeat after so many, so that they tie."""

    def make(rng: np.random.Generator) -> Arrays:
        weight = normal(rng, distinct or count, inner) / np.float32(np.sqrt(inner))
        weight = np.tile(weight, (-(-count // len(weight)), 1))[:count]
        vector = {name: normal(rng, count) for name in extras.split()}
        router = Router(
            *(weight, vector.get("bias"), vector.get("selection"), vector.get("scale"), used, *groups),
            2.5 if "scale" in vector else 1.0,
        )
        return _normed(normal(rng, rows, inner), 1 + 0.1 * normal(rng, inner)), router

    return Case(name, make, {"scores": scores, "weights": weights, "order": order, "tiles": "never"})


def _by_hand() -> Case:
    """The norm of [1, 1] is itself. Logits 1, 2, 2, -1: the two in the middle tie."""

    def make(_: np.random.Generator) -> Arrays:
        weight = np.array([[1, 0], [2, 0], [1, 1], [0, -1]], np.float32)
        row = Normed(np.ones((1, 2), np.float32), None, np.ones(2, np.float32), None, 0.0, True)
        return row, Router(weight, None, None, None, 3, 1, 1, 1.0)

    shares = np.exp([0.0, 0.0, -1.0]) / (2 + np.exp(-1.0))
    options = {"scores": "softmax", "weights": "renormalized", "order": "any", "tiles": "never"}
    return Case("by hand", make, options, expected=([[1, 2, 0]], [shares]))


_ROUTE = [
    _by_hand(),
    route_case("one expert", 1, 8, 1, 1),
    route_case("T1 X128 U8", 1, 256, 128, 8),
    route_case("all experts", 3, 31, 5, 5),  # rows that are no whole vectors
    route_case("ties", 2, 64, 96, 7, distinct=3),
    route_case("T33 X126 U8 as scored", 33, 64, 126, 8, weights="as_scored", extras="bias"),
    route_case("T130", 130, 68, 150, 4, extras="scale bias"),
    route_case("sigmoid", 2, 64, 512, 4, scores="sigmoid", weights="as_scored"),
    route_case("sigmoid with selection bias", 5, 64, 64, 6, scores="sigmoid", extras="bias selection scale"),
    route_case("sigmoid ties with selection bias", 2, 64, 64, 6, scores="sigmoid", distinct=1),
    route_case("groups", 2, 64, 32, 4, scores="sigmoid", extras="selection", groups=(8, 3)),
    route_case("groups without bias", 9, 64, 24, 3, groups=(4, 2)),
    route_case("softmax with selection bias", 1, 64, 16, 4, extras="selection"),
]


def _gate_case(rows: int, inner: int, width: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        normed = _normed(normal(rng, rows, inner))
        return normal(rng, rows, width), normed, normal(rng, inner) / np.float32(np.sqrt(inner))

    return Case(f"T{rows} E{inner} F{width}", make)


# The products


def experts_case(
    name: str,
    rows: int,
    inner: int,
    width: int,
    count: int,
    used: int,
    *,
    format: str = "",
    activation: str = "silu",
    weighs: str = "output",
    order: str = "any",
    partials: str = "never",
    extras: str = "",
    among: int = 0,
) -> Case:
    """format: Of quantized matrices, or of gates, ups and downs; without one they are float. among: Experts that are
    chosen are among so many.

    extras: of "bias", "residual", "normed", "apart" (gates and ups are two matrices).
    """

    of_gate, of_up, of_down = format.split() if " " in format else (format,) * 3

    def matrix(rng: np.random.Generator, kind: str, outer: int, cols: int) -> Any:
        if not kind:
            return normal(rng, outer, cols) / np.float32(np.sqrt(cols))
        return QuantTensor.random(kind, outer, cols, rng)

    def make(rng: np.random.Generator) -> Arrays:
        has = set(extras.split())
        first = width if activation == "relu2" or "apart" in has else 2 * width
        gate, down = matrix(rng, of_gate, count * first, inner), matrix(rng, of_down, count * inner, width)
        if activation == "clamped_swiglu":  # whose x is large, so that some are clamped
            down = down / np.float32(32)
        up = matrix(rng, of_up, count * width, inner) if "apart" in has else None
        biases = [normal(rng, len) for len in (count * first, count * width, count * inner)] if "bias" in has else None
        gate_bias, up_bias, down_bias = biases or (None, None, None)
        experts = Experts(gate, up, gate_bias, up_bias if up is not None else None, down, down_bias, count)
        chosen = np.stack([rng.permutation(among or count)[:used] for _ in range(rows)]).astype(np.int32)
        weights = rng.uniform(0.1, 1, (rows, used)).astype(np.float32)
        x, scale = normal(rng, rows, inner), np.float32(6 if activation == "clamped_swiglu" else 1)
        if format:  # results near 1
            stds = gate.dequantize().std() * np.sqrt(inner), down.dequantize().std() * np.sqrt(width)
            scale, weights = np.float32(1 / stds[0]), weights / np.float32(stds[1])
        operand: Any = x * scale
        if "normed" in has:
            operand = _normed(x, (1 + 0.1 * normal(rng, inner)) * scale)
        return operand, chosen, weights, experts, normal(rng, rows, inner) if "residual" in has else None

    return Case(name, make, {"activation": activation, "weighs": weighs, "order": order, "partials": partials})


def _experts_by_hand() -> Case:
    """Two experts of width 1, without an activation's curve: relu2. The second is not chosen."""

    def make(_: np.random.Generator) -> Arrays:
        gate, down = np.zeros((2, 8, 8), np.float32), np.zeros((2, 8, 8), np.float32)
        gate[1], down[1] = 9, 9
        gate[0, 0, :2], down[0, :2, 0] = [1, 2], [1, -1]
        biases = np.zeros((2, 16), np.float32)
        biases[0, 0], biases[1, 1] = 1, 1
        experts = Experts(gate.reshape(16, 8), None, biases[0], None, down.reshape(16, 8), biases[1], 2)
        x, residual = np.eye(2, 8, dtype=np.float32)
        row, residual = (3 * x + 4 * residual)[None], 1000 * x[None]
        return row, np.array([[0]], np.int32), np.array([[0.5]], np.float32), experts, residual

    options = {"activation": "relu2", "weighs": "output", "order": "any", "partials": "never"}
    return Case("by hand", make, options, expected=([[1072, -71.5, *6 * [0]]],))  # (3 + 8 + 1) ** 2 = 144


_EXPERTS = [
    _experts_by_hand(),
    experts_case("T1", 1, 64, 24, 6, 2, extras="residual"),
    experts_case("T1 all, biases", 1, 72, 40, 3, 3, weighs="input", extras="bias normed", activation="clamped_swiglu"),
    experts_case("T1 gates and ups apart", 1, 64, 32, 4, 2, extras="bias apart"),
    experts_case("T1 fixed", 1, 64, 32, 4, 2, order="fixed", extras="normed"),
    experts_case("T1 wide", 1, 8, 8208, 2, 2, extras="residual", activation="relu2"),  # two launches of the second
    experts_case("T5", 5, 64, 24, 9, 2, extras="residual bias normed"),
    experts_case("T4 of many", 4, 64, 24, 9, 2, extras="residual bias", weighs="input"),
    experts_case("T3 all experts", 3, 40, 16, 4, 4, weighs="input", extras="bias", activation="clamped_swiglu"),
    experts_case("T20 one expert for all", 20, 64, 24, 4, 1, among=1),
    experts_case("T70 ragged", 70, 64, 40, 5, 3, activation="gelu", extras="residual"),
    experts_case("T300 some without rows", 300, 64, 16, 8, 2, among=5, activation="relu2"),
    *(
        experts_case(f"{format} T{rows}", rows, 512, 256, 4, 2, format=format, extras=extras)
        for format, rows, extras in (
            *(("Q4_0", 2, "residual"), ("Q4_K", 1, "normed residual"), ("Q4_K", 5, ""), ("Q6_K", 5, "")),
            *(("MXFP4", 1, "normed residual"), ("MXFP4", 5, ""), ("IQ2_XXS", 1, ""), ("IQ2_XXS", 5, "")),
        )
    ),
    experts_case("gates and ups of two types T5", 5, 512, 256, 4, 2, format="Q4_K IQ2_XXS Q6_K", extras="apart"),
    experts_case("Q5_0 T20 of two", 20, 256, 256, 2, 1, format="Q5_0", extras="residual"),
    experts_case("Q4_K T2 wide", 2, 256, 5632, 6, 3, format="Q4_K", extras="bias"),
]

CASES = {
    "route": _ROUTE,
    "gate_rows": [_gate_case(1, 64, 5), _gate_case(3, 31, 300)],
    "experts": _EXPERTS,
}
