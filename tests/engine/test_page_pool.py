"""Page numbers: handed out once, counted, and laid where sequences can grow."""

from __future__ import annotations

from collections import Counter
from itertools import groupby

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.engine.page_pool import PagePool
from forge.state.paged_kv import PagedKV

KIND = PagedKV((0,), 16, 1, 1, 4)


def test_a_page_is_handed_out_once_until_it_is_released() -> None:
    pool = PagePool(KIND, 5)
    pages = pool.allocate(5)
    assert sorted(pages) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0
    with pytest.raises(ValueError, match="1 pages are wanted and 0 are free"):
        pool.allocate(1)
    pool.release(pages[2:4])
    assert pool.num_free == 2
    assert sorted(pool.allocate(2)) == sorted(pages[2:4])


def test_more_than_there_is_takes_nothing() -> None:
    pool = PagePool(KIND, 3)
    with pytest.raises(ValueError, match="4 pages are wanted and 3 are free"):
        pool.allocate(4)
    assert pool.num_free == 3
    assert pool.allocate(0) == []


def test_a_shared_page_is_free_when_its_last_owner_releases_it() -> None:
    pool = PagePool(KIND, 2)
    [page] = pool.allocate(1)
    pool.share([page])
    assert pool.references(page) == 2
    pool.release([page])
    assert (pool.references(page), pool.num_free) == (1, 1)
    pool.release([page])
    assert (pool.references(page), pool.num_free) == (0, 2)


def test_a_free_page_cannot_be_shared_or_released() -> None:
    pool = PagePool(KIND, 2)
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.share([1])
    with pytest.raises(ValueError, match="page 1 is free"):
        pool.release([1])


def test_a_sequence_goes_on_behind_its_last_page() -> None:
    pool = PagePool(KIND, 64)
    first = pool.allocate(4)
    second = pool.allocate(4)
    for _ in range(8):  # both grow in turn and neither is cut
        first += pool.allocate(1, first[-1])
        second += pool.allocate(1, second[-1])
    for pages in (first, second):
        assert pages == list(range(pages[0], pages[0] + 12))


def test_it_jumps_where_the_next_page_is_taken() -> None:
    pool = PagePool(KIND, 4)
    assert pool.allocate(2) == [0, 1]
    pool.release([0])
    assert pool.allocate(3, after=1) == [2, 3, 0]


def test_the_last_page_has_no_page_behind_it() -> None:
    pool = PagePool(KIND, 2)
    assert pool.allocate(1) == [0]
    assert pool.allocate(1, after=0) == [1]
    pool.release([0])
    assert pool.allocate(1, after=1) == [0]


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(["allocate", "share", "release"]), st.integers(0, 12), st.integers(0, 30))),
)
def test_counts_equal_a_plain_model(num_pages: int, operations: list[tuple[str, int, int]]) -> None:
    pool = PagePool(KIND, num_pages)
    owned: Counter[int] = Counter()
    for name, count, index in operations:
        held = sorted(owned.elements())
        if name == "allocate":
            after = held[index % len(held)] if held and index % 2 else None
            if count > num_pages - len(owned):
                with pytest.raises(ValueError, match="are free"):
                    pool.allocate(count, after)
                continue
            pages = pool.allocate(count, after)
            assert not set(pages) & owned.keys()
            assert len(set(pages)) == len(pages) == count
            owned.update(pages)
        elif held:
            pages = list(dict.fromkeys(held[index % len(held) :][:count]))
            getattr(pool, name)(pages)
            owned.update(pages) if name == "share" else owned.subtract(pages)
            owned = +owned
        assert [pool.references(page) for page in range(num_pages)] == [owned[page] for page in range(num_pages)]
        assert pool.num_free == num_pages - len(owned)


@given(st.lists(st.booleans(), min_size=1, max_size=60), st.data())
def test_pages_lie_behind_the_last_one_or_from_the_middle_of_the_longest_free_run(
    taken: list[bool], data: st.DataObject
) -> None:
    pool = PagePool(KIND, len(taken))
    pool.release([page for page in pool.allocate(len(taken)) if not taken[page]])
    is_free = [not one for one in taken]
    after = data.draw(st.one_of(st.none(), st.integers(0, len(taken) - 1)))
    count = data.draw(st.integers(0, sum(is_free)))
    expected: list[int] = []
    last = after
    for _ in range(count):  # page by page
        if last is None or last + 1 == len(is_free) or not is_free[last + 1]:
            runs = [list(run) for free, run in groupby(range(len(is_free)), is_free.__getitem__) if free]
            longest = max(runs, key=len)
            last = longest[0] - 1 if longest[0] == 0 else longest[len(longest) // 2] - 1
        last += 1
        is_free[last] = False
        expected.append(last)
    assert pool.allocate(count, after) == expected
