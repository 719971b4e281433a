"""The pipelines of sequences whose hooks are data: those with the same edits share steps, captured and queued ahead."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from forge.engine.pipeline import StepPipeline
from forge.engine.recorded_hooks import Edit, RecordedEdits, recorded_edits
from forge.engine.scheduler import Scheduled
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
        self._refused: set[tuple[Edit, ...]] = set()
        """Edits for which there was no memory."""

    def parts(self, step: list[Scheduled]) -> tuple[list[Scheduled], list[Scheduled], list[Scheduled]]:
        """The entries of a step that run as those without hooks do, those of these pipelines, and the separate rest."""
        plain, hooked, separate = [], list[Scheduled](), list[Scheduled]()
        counts: Counter[tuple[Edit, ...]] = Counter()
        for entry in sorted(step, key=lambda entry: entry.sequence.row is None):  # who has a row keeps it
            found = _edits_of(entry) if entry.sequence.hooks else None
            if not entry.sequence.is_separate or (found and not found.edits):
                plain.append(entry)
            elif found and counts[found.edits] < self._room(found.edits):
                counts[found.edits] += 1
                hooked.append(entry)
            else:
                separate.append(entry)
        return plain, hooked, separate

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
        groups: dict[tuple[Edit, ...], list[Scheduled]] = {}
        for entry in step:
            groups.setdefault(entry.sequence.recorded.edits, []).append(entry)
        return all(self._pipelines[edits].launch(group, {}) for edits, group in groups.items())

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


def _edits_of(entry: Scheduled) -> RecordedEdits | None:
    """What the hooks of a sequence do in this decode step and in later ones, where that is data."""
    sequence, start, count = entry
    if count != 1 or start < sequence.num_prompt or sequence.num_remaining != 1 or not sequence.may_be_recorded:
        return None
    if sequence.recorded is None:
        sequence.recorded = None if sequence.has_functions else recorded_edits(sequence)
        sequence.may_be_recorded = sequence.recorded is not None
    found: RecordedEdits | None = sequence.recorded
    return found
