"""The pipelines of sequences whose hooks are data: those with the same edits share steps, captured and queued ahead."""

from __future__ import annotations

from collections.abc import Callable

from forge.engine.pipeline import StepPipeline
from forge.engine.recorded_hooks import Edit, RecordedEdits, recorded_edits
from forge.engine.scheduler import Scheduled, split
from forge.engine.sequence import Sampled, Sequence
from forge.errors import OutOfMemoryError

_MAX_PIPELINES = 4
"""That are kept, the latest ones and those with steps under way."""


class HookedPipelines:
    """Decode steps of sequences with hooks. Prompts with hooks, and hooks that are code, are none of theirs."""

    def __init__(self, make: Callable[[tuple[Edit, ...]], StepPipeline]) -> None:
        """make: Raises OutOfMemoryError where there is no memory for another pipeline."""
        self._make = make
        self._pipelines: dict[tuple[Edit, ...], StepPipeline] = {}
        self._known: dict[tuple[Edit, ...], tuple[Edit, ...]] = {}
        """Equal ones are one object: a step tells them apart by its id."""
        self._refused: set[tuple[Edit, ...]] = set()
        """Edits for which there was no memory."""

    def parts(self, step: list[Scheduled]) -> tuple[list[Scheduled], list[Scheduled], list[Scheduled]]:
        """The entries of a step that run as those without hooks do, those of these pipelines, and the separate rest."""
        plain, apart = split(step)
        hooked, separate, room = list[Scheduled](), list[Scheduled](), dict[int, int]()
        for entry in sorted(apart, key=lambda entry: entry.sequence.row is None):  # who has a row keeps it
            found = self._edits_of(entry)
            if found is None:
                separate.append(entry)
            elif not found.edits:
                plain.append(entry)
            else:
                left = room[id(found.edits)] if id(found.edits) in room else self._room(found.edits)
                (hooked if left > 0 else separate).append(entry)
                room[id(found.edits)] = left - 1
        return plain, hooked, separate

    def _edits_of(self, entry: Scheduled) -> RecordedEdits | None:
        """What the hooks of a sequence do in this decode step and in later ones, where that is data."""
        sequence, start, count = entry
        if sequence.row is None:  # else it is in such steps already
            is_decoding = count == 1 and start >= sequence.num_prompt and sequence.num_remaining == 1
            if not is_decoding or not sequence.may_be_recorded:
                return None
            if sequence.recorded is None:
                sequence.recorded = None if sequence.has_functions else recorded_edits(sequence, self._known)
                sequence.may_be_recorded = sequence.recorded is not None
        found: RecordedEdits | None = sequence.recorded
        return found

    def _room(self, edits: tuple[Edit, ...]) -> int:
        """How many sequences with these edits may be in a step."""
        if edits not in self._pipelines and edits not in self._refused:
            self._drop_idle()
            try:
                self._pipelines[edits] = self._make(edits)
            except OutOfMemoryError:
                self._refused.add(edits)
        return self._pipelines[edits].max_sequences if edits in self._pipelines else 0

    def _drop_idle(self) -> None:
        for edits, pipeline in list(self._pipelines.items())[: 1 - _MAX_PIPELINES]:
            if not pipeline.num_queued and not pipeline.is_seated:
                del self._pipelines[edits]

    @property
    def num_queued(self) -> int:
        """Steps that are queued and not collected, of the pipeline that has most."""
        return max((pipeline.num_queued for pipeline in self._pipelines.values()), default=0)

    @property
    def is_full(self) -> bool:
        """Whether no further step may be queued in one of them."""
        return any(pipeline.is_full for pipeline in self._pipelines.values())

    def launch(self, step: list[Scheduled]) -> bool:
        """Queue a step for each kind of edits. As `StepPipeline.launch`."""
        groups: dict[int, list[Scheduled]] = {}
        for entry in step:
            groups.setdefault(id(entry.sequence.recorded.edits), []).append(entry)
        return all(self._pipelines[group[0].sequence.recorded.edits].launch(group, {}) for group in groups.values())

    def collect(self) -> list[Sampled]:
        """The ids of the oldest step of each."""
        return [one for p in self._pipelines.values() if p.num_queued for one in p.collect()]

    def deliver(self, sequence: Sequence) -> None:
        """A sequence ends: its hooks get what steps have read of it."""
        for pipeline in self._pipelines.values():
            if pipeline.hook:
                pipeline.hook.deliver(sequence)

    def discard(self) -> None:
        """Forget the queued steps, and let go of the pipelines."""
        try:
            for pipeline in self._pipelines.values():
                pipeline.discard()
        finally:
            self._pipelines.clear()
