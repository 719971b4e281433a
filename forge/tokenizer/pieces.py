"""Long texts in parts: places at which a text can be cut without changing its encoding."""

import re
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from functools import cached_property

from tokenizers import pre_tokenizers

CHUNK_CHARS = 1 << 15
LONG_WORD = 1 << 12
WINDOW_CHARS = 1 << 14
_RUN = 1 << 12
_KEPT = 64
_Word = tuple[str, int, int]  # and where in the text it begins and ends

# A text can be cut between a letter or digit and one of these marks, if a rule does so in each of the samples: the word
# has ended, and no rule looks back over the mark.
_MARKS = ' \t\n\r.,;:!?()[]{}<>|+-*/=%&#@$^~"`\\。，、！？'
_BEFORE = ("ab", "aB", "Ab", "é", "中", "ナ", "я", "12", "1234", "a1")
_AFTER = ("cd", "Cd", "é", "文", "か", "34", "", " ", " d", "\n", "\nd", ",", ".d", "/d", "<|d")
_RUNS = "[a-z]", "[A-Za-z]", "[0-9]", r"[^\W\d_A-Za-z]", r"[^\w\s]", "_", r"\s"  # of letters, digits, marks, blanks
_LONG_RUN = re.compile("|".join(f"{characters}{{{_RUN},}}" for characters in _RUNS))
_LINE_ENDS = frozenset("\r\n")


class Splitter:
    """A split rule for texts of any length, in memory that does not grow with the text.

    A part without a place to cut is split a window at a time. The middles of long runs of similar characters are left
    out and put back into the words.
    """

    def __init__(self, rule: pre_tokenizers.PreTokenizer) -> None:
        self._rule = rule

    @cached_property
    def _border(self) -> re.Pattern[str]:
        marks = [mark for mark in _MARKS if all(self._cuts(a, mark + b) for a in _BEFORE for b in _AFTER)]
        return re.compile(rf"(?<=[^\W_])(?=[{re.escape(''.join(marks))}])" if marks else "(?!)")

    def words(self, text: str) -> Iterator[str]:
        """Words of a text, with their bytes spelled as characters."""
        for chunk in chunks(text, lambda: self._border):
            if len(chunk) > 2 * CHUNK_CHARS:
                yield from self._long_chunk(chunk)
            else:
                yield from (word for word, _ in self._rule.pre_tokenize_str(chunk))

    def _long_chunk(self, text: str) -> Iterator[str]:
        short, at = [], 0
        left_out: list[tuple[int, int, int]] = []  # place in the short text, and from where to where in the text
        size = 0
        for start, end in self._runs(text):
            short.append(text[at : start + _KEPT])
            size += start + _KEPT - at
            at = end - _KEPT
            left_out.append((size, start + _KEPT, at))
        short.append(text[at:])
        place, missing = 0, 0
        for word, start, end in self._windows("".join(short)):
            begin = start + missing
            while place < len(left_out) and left_out[place][0] < end:
                missing += left_out[place][2] - left_out[place][1]
                place += 1
            if end - start == end + missing - begin:
                yield word
            else:
                yield self._spelled(text[begin : end + missing])

    def _runs(self, text: str) -> Iterator[tuple[int, int]]:
        """Begin and end of long runs of characters that the rule treats alike. The middle of a run has no border."""
        for run in _LONG_RUN.finditer(text):
            first, *others = characters = sorted(set(run[0]))
            sample = first + "".join(first + other for other in others)
            sample *= 1 + 3001 // len(sample)
            # Rules look for line ends within blanks: for the last one, and for line ends right behind marks.
            if line_ends := _LINE_ENDS.intersection(characters):
                is_mixed = len(line_ends) < len(characters)
                if is_mixed and (line_ends.issuperset(run[0][:_KEPT]) or line_ends.isdisjoint(run[0][-_KEPT:])):
                    continue
                sample += min(line_ends)
            if self._is_word(sample):
                yield run.span()

    def _windows(self, text: str) -> Iterator[_Word]:
        """Words of a text and their places.

        Windows overlap. A word is right if both windows have it and the words behind it, up to blanks that the end of
        the window cannot influence: a rule may look ahead over blanks. Otherwise the window is doubled.
        """
        start, size = 0, WINDOW_CHARS
        words = self._window(text, start, size)
        while start + size < len(text):
            half, most = start + size // 2, start + len(text[start : start + size * 3 // 4].rstrip())
            kept = bisect_right(words, min(half, most), key=lambda word: word[2])
            at = words[kept - 1][2] if kept else start
            # Some rules count digits from the end of a number, so windows must end where this count would differ.
            following = WINDOW_CHARS + (start + size + 1 - at - WINDOW_CHARS) % 3
            after = self._window(text, at, following)
            most = min(most, at + following * 3 // 4)
            seen = words[kept : bisect_right(words, most, key=lambda word: word[2])]
            if kept and seen and seen == after[: bisect_right(after, most, key=lambda word: word[2])]:
                yield from words[:kept]
                start, size, words = at, following, after
            else:
                size *= 2
                words = self._window(text, start, size)
        yield from words

    def _window(self, text: str, start: int, size: int) -> list[_Word]:
        found = self._rule.pre_tokenize_str(text[start : start + size])
        return [(word, start + begin, start + end) for word, (begin, end) in found]

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
    """Pieces of a long word, merged a window at a time. They equal the pieces of `merge` on the whole word.

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
