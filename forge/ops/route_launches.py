"""Launches of the kernels of routers, which choose each row's experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.expert_groups import empty_groups, tile_rows
from forge.ops.norm import Normed

_ROUTE_THREADS = 128
_ROW_PIECES = 8
"""Vectors of a row that a thread of route_row holds at most."""
_ROWS_THREADS, _TOGETHER, _MOST_ROWS, _MOST_PIECES = 256, 8, 64, 5
"""Of route_rows: threads, rows that are computed together and in all, and vectors of a row that a thread takes."""


def route(
    device: GPU,
    normed: Normed,
    router: Any,
    *,
    is_sigmoid: bool,
    renormalizes: bool,
    is_fixed: bool,
    leaves_tiles: bool,
) -> tuple[Any, Any]:
    """The experts of each row, int32 (M, U), and their weights, float32 (M, U).

    is_fixed: A row's logits do not depend on the rows beside it: one kernel computes them. leaves_tiles: The experts
    may be `Grouped`.
    """
    if normed.pending is not None or not normed.is_rms:
        raise ValueError("route: rows have an RMS norm, and nothing pending")
    (rows, inner), experts, used = normed.shape, len(router.weight), router.used
    logits = device.empty((rows, experts), np.float32)
    chosen, weights = device.empty((rows, used), np.int32), device.empty((rows, used), np.float32)
    vectors = normed.x, normed.weight, router.weight, router.bias, router.selection_bias, router.expert_scale
    vector, flags = 4 if inner % 4 == 0 else 1, (int(is_sigmoid), int(renormalizes))
    pieces = -(-inner // (vector * _ROUTE_THREADS))
    if rows == 1 and not is_fixed and router.groups == 1 and pieces <= _ROW_PIECES:
        device.run(
            "route_row",
            "route_row",
            (experts, rows),
            *(*vectors, logits, device.counters(1), chosen, weights),
            *(normed.eps, router.scale, inner, experts, used, *flags),
            BLOCK=_ROUTE_THREADS,
            PIECES=pieces,
            VECTOR=vector,
        )
        return chosen, weights
    results = logits, chosen, weights
    pieces, each = -(-inner // (vector * _ROWS_THREADS)), 1 if rows <= 16 else 2 if rows <= 32 or inner > 4096 else 4
    if 2 <= rows <= _MOST_ROWS and not is_fixed and router.groups == 1 and pieces <= _MOST_PIECES:
        how = {"EACH": each, "BLOCK": _ROWS_THREADS, "PIECES": pieces, "VECTOR": vector}
        return _route_rows(device, vectors, results, normed.eps, router.scale, inner, flags, how, leaves_tiles), weights
    together, each = (1, 1) if rows <= 4 else (8, 1) if rows <= 128 else (8, 4)
    blocks = -(-experts // (_ROUTE_THREADS // device.wave_size * each))
    groups = -(-rows // together)
    defines = {"ROWS": together, "EACH": each, "VECTOR": vector}
    numbers = normed.eps, router.scale, rows, inner, experts, used, router.groups, router.used_groups
    arrays = *vectors, logits, device.counters(groups), chosen, weights
    device.run("route", "route", (blocks, groups), *arrays, *numbers, *flags, blocks, **defines)
    return chosen, weights


def _route_rows(
    device: GPU,
    vectors: Sequence[Any],
    results: tuple[Any, Any, Any],
    eps: float,
    scale: float,
    inner: int,
    flags: tuple[int, int],
    how: Mapping[str, int],
    leaves_tiles: bool,
) -> Any:
    """Launch route_rows, which makes the list of tiles, too. Gives the experts."""
    logits, chosen, weights = results
    (rows, used), experts = chosen.shape, logits.shape[1]
    groups, blocks = -(-rows // _TOGETHER), -(-experts // how["EACH"])
    grouped, lists = None, (None, None, 0, 0)
    if leaves_tiles:
        grouped = empty_groups(device, chosen, experts, tile_rows(device, rows, used, experts))
        lists = grouped.pairs, grouped.tiles, grouped.rows, len(grouped.tiles)
    arrays = *vectors, logits, device.counters(groups + 1), chosen, weights, *lists
    sizes = eps, scale, rows, inner, experts, used, *flags, blocks
    device.run("route_rows", "route_rows", (blocks, groups), *arrays, *sizes, **how)
    return grouped or chosen
