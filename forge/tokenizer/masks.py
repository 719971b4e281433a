"""Keeping what users wrote apart from control tokens: their texts are masked before a template sees them.

A masked text has another character, one that occurs nowhere else, in the place of one character of each token name
that it spells. Lengths, blanks at the ends and everything around the names stay, so that templates trim, cut and split
as before; the name is no token any more, and after the prompt was cut at its tokens the mask is taken off.
"""

import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from forge.errors import ChatTemplateError, ParameterError
from forge.tokenizer.messages import Message

_PRIVATE = ((0xE000, 0xF900), (0xF0000, 0xFFFFE), (0x100000, 0x10FFFE))
_LONGEST_EDGE = 256
THOUGHT_TAG = re.compile("</?think(?:ing)?>|\\[/?THINK\\]")
_ROLE = re.compile(r"[\w.-]+")


class Literals:
    """Names of tokens, looked for in texts."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = sorted(name for name in set(names) if name.strip())
        self._groups = defaultdict[str, list[str]](list)
        for name in self._names:
            self._groups[name[:4]].append(name)
        self._backwards = sorted(name[::-1] for name in self._names)
        self._longest = min(max(map(len, self._names), default=0), _LONGEST_EDGE)

    def without_thoughts(self) -> "Literals":
        """Without the tags around thoughts, which templates look for in what the assistant said."""
        return Literals(name for name in self._names if not THOUGHT_TAG.fullmatch(name))

    def places(self, text: str) -> set[int]:
        """One character of each name in the text, and of what may be half a name, joined with what stands beside it."""
        found = set[int]()
        for start, group in self._groups.items():
            if start in text:
                for name in group:
                    place = -1
                    while (place := text.find(name, place + 1)) >= 0:
                        found.add(place + _pivot(name))
        # A name may come about where two texts meet: then it holds the characters at their ends, blanks trimmed or not.
        for inner in {text, text.strip()} - {""}:
            offset = text.find(inner)
            if _is_edge(inner[: self._longest][::-1], self._backwards):
                found.add(offset)
            if _is_edge(inner[-self._longest :], self._names):
                found.add(offset + len(inner) - 1)
        return {place for place in found if text[place].strip()}


class _Mask:
    """Characters to stand for others, chosen as they are needed."""

    def __init__(self, spare: Iterator[str]) -> None:
        self._spare = spare
        self._masks: dict[str, str] = {}

    @property
    def unmask(self) -> dict[int, int]:
        return {ord(mask): ord(char) for char, mask in self._masks.items()}

    def messages(self, messages: Iterable[Message], literals: Literals, said: Literals) -> list[Message]:
        """The messages masked; `said` are the names to mask in what the assistant said."""
        masked = []
        for message in messages:
            # Roles and types are the template's words, not texts; a role that is no word could spell a name.
            if not _ROLE.fullmatch(message["role"]):
                raise ParameterError(f"messages: the role {message['role']!r:.60} is no word; use user or assistant")
            names = said if message["role"] == "assistant" else literals
            masked.append({key: value if key == "role" else self.value(value, names) for key, value in message.items()})
        return masked

    def value(self, value: Any, literals: Literals) -> Any:
        if isinstance(value, str):
            return self._text(value, literals)
        if isinstance(value, dict):
            return {
                key if key.isidentifier() else self._text(key, literals): member
                if key == "type" and isinstance(member, str)
                else self.value(member, literals)
                for key, member in ((str(key), member) for key, member in value.items())
            }
        return [self.value(member, literals) for member in value] if isinstance(value, list | tuple) else value

    def _text(self, text: str, literals: Literals) -> str:
        places = literals.places(text)
        if not places:
            return text
        characters = list(text)
        for place in places:
            char = characters[place]
            if char not in self._masks:
                self._masks[char] = next(self._spare)
            characters[place] = self._masks[char]
        return "".join(characters)


def mask(
    messages: list[Message],
    others: dict[str, Any],
    literals: Literals,
    text: str,
    render: Callable[[list[Message], dict[str, Any]], str],
    spare: Iterator[str],
) -> tuple[str, dict[int, int]]:
    """`text`, the prompt of these messages and `others`, with `literals` that they spell masked, and the way back.

    Where a template looks for the tags around thoughts in what the assistant said, these are left there. What it does
    on seeing another name in a text it does not do: there it is no token.
    """
    first = None
    for said in (literals, literals.without_thoughts()):
        masks = _Mask(spare)
        masked = masks.messages(messages, literals, said), masks.value(others, literals)
        unmask = masks.unmask
        if not unmask:
            return text, {}
        rendered = render(*masked)
        if rendered.translate(unmask) == text:
            return rendered, unmask
        first = first or (rendered, unmask)
    assert first is not None
    rendered, unmask = first
    if any(rf"\u{mask:04x}" in rendered.lower() for mask in unmask):
        raise ChatTemplateError("the template rewrites texts that spell control tokens: parse_special=True reads them")
    return first


def unused_characters(*values: Any) -> Iterator[str]:
    """Private-use characters that occur nowhere in these JSON values. Raises ParameterError where there are no more."""
    used = set(json.dumps(values, ensure_ascii=False))
    for start, end in _PRIVATE:
        yield from (char for char in map(chr, range(start, end)) if char not in used)
    raise ParameterError("messages: hold every private-use character of Unicode, and one is needed; leave one out")


def _pivot(name: str) -> int:
    """The character to mask: one that no template changes, so no letter if there is another."""
    return next((i for i, c in enumerate(name) if not c.isalnum() and not c.isspace()), len(name) - len(name.lstrip()))


def _is_edge(text: str, names: list[str]) -> bool:
    """Whether an end of the text is the beginning of a name, and not all of it."""
    for start in range(len(text)):
        end = text[start:]
        place = bisect_left(names, end)
        if any(name != end and name.startswith(end) for name in names[place : place + 2]):
            return True
    return False
