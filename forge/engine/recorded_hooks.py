"""Hooks of decode steps that are data: vectors added to the residual stream, and what is read of it. Steps that have
them are captured and replayed, and queued ahead, as steps without hooks are."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.engine.hooked import SequenceHook, deliver
from forge.engine.sequence import Sequence
from forge.ops.activation import add
from forge.ops.decode_state import store_in_ring

_RING_BYTES = 128 << 20
"""Of the host's pinned memory for what a pipeline's steps read."""
_MOST_KEPT = 32
"""Positions of a sequence that are kept before its hooks get them."""


class Edit(NamedTuple):
    """What steps do at a point of the residual stream."""

    name: str
    is_read: bool
    """Its value is read. Else a vector is added to it."""


class RecordedEdits(NamedTuple):
    """What a sequence's hooks do in each of its decode steps from here on."""

    edits: tuple[Edit, ...]
    hooks: tuple[SequenceHook, ...]
    """Whose each edit is."""


def recorded_edits(sequence: Sequence, known: dict[tuple[Edit, ...], tuple[Edit, ...]]) -> RecordedEdits | None:
    """Of a sequence whose prompt is computed. None where a hook runs code of the user's, looks elsewhere than at the
    residual stream, or at some steps only."""
    positions = np.arange(sequence.num_computed, max(sequence.max_length, sequence.num_computed + 1))
    found: list[tuple[Edit, SequenceHook]] = []
    for hook in sequence.hooks:
        chosen = hook.selects(positions, sequence.num_prompt)
        if not chosen.any():
            continue
        if hook.recorded is None or not chosen.all() or not all(".resid_" in name for name in hook.names):
            return None
        found += [(Edit(name, isinstance(hook.recorded, str)), hook) for name in sorted(hook.names)]
    edits = tuple(edit for edit, _ in found)
    return RecordedEdits(known.setdefault(edits, edits), tuple(hook for _, hook in found))


def most_rows(edits: Items[Edit], width: int, ring_entries: int) -> int:
    """Sequences that steps with these edits may have, by the host's memory that what they read takes."""
    return max(_RING_BYTES // (4 * ring_entries * width * max(sum(edit.is_read for edit in edits), 1)), 1)


class RecordedHook:
    """The edits of a captured step, as `models.hooks.Hook`. Its launches are the same for all values and vectors."""

    def __init__(
        self, edits: Items[Edit], backend: Backend, rows: int, width: int, step: Any, ring_entries: int
    ) -> None:
        """step: i32 (1,) on the device, steps so far. ring_entries: Steps whose values are kept for the host."""
        self._edits, self._backend, self._step = edits, backend, step
        self.names = frozenset(edit.name for edit in edits)
        self._vectors = {
            place: backend.asarray(np.zeros((rows, width), np.float32))
            for place, edit in enumerate(edits)
            if not edit.is_read
        }
        """(rows, E) each: what is added to each row, by number of the edit."""
        reads = [place for place, edit in enumerate(edits) if edit.is_read]
        self._firsts: Mapping[int, int] = {place: number * rows * width for number, place in enumerate(reads)}
        """Where what is read begins in an entry of the ring, by number of the edit."""
        shape = ring_entries, max(len(reads), 1) * rows * width
        self._ring, self._host_ring = backend.host_visible(shape, np.float32)
        self._shape = len(reads), rows, width
        self._held: list[Sequence | None] = [None] * rows
        """The sequence whose vectors each row has."""
        self._kept: dict[Sequence, list[tuple[int, npt.NDArray[np.float32], int]]] = {}
        """What hooks have not got yet: of each position what its step read, (reads, R, E), and its row. A call for each
        costs more than a step."""

    def at(self, name: str, value: Any) -> Any:
        """value: float32 (R, E) of the first R rows."""
        for place, edit in enumerate(self._edits):
            if edit.name != name:
                continue
            if edit.is_read:
                store_in_ring(value, self._step, self._ring, self._firsts[place])
            else:
                value = add(value, self._vectors[place][: len(value)])
        return value

    def seat(self, sequences: Items[Sequence]) -> None:
        """These sequences have the first rows of the next step."""
        for row, sequence in enumerate(sequences):
            if sequence is self._held[row]:
                continue
            for place, vectors in self._vectors.items():
                added = sequence.recorded.hooks[place].recorded if sequence.recorded else None
                width = self._shape[2]
                self._backend.upload(vectors[row], np.zeros(width, np.float32) if added is None else added)
            self._held[row] = sequence

    def keep(self, sequences: Items[Sequence], positions: Items[int], number: int) -> None:
        """The step of this number has run: what it read of sequences that have not ended is kept for their hooks.

        positions: Of each row's token.
        """
        if not self._firsts:
            return
        entry = self._host_ring[number % len(self._host_ring)].reshape(self._shape)[:, : len(sequences)].copy()
        for row, (sequence, position) in enumerate(zip(sequences, positions, strict=True)):
            if sequence.finish_reason is None and sequence.recorded:
                self._kept.setdefault(sequence, []).append((position, entry, row))
                if (number + row) % _MOST_KEPT == 0:  # those of a batch take turns: no step waits for all of them
                    self.deliver(sequence)

    def deliver(self, sequence: Sequence) -> None:
        """The sequence's hooks get what was kept for them."""
        if kept := self._kept.pop(sequence, None):
            positions = np.array([position for position, *_ in kept])
            values = np.stack([entry[:, row] for _, entry, row in kept], axis=1)  # (reads, N, E)
            hooks = [sequence.recorded.hooks[place] for place in self._firsts]
            names = [self._edits[place].name for place in self._firsts]
            deliver(sequence, positions, list(zip(hooks, names, values, strict=True)))
