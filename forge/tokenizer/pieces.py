"""Long texts a piece at a time: where a text can be cut so that its parts are encoded as the whole would be."""

import re
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property

from tokenizers import pre_tokenizers

CHUNK_CHARS = 1 << 15
LONG_WORD = 1 << 12
_RUN = 1 << 12
_KEPT = 64

# A text can be cut between a letter or digit and one of these marks, if a rule does so in each of the samples: the word
# has ended, and no rule looks back over the mark.
_MARKS = ' \t\n\r.,;:!?()[]{}<>|+-*/=%&#@$^~"`\\。，、！？'
_BEFORE = ("ab", "aB", "Ab", "é", "中", "ナ", "я", "12", "1234", "a1")
_AFTER = ("cd", "Cd", "é", "文", "か", "34", "", " ", " d", "\n", "\nd", ",", ".d", "/d", "<|d")
# Runs whose characters all rules treat alike, and a sample: if that is one word, the middle of a run makes no border.
_RUNS = (("[a-z]", "lsvertmdabcxyz"), ("[A-Za-z]", "aBcXyZLsT"), ("[一-龥]", "一丁龥中文"))


class Splitter:
    """A split rule applied to texts of any length, in memory that does not grow with it.

    A part of a text that holds no place to cut at is split at once, without the middles of long runs of like letters,
    which are put back into the words.
    """

    def __init__(self, rule: pre_tokenizers.PreTokenizer) -> None:
        self._rule = rule

    @cached_property
    def _border(self) -> re.Pattern[str]:
        marks = [mark for mark in _MARKS if all(self._cuts(a, mark + b) for a in _BEFORE for b in _AFTER)]
        return re.compile(rf"(?<=[^\W_])(?=[{re.escape(''.join(marks))}])" if marks else "(?!)")

    @cached_property
    def _like_letters(self) -> re.Pattern[str]:
        runs = [letters for letters, sample in _RUNS if self._is_word(sample * 300)]
        return re.compile("|".join(f"{letters}{{{_RUN},}}" for letters in runs) or "(?!)")

    def words(self, text: str) -> Iterator[str]:
        """The words, their bytes spelled as characters."""
        for chunk in chunks(text, lambda: self._border):
            if len(chunk) > 2 * CHUNK_CHARS:
                yield from self._long_chunk(chunk)
            else:
                yield from (word for word, _ in self._rule.pre_tokenize_str(chunk))

    def _long_chunk(self, text: str) -> Iterator[str]:
        runs = [match.span() for match in self._like_letters.finditer(text)]
        if not runs:
            spans = (match.span() for match in re.finditer(rf"(\D)\1{{{_RUN},}}", text, re.DOTALL))
            runs = [(start, end) for start, end in spans if self._is_word(text[start] * 3001)]
        short, at = [], 0
        left_out: list[tuple[int, int, int]] = []  # place in the short text, and from where to where in the text
        size = 0
        for start, end in runs:
            short.append(text[at : start + _KEPT])
            size += start + _KEPT - at
            at = end - _KEPT
            left_out.append((size, start + _KEPT, at))
        short.append(text[at:])
        place, missing = 0, 0
        for word, (start, end) in self._rule.pre_tokenize_str("".join(short)):
            begin = start + missing
            while place < len(left_out) and left_out[place][0] < end:
                missing += left_out[place][2] - left_out[place][1]
                place += 1
            if end - start == end + missing - begin:
                yield word
            else:
                yield self._spelled(text[begin : end + missing])

    def _spelled(self, word: str) -> str:
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str
        parts = (word[i : i + CHUNK_CHARS] for i in range(0, len(word), CHUNK_CHARS))
        return "".join(spelled for part in parts for spelled, _ in spell(part))

    def _cuts(self, before: str, after: str) -> bool:
        return any(end == len(before) for _, (_, end) in self._rule.pre_tokenize_str(before + after))

    def _is_word(self, text: str) -> bool:
        return len(self._rule.pre_tokenize_str(text)) == 1


def chunks(text: str, border: Callable[[], re.Pattern[str]]) -> Iterator[str]:
    """A text in parts of some CHUNK_CHARS, cut at borders: empty matches. A part without one is longer."""
    start = 0
    while len(text) - start > 2 * CHUNK_CHARS and (match := border().search(text, start + CHUNK_CHARS)):
        yield text[start : match.start()]
        start = match.start()
    yield text[start:]


def merge_long(word: str, merge: Callable[[str], list[str]]) -> Iterator[str]:
    """The pieces of a long word, merged a window at a time: those that `merge` would find in all of it.

    `merge` joins the neighbours that go first, whatever the rank, leftmost first of equals, until none can be joined.
    Pieces are the word's if and only if `merge` leaves each two neighbours apart: as long as no border is crossed, what
    happens on both sides is what would happen without the rest. So a window's pieces hold, and where two windows meet,
    their neighbours are tried.
    """
    sizes = array("I")
    start, window = 0, LONG_WORD
    while True:
        pieces = merge(word[start : start + window])
        back = 1
        while sizes and (last := word[start - sizes[-1] : start]) and merge(last + pieces[0]) != [last, pieces[0]]:
            start -= sum(sizes[-back:])
            del sizes[-back:]
            back, window = 2 * back, 2 * window  # or the same pieces would come again
            pieces = merge(word[start : start + window])
        if start + window >= len(word):
            sizes.extend(map(len, pieces))
            break
        kept = 0
        for size in map(len, pieces[:-1]):
            if kept + size > window * 3 // 4:
                break
            sizes.append(size)
            kept += size
        start += kept
        if not kept:
            window *= 2
    start = 0
    for size in sizes:
        yield word[start : start + size]
        start += size
