"""The paged KV cache of one layer, and copies within the cache: of pages, and of the keys or values of some tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op, record

_BLOCK_THREADS = 256


@record("k:act[N,P,G,D] v:act[N,P,G,D]")
@dataclass(frozen=True, slots=True)
class KVPages:
    """Keys and values of one layer: N pages of P positions, G heads of D numbers."""

    k: Any
    v: Any


@op("&k_pages:act[L,N,P,G,D] &v_pages:act[L,N,P,G,D] source:i32 target:i32")
def copy_page(k_pages: Array, v_pages: Array, source: int, target: int) -> None:
    """Page `target` becomes a copy of page `source` in all layers: a forked sequence gets its own last page."""
    k_pages[:, target] = k_pages[:, source]
    v_pages[:, target] = v_pages[:, source]


@copy_page.gpu
def _copy_page_gpu(device: GPU, k_pages: Any, v_pages: Any, source: int, target: int) -> None:
    layers, pages = k_pages.shape[:2]
    size = k_pages[0, 0].size
    grid = (-(-size // (8 * _BLOCK_THREADS)), layers, 2)
    device.run("kv_cache", "copy_page", grid, k_pages, v_pages, source, target, pages, size)


@op("slot_mapping:i32[T] pages:act[N,P,G,D] -> y:act[T,G,D]")
def take_slots(slot_mapping: Array, pages: Array) -> Array:
    """The keys (or values) of some tokens in one layer. slot_mapping holds page * P + offset of each token."""
    return np.asarray(pages.reshape(-1, *pages.shape[2:])[slot_mapping])


@take_slots.gpu
def _take_slots_gpu(device: GPU, slot_mapping: Any, pages: Any) -> Any:
    y = device.empty((len(slot_mapping), *pages.shape[2:]), device.dtype)
    device.run("kv_cache", "take_slots", len(slot_mapping), slot_mapping, pages, y, pages[0, 0].size)
    return y
