"""From scheduled sequences to the arrays of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from forge.engine.scheduler import Scheduled
from forge.models.batch import Batch, PageTable

Ints = np.ndarray[Any, Any]


class HostBatch(NamedTuple):
    """The tokens of a step on the host, one sequence after the other; int32 arrays."""

    ids: Ints
    """(T,); 0 where the request table holds the id"""
    positions: Ints
    """(T,)"""
    starts: Ints
    """(B + 1,)"""
    lengths: Ints
    """(B,)"""
    slot_mapping: Ints
    """(kinds of layer state, T)"""
    page_tables: Ints
    """(kinds of layer state, B, the next power of two of the most pages of a sequence)"""
    adapters: Ints | None
    """(T,) the slot of each token's adapter, or -1; None = no token has one"""
    followed: Ints
    """(N, 2) rows of the request table, and the tokens whose ids they hold"""

    def place(self, put: Callable[[list[Ints]], list[Any]], logit_rows: Ints | None) -> tuple[Batch, Any]:
        """The step on a device, and `followed`. put: From arrays of the host to the device's."""
        *arrays, adapters, followed = self
        optional = [array for array in (logit_rows, adapters) if array is not None]
        *placed, on_device = put([*arrays, *optional, followed])
        ids, positions, starts, lengths, slots, pages, *others = placed
        tables = tuple(PageTable(own, of_kind) for own, of_kind in zip(slots, pages, strict=True))
        rows = None if logit_rows is None else others.pop(0)
        return Batch(ids, positions, starts, lengths, tables, rows, others[0] if others else None), on_device


def build(step: list[Scheduled], page_size: int, num_rows: int = 0) -> HostBatch:
    """The tokens of scheduled sequences, with their places in the layers' state.

    num_rows: B, at least. Sequences beyond the step's have no tokens.
    """
    rows = max(num_rows, len(step))
    counts, first, lengths = np.zeros(rows, np.int32), np.zeros(rows, np.int32), np.ones(rows, np.int32)
    counts[: len(step)] = [entry.count for entry in step]
    first[: len(step)] = [entry.start for entry in step]
    lengths[: len(step)] = (first + counts)[: len(step)]
    starts = np.zeros(rows + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    pages = [entry.sequence.pages for entry in step]
    most_pages = max(len(own) for kinds in pages for own in kinds)
    width = 1 << (most_pages - 1).bit_length()  # so that steps have the same shapes, and are recorded once
    table = np.zeros((len(pages[0]), rows, width), np.int32)  # (kinds, B, width)
    for row, kinds in enumerate(pages):
        for kind, own in enumerate(kinds):
            table[kind, row, : len(own)] = own
    row_of = np.repeat(np.arange(rows), counts)  # (T,)
    positions = np.arange(starts[-1], dtype=np.int32) - (starts[:-1] - first)[row_of]
    slot_mapping = table[:, row_of, positions // page_size] * page_size + positions % page_size  # (kinds, T)
    adapters = [entry.sequence.adapter for entry in step]
    slots = np.full(rows, -1, np.int32)
    slots[: len(step)] = adapters
    ids: list[int] = []
    followed: list[tuple[int, int]] = []
    for entry in step:
        if entry.sequence.row is None:
            ids += entry.sequence.ids[entry.start : entry.start + entry.count]
        else:
            followed.append((entry.sequence.row, len(ids)))
            ids.append(0)
    return HostBatch(
        np.array(ids, np.int32),
        positions,
        starts,
        lengths,
        slot_mapping,
        table,
        slots[row_of] if max(adapters) >= 0 else None,
        np.array(followed, np.int32).reshape(-1, 2),
    )


def last_tokens(step: list[Scheduled]) -> Ints:
    """The tokens of the sequences' last ids, int32 (R,), whose logits give the next ones."""
    ends = np.cumsum([entry.count for entry in step], dtype=np.int32)
    return np.array([end - 1 for end, entry in zip(ends, step, strict=True) if entry.samples], np.int32)
