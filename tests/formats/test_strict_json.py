"""JSON is read as Python reads it, or refused; how deep and how long it is, is counted before."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.errors import FormatError
from forge.formats import strict_json

TEXTS = st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from('"\\[]{},:'), max_size=6)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=12,
)


def extent(value: Any, depth: int = 1) -> tuple[int, int]:
    """How deep a value is nested, and how many values it has with itself."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if inner is None:
        return depth - 1, 1
    found = [extent(item, depth + 1) for item in inner]
    return max([depth, *(deepest for deepest, _ in found)]), 1 + sum(count for _, count in found)


@settings(max_examples=30, deadline=None)
@given(value=VALUES, is_ascii=st.booleans(), indent=st.sampled_from([None, 1]))
def test_what_python_writes_is_read_and_counted(value: Any, is_ascii: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent).encode()
    assert strict_json.parse(text, "m:") == value
    deepest, count = extent(value)
    found = strict_json._extent(text)
    assert found[0] == deepest
    assert count <= found[1] <= 2 * count  # an empty list counts as one with a value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r'{"a": "[[[[\"]]\\", "b": [1, -2.5e3, true, null]}', {"a": '[[[["]]\\', "b": [1, -2500.0, True, None]}),
        ('{"model_max_length": 1000000000000000019884624838656}', {"model_max_length": int(1e30)}),
        (r'{"a": "\ud83d\ude00", "ü": "\\ud800"}', {"a": "\U0001f600", "ü": "\\ud800"}),
        ("[" * 32 + "]" * 32, None),
        ('{"a": {"k": 1}, "b": {"k": 1}}', {"a": {"k": 1}, "b": {"k": 1}}),
    ],
)
def test_right_json_is_read_as_python_reads_it(text: str, value: strict_json.Json) -> None:
    found = strict_json.parse(text.encode(), "m:")
    assert value is None or found == value


def test_counts_of_json_do_not_depend_on_where_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts are counted in parts of a megabyte: here of 1 to 9 bytes."""
    text = rb'{"a[": [1, [2, "]\"[", {"b\\": "c"}]], "d": [[], {}]}'  # 7 open, 5 commas, 1 first value
    for size in range(1, 10):
        monkeypatch.setattr(strict_json, "_CHUNK", size)
        assert strict_json._extent(text) == (4, 13)


@pytest.mark.parametrize(
    ("unit", "words"),
    [
        (b'"%d":{},', "values, allowed are 65536"),
        (b"[],", "values, allowed are 65536"),
        (b'"a":0,', "values, allowed are 65536"),
        (b'"\\"":1,', "values, allowed are 65536"),
        (b"[", "nested deeper"),
        (b'"', "not JSON"),
        (b'\\"', "not JSON"),
    ],
)
def test_bombs_of_json_take_little_memory(unit: bytes, words: str) -> None:
    """2 MB: they are counted before Python makes objects of them."""
    data = b"{" + unit * ((2 << 20) // len(unit))
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=words):
            strict_json.parse(data, "m:", 1 << 16)
        assert tracemalloc.get_traced_memory()[1] < 8 * len(data)
    finally:
        tracemalloc.stop()
