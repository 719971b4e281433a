"""How much memory layer state takes, and how many pages of each kind fit."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from forge.state.kind import Kind

_MAX_PAGES = 1 << 18
"""Pages have bookkeeping of their own; with pages of 64 these hold 16 million positions."""


def pages_of(kinds: Sequence[Kind], length: int) -> tuple[int, ...]:
    """Pages of each kind that one sequence of `length` tokens needs."""
    return tuple(kind.num_pages(length) for kind in kinds)


def bytes_of(kinds: Sequence[Kind], num_pages: Sequence[int]) -> int:
    """Bytes of so many pages of each kind and its spare page."""
    return sum((count + 1) * kind.page_bytes for kind, count in zip(kinds, num_pages, strict=True))


def longest_context(kinds: Sequence[Kind], wanted: int, page_size: int, room: int) -> int:
    """The most tokens of one sequence, in whole pages and up to the last page of `wanted`, that fit in `room` bytes."""
    counts = range(1, min(-(-wanted // page_size), _MAX_PAGES) + 1)
    return page_size * bisect_right(counts, room, key=lambda n: bytes_of(kinds, pages_of(kinds, n * page_size)))


def share_out(
    kinds: Sequence[Kind], context: int, room: int, max_sequences: int, shared_pages: int | None
) -> tuple[int, ...]:
    """Pages of each kind, for at least one sequence of `context` tokens, which fits in `room` bytes.

    Args:
        kinds: The kinds; the first one's state grows with the context, if any kind's does.
        context: Most tokens of a sequence.
        room: Bytes that may be taken, spare pages included.
        max_sequences: Most sequences that run together. Each has room for a whole context, as far as memory goes.
        shared_pages: None, or pages of the first kind that all sequences share, unless one needs more. The other kinds
            have room for as many whole contexts as these pages hold, and for more up to the bytes of these pages:
            where the first kind is small, short sequences still run together.
    """
    one = pages_of(kinds, context)
    wanted = [max_sequences * count for count in one]
    if shared_pages is not None:
        first = min(wanted[0], max(one[0], shared_pages))
        first_bytes = (first + 1) * kinds[0].page_bytes
        others = (
            min(most, first, max(-(-count * first // one[0]), first_bytes // kind.page_bytes - 1))
            for kind, count, most in zip(kinds[1:], one[1:], wanted[1:], strict=True)
        )
        wanted = [first, *others]
    if bytes_of(kinds, wanted) > room:
        left = room - bytes_of(kinds, [0] * len(kinds))
        sequence = bytes_of(kinds, one) - bytes_of(kinds, [0] * len(kinds))
        wanted = [min(most, count * left // sequence) for most, count in zip(wanted, one, strict=True)]
    return tuple(min(count, _MAX_PAGES) for count in wanted)
