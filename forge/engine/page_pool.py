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
