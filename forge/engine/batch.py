"""From scheduled sequences to the arrays of a step."""

from __future__ import annotations

import numpy as np

from forge.backend import Backend
from forge.engine.scheduler import Scheduled
from forge.models.batch import Batch, PageTable


def build(step: list[Scheduled], page_size: int, backend: Backend, *, all_logits: bool = False) -> Batch:
    """The step's tokens, one sequence after the other.

    Logits are wanted where a sequence's last id is reached; with all_logits, everywhere.
    """
    counts = np.array([entry.count for entry in step], np.int32)
    starts = np.zeros(len(step) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    first = np.array([entry.start for entry in step], np.int32)
    pages = [entry.sequence.pages for entry in step]
    most_pages = max(len(own) for kinds in pages for own in kinds)
    table = np.zeros((len(pages[0]), len(step), most_pages), np.int32)  # (kinds, B, most pages)
    for row, kinds in enumerate(pages):
        for kind, own in enumerate(kinds):
            table[kind, row, : len(own)] = own
    row_of = np.repeat(np.arange(len(step)), counts)  # (T,)
    positions = np.arange(starts[-1], dtype=np.int32) - (starts[:-1] - first)[row_of]
    slot_mapping = table[:, row_of, positions // page_size] * page_size + positions % page_size  # (kinds, T)
    ids = [entry.sequence.ids[entry.start : entry.start + entry.count] for entry in step]
    rows = np.array([starts[row + 1] - 1 for row, entry in enumerate(step) if entry.samples], np.int32)
    everything = all_logits or len(rows) == len(positions)
    return Batch(
        ids=backend.asarray(np.concatenate(ids), np.int32),
        positions=backend.asarray(positions, np.int32),
        starts=backend.asarray(starts),
        lengths=backend.asarray(first + counts),
        tables=tuple(
            PageTable(backend.asarray(own, np.int32), backend.asarray(of_kind))
            for own, of_kind in zip(slot_mapping, table, strict=True)
        ),
        logit_rows=None if everything else backend.asarray(rows),
    )
