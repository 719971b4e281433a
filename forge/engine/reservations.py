"""Pages of sequences that no request has: passes under way, and states that callers hold. Integers only."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator
from collections.abc import Sequence as Items
from contextlib import contextmanager

from forge.config import SamplingParams
from forge.engine.page_lists import PageLists
from forge.engine.page_pool import PagePool
from forge.engine.prefix_cache import PrefixCache
from forge.engine.sequence import Sequence
from forge.errors import OutOfMemoryError


class Reservations(PageLists):
    """Base of `Scheduler`. Running sequences give pages up for these, the youngest first.

    A pass counts with the most pages that it holds at one time, a state with those that it holds. No request counts on
    either.
    """

    def __init__(self, pools: Items[PagePool], prefix_cache: PrefixCache | None) -> None:
        super().__init__(pools, prefix_cache)
        self.passes: dict[Sequence, list[int]] = {}
        """Sequences of passes that have not ended, with the most pages of each kind that they have beside their
        origin's."""
        self.states: dict[Sequence, None] = {}
        """Computed sequences whose pages stay as they are until they are released."""
        self._may_preempt_for_passes = True

    running: list[Sequence]
    waiting: OrderedDict[Sequence, None]

    @abstractmethod
    def preempt(self, sequence: Sequence | None = None) -> Sequence: ...

    @contextmanager
    def within_step(self) -> Iterator[None]:
        """What is reserved within takes free pages alone: running sequences are in a step under way."""
        before, self._may_preempt_for_passes = self._may_preempt_for_passes, False
        try:
            yield
        finally:
            self._may_preempt_for_passes = before

    def reserve(self, sequence: Sequence, *, may_preempt: bool = True, is_kept: bool = False) -> bool:
        """Pages for a pass over the ids of a sequence. False where there are not so many.

        is_kept: They become a state's: each request under way must be able to go on beside them.

        Steps under way may still write to pages that running sequences give up for it, and sample ids of those
        sequences: the device works in order.
        """
        hit = self._find(sequence, keeps_last=is_kept) if sequence.origin is not None else self._nothing
        length, needed = len(sequence.ids), []
        for pool, pages in zip(self.pools, hit.pages, strict=True):
            needed.append(min(pool.kind.num_pages(length), pool.kind.num_entries(length) - len(pages)))
        if not self._are_there(needed, is_kept=is_kept):
            return False
        while not self._allocate(sequence, hit):
            if not (may_preempt and self._may_preempt_for_passes):
                return False
            self.preempt()
        self.passes[sequence] = needed
        return True

    def reserve_more(self, sequence: Sequence, length: int) -> None:
        """Pages for the next tokens of a pass, up to `length`. Those that it does not need any more go back."""
        while not self._grow(sequence, length):
            if not self._may_preempt_for_passes:
                raise self.out_of_pages(f"a pass over {len(sequence.ids)} positions within a step")
            self.preempt()

    def release(self, sequence: Sequence) -> None:
        """Free the pages of a pass that has ended, or of a state, unless that was done before."""
        if self.passes.pop(sequence, None) is not None or sequence in self.states:
            self.states.pop(sequence, None)
            self._drop_pages(sequence)

    def keep(self, sequence: Sequence) -> None:
        """A pass has ended, and its pages are a state's."""
        del self.passes[sequence]
        self.states[sequence] = None
        sequence.origin = None

    def fork_state(self, state: Sequence, length: int) -> Sequence:
        """Another state of the first `length` ids, which `fewest_ids` allows. Its copies are to be made at once."""
        child = Sequence(0, state.ids[:length], length, state.params, 0, length, adapter=state.adapter, origin=state)
        hit = self._shared(state, length, keeps_last=True)
        self._make_room_beside(
            [pool.kind.num_entries(length) - len(pages) for pool, pages in zip(self.pools, hit.pages, strict=True)],
            length,
        )
        is_there = self._allocate(child, hit)
        assert is_there
        child.origin = None
        self.states[child] = None
        return child

    def new_state(self, ids: list[int], params: SamplingParams, adapter: int, released: Items[int]) -> Sequence:
        """A state whose pages the caller fills. released: Leading entries of each kind without pages."""
        length = len(ids)
        state = Sequence(0, list(ids), length, params, 0, length, adapter=adapter, num_computed=length)
        counts = [pool.kind.num_entries(length) - first for pool, first in zip(self.pools, released, strict=True)]
        self._make_room_beside(counts, length)
        for pool, first, count in zip(self.pools, released, counts, strict=True):
            state.pages.append([pool.spare_page] * first + pool.allocate(count))
        self.states[state] = None
        return state

    def _make_room_beside(self, counts: Items[int], length: int) -> None:
        """Free so many pages of each kind for a state, or raise OutOfMemoryError."""
        may_preempt = self._may_preempt_for_passes
        is_free = all(count <= pool.num_free for pool, count in zip(self.pools, counts, strict=True))
        if not self._are_there(counts, is_kept=True) or not (is_free or may_preempt):
            raise self.out_of_pages(f"a state of {length} tokens")
        while any(count > pool.num_free for pool, count in zip(self.pools, counts, strict=True)):
            self.preempt()

    def _are_there(self, counts: Items[int], *, is_kept: bool) -> bool:
        """Whether there are so many pages of each kind beside those of passes and states, and those that each request
        under way needs by itself, if they are to be kept."""
        requests = (*self.running, *self.waiting) if is_kept else ()
        for pool, taken, count in zip(self.pools, self._taken(), counts, strict=True):
            longest = max((pool.kind.num_pages(sequence.num_tokens + 1) for sequence in requests), default=0)
            if taken + count + longest > pool.num_pages:
                return False
        return True

    def fewest_ids(self, state: Sequence) -> int:
        """The fewest of a state's leading ids that it can go back to: it has all that the last of them reads."""
        released = [len(pages) - len(pool.held(pages)) for pool, pages in zip(self.pools, state.pages, strict=True)]

        def is_there(length: int) -> bool:
            needed = [pool.kind.num_released(length - 1) for pool in self.pools]
            return all(first >= gone for first, gone in zip(needed, released, strict=True))

        return 1 + bisect_left(range(1, state.num_computed), True, key=is_there)

    def out_of_pages(self, what: str) -> OutOfMemoryError:
        """The error for something that needs more pages than there are, which says what holds them."""
        held = []
        if self.states:
            tokens = sum(state.num_computed for state in self.states)
            held.append(f"{_counted(len(self.states), 'state')} of {_counted(tokens, 'token')}")
        if self.passes:
            held.append(f"{_counted(len(self.passes), 'pass that is', 'passes that are')} not read to the end")
        if self.running:
            held.append("requests under way")
        used = self._taken()
        if self.running:
            used = [pool.num_pages - pool.num_free for pool in self.pools]
        pages = ", ".join(
            f"{count} of {pool.num_pages} pages ({pool.kind.name})"
            for pool, count in zip(self.pools, used, strict=True)
        )
        hint = "close states that are not needed, or load with a larger context" if self.states else None
        hint = hint or ("read or close them first" if self.passes else "wait for them, or load with a larger context")
        return OutOfMemoryError(
            f"{what} needs pages of the KV cache that others hold: {' and '.join(held)}, which take {pages}", hint=hint
        )

    def _taken(self) -> list[int]:
        """Pages of each kind that running sequences cannot give up."""
        of_passes = list(self.passes.values())
        found = []
        for kind, pool in enumerate(self.pools):
            of_states = set[int]().union(*(pool.held(state.pages[kind]) for state in self.states))
            found.append(len(of_states) + sum(needed[kind] for needed in of_passes))
        return found


def _counted(count: int, one: str, several: str | None = None) -> str:
    return f"{count:,} {one if count == 1 else several or one + 's'}"
