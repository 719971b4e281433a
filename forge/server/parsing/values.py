"""Values as models write them in calls of tools: JSON, Python's literals, Gemma's notation. All become JSON text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from forge.server.parsing.source import SPACE, Malformed, Reading, Source

MAX_DEPTH = 64
"""Deepest nesting of arrays and objects. Clients and templates read it by recursion."""
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_WORD = re.compile(r"[-+.\w]*")
_JSON_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_PYTHON_PLAIN = {'"': re.compile(r'[^"\\\r\n]*'), "'": re.compile(r"[^'\\\r\n]*")}
_HEX4 = re.compile(r"[0-9a-fA-F]{4}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_PYTHON_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-7]{1,3})|(.))", re.DOTALL)
_PYTHON_CHARACTERS = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "v": "\v", "a": "\a", "\n": ""}
_PYTHON_CHARACTERS |= {char: char for char in "\\'\""}
_GEMMA_KEY = re.compile(r"[^\s:{}\[\],<\"]*")


@dataclass(frozen=True)
class Notation:
    """How values are written.

    Attributes:
        quotes: What begins a string; the longest that fits counts.
        string: Reads a string behind its quote, as JSON text with quotes.
        words: Names of constants, and JSON's for them.
        bare_keys: Whether keys may stand without quotes.
    """

    quotes: tuple[str, ...]
    string: Callable[[Source, str], Reading[str]]
    words: Mapping[str, str]
    bare_keys: bool = False


def value(source: Source, notation: Notation) -> Reading[str]:
    """A value as JSON text, behind white space. Raises Malformed."""
    out: list[str] = []
    closers: list[str] = []
    while True:
        yield from source.run(SPACE)
        opener = yield from source.ahead(1)
        if opener in ("{", "["):
            out.append(source.take(1))
            closers.append("}" if opener == "{" else "]")
            if len(closers) > MAX_DEPTH:
                raise Malformed
            yield from source.run(SPACE)
            if (yield from source.ahead(1)) != closers[-1]:
                if opener == "{":
                    out.append((yield from _key(source, notation)))
                continue
        else:
            out.append((yield from _scalar(source, notation)))
        while closers:
            yield from source.run(SPACE)
            following = yield from source.ahead(1)
            if following == closers[-1]:
                out.append(source.take(1))
                closers.pop()
            elif following == ",":
                source.take(1)
                out.append(", ")
                if closers[-1] == "}":
                    yield from source.run(SPACE)
                    out.append((yield from _key(source, notation)))
                break
            else:
                raise Malformed
        else:
            return "".join(out)


def string(source: Source, notation: Notation) -> Reading[str | None]:
    """A string as JSON text. None where another thing comes, of which nothing is taken."""
    quote = yield from source.choice(*notation.quotes)
    if quote is None:
        return None
    source.take(len(quote))
    return (yield from notation.string(source, quote))


def whole(text: str, notation: Notation) -> str | None:
    """The JSON text of a value that a text consists of, or None."""
    source = Source()
    source.feed(text)
    source.is_ended = True
    with suppress(Malformed):
        found = finished(value(source, notation))
        finished(source.run(SPACE))
        if source.is_done:
            return found
    return None


def finished(reading: Reading[str]) -> str:
    """What is read from a source that is ended."""
    try:
        next(reading)
    except StopIteration as end:
        return str(end.value)
    raise AssertionError("a reader waits for text behind the end")


def quoted(text: str) -> str:
    """A string as JSON text that can be written as UTF-8."""
    return _SURROGATE.sub(lambda half: f"\\u{ord(half.group()):04x}", json.dumps(text, ensure_ascii=False))


def _key(source: Source, notation: Notation) -> Reading[str]:
    key = yield from string(source, notation)
    if key is None:
        if not notation.bare_keys:
            raise Malformed
        name = yield from source.run(_GEMMA_KEY)
        if not name:
            raise Malformed
        key = quoted(name)
    yield from source.run(SPACE)
    yield from source.expect(":")
    return f"{key}: "


def _scalar(source: Source, notation: Notation) -> Reading[str]:
    found = yield from string(source, notation)
    if found is not None:
        return found
    word = yield from source.run(_WORD)
    if word in notation.words:
        return notation.words[word]
    if not _NUMBER.fullmatch(word):
        raise Malformed
    return word


def _json_string(source: Source, quote: str) -> Reading[str]:
    pieces = [quote]
    while True:
        pieces.append((yield from source.run(_JSON_PLAIN)))
        char = yield from source.ahead(1)
        if char == quote:
            pieces.append(source.take(1))
            return "".join(pieces)
        escape = yield from source.ahead(2)
        if len(escape) < 2 or escape[0] != "\\":  # the end, or a control character
            raise Malformed
        if escape[1] == "u":
            escape = yield from source.ahead(6)
            if not _HEX4.fullmatch(escape[2:]):
                raise Malformed
        elif escape[1] not in '"\\/bfnrt':
            raise Malformed
        pieces.append(source.take(len(escape)))


def _python_string(source: Source, quote: str) -> Reading[str]:
    pieces = []
    if len(quote) == 3:
        pieces.append((yield from source.until(quote)))
    else:
        while True:
            pieces.append((yield from source.run(_PYTHON_PLAIN[quote])))
            char = yield from source.ahead(1)
            if char == quote:
                source.take(1)
                break
            escape = yield from source.ahead(2)
            if len(escape) < 2 or escape[0] != "\\":
                raise Malformed
            pieces.append(source.take(2))
    return quoted(_PYTHON_ESCAPE.sub(_python_character, "".join(pieces)))


def _python_character(escape: re.Match[str]) -> str:
    *hexadecimal, octal, other = escape.groups()
    if other is not None:
        return _PYTHON_CHARACTERS.get(other, escape[0])
    code = int(octal, 8) if octal else int(next(filter(None, hexadecimal)), 16)
    return chr(code) if code < 0x110000 else escape[0]


def _delimited_string(source: Source, quote: str) -> Reading[str]:
    return quoted((yield from source.until(quote)))


_JSON_WORDS = {word: word for word in ("true", "false", "null")}
JSON = Notation(('"',), _json_string, _JSON_WORDS)
"""RFC 8259."""
PYTHON = Notation(
    ('"""', "'''", '"', "'"),
    _python_string,
    {**_JSON_WORDS, "True": "true", "False": "false", "None": "null"},
)
"""Strings, numbers, lists, dictionaries and constants."""
GEMMA = Notation(("<escape>", '<|"|>'), _delimited_string, _JSON_WORDS, bare_keys=True)
"""https://ai.google.dev/gemma/docs/functiongemma/formatting-and-best-practices, and Gemma 4's."""
