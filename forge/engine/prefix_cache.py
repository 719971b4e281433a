"""Which full pages hold which ids, so that a sequence that begins like an earlier one does not compute them again."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial

from forge.engine.page_pool import PagePool
from forge.engine.sequence import CachedPage, Sequence
from forge.state.kind import Kind


@dataclass(frozen=True, slots=True)
class Hit:
    """Leading ids of a sequence whose state is there."""

    length: int
    prefix: list[CachedPage]
    pages: list[list[int]]
    """Page lists of a sequence with so many ids, by kind. They have no reference of their own yet."""


def can_share(kinds: Items[Kind], page_size: int) -> bool:
    """Whether full pages of every kind stay as they are. Those of a recurrence do not."""
    return all(kind.num_shared(page_size) == kind.num_entries(page_size) for kind in kinds)


class PrefixCache:
    """A tree of full pages: each is found by its ids behind those before it.

    A page is looked up by the hash of its ids, and Python's dict compares the ids themselves. An engine has one model,
    one precision and one KV cache, so these are no part of the key. The adapter is: behind the first page that names
    it, an adapter's pages are a tree of their own. A page is entered when an id was drawn behind it
    from finite logits; those of a sequence that ends with an error are forgotten, whoever wrote them. Pages without an
    owner stay until the pool needs them, the least recently used first. Source: automatic prefix caching of vLLM.

    A window's pages may be gone while later ones are there. So a hit of some length asks of each kind for the pages
    alone that the tokens behind it read. A sequence with hooks finds nothing, because they are to see all its
    positions, and its pages are not found, because they may have changed what these hold. So may those have that a
    sequence starts from.
    """

    def __init__(self, pools: Items[PagePool], page_size: int) -> None:
        self.page_size = page_size
        self.asked_tokens = 0
        """Prompt tokens of the sequences that have started."""
        self.hit_tokens = 0
        """Those of them that were found."""
        self.num_evictions = 0
        """Pages that could be found and were used for something else."""
        self._pools = tuple(pools)
        self._root = CachedPage(b"", [])
        self._of_page: list[dict[int, CachedPage]] = [{} for _ in pools]
        """By kind: what a page is part of."""
        for kind, pool in enumerate(pools):
            pool.on_reuse = partial(self._reused, kind)

    def find(self, sequence: Sequence) -> Hit:
        """The longest prefix of a sequence's ids that is there. At least one id is left to compute, for its logits."""
        most = (len(sequence.ids) - 1) // self.page_size if sequence.is_cached else 0
        found: list[CachedPage] = []
        in_a_row = [0] * len(self._pools)  # pages of each kind without a gap up to here
        best = 0
        for node in self._walk(sequence, most):
            found.append(node)
            in_a_row = [0 if page is None else count + 1 for page, count in zip(node.pages, in_a_row, strict=True)]
            needed = (len(found) - released for released in self._num_released(len(found)))
            if all(count >= least for count, least in zip(in_a_row, needed, strict=True)):
                best = len(found)
        prefix = found[:best]
        pages: list[list[int]] = []
        for kind, (pool, released) in enumerate(zip(self._pools, self._num_released(best), strict=True)):
            held = [page for node in prefix[released:] if (page := node.pages[kind]) is not None]
            pages.append([pool.spare_page] * released + held)
        return Hit(best * self.page_size, prefix, pages)

    def count(self, sequence: Sequence, hit: Hit) -> None:
        """Count what a sequence has found that starts for the first time."""
        if sequence.num_cached is None:
            sequence.num_cached = hit.length
            self.asked_tokens += sequence.num_prompt
            self.hit_tokens += hit.length

    def hold(self, sequence: Sequence, length: int) -> None:
        """The first `length` ids are computed: their full pages, released ones too, stay until it is known of them
        whether they may be found."""
        prefix, count = sequence.prefix, length // self.page_size
        if not sequence.pages or len(prefix) >= count or not sequence.is_cached:
            return
        for index, key in enumerate(self._keys(sequence, count)[len(prefix) : count], len(prefix)):
            node = CachedPage(key, [None] * len(self._pools))
            for kind, (pool, pages) in enumerate(zip(self._pools, sequence.pages, strict=True)):
                page = pages[index]
                if page != pool.spare_page and page not in self._of_page[kind]:  # a fork's is its parent's
                    self._set(node, kind, page)
                    pool.keep(page)
            prefix.append(node)

    def enter(self, sequence: Sequence, length: int) -> None:
        """An id was drawn from finite logits behind the first `length` ids: their full pages can be found from here
        on."""
        prefix = sequence.prefix
        if len(prefix) >= length // self.page_size and (not prefix or prefix[-1].parent is not None):
            return
        self.hold(sequence, length)
        start = len(prefix)
        while start and prefix[start - 1].parent is None:
            start -= 1
        for index in range(start, len(prefix)):
            parent, node = prefix[index - 1] if index else self._root, prefix[index]
            known = parent.children.setdefault(node.key, node)
            if known is node:
                node.parent = parent
                continue
            prefix[index] = known
            for kind, page in enumerate(node.pages):
                if page is not None and known.pages[kind] is None:
                    node.pages[kind] = None
                    self._set(known, kind, page)
            self._forget(node)

    def leave(self, sequence: Sequence, *, failed: bool = False) -> None:
        """A sequence gives its pages up. What it held alone cannot be found, and if it failed nothing of its ids: what
        it was given may have been wrong."""
        if not sequence.is_cached:
            return
        for node in reversed(sequence.prefix):
            if node.parent is not None:
                self._prune(node)
                break
            self._forget(node)
        if failed:
            for node in reversed(list(self._walk(sequence, len(sequence.ids) // self.page_size))):
                self._forget(node)
                self._prune(node)
        sequence.prefix = []

    def clear(self) -> None:
        """Nothing can be found any more. No sequence may have pages."""
        for pool, pages in zip(self._pools, self._of_page, strict=True):
            for page in pages:
                pool.forget(page)
            pages.clear()
        self._root = CachedPage(b"", [])

    def _walk(self, sequence: Sequence, most: int) -> Iterator[CachedPage]:
        """What the tree has of a sequence's first pages, with pages or without."""
        node = self._root
        for key in self._keys(sequence, most):
            if (child := node.children.get(key)) is None:
                return
            yield (node := child)

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of the first `count` pages, or more. Bytes, because their hash differs from process to process."""
        keys, size = sequence.page_keys, self.page_size
        for start in range(len(keys) * size, count * size, size):
            own = [sequence.adapter] if not start and sequence.adapter >= 0 else []  # one number longer: no other key
            keys.append(array("i", [*own, *sequence.ids[start : start + size]]).tobytes())
        return keys if len(keys) == count else keys[:count]

    def _num_released(self, count: int) -> list[int]:
        """Leading pages of each kind that no token behind the first `count` pages reads."""
        return [pool.kind.num_released(count * self.page_size) for pool in self._pools]

    def _set(self, node: CachedPage, kind: int, page: int) -> None:
        node.pages[kind] = page
        self._of_page[kind][page] = node

    def _forget(self, node: CachedPage) -> None:
        for kind, page in enumerate(node.pages):
            if page is not None:
                node.pages[kind] = None
                del self._of_page[kind][page]
                self._pools[kind].forget(page)

    def _reused(self, kind: int, page: int) -> None:
        """The pool gives a page to somebody else."""
        node = self._of_page[kind].pop(page)
        node.pages[kind] = None
        self.num_evictions += 1
        self._prune(node)

    def _prune(self, node: CachedPage) -> None:
        """Take out of the tree what leads to no page. A sequence may still have it in its prefix."""
        while node.parent is not None and not node.children and all(page is None for page in node.pages):
            parent, node.parent = node.parent, None
            del parent.children[node.key]
            node = parent
