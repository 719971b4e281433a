"""Rotary position embedding fused with what stands around it: bias, q/k norm, and the append to the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, Arrays, Case, op


def random_product(
    rng: np.random.Generator, rows: int, heads: tuple[int, int], dim: int, positions: int, rotated: int, *, extras: bool
) -> Arrays:
    """For cases: the first six arguments of `rope_append_kv`, with biases, norms and query scales if `extras`."""

    def normal(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    num_heads, num_kv_heads = heads
    width = (num_heads + 2 * num_kv_heads) * dim
    angles = normal(positions, rotated // 2) * 3
    return (
        normal(rows, width),
        normal(width) if extras else None,
        1 + 0.1 * normal(dim) if extras else None,
        1 + 0.1 * normal(dim) if extras else None,
        np.stack([np.cos(angles), np.sin(angles)], axis=-1),
        1 + rng.random(positions).astype(np.float32) if extras else None,
    )


def _case(
    name: str, tokens: int, heads: tuple[int, int], dim: int, rotated: int, style: str, *, extras: bool = False
) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        pages, page_size, positions = 5, 4, 40
        cache = rng.standard_normal((2, pages, page_size, heads[1], dim)).astype(np.float32)
        return (
            *random_product(rng, tokens, heads, dim, positions, rotated, extras=extras),
            rng.integers(0, positions, tokens).astype(np.int32),
            rng.permutation(pages * page_size)[:tokens].astype(np.int32),
            *cache,
            1e-6,
        )

    return Case(name, make, {"style": style})


def _by_hand(style: str, q: list[float]) -> Case:
    """A quarter turn at position 1: each pair (a, b) becomes (-b, a)."""

    def make(rng: np.random.Generator) -> Arrays:
        qkv = np.array([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]], np.float32)
        rotations = np.array([[[1, 0], [1, 0]], [[0, 1], [0, 1]]], np.float32)
        pages = (np.zeros((1, 2, 1, 4), np.float32), np.zeros((1, 2, 1, 4), np.float32))
        at = (np.array([1], np.int32), np.array([0], np.int32))
        return (qkv, None, None, None, rotations, None, *at, *pages, 0.0)

    return Case(f"{style} by hand", make, {"style": style}, expected=([[q]],))


_SHAPES: list[tuple[str, int, tuple[int, int], int, int]] = [
    ("one token", 1, (1, 1), 4, 4),
    ("grouped", 3, (6, 2), 64, 64),
    ("partial", 7, (2, 2), 80, 32),
    ("all slots", 20, (4, 1), 32, 32),
]
_CASES = [
    *(
        _case(f"{style} {name}{' bias norm' * extras}", tokens, heads, dim, rotated, style, extras=extras)
        for style in ("neox", "interleaved")
        for name, tokens, heads, dim, rotated in _SHAPES
        for extras in (False, True)
    ),
    _by_hand("neox", [-3, -4, 1, 2]),
    _by_hand("interleaved", [-2, 1, -4, 3]),
]


def _rms(x: Array, weight: Array, eps: float) -> Array:
    mean_square = np.einsum("thd,thd->th", x, x) / x.shape[2]
    return np.asarray(x * (1.0 / np.sqrt(mean_square + eps)).astype(x.dtype)[..., None] * weight)


def _rotate_neox(x: Array, rotations: Array) -> Array:
    pairs = rotations.shape[2]
    cos, sin = rotations[..., 0], rotations[..., 1]
    low, high = x[..., :pairs], x[..., pairs : 2 * pairs]
    y = x.copy()
    y_low, y_high = y[..., :pairs], y[..., pairs : 2 * pairs]
    y_low *= cos
    y_low -= high * sin
    y_high *= cos
    y_high += low * sin
    return y


def _rotate_interleaved(x: Array, rotations: Array) -> Array:
    """Pairs that are neighbours are complex numbers, and a rotation is their product."""
    turns = rotations.view(np.complex64)[..., 0]
    rotated = 2 * turns.shape[2]
    if rotated == x.shape[2]:
        return (x.view(np.complex64) * turns).view(np.float32)
    y = x.copy()
    y[..., :rotated].view(np.complex64)[:] *= turns
    return y


_ROTATE: dict[str, Callable[[Array, Array], Array]] = {"neox": _rotate_neox, "interleaved": _rotate_interleaved}
"""Of heads (T, H, D) by rotations (T, 1, R, 2)."""


def _rope_append_kv_cpu(
    qkv: Array,
    bias: Array | None,
    q_norm: Array | None,
    k_norm: Array | None,
    rotations: Array,
    query_scale: Array | None,
    positions: Array,
    slots: Array,
    k_pages: Array,
    v_pages: Array,
    eps: float,
    *,
    style: str,
) -> Array:
    tokens = len(qkv)
    _, _, kv_heads, dim = k_pages.shape
    if bias is not None:
        qkv = qkv + bias
    x = qkv.reshape(tokens, -1, dim)  # (T, H + 2G, D)
    heads = x.shape[1] - 2 * kv_heads
    qk = x[:, : heads + kv_heads]
    if q_norm is not None and k_norm is not None:
        qk = np.concatenate([_rms(qk[:, :heads], q_norm, eps), _rms(qk[:, heads:], k_norm, eps)], axis=1)
    y = _ROTATE[style](qk, rotations.take(positions, 0)[:, None])
    where = slots if tokens > 1 else slots[0]  # one slot needs no index array
    k_pages.reshape(-1, kv_heads, dim)[where] = y[:, heads:]
    v_pages.reshape(-1, kv_heads, dim)[where] = x[:, heads + kv_heads :]
    q = y[:, :heads]
    if query_scale is not None:
        q = q * query_scale[positions][:, None, None]
    return q


def _rope_append_kv_gpu(
    device: GPU,
    qkv: Any,
    bias: Any,
    q_norm: Any,
    k_norm: Any,
    rotations: Any,
    query_scale: Any,
    positions: Any,
    slots: Any,
    k_pages: Any,
    v_pages: Any,
    eps: float,
    *,
    style: str,
) -> Any:
    _, _, kv_heads, dim = k_pages.shape
    tokens, width = qkv.shape
    heads = width // dim - 2 * kv_heads
    q = device.empty((tokens, heads, dim), device.dtype)
    waves = 256 // device.wave_size
    device.run(
        "rope",
        "rope_append_kv",
        (tokens, -(-(heads + 2 * kv_heads) // waves)),
        *(qkv, bias, q_norm, k_norm, rotations, query_scale, positions, slots, q, k_pages, v_pages),
        *(heads, kv_heads, rotations.shape[1], eps),
        HEAD_DIM=dim,
        INTERLEAVED=int(style == "interleaved"),
    )
    return q


@op(
    "qkv:f32[T,H*D+2*G*D] bias?:f32[H*D+2*G*D] q_norm?:f32[D] k_norm?:f32[D] rotations:f32[C,R,2] "
    "query_scale?:f32[C] positions:i32[T] slots:i32[T] &k_pages:act[N,P,G,D] &v_pages:act[N,P,G,D] eps:f32 "
    "style=neox|interleaved -> q:act[T,H,D]",
    cpu=_rope_append_kv_cpu,
    gpu=_rope_append_kv_gpu,
    cases=_CASES,
)
def rope_append_kv(
    qkv: Array,
    bias: Array | None,
    q_norm: Array | None,
    k_norm: Array | None,
    rotations: Array,
    query_scale: Array | None,
    positions: Array,
    slots: Array,
    k_pages: Array,
    v_pages: Array,
    eps: float,
    *,
    style: str,
) -> Array:
    """Bias, RMS norm of q and k heads, rotation by position; k and v go to their slots, q, scaled, is returned.

    R pairs of each head are rotated by the angles whose cos and sin `rotations` holds per position; components past 2R
    pass through. A slot is page * P + offset. Pairs are (i, i + R) in style neox, (2i, 2i + 1) interleaved.
    Source: arXiv:2104.09864.
    """
    _, page_size, kv_heads, dim = k_pages.shape
    heads = qkv.shape[1] // dim - 2 * kv_heads
    pairs = rotations.shape[1]
    pair = np.arange(pairs)
    first, second = (pair, pair + pairs) if style == "neox" else (2 * pair, 2 * pair + 1)
    q = np.empty((len(qkv), heads, dim), qkv.dtype)
    for t, (position, slot) in enumerate(zip(positions, slots, strict=True)):
        token = (qkv[t] if bias is None else qkv[t] + bias).reshape(-1, dim)  # (H + 2G, D)
        page, offset = divmod(int(slot), page_size)
        for h, head in enumerate(token[: heads + kv_heads]):
            norm = q_norm if h < heads else k_norm
            if norm is not None:
                head = head / np.sqrt(np.mean(head * head) + eps) * norm
            y = head.copy()
            cos, sin = rotations[position].T
            y[first] = head[first] * cos - head[second] * sin
            y[second] = head[second] * cos + head[first] * sin
            if h < heads:
                q[t, h] = y if query_scale is None else y * query_scale[position]
            else:
                k_pages[page, offset, h - heads] = y
        v_pages[page, offset] = token[heads + kv_heads :]
    return q


def _normed_case(name: str, tokens: int, heads: tuple[int, int], dim: int, scale: float = 1.0) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        def normal(*shape: int) -> Array:
            return rng.standard_normal(shape).astype(np.float32)

        num_heads, num_kv_heads = heads
        product = normal(tokens, (num_heads + 2 * num_kv_heads) * dim) * np.float32(scale) + np.float32(3 * scale)
        return product, 1 + 0.1 * normal(num_heads, dim), 1 + 0.1 * normal(num_kv_heads, dim), 1e-5

    return Case(name, make)


# q (1, 3) and k (5, 1): means 2 and 3, deviations 1 and 2. v stays.
_NORMED_BY_HAND = Case(
    "by hand",
    lambda rng: (*(np.array(x, np.float32) for x in ([[1, 3, 5, 1, 7, 9]], [[2, 3]], [[10, 20]])), 0.0),
    written=([[-2, 3, 10, -20, 7, 9]],),
)


def _layernorm_heads_gpu(device: GPU, qkv: Any, q_norm: Any, k_norm: Any, eps: float) -> None:
    tokens, (heads, dim), kv_heads = len(qkv), q_norm.shape, len(k_norm)
    waves = 256 // device.wave_size
    grid = (tokens, -(-(heads + kv_heads) // waves))
    defines = {"HEAD_DIM": dim, "INTERLEAVED": 0}
    device.run("rope", "layernorm_heads", grid, qkv, q_norm, k_norm, heads, kv_heads, eps, **defines)


@op(
    "&qkv:f32[T,H*D+2*G*D] q_norm:f32[H,D] k_norm:f32[G,D] eps:f32",
    gpu=_layernorm_heads_gpu,
    cases=[
        _normed_case("one token", 1, (1, 1), 4),
        _normed_case("grouped", 3, (6, 2), 64),
        _normed_case("many heads", 5, (32, 8), 160),
        _normed_case("odd sizes", 20, (5, 1), 36),
        _normed_case("large values", 2, (2, 2), 80, 1e4),
        _NORMED_BY_HAND,
    ],
)
def layernorm_heads(qkv: Array, q_norm: Array, k_norm: Array, eps: float) -> None:
    """LayerNorm without bias of each q and k head, in place, with weights of its own: StableLM 2 12B's.

    Of all D numbers of a head, before they are rotated. Source: arXiv:1607.06450.
    """
    heads, dim = q_norm.shape
    x = qkv.reshape(len(qkv), -1, dim)[:, : heads + len(k_norm)]  # (T, H + G, D)
    x -= np.mean(x, axis=2, keepdims=True)
    x /= np.sqrt(np.mean(x * x, axis=2, keepdims=True) + x.dtype.type(eps))
    x *= np.concatenate([q_norm, k_norm])
