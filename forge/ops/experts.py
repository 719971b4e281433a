"""Mixtures of experts: which experts compute a token, and what they compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend import backend_of, register
from forge.backend.gpu import GPU
from forge.errors import UnsupportedError
from forge.ops import expert_launches, fixed, route_launches
from forge.ops.activation import act_and_mul
from forge.ops.expert_groups import rows_of
from forge.ops.norm import Normed, norm
from forge.ops.op import Array, op, record
from forge.ops.quant import QuantTensor

MAX_EXPERTS, MAX_USED, MAX_GROUPS = 512, 32, 32
"""Experts of a layer, of a row, and groups of experts."""
EXPERT_WIDTH = 8
"""A GPU's kernels take experts whose widths are multiples of this."""
_MIN_SUM = 2.0**-14
"""What a sum of scores is taken for at least, where weights are divided by it: as llama.cpp does."""
_ALPHA, _LIMIT = 1.702, 7.0
"""Of the clamped SwiGLU. Source: gpt-oss' reference implementation."""


@record(
    "weight:f32[X,K] bias?:f32[X] selection_bias?:f32[X] expert_scale?:f32[X] "
    "used:i32 groups:i32 used_groups:i32 scale:f32"
)
@dataclass(frozen=True, slots=True)
class Router:
    """What chooses among X experts.

    weight: float32 (X, K). bias: float32 (X,), added to the logits. selection_bias: float32 (X,), added to the scores
    for the choice alone. expert_scale: float32 (X,), factors of the weights. used: experts of a token. groups,
    used_groups: as of `ExpertsConfig`. scale: factor of all weights.
    """

    weight: Any
    bias: Any
    selection_bias: Any
    expert_scale: Any
    used: int
    groups: int
    used_groups: int
    scale: float


register(Router, lambda router: backend_of(router.weight))


@op(
    "normed:Normed router:Router scores=softmax|sigmoid weights=renormalized|as_scored order=any|fixed "
    "tiles=never|allowed -> chosen:i32[M,U] weights:f32[M,U]",
    gpu_rtol=1e-4,
    gpu_atol=1e-5,
)
def route(normed: Normed, router: Router, *, scores: str, weights: str, order: str, tiles: str) -> tuple[Array, Array]:
    """The experts of each row, best first, and their weights. Of equal ones the lower index is better.

    order="fixed": A row's result has the same bits whatever rows stand beside it. tiles="allowed": The experts may be
    `Grouped`, with the list of tiles that `experts` multiplies.

    normed: Rows in float32 with nothing pending. The best are those with the largest logits; with a selection bias or
    with groups, those with the largest sums of score and bias. Sources: arXiv:1701.06538, arXiv:2412.19437.
    """
    logits = norm.reference(normed, out="f32") @ router.weight.T
    return chosen_by(logits if router.bias is None else logits + router.bias, router, scores, weights)


def router_logits(x: Array, router: Router) -> Array:
    """Logits (M, X) of rows (M, K), both float32, on NumPy. They have the same bits whatever rows stand beside them:
    they are few, and decide."""
    logits = fixed.product(router.weight, x)
    return logits if router.bias is None else logits + router.bias


def chosen_by(logits: Array, router: Router, scores: str, weights: str) -> tuple[Array, Array]:
    """The choice by logits (M, X), on NumPy."""
    if scores == "softmax":
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        scored = powers / powers.sum(axis=1, keepdims=True)
    else:
        with np.errstate(over="ignore"):
            scored = 1 / (1 + np.exp(-logits))
    ranked = logits
    if router.selection_bias is not None or router.groups > 1:
        ranked = scored if router.selection_bias is None else scored + router.selection_bias
    if router.groups > 1:
        ranked = _of_best_groups(ranked, router)
    chosen = np.argsort(-ranked, axis=1, kind="stable")[:, : router.used].astype(np.int32)
    found = np.take_along_axis(scored, chosen, axis=1)
    if weights == "renormalized":
        if scores == "softmax":  # all may be tiny beside an expert that was not chosen
            powers = np.take_along_axis(logits, chosen, axis=1)
            found = np.exp(powers - powers.max(axis=1, keepdims=True))
        found = found / np.maximum(found.sum(axis=1, keepdims=True), found.dtype.type(_MIN_SUM))
    found = found * found.dtype.type(router.scale)
    return chosen, found if router.expert_scale is None else found * router.expert_scale[chosen]


@route.cpu
def _route_cpu(
    normed: Normed, router: Router, *, scores: str, weights: str, order: str, tiles: str
) -> tuple[Array, Array]:
    return chosen_by(router_logits(norm.run_cpu(normed, out="f32"), router), router, scores, weights)


def _of_best_groups(ranked: Array, router: Router) -> Array:
    """The ranks, -inf outside the groups with the largest sums of two."""
    grouped = ranked.reshape(len(ranked), router.groups, -1)  # (M, G, X / G)
    best = np.sort(grouped, axis=2)[:, :, -2:].sum(axis=2)  # (M, G)
    order = np.argsort(-best, axis=1, kind="stable")
    kept = np.zeros(best.shape, bool)
    np.put_along_axis(kept, order[:, : router.used_groups], True, axis=1)
    return np.where(kept[:, :, None], grouped, -np.inf).reshape(ranked.shape)


@route.gpu
def _route_gpu(
    device: GPU, normed: Normed, router: Router, *, scores: str, weights: str, order: str, tiles: str
) -> Any:
    how = {"is_sigmoid": scores == "sigmoid", "renormalizes": weights == "renormalized", "is_fixed": order == "fixed"}
    return route_launches.route(device, normed, router, **how, leaves_tiles=tiles == "allowed")


@op("&h:act[M,F] normed:Normed gate:f32[K] -> y:act[M,F]")
def gate_rows(h: Array, normed: Normed, gate: Array) -> Array:
    """h * sigmoid(normed @ gate) for each row, in place: the gate of Qwen 2's shared expert."""
    x = norm.reference(normed, out="f32")
    with np.errstate(over="ignore"):
        h *= 1 / (1 + np.exp(-(x @ gate.astype(x.dtype))))[:, None]
    return h


@gate_rows.cpu
def _gate_rows_cpu(h: Array, normed: Normed, gate: Array) -> Array:
    """A row's gate has the same bits whatever rows stand beside it."""
    with np.errstate(over="ignore"):
        h *= 1 / (1 + np.exp(-np.vecdot(norm.run_cpu(normed, out="f32"), gate)))[:, None]
    return h


@gate_rows.gpu
def _gate_rows_gpu(device: GPU, h: Any, normed: Normed, gate: Any) -> Any:
    sizes = (normed.shape[1], h.shape[1], normed.eps)
    device.run("expert_gate", "gate_rows", len(h), h, normed.x, normed.weight, gate, *sizes)
    return h


@record(
    "gate:weight[N,K] up?:weight[O,K] gate_bias?:f32[N] up_bias?:f32[O] down:weight[P,F] down_bias?:f32[P] count:i32"
)
@dataclass(frozen=True, slots=True)
class Experts:
    """The matrices of X experts of width F, as one matrix each: an expert's rows lie together.

    gate: (X * 2F, K), an expert's gates, then its ups; or (X * F, K), the gates, where `up` holds the ups, or the ups,
    where the activation has no gate. down: (X * K, F). Biases: float32, one for each row. count: X.
    """

    gate: Any
    up: Any
    gate_bias: Any
    up_bias: Any
    down: Any
    down_bias: Any
    count: int


register(Experts, lambda experts: backend_of(experts.gate))


@op(
    "operand:act[M,K]|Normed chosen:i32[M,U] weights:f32[M,U] experts:Experts &residual?:f32[M,K] "
    "activation=silu|gelu|clamped_swiglu|relu2 weighs=output|input order=any|fixed partials=never|allowed "
    "-> y:f32[M,K]",
    rtol=1e-4,
    atol=1e-4,
)
def experts(
    operand: Any,
    chosen: Array,
    weights: Array,
    experts: Experts,
    residual: Array | None,
    *,
    activation: str,
    weighs: str,
    order: str,
    partials: str,
) -> Array:
    """The sum over each row's experts of weight * down(activation(gate(x)) * up(x)), or of down(activation(up(x))).

    operand: An array (M, K), or rows that are normalized first. residual: The sum is added to it in place, and it is
    returned. weighs: What the weight multiplies; with "input" the products without their biases. order="fixed": A row's
    result has the same bits whatever rows stand beside it. partials="allowed": Without a residual the result may be
    `Partials`, which the reader sums.
    """
    x = norm.reference(operand, out="act") if isinstance(operand, Normed) else operand
    gates, downs = _of_each(experts.gate, experts), _of_each(experts.down, experts)
    ups = None if experts.up is None else _of_each(experts.up, experts)
    y = np.zeros(x.shape, x.dtype)
    for row, its in enumerate(chosen):
        for expert, weight in zip(its, weights[row], strict=True):
            matrix, bias = gates[expert], _bias_of(experts.gate_bias, expert, experts)
            if ups is not None:
                matrix = np.concatenate([matrix, ups[expert]])
                up_bias = _bias_of(experts.up_bias, expert, experts)
                bias = None if bias is None else np.concatenate([bias, up_bias])
            first = matrix.astype(x.dtype) @ x[row] * (weight if weighs == "input" else 1)
            h = expert_activation(first if bias is None else first + bias, activation)
            second = downs[expert].astype(x.dtype) @ h
            bias = _bias_of(experts.down_bias, expert, experts)
            y[row] += (second if bias is None else second + bias) * (weight if weighs == "output" else 1)
    if residual is None:
        return y
    residual += y
    return residual


def _of_each(weight: Any, experts: Experts) -> Array:
    """(X, rows, cols) float."""
    matrix = weight.dequantize() if isinstance(weight, QuantTensor) else weight
    return np.asarray(matrix.reshape(experts.count, -1, matrix.shape[1]))


def _bias_of(bias: Array | None, expert: int, experts: Experts) -> Array | None:
    return None if bias is None else bias.reshape(experts.count, -1)[expert]


def expert_activation(first: Array, activation: str) -> Array:
    """The activation (..., F) of an expert's first product: (..., 2F), gates and ups, or with relu2 (..., F)."""
    if activation == "relu2":
        return np.maximum(first, 0) ** 2
    if activation == "clamped_swiglu":
        gate, up = np.split(first, 2, axis=-1)
        gate, up = np.minimum(gate, _LIMIT), np.clip(up, -_LIMIT, _LIMIT)
        with np.errstate(over="ignore"):
            return np.asarray((up + 1) * gate / (1 + np.exp(-_ALPHA * gate)))
    flat = first.reshape(-1, first.shape[-1])
    return np.asarray(act_and_mul.reference(flat, activation=activation).reshape(*first.shape[:-1], -1))


@experts.cpu
def _experts_cpu(
    operand: Any,
    chosen: Array,
    weights: Array,
    experts: Experts,
    residual: Array | None,
    *,
    activation: str,
    weighs: str,
    order: str,
    partials: str,
) -> Array:
    """Each chosen expert's matrices are read once, for all of its rows."""
    x: Array = norm.run_cpu(operand, out="act") if isinstance(operand, Normed) else operand
    of_pairs = np.empty((*chosen.shape, x.shape[1]), x.dtype)  # (M, U, K)
    for expert in np.unique(chosen):
        rows, places = np.nonzero(chosen == expert)
        weight = weights[rows, places, None]
        one = _one(experts, int(expert))
        first = _product(one.gate, x[rows], order)
        if one.up is not None:
            first = np.concatenate([first, _product(one.up, x[rows], order)], axis=1)
        if weighs == "input":
            first *= weight
        if one.gate_bias is not None:
            first += one.gate_bias if one.up_bias is None else np.concatenate([one.gate_bias, one.up_bias])
        second = _product(one.down, expert_activation(first, activation), order)
        if one.down_bias is not None:
            second += one.down_bias
        of_pairs[rows, places] = second * weight if weighs == "output" else second
    y = of_pairs[:, 0].copy()
    for place in range(1, chosen.shape[1]):  # in the order of a row alone
        y += of_pairs[:, place]
    if residual is None:
        return y
    residual += y
    return residual


def _product(matrix: Array, x: Array, order: str) -> Array:
    if order == "fixed":
        return fixed.product(matrix, x)
    return np.dot(matrix, x[0])[None] if len(x) == 1 else np.dot(x, matrix.T)


def _one(experts: Experts, expert: int) -> Experts:
    """The matrices and biases of one expert."""

    def rows(value: Any) -> Any:
        if value is None:
            return None
        size = value.shape[0] // experts.count
        part = slice(expert * size, (expert + 1) * size)
        if isinstance(value, QuantTensor):
            return value.rows(np.arange(part.start, part.stop, dtype=np.int32))
        return value[part]

    gate, up, down = rows(experts.gate), rows(experts.up), rows(experts.down)
    return Experts(gate, up, rows(experts.gate_bias), rows(experts.up_bias), down, rows(experts.down_bias), 1)


@experts.gpu
def _experts_gpu(
    device: GPU,
    operand: Any,
    chosen: Any,
    weights: Any,
    experts: Experts,
    residual: Any,
    *,
    activation: str,
    weighs: str,
    order: str,
    partials: str,
) -> Any:
    """Choose the kernels.

    - Few rows: the chosen experts' first products with their activation in one launch, the second with the weighted sum
      in another. They are matrix-vector products. An RMS norm of the operand is inside.
    - More rows, or a fixed order: pairs of row and expert are grouped by expert, and tiles of them multiplied on the
      matrix cores.
    """
    widths = operand.shape[1], experts.down.shape[1]
    if any(width % EXPERT_WIDTH for width in widths):
        raise UnsupportedError(f"experts of {widths[0]} and {widths[1]} numbers have no kernel: multiples of 8 have")
    how = expert_launches.How(activation, weighs == "input", order == "fixed")
    is_few = order == "any" and expert_launches.takes_rows(device, operand, chosen, experts)
    if isinstance(operand, Normed) and not (is_few and operand.is_rms and operand.pending is None):
        operand = device.launch(norm, (operand,), {"out": "act"})
    if is_few:
        rows = rows_of(chosen)
        return expert_launches.by_rows(device, operand, rows, weights, experts, residual, how)
    given = device, operand, chosen, weights, experts, residual, how
    return expert_launches.tiles(*given, leaves_partials=partials == "allowed")
