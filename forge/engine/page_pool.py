"""The pages of one kind of layer state, and the rules by which sequences hold them. Integers only."""

from __future__ import annotations

from forge.engine.page_allocator import PageAllocator
from forge.state.kind import Kind


class PagePool(PageAllocator):
    """Hands out the pages of a kind. A sequence's list of them is changed in place."""

    def __init__(self, kind: Kind, num_pages: int) -> None:
        super().__init__(num_pages)
        self.kind = kind
        self.spare_page = num_pages
        """Stands in a list where a page was released."""
        self.num_reserved = 0
        """Pages that passes over all positions may hold at one time: no request counts on them."""

    def held(self, pages: list[int]) -> list[int]:
        """The pages of a list that are not released."""
        return pages[self.num_released(pages) :]

    def num_released(self, pages: list[int]) -> int:
        """Leading entries of a list whose pages were released."""
        return next((index for index, page in enumerate(pages) if page != self.spare_page), len(pages))

    def release_before(self, pages: list[int], position: int) -> None:
        """Release the pages that no token from `position` on needs."""
        stop = first = min(self.kind.num_released(position), len(pages))
        while first and pages[first - 1] != self.spare_page:
            first -= 1
        self.release(pages[first:stop])
        pages[first:stop] = [self.spare_page] * (stop - first)

    def extend(self, pages: list[int], count: int) -> None:
        """`count` more entries, which are free: the caller has looked."""
        found = self.allocate(count, pages[-1] if pages else None)
        assert found is not None
        pages += found

    def fork(self, pages: list[int], length: int) -> tuple[list[int], list[tuple[int, int]]] | None:
        """A list for another sequence with the same `length` tokens, and pairs (source, target) of pages to copy.

        None, and nothing changes, where there is no room for the copies.
        """
        shared = self.kind.num_shared(length)
        sources = pages[shared : self.kind.num_entries(length)]
        targets = self.allocate(len(sources))
        if targets is None:
            return None
        self.share(self.held(pages[:shared]))
        return pages[:shared] + targets, list(zip(sources, targets, strict=True))
