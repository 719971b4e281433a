"""The pages of one kind of layer state: who owns which, how often, and where the next one should lie. Integers only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable

from forge.state.kind import Kind


class PagePool:
    """Hands out page numbers 0 to num_pages - 1, each with a reference count; a shared page has several owners.

    Neighbouring pages are read as one run, so a sequence continues behind its last page where it can, and a new one
    starts in the middle of the longest free run, away from the growth of others. A sequence's list of pages is changed
    in place. A page whose content can be found counts as free when it has no owner, and is handed out when no other is
    left: the least recently used first.
    """

    def __init__(self, kind: Kind, num_pages: int) -> None:
        self.kind, self.num_pages = kind, num_pages
        self.spare_page = num_pages
        """Stands in a list where a page was released."""
        self.on_reuse: Callable[[int], None] = lambda page: None
        """Told of a page that can be found, before it is handed out for something else."""
        self._is_free = bytearray(b"\1" * num_pages)
        """1 for each page without an owner that holds nothing of use. Runs of it are found at once."""
        self._num_free = num_pages
        self._findable: set[int] = set()
        self._unowned: OrderedDict[int, None] = OrderedDict()
        """Findable pages without an owner, the least recently used first."""
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        """Pages that can be handed out."""
        return self._num_free + len(self._unowned)

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages with one reference each, behind page `after` where possible."""
        if count > self.num_free:
            raise ValueError(f"{count} pages are wanted and {self.num_free} are free")
        for _ in range(count - self._num_free):
            reused = next(iter(self._unowned))
            self.on_reuse(reused)
            self.forget(reused)
        pages: list[int] = []
        start, longest = -1 if after is None else after + 1, self.num_pages
        while len(pages) < count:
            if not 0 <= start < self.num_pages or not self._is_free[start]:
                start, longest = self._start(longest)
            stop = min(self._end_of_run(start), start + count - len(pages))
            self._is_free[start:stop] = bytes(stop - start)
            self._references[start:stop] = [1] * (stop - start)
            pages += range(start, stop)
            start = stop
        self._num_free -= count
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of these pages, which have owners or can be found."""
        for page in pages:
            if not self._references[page] and page not in self._unowned:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._unowned.pop(page, None)
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each of these pages; a page without any is free.

        Of those that can be found the last ones are handed out first: they are of no use without those before them.
        """
        for page in reversed(list(pages)):
            if not self._references[page]:
                raise ValueError(f"page {page} is free already")
            self._references[page] -= 1
            if not self._references[page]:
                if page in self._findable:
                    self._unowned[page] = None
                else:
                    self._free(page)

    def keep(self, page: int) -> None:
        """A page with an owner can be found: it is handed out again only if no other is left."""
        self._findable.add(page)

    def forget(self, page: int) -> None:
        """A page cannot be found any more."""
        self._findable.discard(page)
        if page in self._unowned:
            del self._unowned[page]
            self._free(page)

    def is_findable(self, page: int) -> bool:
        return page in self._findable

    def held(self, pages: list[int]) -> list[int]:
        """The pages of a list that are not released."""
        return [page for page in pages if page != self.spare_page]

    def release_before(self, pages: list[int], position: int) -> None:
        """Release the pages that no token from `position` on needs."""
        stop = first = min(self.kind.num_released(position), len(pages))
        while first and pages[first - 1] != self.spare_page:
            first -= 1
        self.release(pages[first:stop])
        pages[first:stop] = [self.spare_page] * (stop - first)

    def extend(self, pages: list[int], count: int) -> None:
        """`count` more entries, which are free: the caller has looked."""
        pages += self.allocate(count, pages[-1] if pages else None)

    def num_copied(self, length: int) -> int:
        """Pages that a fork behind `length` tokens copies."""
        return self.kind.num_entries(length) - self.kind.num_shared(length)

    def fork(self, pages: list[int], length: int) -> tuple[list[int], list[tuple[int, int]]]:
        """A list for another sequence with the same `length` tokens, and pairs (source, target) of pages to copy.

        The targets are free: the caller has looked.
        """
        shared = self.kind.num_shared(length)
        sources = pages[shared : self.kind.num_entries(length)]
        targets = self.allocate(len(sources))
        self.share(self.held(pages[:shared]))
        return pages[:shared] + targets, list(zip(sources, targets, strict=True))

    def _free(self, page: int) -> None:
        self._is_free[page] = 1
        self._num_free += 1

    def _start(self, most: int) -> tuple[int, int]:
        """The middle of the longest free run, or its first page if nobody can grow into it; and the run's length.

        most: No run is longer. The search ends at the first one that is as long.
        """
        first = end = length = 0
        while length < most and (found := self._is_free.find(b"\1" * (length + 1), end)) >= 0:
            end = self._end_of_run(found)
            first, length = found, end - found
        return first if first == 0 else first + length // 2, length

    def _end_of_run(self, page: int) -> int:
        """Behind the free pages from `page` on."""
        end = self._is_free.find(b"\0", page)
        return self.num_pages if end < 0 else end
