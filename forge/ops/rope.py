"""What stands between the QKV product and attention: bias, norms of heads, RoPE, and the append to the KV cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.kv_cache import KVPages
from forge.ops.norm import rms_norm
from forge.ops.op import Array, op, record

_BLOCKS_PER_CU = 8
"""Blocks of 256 threads that run side by side."""


@record(
    "bias?:f32[Q] q_norm?:f32[D] k_norm?:f32[D] cos_sin:f32[C,R,2] query_scale?:f32[C] eps:f32 "
    "v_norm?:f32[D] values_are_keys:bool rest:i32"
)
@dataclass(frozen=True, slots=True)
class RopeArgs:
    """What is done to a layer's QKV product: the bias is added, heads are normed, q and k are rotated, q is scaled."""

    bias: Any | None
    q_norm: Any | None
    """Weight of the RMS norm of each q head; None = no norm."""
    k_norm: Any | None
    """Weight of the RMS norm of each k head; None = no norm."""
    cos_sin: Any
    """Cosine and sine of the angles of R pairs, for each of C positions."""
    query_scale: Any | None
    """Factor of the queries, for each of C positions; None = 1."""
    eps: float
    """Epsilon of the norms: it is added to the mean square."""
    v_norm: Any | None = None
    """Weight of the RMS norm of each v head; None = no norm."""
    values_are_keys: bool = False
    """The product has no v: values are the keys before their norm and their rotation."""
    rest: int = 0
    """Numbers at the end of a row that are none of q, k and v."""

    def num_heads(self, row_size: int, kv_heads: int, dim: int) -> int:
        """Query heads of a product's row."""
        return (row_size - self.rest) // dim - (1 if self.values_are_keys else 2) * kv_heads

    def value_head(self, heads: int, kv_heads: int) -> int:
        """The first head of the values in a product's row."""
        return heads if self.values_are_keys else heads + kv_heads


@op(
    "qkv:f32[T,Q] rope:RopeArgs positions:i32[T] slot_mapping:i32[T] &kv:KVPages style=neox|interleaved -> q:act[T,H,D]"
)
def rope_append_kv(
    qkv: Array, rope: RopeArgs, positions: Array, slot_mapping: Array, kv: KVPages, *, style: str
) -> Array:
    """Bias, RMS norms of heads, rotation by position; k and v go to their slots, q, scaled, is returned.

    R pairs of each head are rotated by the angles of their position; components past 2R pass through. Pairs are
    (i, i + R) in style neox, (2i, 2i + 1) in style interleaved. A slot is page * P + offset. Source: arXiv:2104.09864.
    """
    _, page_size, kv_heads, dim = kv.k.shape
    heads = rope.num_heads(qkv.shape[1], kv_heads, dim)
    q = np.empty((len(qkv), heads, dim), qkv.dtype)
    for t, (position, slot) in enumerate(zip(positions, slot_mapping, strict=True)):
        token = qkv[t] if rope.bias is None else qkv[t] + rope.bias
        token = token[: len(token) - rope.rest].reshape(-1, dim)  # (H + 2G, D), or (H + G, D)
        page, offset = divmod(int(slot), page_size)
        for h, head in enumerate(token[:heads]):
            q[t, h] = _query(head, rope, position, style)
        for g in range(kv_heads):
            kv.k[page, offset, g] = _rotated(_normed(token[heads + g], rope.k_norm, rope.eps), rope, position, style)
            value = token[heads + g if rope.values_are_keys else heads + kv_heads + g]
            kv.v[page, offset, g] = _normed(value, rope.v_norm, rope.eps)
    return q


def _normed(head: Array, norm: Array | None, eps: float) -> Array:
    return head if norm is None else head / np.sqrt(np.mean(head * head) + eps) * norm


def _rotated(head: Array, rope: RopeArgs, position: int, style: str) -> Array:
    pairs = rope.cos_sin.shape[1]
    pair = np.arange(pairs)
    first, second = (pair, pair + pairs) if style == "neox" else (2 * pair, 2 * pair + 1)
    cos, sin = rope.cos_sin[position].T
    y = head.copy()
    y[first] = head[first] * cos - head[second] * sin
    y[second] = head[second] * cos + head[first] * sin
    return y


def _query(head: Array, rope: RopeArgs, position: int, style: str) -> Array:
    y = _rotated(_normed(head, rope.q_norm, rope.eps), rope, position, style)
    return y if rope.query_scale is None else y * rope.query_scale[position]


@rope_append_kv.cpu
def _rope_append_kv_cpu(
    qkv: Array, rope: RopeArgs, positions: Array, slot_mapping: Array, kv: KVPages, *, style: str
) -> Array:
    tokens = len(qkv)
    _, _, kv_heads, dim = kv.k.shape
    heads = rope.num_heads(qkv.shape[1], kv_heads, dim)
    if rope.bias is not None:
        qkv = qkv + rope.bias
    x = qkv[:, : qkv.shape[1] - rope.rest].reshape(tokens, -1, dim)  # (T, H + 2G, D), or (T, H + G, D)
    qk = x[:, : heads + kv_heads]
    if rope.q_norm is not None and rope.k_norm is not None:
        normed = rms_norm(qk[:, :heads], rope.q_norm, rope.eps), rms_norm(qk[:, heads:], rope.k_norm, rope.eps)
        qk = np.concatenate(normed, axis=1)
    y = _ROTATE[style](qk, rope.cos_sin.take(positions, 0)[:, None])
    where = slot_mapping if tokens > 1 else slot_mapping[0]  # one slot needs no index array
    kv.k.reshape(-1, kv_heads, dim)[where] = y[:, heads:]
    v = x[:, -kv_heads:]
    kv.v.reshape(-1, kv_heads, dim)[where] = v if rope.v_norm is None else rms_norm(v, rope.v_norm, rope.eps)
    q = y[:, :heads]
    if rope.query_scale is not None:
        q = q * rope.query_scale[positions][:, None, None]
    return q


def _rotate_neox(x: Array, cos_sin: Array) -> Array:
    pairs = cos_sin.shape[2]
    cos, sin = cos_sin[..., 0], cos_sin[..., 1]
    low, high = x[..., :pairs], x[..., pairs : 2 * pairs]
    y = x.copy()
    y_low, y_high = y[..., :pairs], y[..., pairs : 2 * pairs]
    y_low *= cos
    y_low -= high * sin
    y_high *= cos
    y_high += low * sin
    return y


def _rotate_interleaved(x: Array, cos_sin: Array) -> Array:
    """Pairs that are neighbours are complex numbers, and a rotation is their product."""
    rotations = cos_sin.view(np.complex64)[..., 0]
    rotated = 2 * rotations.shape[2]
    if rotated == x.shape[2]:
        return (x.view(np.complex64) * rotations).view(np.float32)
    y = x.copy()
    y[..., :rotated].view(np.complex64)[:] *= rotations
    return y


_ROTATE: dict[str, Callable[[Array, Array], Array]] = {"neox": _rotate_neox, "interleaved": _rotate_interleaved}
"""Rotate heads (T, H, D) by cos_sin (T, 1, R, 2)."""


@rope_append_kv.gpu
def _rope_append_kv_gpu(
    device: GPU, qkv: Any, rope: RopeArgs, positions: Any, slot_mapping: Any, kv: KVPages, *, style: str
) -> Any:
    return _run_rope(device, qkv, rope, positions, slot_mapping, kv, kv.k.shape[2:], style)


@op("q:f32[T,H,D] rope:RopeArgs positions:i32[T] style=neox|interleaved -> y:act[T,H,D]")
def rope_queries(q: Array, rope: RopeArgs, positions: Array, *, style: str) -> Array:
    """As rope_append_kv, of layers that have no keys and values of their own: they read those of an earlier layer."""
    x = q if rope.bias is None else q + rope.bias.reshape(q.shape[1:])
    heads = [[_query(head, rope, at, style) for head in token] for token, at in zip(x, positions, strict=True)]
    return np.array(heads, q.dtype)


@rope_queries.cpu
def _rope_queries_cpu(q: Array, rope: RopeArgs, positions: Array, *, style: str) -> Array:
    x = q if rope.bias is None else q + rope.bias.reshape(q.shape[1:])
    if rope.q_norm is not None:
        x = rms_norm(x, rope.q_norm, rope.eps)
    y = _ROTATE[style](x, rope.cos_sin.take(positions, 0)[:, None])
    return y if rope.query_scale is None else y * rope.query_scale[positions][:, None, None]


@rope_queries.gpu
def _rope_queries_gpu(device: GPU, q: Any, rope: RopeArgs, positions: Any, *, style: str) -> Any:
    rows = q.reshape(len(q), -1)
    return _run_rope(device, rows, rope, positions, positions, KVPages(None, None), (0, q.shape[2]), style)


def _run_rope(
    device: GPU, qkv: Any, rope: RopeArgs, positions: Any, slots: Any, kv: KVPages, shape: tuple[int, int], style: str
) -> Any:
    """Launch rope_append_kv for (KV heads, numbers of a head)."""
    kv_heads, dim = shape
    tokens, row_size = qkv.shape
    heads = rope.num_heads(row_size, kv_heads, dim)
    q = device.empty((tokens, heads, dim), device.dtype)
    waves = 256 // device.wave_size
    # Waves take several heads of a token where tokens alone fill the device.
    blocks = min(-(-(heads + 2 * kv_heads) // waves), max(_BLOCKS_PER_CU * device.num_cus // max(tokens, 1), 1))
    device.run(
        "rope",
        "rope_append_kv",
        (tokens, blocks),
        *(qkv, rope.bias, rope.q_norm, rope.k_norm, rope.v_norm, rope.cos_sin, rope.query_scale, positions, slots),
        *(q, kv.k, kv.v, heads, kv_heads, row_size, rope.value_head(heads, kv_heads), rope.cos_sin.shape[1]),
        *(blocks, rope.eps),
        HEAD_DIM=dim,
        INTERLEAVED=int(style == "interleaved"),
    )
    return q


@op("&qkv:f32[T,H*D+2*G*D] q_norm:f32[H,D] k_norm:f32[G,D] eps:f32")
def layernorm_heads(qkv: Array, q_norm: Array, k_norm: Array, eps: float) -> None:
    """LayerNorm without bias of each q and k head, in place, with a weight for each head, as in StableLM 2 12B.

    It takes all D numbers of a head, before they are rotated. Source: arXiv:1607.06450.
    """
    heads, dim = q_norm.shape
    x = qkv.reshape(len(qkv), -1, dim)[:, : heads + len(k_norm)]  # (T, H + G, D)
    x -= np.mean(x, axis=2, keepdims=True)
    x /= np.sqrt(np.mean(x * x, axis=2, keepdims=True) + x.dtype.type(eps))
    x *= np.concatenate([q_norm, k_norm])


@layernorm_heads.gpu
def _layernorm_heads_gpu(device: GPU, qkv: Any, q_norm: Any, k_norm: Any, eps: float) -> None:
    tokens, (heads, dim), kv_heads = len(qkv), q_norm.shape, len(k_norm)
    waves = 256 // device.wave_size
    grid = (tokens, -(-(heads + kv_heads) // waves))
    defines = {"HEAD_DIM": dim, "INTERLEAVED": 0}
    device.run("rope", "layernorm_heads", grid, qkv, q_norm, k_norm, heads, kv_heads, eps, **defines)
