"""Attention weights, written down: the fused kernels never do. They are computed on the host, for hooks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import backend_of
from forge.models.batch import Batch
from forge.ops.attention import AttentionSpec, attention_weights
from forge.ops.kv_cache import KVPages, take_slots

Array = npt.NDArray[Any]
_SCORE_BYTES = 32 << 20
"""Scores that are computed together: temporaries stay small beside the weights."""


def patterns(q: Any, kv: KVPages, batch: Batch, page_table: Any, spec: AttentionSpec) -> list[Array]:
    """The weights of each sequence, float32 (H, T, S) on the host: T its tokens of the batch, S its positions so far.

    q: (T, H, D) of all tokens. Where a window does not reach, weights are zeros.
    """
    backend = backend_of(q)
    queries = np.asarray(backend.to_numpy(q), np.float32)
    if spec.sinks is not None:
        spec = replace(spec, sinks=backend.to_numpy(spec.sinks))
    return [
        _pattern(queries[rows], _taken(kv.k, slots), length, first, spec)
        for rows, length, first, slots in _sequences(batch, page_table, kv.k.shape[1], spec)
    ]


def _pattern(q: Array, k: Array, length: int, first: int, spec: AttentionSpec) -> Array:
    """q (T, H, D), k of positions from `first` on -> (H, T, S)."""
    tokens, heads, _ = q.shape
    weights = np.zeros((heads, tokens, length), np.float32)
    rows = max(_SCORE_BYTES // (4 * heads * length), 1)
    with np.errstate(all="ignore"):  # weights of a model that are not finite
        for start in range(0, tokens, rows):
            stop = min(start + rows, tokens)
            end = length - tokens + stop
            weights[:, start:stop, first:end] = attention_weights(q[start:stop], k[: end - first], spec, first)
    return weights


def attend_by(
    before: list[Array], weights: list[Array], attended: Any, kv: KVPages, batch: Batch, page_table: Any, spec: Any
) -> None:
    """Write what other weights attend to, over the attended values (T, H, D). `before` tells which have changed."""
    backend = backend_of(attended)
    for index, (rows, _, first, slots) in enumerate(_sequences(batch, page_table, kv.k.shape[1], spec)):
        if weights[index] is not before[index]:
            values = _taken(kv.v, slots)  # (S, G, D)
            group = attended.shape[1] // values.shape[1]
            found = np.einsum("hts,shd->thd", weights[index][:, :, first:], np.repeat(values, group, axis=1))
            attended[rows] = backend.asarray(found, attended.dtype)


def _sequences(
    batch: Batch, page_table: Any, page_size: int, spec: AttentionSpec
) -> Iterator[tuple[slice, int, int, Array]]:
    """Of each sequence its rows, its length, the first position that any of its tokens sees, and the slots from there
    on: pages before it may have been given away."""
    starts, lengths, pages = (backend_of(array).to_numpy(array) for array in (batch.starts, batch.lengths, page_table))
    for index, length in enumerate(lengths.tolist()):
        rows = slice(int(starts[index]), int(starts[index + 1]))
        first = int(spec.first_seen(length - (rows.stop - rows.start)))
        positions = np.arange(first, length)
        yield rows, length, first, pages[index, positions // page_size] * page_size + positions % page_size


def _taken(pages: Any, slots: Array) -> Array:
    """Keys or values of some slots, float32 on the host."""
    backend = backend_of(pages)
    return np.asarray(backend.to_numpy(take_slots(backend.asarray(slots, np.int32), pages)), np.float32)
