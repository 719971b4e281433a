"""The state of running sequences on the device, per slot: what a decode step reads of it, how it goes on, and how the
host changes it."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.ops.op import Array, Arrays, Case, op

_BLOCK = 64


def _case(name: str, rows: int, slots: int, pages: int, page_size: int) -> Case:
    def make(rng: np.random.Generator) -> Arrays:
        table = rng.integers(0, 1000, (slots, pages)).astype(np.int32)
        lengths = rng.integers(0, pages * page_size + 1, slots).astype(np.int32)
        chosen = rng.permutation(slots)[:rows].astype(np.int32)
        turn = rng.integers(0, 9, 1).astype(np.int32)
        return chosen, rng.integers(0, 5000, slots).astype(np.int32), lengths, table, turn, page_size

    return Case(name, make)


def _decode_inputs_gpu(
    device: GPU, slots: Any, last_ids: Any, lengths: Any, page_table: Any, turn: Any, page_size: int
) -> tuple[Any, ...]:
    rows, pages = len(slots), page_table.shape[1]
    outputs = tuple(device.empty((rows,), np.int32) for _ in range(4))
    state = (slots, last_ids, lengths, page_table, turn)
    device.run("step", "decode_inputs", -(-rows // _BLOCK), *state, *outputs, rows, pages, page_size)
    return outputs


@op(
    "slots:i32[B] last_ids:i32[S] lengths:i32[S] page_table:i32[S,M] &turn:i32[1] page_size:i32 "
    "-> ids:i32[B] positions:i32[B] kv_slots:i32[B] row_lengths:i32[B]",
    gpu=_decode_inputs_gpu,
    cases=[
        _case("one", 1, 1, 1, 4),
        _case("some of the slots", 5, 9, 70, 16),
        _case("more rows than a block", 70, 90, 3, 4),
        Case(
            "by hand: the fifth token of slot 1, on the second page",
            lambda rng: (
                np.array([1], np.int32),
                np.array([7, 8], np.int32),
                np.array([1, 5], np.int32),
                np.array([[0, 0, 0], [3, 2, 9]], np.int32),
                np.array([6], np.int32),
                4,
            ),
            expected=([8], [4], [8], [5]),
            written=([7],),
        ),
        Case(
            "by hand: idle slots, on page 6",
            lambda rng: (
                np.array([0, 2, 1], np.int32),
                np.array([0, 7, 9], np.int32),
                np.array([0, 1, 0], np.int32),
                np.array([[6, 1], [5, 3], [6, 2]], np.int32),
                np.array([0], np.int32),
                4,
            ),
            expected=([0, 9, 7], [0, 0, 0], [24, 24, 20], [1, 1, 1]),
        ),
    ],
)
def decode_inputs(
    slots: Array, last_ids: Array, lengths: Array, page_table: Array, turn: Array, page_size: int
) -> tuple[Array, ...]:
    """What each row's next token is: its id, position, KV slot, and sequence length. A turn begins, the next one.

    A slot of length 0 is idle: its row computes one token at the start of its first page.
    """
    turn += 1
    row_lengths = np.maximum(lengths[slots], 1)
    positions = row_lengths - 1
    pages = page_table[slots, positions // page_size]
    return last_ids[slots], positions, pages * page_size + positions % page_size, row_lengths


def _place_gpu(device: GPU, edits: Any, words: Any) -> None:
    device.run("step", "place", -(-len(edits) // _BLOCK), edits, words, len(edits))


@op(
    "edits:i32[N,2] &words:i32[W]",
    gpu=_place_gpu,
    cases=[
        Case(
            "by hand: the last word and the first, none between",
            lambda rng: (np.array([[3, -7], [0, 5]], np.int32), np.array([1, 2, 3, 4], np.int32)),
            written=([5, 2, 3, -7],),
        ),
        Case("nothing", lambda rng: (np.empty((0, 2), np.int32), np.array([4], np.int32)), written=([4],)),
        Case(
            "more than a block",
            lambda rng: (
                np.stack([rng.permutation(500)[:130], rng.integers(-9, 9, 130)], axis=1).astype(np.int32),
                rng.integers(0, 99, 500).astype(np.int32),
            ),
        ),
    ],
)
def place(edits: Array, words: Array) -> None:
    """words[index] = value for each pair (index, value) of edits. No index occurs twice; none is checked."""
    words[edits[:, 0]] = edits[:, 1]


def _clear_gpu(device: GPU, words: Any) -> None:
    device.run("step", "clear", -(-len(words) // _BLOCK), words, len(words))


@op(
    "&words:i32[N]",
    gpu=_clear_gpu,
    cases=[
        Case("by hand", lambda rng: (np.array([3, -1], np.int32),), written=([0, 0],)),
        Case("more than a block", lambda rng: (rng.integers(-9, 9, 200).astype(np.int32),)),
    ],
)
def clear(words: Array) -> None:
    """words = 0."""
    words[:] = 0


def _advance_gpu(
    device: GPU, ids: Any, slots: Any, last_ids: Any, lengths: Any, counts: Any, drawn: Any, turn: Any, mail: Any
) -> None:
    rows, vocabulary = len(ids), 0 if counts is None else counts.shape[1]
    sizes = (0, 0, 0) if mail is None else (len(drawn), *mail.shape)
    arrays = ids, slots, last_ids, lengths, counts, drawn, turn, mail
    device.run("step", "advance", -(-rows // _BLOCK), *arrays, rows, vocabulary, *sizes)


@op(
    "ids:i32[B] slots:i32[B] &last_ids:i32[S] &lengths:i32[S] &counts?:i32[C,V] drawn?:i32[N] turn?:i32[1] "
    "&mail?:i32[P,M]",
    gpu=_advance_gpu,
    cases=[
        Case(
            "by hand: one without an id",
            lambda rng: (
                np.array([6, -1], np.int32),
                np.array([2, 0], np.int32),
                np.array([1, 2, 3], np.int32),
                np.array([10, 20, 30], np.int32),
                None,
                np.array([6, -1, 5], np.int32),
                np.array([5], np.int32),
                np.array([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]], np.int32),
            ),
            written=([0, 2, 6], [11, 20, 31], [[1, 2, 3, 4], [5, 6, 7, 8], [6, -1, 5, 12]]),
        ),
        Case(
            "by hand: an idle slot",
            lambda rng: (
                np.array([1, 1], np.int32),
                np.array([0, 1], np.int32),
                np.array([2, 0], np.int32),
                np.array([9, 0], np.int32),
                np.array([[1, 0, 3], [1, 4, 0]], np.int32),
                *(None, None, None),
            ),
            written=([1, 0], [10, 0], [[1, 2, 3], [1, 4, 0]]),
        ),
        Case(
            "by hand: new, in the prompt, generated before",
            lambda rng: (
                np.array([1, 0, 2], np.int32),
                np.array([0, 1, 2], np.int32),
                np.array([7, 8, 9, 5], np.int32),
                np.array([10, 20, 30, 40], np.int32),
                np.array([[1, 0, 3], [1, 4, 0], [1, 1, 5]], np.int32),
                *(None, None, None),
            ),
            written=([1, 0, 2, 5], [11, 21, 31, 40], [[1, 2, 3], [2, 4, 0], [1, 1, 6]]),
        ),
        Case(
            "more rows than a block",
            lambda rng: (
                rng.integers(0, 100, 70).astype(np.int32),
                rng.permutation(90)[:70].astype(np.int32),
                rng.integers(0, 100, 90).astype(np.int32),
                rng.integers(0, 4, 90).astype(np.int32),
                rng.integers(0, 3, (90, 100)).astype(np.int32),
                rng.integers(0, 99, 70 * 6).astype(np.int32),
                np.array([9], np.int32),
                np.zeros((4, 70 * 6 + 5), np.int32),
            ),
        ),
    ],
)
def advance(
    ids: Array,
    slots: Array,
    last_ids: Array,
    lengths: Array,
    counts: Array | None,
    drawn: Array | None,
    turn: Array | None,
    mail: Array | None,
) -> None:
    """Each row's slot has one more id; 0 stands for -1, after which nothing of the sequence is used.

    A slot of length 0 is idle and stays as it is. counts are those of `penalize`, for the first C slots. With mail,
    what was drawn is left for the host in the place of this turn: mail[turn % P, :N] = drawn.
    """
    if mail is not None:
        assert drawn is not None
        assert turn is not None
        mail[turn[0] % len(mail), : len(drawn)] = drawn
    runs = lengths[slots] > 0
    slots, known = slots[runs], np.maximum(ids[runs], 0)
    last_ids[slots] = known
    lengths[slots] += 1
    if counts is not None:
        counts[slots, known] = np.maximum(counts[slots, known], 1) + 1
