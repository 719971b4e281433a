"""The pages of one kind of layer state: who owns which, how often, and where the next one should lie. Integers only."""

from __future__ import annotations

from collections.abc import Iterable

from forge.state.kind import Kind


class PagePool:
    """Hands out page numbers 0 to num_pages - 1, each with a reference count; a shared page has several owners.

    Neighbouring pages are read as one run, so a sequence continues behind its last page where it can, and a new one
    starts in the middle of the longest free run, away from the growth of others. A sequence's list of pages is changed
    in place.
    """

    def __init__(self, kind: Kind, num_pages: int) -> None:
        self.kind, self.num_pages = kind, num_pages
        self.spare_page = num_pages
        """Stands in a list where a page was released."""
        self.num_reserved = 0
        """Pages that passes over all positions may hold at one time: no request counts on them."""
        self._free = set(range(num_pages))
        self._references = [0] * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def references(self, page: int) -> int:
        return self._references[page]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """`count` pages with one reference each, behind page `after` where possible."""
        if count > len(self._free):
            raise ValueError(f"{count} pages are wanted and {len(self._free)} are free")
        pages: list[int] = []
        while len(pages) < count:
            following = None if after is None else after + 1
            after = following if following in self._free else self._start()
            self._free.remove(after)
            self._references[after] = 1
            pages.append(after)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each of these pages."""
        for page in pages:
            if not self._references[page]:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One reference less to each of these pages; a page without any is free."""
        for page in pages:
            if not self._references[page]:
                raise ValueError(f"page {page} is free already")
            self._references[page] -= 1
            if not self._references[page]:
                self._free.add(page)

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

    def _start(self) -> int:
        """The middle of the longest free run, or its first page if nobody can grow into it."""
        best, length, start = 0, 0, 0
        for page in range(self.num_pages + 1):
            if page not in self._free:
                if page - start > length:
                    best, length = start, page - start
                start = page + 1
        return best if best == 0 else best + length // 2
