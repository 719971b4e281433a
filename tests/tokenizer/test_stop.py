"""Stop strings in a stream: the same text however it is cut into pieces."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forge.tokenizer.stop import StopStrings


def one_shot(text: str, stops: list[str]) -> tuple[str, bool]:
    """By definition: read one character more until a stop string is at the end; the longest of those is cut off."""
    for end in range(len(text) + 1):
        matching = [stop for stop in stops if text[:end].endswith(stop)]
        if matching:
            return text[: end - max(map(len, matching))], True
    return text, False


def stream(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    strings = StopStrings(stops)
    shown = ""
    for piece in pieces:
        text, stopped = strings.push(piece)
        shown += text
        if stopped:
            assert "".join(pieces).startswith(shown + str(strings.found))
            return shown, True
    assert strings.found is None
    return shown + strings.flush(), False


def cut(text: str, borders: list[int]) -> list[str]:
    ends = sorted({min(border, len(text)) for border in borders} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(ends)]


LETTERS = st.text("ab\n", max_size=30)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4)


@given(LETTERS, st.lists(st.integers(0, 30)), STOPS)
@example("abcd", [3], ["abcd", "bc"])  # the shorter one, inside the longer, is complete first
@example("xabc", [], ["bc", "abc"])  # both end together: the longer one
@example("aab", [1, 2], ["ab"])  # a held beginning that proves false, with a true one inside
@example("abab", [2], ["abac", "b"])
def test_the_stream_equals_the_definition(text: str, borders: list[int], stops: list[str]) -> None:
    assert stream(cut(text, borders), stops) == one_shot(text, stops)


@given(st.text(max_size=20), st.lists(st.integers(0, 20)), st.lists(st.text(min_size=1, max_size=3), max_size=3))
def test_stop_strings_in_any_unicode_text_do_not_depend_on_its_cuts(
    text: str, borders: list[int], stops: list[str]
) -> None:
    assert stream(cut(text, borders), stops) == one_shot(text, stops)


@given(LETTERS, st.lists(st.integers(0, 30)), STOPS)
def test_only_a_possible_beginning_is_held_back(text: str, borders: list[int], stops: list[str]) -> None:
    strings = StopStrings(stops)
    read = shown = ""
    for piece in cut(text, borders):
        read += piece
        out, stopped = strings.push(piece)
        shown += out
        if stopped:
            return
        held = read[len(shown) :]
        assert read == shown + held
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_nothing_is_held_without_stop_strings() -> None:
    strings = StopStrings(())
    assert strings.push("anything") == ("anything", False)
    assert strings.flush() == ""


@pytest.mark.parametrize("piece", ["", "a"])
def test_flush_gives_what_was_held_once(piece: str) -> None:
    strings = StopStrings(["ab"])
    assert strings.push(piece) == ("", False)
    assert strings.flush() == piece
    assert strings.flush() == ""
