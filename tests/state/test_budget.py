"""How many pages of each kind a load takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from forge.state import budget
from forge.state.paged_kv import PagedKV
from forge.state.window_kv import WindowKV

P = 64


def plain(layers: int = 3) -> PagedKV:
    return PagedKV(tuple(range(layers)), P, 1, 256, 4)


def window(layers: int = 15, positions: int = 512) -> WindowKV:
    return WindowKV(tuple(range(layers)), P, 1, 256, 4, positions, 512)


@given(st.integers(1, 40_000), st.integers(1, 64), st.integers(0, 3000), st.booleans())
def test_one_kind_gets_what_fits_of_what_is_wanted(context: int, sequences: int, room: int, shared: bool) -> None:
    """`room` pages of memory, one of which is spare."""
    kind, one = plain(), -(-context // P)
    longest = budget.longest_context([kind], context, P, room * kind.page_bytes)
    assert longest == P * max(min(one, room - 1), 0)
    if longest < context:
        return
    wanted = min(sequences * one, max(one, 512)) if shared else sequences * one
    found = budget.share_out([kind], context, room * kind.page_bytes, sequences, 512 if shared else None)
    assert found == (min(wanted, room - 1),)


@given(
    st.integers(1, 40_000),
    st.integers(1, 64),
    st.integers(1, 20),
    st.integers(1, 20),
    st.integers(1, 5000),
    st.integers(0, 1 << 31),
    st.booleans(),
)
def test_pages_fit_in_the_room_and_hold_a_whole_context(
    context: int, sequences: int, plain_layers: int, window_layers: int, positions: int, room: int, shared: bool
) -> None:
    kinds = [plain(plain_layers), window(window_layers, positions)]
    longest = budget.longest_context(kinds, context, P, room)
    assert longest == 0 or budget.bytes_of(kinds, budget.pages_of(kinds, longest)) <= room
    if longest < context:
        assert budget.bytes_of(kinds, budget.pages_of(kinds, longest + P)) > room
        return
    found = budget.share_out(kinds, context, room, sequences, 512 if shared else None)
    assert budget.bytes_of(kinds, found) <= room
    one = budget.pages_of(kinds, context)
    assert all(count >= least for count, least in zip(found, one, strict=True))
    assert all(count <= sequences * least for count, least in zip(found, one, strict=True))


def test_a_third_is_enough_where_five_of_six_layers_have_a_window() -> None:
    """A context of 32,768 with the default for the number of sequences, and with one sequence."""
    kinds, before = [plain(3), window(15)], budget.bytes_of([plain(18)], [512])
    for sequences, shared in ((64, 512), (1, None)):
        found = budget.share_out(kinds, 32_768, 1 << 40, sequences, shared)
        assert found[0] == 512
        assert 3 * budget.bytes_of(kinds, found) <= before


def test_a_default_load_runs_as_many_whole_contexts_as_before() -> None:
    kinds = [plain(3), window(15)]
    for context, sequences in ((256, 64), (1024, 32), (2048, 16), (4096, 8), (8192, 4), (32_768, 1)):
        found = budget.share_out(kinds, context, 1 << 40, 64, 512)
        one = budget.pages_of(kinds, context)
        assert min(count // of_one for count, of_one in zip(found, one, strict=True)) == sequences


def test_a_default_load_keeps_the_pages_of_windows_that_take_as_much_as_other_layers() -> None:
    """Gemma 2 has as many layers with a window as without: short sequences still run together."""
    found = budget.share_out([plain(13), window(13, 4096)], 8192, 1 << 40, 64, 512)
    assert found == (512, 512)


def test_each_of_so_many_sequences_has_a_whole_context() -> None:
    kinds = [plain(3), window(15)]
    assert budget.share_out(kinds, 32_768, 1 << 40, 8, None) == (8 * 512, 8 * 17)
