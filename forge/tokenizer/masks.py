"""Masks that keep users' texts from becoming control tokens: texts are masked before a template sees them.

In a masked text, one character of each token name is replaced by a character that occurs nowhere else. Lengths, blanks
at the ends and the text around the names stay, so that templates trim, cut and split as before. The name is no longer a
token. After the prompt is cut at its tokens, the mask is undone.
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
_Render = Callable[[list[Message], dict[str, Any]], str]
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

    def places(self, text: str, spares_thoughts: bool = False) -> set[int]:
        """One character of each name in the text, and of each end that may be half a name together with a neighbour.

        `spares_thoughts` leaves out the tags around thoughts, up to the last one that ends a thought.
        """
        found = set[int]()
        for start, group in self._groups.items():
            if start in text:
                for name in group:
                    place = -1
                    while (place := text.find(name, place + 1)) >= 0:
                        found.add(place + _pivot(name))
        # A name may arise where two texts meet. It then holds the characters at their ends, blanks trimmed or not.
        for inner in {text, text.strip()} - {""}:
            offset = text.find(inner)
            if _is_edge(inner[: self._longest][::-1], self._backwards):
                found.add(offset)
            if _is_edge(inner[-self._longest :], self._names):
                found.add(offset + len(inner) - 1)
        if spares_thoughts:
            tags = list(THOUGHT_TAG.finditer(text))
            while tags and "/" not in tags[-1].group():
                tags.pop()
            found -= {tag.start() + _pivot(tag.group()) for tag in tags}
        return {place for place in found if text[place].strip()}


class _Mask:
    """Replacement characters, chosen as they are needed."""

    def __init__(self, literals: Literals, spare: Iterator[str]) -> None:
        self._literals = literals
        self._spare = spare
        self._masks: dict[str, str] = {}

    @property
    def unmask(self) -> dict[int, int]:
        return {ord(mask): ord(char) for char, mask in self._masks.items()}

    def messages(self, messages: Iterable[Message], spares_thoughts: bool) -> list[Message]:
        """The messages, masked. `spares_thoughts` leaves the tags around thoughts of the assistant."""
        masked = []
        for message in messages:
            # Templates compare roles and types, so they are not masked. A role that is no word could spell a name.
            if not _ROLE.fullmatch(message["role"]):
                what = f"messages: the role {message['role']!r:.60} is no word"
                raise ParameterError(what, parameter="messages", hint="use user or assistant")
            spares = spares_thoughts and message["role"] == "assistant"
            masked.append(
                {key: value if key == "role" else self.value(value, spares) for key, value in message.items()}
            )
        return masked

    def value(self, value: Any, spares_thoughts: bool = False) -> Any:
        if isinstance(value, str):
            return self._text(value, spares_thoughts)
        if isinstance(value, dict):
            return {
                key if key.isidentifier() else self._text(key, spares_thoughts): member
                if key == "type" and isinstance(member, str)
                else self.value(member, spares_thoughts)
                for key, member in ((str(key), member) for key, member in value.items())
            }
        return [self.value(member, spares_thoughts) for member in value] if isinstance(value, list | tuple) else value

    def _text(self, text: str, spares_thoughts: bool) -> str:
        places = self._literals.places(text, spares_thoughts)
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
    render: _Render,
    spare: Iterator[str],
) -> tuple[str, dict[int, int]]:
    """`text`, the prompt of messages and `others`, with their `literals` masked, and the table that undoes the mask.

    If a template removes thoughts from the assistant's messages, the tags around them are not masked. Any other special
    treatment of a name in a text does not happen, because the name is no token there.
    """
    first = None
    takes_thoughts = (doubled := _with_doubled_ends(messages)) != messages and _is_same(render, doubled, others, text)
    for spares_thoughts in (takes_thoughts, not takes_thoughts):
        masks = _Mask(literals, spare)
        masked = masks.messages(messages, spares_thoughts), masks.value(others)
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


def _with_doubled_ends(messages: list[Message]) -> list[Message]:
    """Messages with the last tag that ends a thought doubled. A template that splits there renders them as before."""

    def doubled(value: Any) -> Any:
        if isinstance(value, list):
            return [part | {"text": doubled(part["text"])} for part in value]
        ends = [tag for tag in THOUGHT_TAG.finditer(value) if "/" in tag.group()]
        return value[: ends[-1].end()] + ends[-1].group() + value[ends[-1].end() :] if ends else value

    return [
        message | {"content": doubled(message["content"])}
        if message["role"] == "assistant" and message.get("content")
        else message
        for message in messages
    ]


def _is_same(render: _Render, messages: list[Message], others: dict[str, Any], text: str) -> bool:
    try:
        return render(messages, others) == text
    except ChatTemplateError:
        return False


def unused_characters(*values: Any) -> Iterator[str]:
    """Private-use characters that occur nowhere in these JSON values. Raises ParameterError if there are no more."""
    used = set(json.dumps(values, ensure_ascii=False))
    for start, end in _PRIVATE:
        yield from (char for char in map(chr, range(start, end)) if char not in used)
    what = "messages: hold every private-use character of Unicode, and one is needed"
    raise ParameterError(what, parameter="messages", hint="leave one out")


def _pivot(name: str) -> int:
    """Index of the character to mask. It is no letter if possible, because templates may change letters."""
    return next((i for i, c in enumerate(name) if not c.isalnum() and not c.isspace()), len(name) - len(name.lstrip()))


def _is_edge(text: str, names: list[str]) -> bool:
    """Whether the text ends with a proper beginning of a name."""
    for start in range(len(text)):
        end = text[start:]
        place = bisect_left(names, end)
        if any(name != end and name.startswith(end) for name in names[place : place + 2]):
            return True
    return False
