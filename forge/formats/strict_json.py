"""JSON files of models, read strictly: the one reader of headers, indices, configurations and tokenizers.

JSON leaves to its readers what repeated keys, NaN and deep nesting mean. Here each is an error. How deep a text is
nested, and how many values it has, is counted before Python makes an object of any of them.
"""

import json
import re
from collections.abc import Iterator
from math import isfinite
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError
from forge.formats.source import read_whole, show

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]

MAX_DEPTH = 32  # configurations of several parts, the deepest files of models, nest seven deep
MAX_VALUES = 1 << 22  # a vocabulary of 262,144 tokens and its merges are two million
MAX_DIGITS = 40  # the length of no limit, int(1e30), in tokenizer_config.json has 31

_CHUNK = 1 << 18
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


def parse(data: bytes, where: str, max_values: int = MAX_VALUES) -> Json:
    """The value of a JSON text. `where` begins messages: the file, and the part of it.

    Raises FormatError for what is not JSON in UTF-8, is nested deeper than MAX_DEPTH, has more than `max_values`
    values, repeats a key of an object, or holds NaN, an infinite number, half a surrogate pair or an integer of more
    than MAX_DIGITS digits.
    """
    depth, count = _extent(data)
    if depth > MAX_DEPTH:
        raise FormatError(f"{where} is nested deeper than {MAX_DEPTH}: it is forged")
    if count > max_values:
        raise FormatError(f"{where} has {count} values, allowed are {max_values}: it is forged")
    try:
        value: Json = _DECODER.decode(str(data, "utf-8"))
    except UnicodeDecodeError as error:
        raise FormatError(f"{where} is not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise FormatError(f"{where} is not JSON: {error.msg} at character {error.pos}") from None
    except _RefusedError as error:
        raise FormatError(f"{where} {error}") from None
    if _SURROGATE.search(data):
        for text in _strings(value):
            if any("\ud800" <= char <= "\udfff" for char in text):
                raise FormatError(f"{where} has half a surrogate pair in {show(text)}")
    return value


def read_object(path: Path, max_bytes: int, max_values: int) -> dict[str, Json]:
    """The object that a JSON file of at most `max_bytes` bytes holds. Raises FormatError as `parse` does."""
    value = parse(read_whole(path, max_bytes), f"{path}:", max_values)
    if not isinstance(value, dict):
        raise FormatError(f"{path}: should be a JSON object, not {show_json(value)}")
    return value


def show_json(value: Json) -> str:
    """A value for a message, in at most 60 characters: `show`, and JSON's words for what Python names differently."""
    if isinstance(value, dict):
        return f"an object of {len(value)}"
    return "null" if value is None else show(value)


class _RefusedError(Exception):
    """A text is JSON, and not what this reader takes."""


def _object(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _RefusedError(f"has the key {show(key)} twice in one object")
            seen.add(key)
    return found


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise _RefusedError(f"has an integer of {len(digits)} digits, allowed are {MAX_DIGITS}")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if not isfinite(value):
        raise _RefusedError(f"has the number {show(digits)}, which no float64 can be")
    return value


def _constant(name: str) -> NoReturn:
    raise _RefusedError(f"has {name}, which is not a number of JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


def _strings(value: Json) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _extent(data: bytes) -> tuple[int, int]:
    """How deep a text is nested, and how many values it has at most: exact up to the first error of a text."""
    # Without escapes every quote begins or ends a string. Pairs of backslashes go first: they escape each other.
    plain = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    depth = deepest = quotes = 0
    count = 1
    for start in range(0, len(plain), _CHUNK):
        chunk = plain[start : start + _CHUNK]
        before: NDArray[Any] = np.cumsum(chunk == ord('"'), dtype=np.int32) + quotes
        outside = before % 2 == 0
        opens = outside & ((chunk == ord("{")) | (chunk == ord("[")))
        closes = outside & ((chunk == ord("}")) | (chunk == ord("]")))
        levels = np.cumsum(opens.astype(np.int8) - closes.astype(np.int8), dtype=np.int32) + depth
        deepest = max(deepest, int(levels.max()))
        count += int(np.count_nonzero(opens)) + int(np.count_nonzero(outside & (chunk == ord(","))))
        depth, quotes = int(levels[-1]), int(before[-1]) % 2
    return deepest, count
