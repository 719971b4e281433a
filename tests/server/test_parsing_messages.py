"""Answers that are messages with headers: harmony against openai-harmony (data/chat/make_harmony.py), Muse Glimmer."""

import json
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed import MESSAGES, call, content, parsed, parser, reasoning

from forge.server.api.generation import joined
from forge.server.parts import Part

PATH = Path(__file__).parents[1] / "data/chat/harmony.json"
ANSWERS: list[dict[str, Any]] = json.loads(PATH.read_text(encoding="utf-8"))
PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
HEADER = "<|channel|>final<|message|>"
CALL = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>"


def parts_of(messages: list[dict[str, Any]]) -> list[Part]:
    """The parts that messages mean: an empty line between two of one kind."""
    parts, written, calls = list[Part](), set[str](), 0
    for message in filter(lambda message: message["text"], messages):
        recipient = message["recipient"] or ""
        kind = "reasoning" if message["channel"] == "analysis" else "content"
        if recipient.startswith("functions."):
            parts.append(call(calls, recipient.removeprefix("functions."), message["text"]))
            calls += 1
        else:
            parts.append(Part(kind, ("\n\n" if kind in written else "") + message["text"]))
            written.add(kind)
    return joined(parts)


@pytest.mark.parametrize("answer", ANSWERS, ids=lambda answer: answer["text"][:60])
def test_messages_are_those_of_openai_harmony(answer: dict[str, Any]) -> None:
    for pieces in ([answer["text"]], answer["text"]):
        assert parsed(parser("harmony", prompt_end=PROMPT), pieces) == parts_of(answer["messages"])


@pytest.mark.parametrize(
    ("prompt_end", "text", "parts"),
    [
        (f"{PROMPT}{HEADER}I ", "say.<|end|>", [content("say.")]),
        (f"{PROMPT}<|channel|>analysis<|message|>I ", "think.", [reasoning("think.")]),
        ("the end of a long message that is continued", " and more<|return|>", [content(" and more")]),
        (PROMPT, "I know no channels. ", [content("I know no channels. ")]),
        (PROMPT, "to=me is a header without an end", [content("to=me is a header without an end")]),
        (PROMPT, f"<|channel|>{'x' * 600}<|message|>", [content(f"<|channel|>{'x' * 600}<|message|>")]),
        (PROMPT, "<|channel|>fin", []),
        (PROMPT, f"{HEADER}One<|end|>\n<|start|>assistant{HEADER}Two<|return|>\n", [content("One\n\nTwo")]),
        (PROMPT, f"{CALL}now", [content("now")]),
        (PROMPT, f'{CALL}{{"a": 1', [content('{"a": 1')]),
        (PROMPT, f"{CALL}{{}} <|call|>", [call(0, "now", "{}")]),
        (PROMPT, f"{CALL}{{}}<|end|>", [call(0, "now", "{}")]),
    ],
)
def test_harmony_outside_of_the_rules(prompt_end: str, text: str, parts: list[Part]) -> None:
    for pieces in ([text], text):
        assert parsed(parser("harmony", prompt_end=prompt_end), pieces) == parts


def test_a_call_streams_when_it_is_whole_and_text_as_it_comes() -> None:
    one = parser("harmony", prompt_end=PROMPT)
    pieces = ["<|channel|>ana", "lysis<|message|>", "I", " look", ".<|e", "nd|><|start|>assistant", CALL, "{", "}"]
    assert [joined(one.push(piece)) for piece in pieces] == [
        *([], [], [reasoning("I")], [reasoning(" look")], [reasoning(".")]),
        *([], [], [], [call(0, "now", "{}")]),
    ]


def test_without_tools_a_call_is_content_and_reasoning_that_is_not_told_apart_keeps_its_marks() -> None:
    thought = "<|channel|>analysis<|message|>I think.<|end|>"
    text = f"{thought}<|start|>assistant{CALL}{{}}"
    one = parser("harmony", tools=[], prompt_end=PROMPT)
    assert parsed(one, [text]) == [reasoning("I think."), content("{}")]
    one = parser("harmony", prompt_end=PROMPT, tells_reasoning=False)
    assert parsed(one, text) == [content(thought), call(0, "now", "{}")]


def test_messages_of_muse_glimmer() -> None:
    arguments = '<atem:parameter name="city">a\n<b></atem:parameter>\n<atem:parameter name="days">2</atem:parameter>\n'
    begin, end, close = "<atem:function_calls>\n", "</atem:function_calls>", "</atem:invoke>\n"
    now = '<atem:invoke name="now">\n</atem:invoke>\n'
    text = (
        " to=self<|message|>I look.<|eom|><|start|>assistant to=user<|message|>Wait.<|eom|>"
        f'<|start|>assistant to=get_weather<|message|>{begin}<atem:invoke name="get_weather">\n{arguments}{close}'
        f"{end}<|eom|><|start|>assistant to=now<|message|>{begin}{now}{now}{end}<|eot|>"
    )
    parts = [reasoning("I look."), content("Wait."), call(0, "get_weather", '{"city": "a\\n<b>", "days": 2}')]
    for pieces in ([text], text):
        found = parsed(parser("muse_glimmer", prompt_end=PROMPT), pieces)
        assert found == [*parts, call(1, "now", "{}"), call(2, "now", "{}")]


FRAGMENTS = [
    *(answer["text"] for answer in ANSWERS),
    *("<|start|>assistant", "<|channel|>analysis", HEADER, CALL, "<|message|>", "<|end|>", "<|call|>", "<|eom|>"),
    *(
        " to=self",
        " to=now<|message|>",
        '<atem:invoke name="now">',
        "</atem:invoke>",
        "{}",
        "{",
        " \n",
        "é🙂",
        "x" * 300,
    ),
]


@settings(max_examples=60)
@given(
    form=st.sampled_from([*MESSAGES]),
    texts=st.lists(st.sampled_from(FRAGMENTS), max_size=6),
    tells=st.booleans(),
    sizes=st.lists(st.integers(1, 30), max_size=60),
)
def test_parts_of_messages_do_not_depend_on_the_cuts(
    form: str, texts: list[str], tells: bool, sizes: list[int]
) -> None:
    text = "".join(texts)
    places = [0, *accumulate(sizes), len(text) + sum(sizes)]
    whole = parsed(parser(form, prompt_end=PROMPT, tells_reasoning=tells), [text])
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert parsed(parser(form, prompt_end=PROMPT, tells_reasoning=tells), pieces) == whole


@pytest.mark.parametrize(
    "text", ["<|start|>" * 3000, "<|channel|>" * 3000, CALL * 300, f"{CALL}[" + "{" * 20_000, "<" * 20_000]
)
def test_hostile_messages_raise_nothing_and_pile_nothing_up(text: str) -> None:
    for form in MESSAGES:
        whole = parsed(parser(form), [text])
        one = parser(form)
        pieces = [part for i in range(0, len(text), 7) for part in one.push(text[i : i + 7])]
        assert joined([*pieces, *one.finish()]) == whole
        assert len(one._source._text) < 2000
