"""Cut a text at the tokens that are matched literally, before the tokenizer proper sees it."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

_BLANKS = " \t\n\v\f\r"
_BLANK_RUN = re.compile(f"[{_BLANKS}]*")
_FREE, _START, _INSIDE, _BLANK = range(4)  # what a character is: text, the first or another of a token, swallowed
_RUNS = re.compile(rb"\x00+|\x01\x02*|\x03+")
_FEW = 64  # in a group; more are told apart by where the text has what they begin with


class Partition:
    """Literal tokens, and how they divide a text.

    `literals` maps a token's text to its id. Tokens in `strip_left` or `strip_right` swallow the ASCII blanks beside
    them. Longer tokens (in UTF-8 bytes) go first. Each takes all its occurrences, from left to right, out of the text
    that earlier tokens left. This is llama.cpp's rule. It differs from the longest match at each place if tokens
    overlap.
    """

    def __init__(
        self, literals: dict[str, int], strip_left: Iterable[str] = (), strip_right: Iterable[str] = ()
    ) -> None:
        self._literals = literals
        self._strip_left = frozenset(strip_left)
        self._strip_right = frozenset(strip_right)
        # A vocabulary may have thousands of literals (gemma: 6,242 <unused...>), most of them in no text. A token is
        # searched only if the text holds the beginning of its group.
        groups = defaultdict[str, list[str]](list)
        for token in literals:
            groups[token[:4]].append(token)
        self._groups = dict(groups)

    def __call__(self, text: str) -> Iterator[str | int]:
        """Fragments in order: a text to encode (never empty), or the id of a literal.

        It takes one byte of memory per character beside the current fragment, and none without literals.
        """
        found = [token for start, group in self._groups.items() if start in text for token in _present(group, text)]
        if not found:
            yield from [text] if text else []
            return
        kinds = bytearray(len(text))
        for token in sorted(found, key=lambda token: -len(token.encode())):
            self._take(text, kinds, token)
        for run in _RUNS.finditer(kinds):
            start, end = run.span()
            if kinds[start] != _BLANK:
                fragment = text[start:end]
                yield fragment if kinds[start] == _FREE else self._literals[fragment]

    def _take(self, text: str, kinds: bytearray, token: str) -> None:
        """Mark the occurrences of a token in text that is not taken yet."""
        size = len(token)
        mark = bytes([_START]) + bytes([_INSIDE]) * (size - 1)
        place = kinds.find(_FREE)
        while place >= 0 and (match := text.find(token, place)) >= 0:
            taken = kinds[match : match + size].rstrip(b"\0")
            if taken:
                place = kinds.find(_FREE, match + len(taken))
                continue
            start, place = match, match + size
            kinds[match:place] = mark
            if token in self._strip_left:
                while start and kinds[start - 1] == _FREE and text[start - 1] in _BLANKS:
                    start -= 1
                    kinds[start] = _BLANK
            if token in self._strip_right:
                end = _BLANK_RUN.match(text, place).end()  # type: ignore[union-attr]  # it matches anywhere
                free = len(kinds[place:end]) - len(kinds[place:end].lstrip(b"\0"))
                kinds[place : place + free] = bytes([_BLANK]) * free
            place = kinds.find(_FREE, place)


def _present(tokens: list[str], text: str) -> Iterable[str]:
    """The tokens that the text holds, of a group that begins alike."""
    if len(tokens) <= _FEW:
        return [token for token in tokens if token in text]
    head, known = tokens[0][:4], frozenset(tokens)
    sizes = sorted({len(token) for token in tokens})
    found = set[str]()
    place = text.find(head)
    while place >= 0 and len(found) < len(known):
        found.update(known.intersection(text[place : place + size] for size in sizes))
        place = text.find(head, place + 1)
    return sorted(found)
