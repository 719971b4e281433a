"""Hostile answers: huge, nested, endless. Nothing raises, nothing is lost, and the time is linear."""

import json

import pytest
from parsed import CALLS, call, content, parsed, parser

from forge.server.parsing.source import Source

LONG = 20_000
HOSTILE = {
    "angle brackets": "<" * LONG,
    "brackets": "[" * LONG,
    "braces": "{" * LONG,
    "backslashes": '<tool_call>{"name": "' + "\\" * LONG,
    "white space": " \n" * (LONG // 2),
    "digits without end": '<tool_call>{"name": 1' + "0" * LONG,
    "a string without end": '<tool_call>{"name": "' + "x" * LONG,
    "an XML value without end": "<tool_call><function=now><parameter=a>" * (LONG // 40),
    "a Gemma string without end": "<start_function_call>call:now{a:<escape>" + "x" * LONG,
    "many starts": "<tool_call>" * (LONG // 11),
    "many objects": '<tool_call>{"name": "now", "arguments": {"a": ' * (LONG // 45),
    "many lists": "[TOOL_CALLS][{" * (LONG // 14),
    "many half marks": "<tool_cal" * (LONG // 9),
    "half a surrogate pair": "\ud83d <tool_call>\udc00",
    "zero bytes": "\0<tool_call>\0{\0",
}


@pytest.fixture(autouse=True)
def work(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of characters that sources copy when they are fed: what a quadratic reader would copy grows with it."""
    copied: list[int] = []
    feed = Source.feed

    def counted(self: Source, text: str) -> None:
        feed(self, text)
        copied.append(len(self._text))

    monkeypatch.setattr(Source, "feed", counted)
    return copied


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_content_whole_or_in_pieces(name: str, work: list[int]) -> None:
    text = HOSTILE[name]
    forms = [form for form in CALLS if any(mark in text for mark in CALLS[form].marks)] or ["hermes", "pythonic"]
    for form in forms:
        assert parsed(parser(form), [text]) == [content(text)], form
        work.clear()
        pieces = [text[i : i + 7] for i in range(0, len(text), 7)]
        assert parsed(parser(form), pieces) == [content(text)], form
        assert max(work) < 100, "unread text piles up"


@pytest.mark.parametrize("form", CALLS)
def test_reasoning_without_end_is_reasoning(form: str) -> None:
    text = "</thin<think>" * 3000
    (part,) = parsed(parser(form, "<think>", prompt_end="<think>"), [text])
    assert (part.kind, part.text) == ("reasoning", text)


@pytest.mark.parametrize("depth", [10, 64, 65, 5000])
def test_nesting_has_a_limit_and_no_recursion(depth: int) -> None:
    values = {"[": "[" * (depth - 1) + "]" * (depth - 1), "{": '{"a":' * (depth - 1) + "1" + "}" * (depth - 1)}
    for value in values.values():
        texts = {
            "hermes": f'<tool_call>{{"name": "now", "arguments": {{"a": {value}}}}}',
            "mistral": f'[TOOL_CALLS]now[ARGS]{{"a": {value}}}',
            "pythonic": f'[now(a={{"a": {value}}})]',
            "gemma4": f"<|tool_call>call:now{{a:{value}}}".replace('"a"', "a"),
        }
        for form, text in texts.items():
            (part,) = parsed(parser(form), [text])
            if depth <= 64:
                assert part.kind == "tool_call", form
                found = json.loads(part.text)
                assert (found if form != "pythonic" else found["a"])["a"] is not None
            else:
                assert part == content(text), form


def test_arguments_are_the_text_that_the_model_wrote() -> None:
    numbers = "9" * 5000, "1e999", "-0", "1.10", "12345678901234567890.5"
    for number in numbers:
        text = f'<tool_call>{{"name": "now", "arguments": {{"a": {number}, "b": "\\ud800 \\u00e9é"}}}}</tool_call>'
        assert parsed(parser("hermes"), [text]) == [call(0, "now", f'{{"a": {number}, "b": "\\ud800 \\u00e9é"}}')]


def test_surrogates_of_python_and_gemma_strings_can_be_written() -> None:
    for form, text in {
        "pythonic": '[now(a="\\ud800")]',
        "gemma4": '<|tool_call>call:now{a:<|"|>\ud800<|"|>}',
        "qwen3_coder": "<function=now><parameter=a>\ud800</parameter></function>",
    }.items():
        (part,) = parsed(parser(form), [text])
        assert json.loads(part.text.encode()) == {"a": "\ud800"}, form


def test_many_calls_are_all_found() -> None:
    text = '<tool_call>{"name": "now", "arguments": {}}</tool_call>\n' * 300
    assert parsed(parser("hermes"), [text]) == [call(number, "now", "{}") for number in range(300)]
