"""Pages of layer state as integers: who owns which, how often, and where the next one should lie."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 0 to num_pages - 1, each with a reference count; a shared page has several owners.

    Neighbouring pages are read as one run, so a sequence continues behind its last page where it can, and a new one
    starts in the middle of the longest free run, away from the growth of others.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
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

    def _start(self) -> int:
        """The middle of the longest free run, or its first page if nobody can grow into it."""
        best, length, start = 0, 0, 0
        for page in range(self.num_pages + 1):
            if page not in self._free:
                if page - start > length:
                    best, length = start, page - start
                start = page + 1
        return best if best == 0 else best + length // 2
