"""A decode step's attention as one op: from the QKV product of each sequence's new token to the attended values."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.attention import AttentionSpec, check_head_dim, packed_heads, paged_attention, split_states
from forge.ops.kv_cache import KVPages
from forge.ops.matmul import Partials
from forge.ops.op import Array, op
from forge.ops.rope import RopeArgs, rope_append_kv

_MAX_SPLITS = 128
"""MAX_SPLITS of the kernel: one block merges the splits of a head."""


@op(
    "qkv:f32[B,Q] rope:RopeArgs lengths:i32[B] slot_mapping:i32[B] &kv:KVPages page_table:i32[B,M] "
    "spec:AttentionSpec style=neox|interleaved -> out:act[B,H,D]",
    rtol=1e-4,
    atol=1e-5,
)
def decode_attention(
    qkv: Array,
    rope: RopeArgs,
    lengths: Array,
    slot_mapping: Array,
    kv: KVPages,
    page_table: Array,
    spec: AttentionSpec,
    *,
    style: str,
) -> Array:
    """rope_append_kv, then paged_attention, where each sequence has one token, the last of its lengths[b] positions.

    Attention sees the new token's key and value as the cache holds them.
    """
    q = rope_append_kv.reference(qkv, rope, lengths - 1, slot_mapping, kv, style=style)  # (B, H, D)
    return np.asarray(paged_attention.reference(q, kv, _one_each(lengths), lengths, page_table, spec))


@decode_attention.cpu
def _decode_attention_cpu(qkv: Array, rope: RopeArgs, lengths: Array, *state: Any, style: str) -> Array:
    slot_mapping, kv, page_table, spec = state
    q = rope_append_kv.run_cpu(qkv, rope, lengths - 1, slot_mapping, kv, style=style)  # (B, H, D)
    return np.asarray(paged_attention.run_cpu(q, kv, _one_each(lengths), lengths, page_table, spec))


def _one_each(lengths: Array) -> Array:
    """`starts` of a batch with one token of each sequence: (B + 1,)."""
    return np.arange(len(lengths) + 1, dtype=np.int32)


@decode_attention.gpu
def _decode_attention_gpu(device: GPU, qkv: Any, rope: RopeArgs, lengths: Any, *state: Any, style: str) -> Any:
    """One launch. qkv may be `Partials`: the kernel sums them."""
    slot_mapping, kv, page_table, spec = state
    rows, pages = page_table.shape
    _, page_size, kv_heads, dim = kv.k.shape
    check_head_dim(dim)
    heads = rope.num_heads(qkv.shape[1], kv_heads, dim)
    group = heads // kv_heads
    packed = packed_heads(group)
    groups = kv_heads * -(-group // packed)
    choice = device.choice("attention_decode", dim=dim, packed=packed, kv_heads=kv_heads, rows=rows)
    min_span, min_blocks = choice["MIN_SPAN"], choice["MIN_BLOCKS"]
    # Split-KV for the longest context there can be, into as many splits as fill the device: how many a row has depends
    # on its length, which is not known here. Blocks without a split cost little.
    positions = min(pages * page_size, spec.window or pages * page_size)
    splits = min(_splits_to_fill(rows * groups, min_blocks * device.num_cus), -(-positions // min_span), _MAX_SPLITS)
    out = device.empty((rows, heads, dim), device.dtype)
    parts = qkv.parts if isinstance(qkv, Partials) else qkv[None]  # (S, B, Q)
    device.run(
        "attention_decode",
        "attention_decode",
        (groups, rows, splits),  # blocks of a row beside each other: they read the same pages
        *(parts, rope.bias, rope.q_norm, rope.k_norm, rope.v_norm, rope.cos_sin, rope.query_scale),
        *(lengths, slot_mapping),
        *(kv.k, kv.v, page_table, out),
        *split_states(device, rows * groups, splits, packed, dim),
        *(heads, kv_heads, qkv.shape[1], rope.value_head(heads, kv_heads), pages),
        *(rope.cos_sin.shape[1], rows, len(parts), splits),
        *(rope.eps, spec.scale, spec.window, spec.softcap, spec.sinks),
        HEAD_DIM=dim,
        PAGE=page_size,
        PACKED=packed,
        INTERLEAVED=int(style == "interleaved"),
        THREADS=choice["THREADS"],
        POSITIONS=choice["POSITIONS"],
        MIN_BLOCKS=min_blocks,
        **spec.defines(),
        **({"ODD_ROWS": 1} if qkv.shape[1] % 4 else {}),
    )
    return out


def _splits_to_fill(blocks: int, room: int) -> int:
    """Splits of each block that fill the device's room for resident blocks, once or a few times over."""
    times = max(range(1, 5), key=lambda n: min(n * room // blocks * blocks / (n * room), 0.9))
    return max(times * room // blocks, 1)
