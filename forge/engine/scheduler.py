"""Which tokens of which sequences run in the next step. Integers only: it is tested without a model."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Sequence as Items
from typing import NamedTuple

from forge.engine.page_pool import PagePool
from forge.engine.prefix_cache import PrefixCache
from forge.engine.reservations import Reservations
from forge.engine.sequence import FinishReason, Sequence
from forge.engine.step_budget import StepBudget


class Scheduled(NamedTuple):
    """`count` tokens of a sequence from position `start` on."""

    sequence: Sequence
    start: int
    count: int  # type: ignore[assignment]  # not the tuple's method

    @property
    def samples(self) -> bool:
        """The step reaches the sequence's last id, so its logits give the next one. Asked before the step is queued."""
        return self.start + self.count == self.sequence.num_tokens


class _NoPages(Exception):
    """Somebody would have to be preempted."""


class Scheduler(Reservations):
    """Continuous batching: each step takes one token of every decoding sequence, and prompt tokens while there is room.

    A prompt is computed in chunks of what a step has room for. Beside decoding sequences that is `max_prefill_tokens`
    in all, which bounds the time between their tokens (chunked prefill: Sarathi-Serve, arXiv:2403.02310). Sequences
    start in order of arrival, each as soon as there are pages for all that it has to compute. None overtakes another:
    where the next one does not fit, those behind it wait too, until running ones end. Where pages of any kind run out,
    the youngest running sequence gives up all its pages and waits in front; it computes its ids again later, but for
    pages that the prefix cache still finds. So the oldest one always goes on, and each gets its turn. Source: vLLM,
    arXiv:2309.06180.
    """

    def __init__(
        self,
        pools: Items[PagePool],
        max_sequences: int,
        max_step_tokens: int,
        max_prefill_tokens: int | None = None,
        prefix_cache: PrefixCache | None = None,
    ) -> None:
        """max_prefill_tokens: None = as many as fit in a step."""
        super().__init__(pools, prefix_cache)
        self.max_sequences = max_sequences
        self.max_step_tokens = max(max_step_tokens, max_sequences)
        self.max_prefill_tokens = max_prefill_tokens or self.max_step_tokens
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()
        """In order. Any of many can be taken out at once."""
        self.running: list[Sequence] = []
        self.budget: StepBudget | None = None
        """Says max_prefill_tokens anew for each step, if there is one."""
        self.num_preemptions = 0
        self._may_preempt = True
        self._settled: set[Sequence] | None = None
        """Sequences that decoded when there was no prompt to compute. None while there is none."""

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; the pools must be able to hold it alone at its greatest length."""
        if not self.fits(1, sequence.max_length):
            sizes = ", ".join(str(pool.num_pages) for pool in self.pools)
            raise ValueError(f"{sequence.max_length} tokens never fit in {sizes} pages")
        self.waiting[sequence] = None

    def schedule(self, *, may_preempt: bool = True) -> list[Scheduled]:
        """The next step. Pages for its tokens are allocated; nothing else changes until `commit`.

        Without may_preempt there is none where somebody would have to be preempted: ids under way may end sequences.
        """
        self._may_preempt = may_preempt
        step: list[Scheduled] = []
        budget = self.max_step_tokens
        decoding: list[Sequence] = []
        others: list[Sequence] = []
        for sequence in self.running:  # hundreds in each step: `goes_on` and `is_decoding` written out
            pending, computed = sequence.num_pending, sequence.num_computed
            length = len(sequence.ids) + pending
            if length > computed and length < sequence.max_length and not (pending and sequence.row is None):
                (decoding if length - computed == 1 and computed >= sequence.num_prompt else others).append(sequence)
        try:
            for sequence in decoding:
                length = sequence.num_computed + 1
                for pool, pages in zip(self.pools, sequence.pages, strict=False):  # none where it was preempted
                    if pool.kind.num_entries(length) > len(pages):
                        break
                else:
                    if sequence.pages:
                        step.append(Scheduled(sequence, length - 1, 1))
                        budget -= 1
                    continue
                budget -= self._continue(sequence, 1, step)
            most = self._most_prompt_tokens(decoding, others)
            if step:
                budget = min(budget, most)
            elif self.budget:
                budget = min(budget, self.budget.longest)
            for sequence in others:
                budget -= self._continue(sequence, budget, step)
        except _NoPages:
            return []
        while self.waiting and budget and len(self.running) < self.max_sequences:
            sequence = next(iter(self.waiting))
            # It starts only if all it has to compute fits: else it would be the first to be preempted again.
            if not sequence.goes_on or not self._start(sequence):
                break
            del self.waiting[sequence]
            self.running.append(sequence)
            sequence.started_at = sequence.started_at or time.perf_counter()
            count = min(sequence.num_remaining, budget)
            step.append(Scheduled(sequence, sequence.num_computed, count))
            budget -= count
        return step

    def commit(self, step: list[Scheduled]) -> None:
        """The step has run, or runs before all later ones: the layers' state holds its tokens."""
        cache = self.prefix_cache
        for sequence, start, count in step:
            sequence.num_computed = computed = start + count
            if cache and computed // cache.page_size > len(sequence.prefix):
                cache.hold(sequence, min(computed, len(sequence.ids)))

    def fork(self, parent: Sequence, child: Sequence) -> list[tuple[int, int, int]]:
        """Let a child with the parent's ids run on the parent's pages.

        Pages that nobody writes to any more are shared. The others are copied: returns (kind, source, target) of each.
        Where there is no room the child waits, and computes the ids itself. It has arrived before all others that wait.
        """
        length, copies = parent.num_computed, []
        child.num_cached = parent.num_cached
        has_pages = all(pool.num_copied(length) <= pool.num_free for pool in self.pools)
        if len(self.running) >= self.max_sequences or not has_pages:
            self.waiting[child] = None
            self.waiting.move_to_end(child, last=False)
            return []
        for kind, (pool, pages) in enumerate(zip(self.pools, parent.pages, strict=True)):
            own, pairs = pool.fork(pages, length)
            child.pages.append(own)
            copies += [(kind, source, target) for source, target in pairs]
        child.num_computed, child.started_at = length, parent.started_at
        child.prefix = list(parent.prefix)  # so a shared page that may not be found stays so
        self.running.append(child)
        return copies

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, running or waiting, and give its pages back."""
        sequence.finish_reason, sequence.functions = reason, ()
        self.waiting.pop(sequence, None)  # it is nowhere if it waits for its prompt to be computed as another choice's
        if sequence in self.running:
            self.running.remove(sequence)
        self._drop_pages(sequence, failed=reason == "error")
        for hook in sequence.hooks:
            hook.finished(reason in ("stop", "length"))

    def preempt(self, sequence: Sequence | None = None) -> Sequence:
        """A running sequence, the youngest unless told, gives its pages up and waits, before all others that wait."""
        sequence = sequence or self.running[-1]
        self.running.remove(sequence)
        self.num_preemptions += 1
        self._drop_pages(sequence)
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        return sequence

    def _most_prompt_tokens(self, decoding: list[Sequence], others: list[Sequence]) -> int:
        """Prompt tokens of a step in which sequences decode. others: Running ones that do not."""
        num_coming = len(others) + min(len(self.waiting), self.max_sequences - len(self.running))
        if not num_coming:
            self._settled = None
        elif self._settled is None:
            self._settled = set(decoding)
        if self.budget and self._settled is not None:
            num_settled = sum(sequence in self._settled for sequence in decoding)
            num_come = num_coming + len(decoding) - num_settled
            self.max_prefill_tokens = self.budget.tokens(num_settled, num_come, len(decoding))
        return self.max_prefill_tokens

    def _continue(self, sequence: Sequence, budget: int, step: list[Scheduled]) -> int:
        """Put the next tokens of a running sequence into a step, unless it was preempted for one before it.

        Returns their number.
        """
        count = min(sequence.num_remaining, budget)
        if not count or not sequence.pages:
            return 0
        if not self._make_room(sequence, sequence.num_computed + count):
            return 0
        step.append(Scheduled(sequence, sequence.num_computed, count))
        return count

    def _make_room(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` ids of a running sequence; younger ones are preempted for it, at last it itself."""
        while not self._grow(sequence, length):
            if not self._may_preempt:
                raise _NoPages
            if self.preempt() is sequence:
                return False
        return True


def split(step: list[Scheduled]) -> tuple[list[Scheduled], list[Scheduled]]:
    """The entries that run together as ever, and those of separate sequences."""
    separate = [entry for entry in step if entry.sequence.is_separate]
    return ([entry for entry in step if not entry.sequence.is_separate], separate) if separate else (step, [])
