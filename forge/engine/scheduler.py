"""Which tokens of which sequences run in the next step. Integers only: it is tested without a model."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from forge.engine.page_allocator import PageAllocator
from forge.engine.sequence import FinishReason, Sequence


@dataclass(frozen=True, slots=True)
class Scheduled:
    """`count` tokens of a sequence from position `start` on."""

    sequence: Sequence
    start: int
    count: int

    @property
    def samples(self) -> bool:
        """The step reaches the sequence's last id, so its logits give the next one."""
        return self.start + self.count == len(self.sequence.ids)


class Scheduler:
    """Continuous batching: each step takes one token of every running sequence, and prompt tokens while there is room.

    A prompt longer than a step is computed in chunks. Where pages run out, the youngest running sequence gives up its
    pages and waits; it computes its ids again later. Source: vLLM, arXiv:2309.06180.
    """

    def __init__(self, blocks: PageAllocator, page_size: int, max_sequences: int, max_step_tokens: int) -> None:
        self.blocks = blocks
        self.page_size = page_size
        self.max_sequences = max_sequences
        self.max_step_tokens = max(max_step_tokens, max_sequences)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the pool must be able to hold it alone at its greatest length."""
        if self._pages_for(sequence.max_length) > self.blocks.num_pages:
            raise ValueError(f"{sequence.max_length} tokens never fit in {self.blocks.num_pages} pages")
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """The next step. Pages for its tokens are allocated; nothing else changes until `commit`."""
        step: list[Scheduled] = []
        budget = self.max_step_tokens
        for sequence in self.running:
            if not sequence.num_remaining:  # a step was interrupted between its commit and its ids: sample again
                sequence.num_computed -= 1
        # Running sequences first, oldest first. Decoding ones need one token each, so a long prompt cannot starve them.
        for sequence in sorted(self.running, key=lambda s: s.num_remaining > 1):
            if sequence not in self.running:  # preempted for one before it
                continue
            count = min(sequence.num_remaining, budget)
            if count and self._make_room(sequence, sequence.num_computed + count):
                step.append(Scheduled(sequence, sequence.num_computed, count))
                budget -= count
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = self.waiting[0]
            # It starts only if all it has to compute fits: else it would be the first to be preempted again.
            if not self._grow(sequence, len(sequence.ids)):
                break
            self.running.append(self.waiting.popleft())
            count = min(sequence.num_remaining, budget)
            step.append(Scheduled(sequence, sequence.num_computed, count))
            budget -= count
        return step

    def decoding(self) -> list[Sequence]:
        """The running sequences that go on, if the next step is one token of each: each has one id to compute, nobody
        can start, and there are pages without preempting anybody. The pages are allocated. Else none.

        A sequence whose last id, by its length, is under way does not go on.
        """
        if self._can_start() or any(s.num_remaining != 1 for s in self.running):
            return []
        going_on = [s for s in self.running if s.num_tokens < s.max_length]
        return going_on if all(self._grow(s, s.num_tokens) for s in going_on) else []

    def commit(self, step: list[Scheduled]) -> None:
        """The step has run: its tokens are in the cache."""
        for entry in step:
            entry.sequence.num_computed = entry.start + entry.count

    def fork(self, parent: Sequence, child: Sequence) -> tuple[int, int] | None:
        """Let a child with the parent's ids run on the parent's pages.

        Full pages are shared. The page in which both will go on is copied: the pair (source, target) is returned. Where
        there is no room the child waits, and computes the ids itself.
        """
        shared, rest = divmod(parent.num_computed, self.page_size)
        own = self.blocks.allocate(1) if rest else []
        if own is None or len(self.running) >= self.max_sequences:
            if own:
                self.blocks.release(own)
            self.waiting.append(child)
            return None
        self.blocks.share(parent.pages[:shared])
        child.pages = parent.pages[:shared] + own
        child.num_computed = parent.num_computed
        self.running.append(child)
        return (parent.pages[shared], own[0]) if own else None

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, running or waiting, and give its pages back."""
        sequence.finish_reason = reason
        for queue in (self.running, self.waiting):
            if sequence in queue:  # in neither if a step was interrupted between two queues
                queue.remove(sequence)
        self._drop_pages(sequence)

    def preempt(self) -> Sequence:
        """The youngest running sequence gives its pages up and waits, before all others that wait."""
        youngest = self.running.pop()
        self._drop_pages(youngest)
        self.waiting.appendleft(youngest)
        return youngest

    def _can_start(self) -> bool:
        """Whether the next one that waits may run, and has room for all it has to compute."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return False
        return self._missing(self.waiting[0], len(self.waiting[0].ids)) <= self.blocks.num_free

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` ids of a running sequence; younger ones are preempted for it, at last it itself."""
        while not self._grow(sequence, length):
            if self.preempt() is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, length: int) -> bool:
        missing = self._missing(sequence, length)
        if missing > 0:
            pages = self.blocks.allocate(missing, sequence.pages[-1] if sequence.pages else None)
            if pages is None:
                return False
            sequence.pages += pages
        return True

    def _missing(self, sequence: Sequence, length: int) -> int:
        """Pages that it needs for so many ids and has not got."""
        return self._pages_for(length) - len(sequence.pages)

    def _drop_pages(self, sequence: Sequence) -> None:
        self.blocks.release(sequence.pages)
        sequence.pages = []
        sequence.num_computed = 0

    def _pages_for(self, length: int) -> int:
        return -(-length // self.page_size)
