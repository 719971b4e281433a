"""Cutting a text at the tokens that are matched literally, before anything else looks at it."""

import re
from collections import defaultdict
from collections.abc import Iterable

_BLANKS = " \t\n\v\f\r"
_BLANK_RUN = re.compile(f"[{_BLANKS}]*")


class Partition:
    """Literal tokens, and how they divide a text.

    `literals` maps a token's text to its id. Tokens in `strip_left` or `strip_right` swallow the ASCII blanks beside
    them. Longer tokens (in UTF-8 bytes) go first: each takes all its occurrences, from left to right, out of the text
    that the ones before it left. That is llama.cpp's rule, and differs from "longest match at each place" where
    tokens overlap.
    """

    def __init__(
        self, literals: dict[str, int], strip_left: Iterable[str] = (), strip_right: Iterable[str] = ()
    ) -> None:
        self._literals = literals
        self._strip_left = frozenset(strip_left)
        self._strip_right = frozenset(strip_right)
        # A vocabulary may have thousands of literals (gemma: 6,242 <unused...>), most in no text: tokens are looked for
        # only if the text holds what their group begins with.
        groups = defaultdict[str, list[str]](list)
        for token in literals:
            groups[token[:4]].append(token)
        self._groups = dict(groups)

    def __call__(self, text: str) -> list[str | int]:
        """Fragments in order: text still to be encoded (never empty), or the id of a literal."""
        found = [token for start, group in self._groups.items() if start in text for token in group if token in text]
        fragments: list[str | int] = [text] if text else []
        for token in sorted(found, key=lambda token: -len(token.encode())):
            fragments = [piece for fragment in fragments for piece in self._cut(fragment, token)]
        return fragments

    def _cut(self, fragment: str | int, token: str) -> list[str | int]:
        if isinstance(fragment, int):
            return [fragment]
        pieces: list[str | int] = []
        start = 0
        while (match := fragment.find(token, start)) >= 0:
            before = fragment[start:match]
            pieces += [before.rstrip(_BLANKS) if token in self._strip_left else before, self._literals[token]]
            start = match + len(token)
            if token in self._strip_right:
                start = _BLANK_RUN.match(fragment, start).end()  # type: ignore[union-attr]  # it matches anywhere
        return [piece for piece in (*pieces, fragment[start:]) if piece != ""]
