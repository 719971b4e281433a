"""The lists of pages that sequences have: how they begin, grow, are shared and given back. Integers only."""

from __future__ import annotations

from collections.abc import Sequence as Items
from typing import NamedTuple

from forge.engine.page_pool import PagePool
from forge.engine.prefix_cache import Hit, PrefixCache
from forge.engine.sequence import Sequence


class PageCopy(NamedTuple):
    """A page that a sequence's first step needs a copy of."""

    sequence: Sequence
    kind: int
    source: int
    target: int


class PageLists:
    """Base of `Scheduler`. A sequence has a list of pages for each kind of layer state, all of them or none."""

    def __init__(self, pools: Items[PagePool], prefix_cache: PrefixCache | None) -> None:
        self.pools = tuple(pools)
        """One for each kind of layer state, in the order of `Sequence.pages`."""
        self.prefix_cache = prefix_cache
        self.copies: list[PageCopy] = []
        """To be made before the next step: sequences have begun from others' pages. Whoever makes them clears them."""

    def fits(self, count: int, length: int) -> bool:
        """Whether so many sequences of `length` ids can run together."""
        return all(count * pool.kind.num_pages(length) <= pool.num_pages for pool in self.pools)

    def can_start(self, sequence: Sequence) -> bool:
        """Whether there are pages for all ids of a sequence that has none."""
        return self._counts(sequence, self._find(sequence)) is not None

    def _start(self, sequence: Sequence) -> bool:
        """Pages for all ids of a sequence that waits. The first ones may be found."""
        hit = self._find(sequence)
        if not self._allocate(sequence, hit):
            return False
        if sequence.origin is not None:
            sequence.num_cached = hit.length if sequence.num_cached is None else sequence.num_cached
        elif self.prefix_cache:
            self.prefix_cache.count(sequence, hit)
        return True

    @property
    def _nothing(self) -> Hit:
        return Hit(0, [], [[] for _ in self.pools])

    def _find(self, sequence: Sequence, *, keeps_last: bool = False) -> Hit:
        """What is there of a sequence's ids: what it begins from, or what the prefix cache has.

        keeps_last: As of `_shared`.
        """
        if (origin := sequence.origin) is not None:
            length = min(origin.num_computed, len(sequence.ids) - 1)
            return self._shared(origin, length, keeps_last=keeps_last and length == origin.num_computed)
        return self.prefix_cache.find(sequence) if self.prefix_cache else self._nothing

    def _shared(self, origin: Sequence, length: int, *, keeps_last: bool = False) -> Hit:
        """The pages that a sequence shares which goes on behind the first `length` ids of another one.

        keeps_last: With those that the last of these ids reads, which may have to be computed again.
        """
        pages = []
        for pool, own in zip(self.pools, origin.pages, strict=True):
            released = pool.kind.num_released(length - keeps_last)
            pages.append([pool.spare_page] * released + own[released : pool.kind.num_shared(length)])
        return Hit(length, [], pages)

    def _counts(self, sequence: Sequence, hit: Hit) -> list[int] | None:
        """Pages behind those that were found, as many as a sequence holds at most until all its ids are computed.

        None where there are not so many.
        """
        counts, length = [], len(sequence.ids)
        for pool, pages in zip(self.pools, hit.pages, strict=True):
            held = pool.held(pages)
            num_released = len(pages) - len(held)
            most = min(pool.kind.num_entries(length), num_released + pool.kind.num_pages(length))
            counts.append(most - len(pages))
            if counts[-1] + sum(not pool.references(page) for page in held) > pool.num_free:
                return None
        return counts

    def _allocate(self, sequence: Sequence, hit: Hit) -> bool:
        """Pages for all ids of a sequence without any, those that were found included. False where there is no room.

        What it begins from and may not share is copied to the first pages of its own: `copies`.
        """
        counts = self._counts(sequence, hit)
        if counts is None:
            return False
        for kind, (pool, pages, count) in enumerate(zip(self.pools, hit.pages, counts, strict=True)):
            shared = len(pages)
            pool.share(pool.held(pages))
            pool.extend(pages, count)
            if sequence.origin is not None:
                places = range(shared, pool.kind.num_entries(hit.length))
                sources = sequence.origin.pages[kind]
                self.copies += [PageCopy(sequence, kind, sources[place], pages[place]) for place in places]
        sequence.pages, sequence.prefix, sequence.num_computed = hit.pages, hit.prefix, hit.length
        return True

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` ids. Where there are to be more, those that no later step reads are released first."""
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            if pool.kind.num_entries(length) > len(pages):
                break
        else:
            return True
        for pool, pages in zip(self.pools, sequence.pages, strict=True):
            pool.release_before(pages, sequence.num_computed)
        return self._extend(sequence, [pool.kind.num_entries(length) for pool in self.pools])

    def _extend(self, sequence: Sequence, num_entries: list[int]) -> bool:
        """Make the lists so long, all or none."""
        lists = list(zip(self.pools, sequence.pages, num_entries, strict=True))
        if any(count - len(pages) > pool.num_free for pool, pages, count in lists):
            return False
        for pool, pages, count in lists:
            if count > len(pages):
                pool.extend(pages, count - len(pages))
        return True

    def _drop_pages(self, sequence: Sequence, *, failed: bool = False) -> None:
        if self.prefix_cache:
            self.prefix_cache.leave(sequence, failed=failed)
        for pool, pages in zip(self.pools, sequence.pages, strict=False):  # a sequence that waits has no lists
            pool.release(pool.held(pages))
        self.copies = [copy for copy in self.copies if copy.sequence is not sequence]
        sequence.pages = []
        sequence.num_computed = 0
        sequence.row = None
