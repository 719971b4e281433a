"""Experts that lie in the host's memory: those that were chosen are copied to the device, which reads its link itself.

The device knows which experts were chosen, and no step waits for the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op

PIECE = 16
"""Bytes that are copied together."""
MAX_PARTS = 12
_THREADS, _EACH = 256, 4


@op("chosen:i32[M,U] source:u32[S] &target:u32[T] parts:u32[N,2]")
def fetch_experts(chosen: Array, source: Array, target: Array, parts: Array) -> None:
    """Copy what the chosen experts have in each part from source to the same place of target.

    parts: Of each (at most 12) where it begins, in pieces of 16 bytes, and bytes of an expert, which lie one expert
    behind the other. The whole pieces that hold an expert's bytes are copied.
    """
    of_source, of_target = source.view(np.uint8), target.view(np.uint8)
    for begin, size in parts.tolist():
        for expert in np.unique(chosen).tolist():
            first, end = expert * size // PIECE, -(-(expert + 1) * size // PIECE)
            where = slice(PIECE * (begin + first), PIECE * (begin + end))
            of_target[where] = of_source[where]


@fetch_experts.gpu
def _fetch_experts_gpu(device: GPU, chosen: Any, source: Any, target: Any, parts: Any) -> None:
    blocks = min(device.num_cus, -(-4 * source.size // (PIECE * _THREADS * _EACH)))
    sizes = chosen.size, len(parts), blocks
    device.run("expert_fetch", "fetch_experts", blocks, chosen, source, target, parts, *sizes)
