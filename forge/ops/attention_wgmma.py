"""Launches of the attention kernel of NVIDIA's Hopper: queries of several sequences, by groups of waves with roles."""

from __future__ import annotations

import math
from typing import Any

from forge.backend.gpu import GPU
from forge.ops.kv_cache import KVPages
from forge.tuning.lds import attention_lds_bytes
from forge.tuning.table import KERNELS

HEAD_DIMS = KERNELS["attention_wgmma"].classes["dim"]
"""Sizes of heads that the kernel takes."""
_MAX_PACKED = 16
"""Query heads of one KV head that a tile of queries holds together, at most."""

_BOX_STEP = 8
"""Positions that begin as the lines of LDS are swizzled: a box has a multiple of them."""


def supports(device: GPU, dim: int) -> bool:
    """Whether the kernel computes heads of `dim` numbers on a device."""
    return device.has_wgmma and dim in HEAD_DIMS


def run(
    device: GPU,
    q: Any,
    kv: KVPages,
    starts: Any,
    lengths: Any,
    page_table: Any,
    numbers: tuple[float, int, float, Any],
    defines: dict[str, int],
    out: Any,
) -> None:
    """As `paged_attention`, into out: act (T, H, D). numbers: scale, window, softcap and sinks of the scores.
    defines: What the kernel is compiled with beside its sizes."""
    tokens, heads, dim = q.shape
    rows, pages = page_table.shape
    _, page_size, kv_heads, _ = kv.k.shape
    group = heads // kv_heads
    packed = group if group <= _MAX_PACKED else 1
    choice = device.choice("attention_wgmma", dim=dim, packed=packed, kv_heads=kv_heads, rows=rows)
    queries = 64 * (choice["BLOCK"] // 128 - 1) // packed
    tiles = (tokens // queries + rows) * (heads // packed)  # as many as there can be
    box = math.gcd(page_size, choice["KEYS"])
    box = 0 if box % _BOX_STEP else box
    maps = [device.tensor_map(each, box) if box else None for each in (kv.k, kv.v)]
    stride = min(tiles, device.num_cus) if choice["PERSISTENT"] else tiles
    device.run(
        "attention_wgmma",
        "attention_wgmma",
        stride,
        *(q, kv.k, kv.v, *maps, starts, lengths, page_table, out),
        *(rows, heads, kv_heads, pages, stride, *numbers),
        HEAD_DIM=dim,
        PAGE=page_size,
        BOX=box,
        PACKED=packed,
        **{name: choice[name] for name in ("KEYS", "STAGES", "BLOCK")},
        LDS_BYTES=attention_lds_bytes(dim, choice),
        **defines,
    )
