"""The state of running requests on the device, one row each in the arrays of the request table.

A decode step reads its inputs from it and advances it, so that no step waits for the host; the host scatters its edits.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, op

_BLOCK_THREADS = 64
_RING_BLOCK, _RING_NUMBERS = 256, 4


@op(
    "request_rows:i32[B] last_ids:i32[S] lengths:i32[S] page_tables:i32[K,S,M] &step:i32[1] page_size:i32 "
    "-> ids:i32[B] positions:i32[B] slot_mapping:i32[K,B] row_lengths:i32[B]"
)
def decode_inputs(
    request_rows: Array, last_ids: Array, lengths: Array, page_tables: Array, step: Array, page_size: int
) -> tuple[Array, ...]:
    """The inputs of a decode step: each request's last id, position, KV slots and sequence length. `step` counts up.

    There are K page tables, and K slots of a token, one for each kind of layer state. request_rows are the rows of the
    request table that take part. A row of length 0 is idle: it computes one token at the start of its first page.
    """
    step += 1
    row_lengths = np.maximum(lengths[request_rows], 1)
    positions = row_lengths - 1
    pages = page_tables[:, request_rows, positions // page_size]  # (K, B)
    return last_ids[request_rows], positions, pages * page_size + positions % page_size, row_lengths


@decode_inputs.gpu
def _decode_inputs_gpu(
    device: GPU, request_rows: Any, last_ids: Any, lengths: Any, page_tables: Any, step: Any, page_size: int
) -> tuple[Any, ...]:
    rows, (kinds, count, pages) = len(request_rows), page_tables.shape
    shapes = (rows,), (rows,), (kinds, rows), (rows,)
    outputs = tuple(device.empty(shape, np.int32) for shape in shapes)
    state = (request_rows, last_ids, lengths, page_tables, step)
    sizes = rows, kinds, count, pages, page_size
    device.run("decode_state", "decode_inputs", -(-rows // _BLOCK_THREADS), *state, *outputs, *sizes)
    return outputs


@op(
    "ids:i32[B] request_rows:i32[B] &last_ids:i32[S] &lengths:i32[S] &counts?:i32[C,V] drawn?:i32[N] step?:i32[1] "
    "&output_ring?:i32[R,M]"
)
def advance(
    ids: Array,
    request_rows: Array,
    last_ids: Array,
    lengths: Array,
    counts: Array | None,
    drawn: Array | None,
    step: Array | None,
    output_ring: Array | None,
) -> None:
    """Append each request's new id: last_ids, lengths and counts take it in. An idle row, of length 0, stays as it is.

    Id -1 stands for a row without a distribution and counts as 0: nothing of its sequence is used afterwards. counts
    are those that `penalize` reads, for the first C rows. Where there is an output ring in the host's memory, its entry
    for this step takes what was drawn: output_ring[step % R, :N] = drawn.
    """
    if output_ring is not None:
        assert drawn is not None
        assert step is not None
        output_ring[step[0] % len(output_ring), : len(drawn)] = drawn
    runs = lengths[request_rows] > 0
    rows, known = request_rows[runs], np.maximum(ids[runs], 0)
    last_ids[rows] = known
    lengths[rows] += 1
    if counts is not None:
        counts[rows, known] = np.maximum(counts[rows, known], 1) + 1


@advance.gpu
def _advance_gpu(device: GPU, ids: Any, *arrays: Any) -> None:
    *_, counts, drawn, _, output_ring = arrays
    rows, vocabulary = len(ids), 0 if counts is None else counts.shape[1]
    sizes = (0, 0, 0) if output_ring is None else (len(drawn), *output_ring.shape)
    device.run("decode_state", "advance", -(-rows // _BLOCK_THREADS), ids, *arrays, rows, vocabulary, *sizes)


@op("edits:i32[N,2] &words:i32[W]")
def scatter(edits: Array, words: Array) -> None:
    """words[index] = value for each pair (index, value) of edits. No index occurs twice; none is checked."""
    words[edits[:, 0]] = edits[:, 1]


@scatter.gpu
def _scatter_gpu(device: GPU, edits: Any, words: Any) -> None:
    device.run("decode_state", "scatter", -(-len(edits) // _BLOCK_THREADS), edits, words, len(edits))


@op("pairs:i32[N,2] source:i32[S,W] &target:i32[R,W]")
def copy_rows(pairs: Array, source: Array, target: Array) -> None:
    """target[to] = source[from] for each pair (from, to). No `to` occurs twice, and none is checked.

    Both may be one array, where no row that is read is written.
    """
    target[pairs[:, 1]] = source[pairs[:, 0]]


@copy_rows.gpu
def _copy_rows_gpu(device: GPU, pairs: Any, source: Any, target: Any) -> None:
    width = source.shape[1]
    blocks = -(-len(pairs) * width // _BLOCK_THREADS)
    device.run("decode_state", "copy_rows", blocks, pairs, source, target, len(pairs), width)


@op("x:f32[T,W] step:i32[1] &ring:f32[R,N] first:i32")
def store_in_ring(x: Array, step: Array, ring: Array, first: int) -> None:
    """ring[step % R, first:first + T * W] = x, row by row: what the host reads of a step, in its memory."""
    ring[step[0] % len(ring), first : first + x.size] = x.reshape(-1)


@store_in_ring.gpu
def _store_in_ring_gpu(device: GPU, x: Any, step: Any, ring: Any, first: int) -> None:
    blocks = -(-x.size // (_RING_BLOCK * _RING_NUMBERS))
    device.run("decode_state", "store_in_ring", blocks, x, step, ring, x.size, *ring.shape, first)


@op("&words:i32[N]")
def clear(words: Array) -> None:
    """Set all words to 0."""
    words[:] = 0


@clear.gpu
def _clear_gpu(device: GPU, words: Any) -> None:
    device.run("decode_state", "clear", -(-len(words) // _BLOCK_THREADS), words, len(words))
