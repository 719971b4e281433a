"""What becomes of sequences where a step fails, or may have been wrong."""

from __future__ import annotations

from contextlib import suppress
from itertools import chain

from forge.engine.passes import Passes
from forge.engine.prefix_cache import PrefixCache
from forge.engine.sequence import FinishReason, Sequence
from forge.errors import OutOfMemoryError, drop_frames

OUT_OF_MEMORY = (MemoryError, OutOfMemoryError)


class Recovery(Passes):
    """Base of `Engine`."""

    prefix_cache: PrefixCache | None
    _siblings: dict[Sequence, list[Sequence]]

    def _choices(self, first: Sequence) -> list[Sequence]:
        """A sequence, and those that start when its prompt is computed."""
        return self._siblings.get(first, [first])

    def _finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, whose hooks get what was read of it. What they raise ends it with an error."""
        if sequence.recorded and self.runner.hooked:
            self.runner.hooked.deliver(sequence)
        self.scheduler.finish(sequence, "error" if sequence.error else reason)

    def _discard_queued(self) -> None:
        """Forget the steps under way, and the ids that they sample."""
        try:
            if self.runner.pipeline:
                self.runner.pipeline.discard()
            if self.runner.hooked:
                self.runner.hooked.discard()
        finally:
            for sequence in (*self.scheduler.running, *self.scheduler.waiting):  # one that waits may be in these steps
                sequence.num_pending = 0

    def _start_over(self) -> None:
        """Replays were wrong, and so may be the KV cache: all of it is computed again from the ids."""
        self._discard_queued()
        self._preempt_all()
        if self.prefix_cache:
            self.prefix_cache.clear()

    def _preempt_all(self) -> None:
        while self.scheduler.running:
            self.scheduler.preempt()

    def _fail_all(self, error: BaseException) -> None:
        """End all running sequences, or the youngest where memory ran out: they are in the steps under way."""
        with suppress(Exception):  # the device may have failed: the step's own error says so
            self._discard_queued()
        self._fail([self._choices(first) for first in self.scheduler.running], error)

    def _fail(self, groups: list[list[Sequence]], error: BaseException) -> None:
        """End the sequences of a step that failed: the choices of each prompt. Where memory ran out, the youngest's.

        What the step has written of the others' pages is not known. They give them up.
        """
        drop_frames(error)  # whoever keeps the error shall not keep the step's arrays
        if isinstance(error, OUT_OF_MEMORY):
            group_of = {sequence: group for group in groups for sequence in group}
            groups = [group_of[sequence] for sequence in self.scheduler.running if sequence in group_of][-1:]
            self._preempt_all()
        for sequence in chain.from_iterable(groups):
            self._siblings.pop(sequence, None)
            self._finish(sequence, "error")
