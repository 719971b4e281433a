"""Values within calls, against Python's own readers of JSON and of Python's literals."""

import ast
import json
import warnings
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.server.parsing.values import GEMMA, JSON, PYTHON, whole

TEXTS = st.text(alphabet=st.sampled_from("ab \"'\\\n\t/{}[],:\0é🙂\ud800"), max_size=8)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), TEXTS)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=8,
)
CHARACTERS = st.sampled_from("\"'\\{}[],:0123.-+eEtrufalsn \n\x01x")


def strict_json(text: str) -> Any:
    """What Python reads, without the constants that JSON does not have. Raises ValueError."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def changed(text: str, place: float, kind: str, character: str) -> str:
    """The text with one character added, left out or replaced."""
    at = int(place * len(text))
    return text[:at] + ("" if kind == "delete" else character) + text[at + (kind != "insert") :]


@settings(max_examples=80)
@given(VALUES, st.sampled_from([None, 1]), st.booleans())
def test_json_that_python_writes_is_read(value: Any, indent: int | None, ascii_only: bool) -> None:
    found = whole(f" {json.dumps(value, indent=indent, ensure_ascii=ascii_only)}\n", JSON)
    assert found is not None
    assert json.loads(found) == value


@settings(max_examples=80)
@given(VALUES, st.floats(0, 1), st.sampled_from(["insert", "delete", "replace"]), CHARACTERS)
def test_what_python_refuses_as_json_is_refused(value: Any, place: float, kind: str, character: str) -> None:
    text = changed(json.dumps(value), place, kind, character)
    found = whole(text, JSON)
    try:
        expected = strict_json(text)
    except ValueError:
        assert found is None, text
    else:
        assert found is not None, text
        assert json.loads(found) == expected


@settings(max_examples=80)
@given(VALUES, st.floats(0, 1), st.sampled_from(["insert", "delete", "replace", "keep"]), CHARACTERS)
def test_python_literals_are_read_as_python_reads_them(value: Any, place: float, kind: str, character: str) -> None:
    text = repr(value) if kind == "keep" else changed(repr(value), place, kind, character)
    found = whole(text, PYTHON)
    assert found is not None or kind != "keep"
    if found is None:
        return
    with warnings.catch_warnings(), suppress(ValueError, SyntaxError):  # which refuse true and null, and read no NUL
        warnings.simplefilter("ignore")
        assert json.loads(found) == ast.literal_eval(text), text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('<escape>a <b> \\n "c"<escape>', 'a <b> \\n "c"'),
        (
            '{a:<|"|>x<|"|>, <escape>b c<escape> : [1,-2.5 ,true,null,{}], d_é:{}}',
            {"a": "x", "b c": [1, -2.5, True, None, {}], "d_é": {}},
        ),
        ("{}", {}),
        ("[<escape><escape>]", [""]),
    ],
)
def test_gemmas_notation_is_read(text: str, value: Any) -> None:
    found = whole(text, GEMMA)
    assert found is not None
    assert json.loads(found) == value


@pytest.mark.parametrize("text", ["{a:b}", "{:1}", "{a 1}", "<escape>a", '"a"', "{a:1,}", "[1 2]", "", "{a:1}}", "nul"])
def test_what_is_not_gemmas_notation_is_refused(text: str) -> None:
    assert whole(text, GEMMA) is None
