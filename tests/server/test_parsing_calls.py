"""Calls of tools in the formats that models write, as their chat templates and makers publish them."""

import json
from itertools import accumulate, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parsed import CALLS, TOOLS, call, content, parsed, parser, reasoning

from forge.server.api.generation import joined
from forge.server.parts import Part

PARIS = '{"city": "Paris"}'
CASES: list[tuple[str, str, list[Part]]] = [
    # Hermes 2 Pro, Qwen 2.5 and 3: an object in tags, one pair of tags for each call
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        [call(0, "get_weather", PARIS)],
    ),
    (
        "hermes",
        'I look.\n<tool_call>\n{"arguments": {}, "name": "now"}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>\n',
        [content("I look."), call(0, "now", "{}"), call(1, "get_weather", PARIS)],
    ),
    (
        "hermes",
        '<tool_call>{"name": "now"}</tool_call> One more: <tool_call>{"name": "now"}</tool_call> Done.\n',
        [call(0, "now", "{}"), content("One more:"), call(1, "now", "{}"), content(" Done.\n")],
    ),
    ("hermes", '<tool_call>{"name": "now", "arguments": {}}', [call(0, "now", "{}")]),
    ("hermes", '<tool_call>{"name": "now", "arguments": null}', [call(0, "now", "{}")]),
    ("hermes", 'A <tool_call>{"name": "now"} B', [content("A"), call(0, "now", "{}"), content(" B")]),
    ("hermes", '<tool_call>{"name": "made_up", "arguments": {}}</tool_call>', [call(0, "made_up", "{}")]),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": {"city": "</tool_call><tool_call>{\\"a\\": 1}"}}</tool_call>',
        [call(0, "get_weather", '{"city": "</tool_call><tool_call>{\\"a\\": 1}"}')],
    ),
    (
        "hermes",
        '<tool_call>{"name": "get_weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        [call(0, "get_weather", PARIS)],
    ),
    (
        "hermes",
        '<tool_call><tool_call>{"name": "now", "arguments": {}}</tool_call>',
        [content("<tool_call>"), call(0, "now", "{}")],
    ),
    # Qwen3-Coder: texts in tags
    (
        "qwen3_coder",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=city>\nSão\n <b>Paulo</b>\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=hourly>\nTrue\n</parameter>\n"
        '<parameter=area>\n{"lat": [1.5]}\n</parameter>\n<parameter=note>\n12\n</parameter>\n</function>\n</tool_call>',
        [
            content("I look."),
            call(
                0,
                "get_weather",
                '{"city": "São\\n <b>Paulo</b>", "days": 3, "hourly": true, "area": {"lat": [1.5]}, "note": "12"}',
            ),
        ],
    ),
    (
        "qwen3_coder",
        "<function=get_weather>\n<parameter=days>\nthree\n</parameter>\n<parameter=note>\nnull\n</parameter>\n"
        "<parameter=other>\n5\n</parameter>\n</function>\n</tool_call>",
        [call(0, "get_weather", '{"days": "three", "note": null, "other": "5"}')],
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=now>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        [call(0, "now", "{}"), call(1, "now", "{}")],
    ),
    (
        "qwen3_coder",
        "<tool_call><function=get_weather><parameter=city>\n\n  def f():\n    pass\n\n</parameter></function>",
        [call(0, "get_weather", '{"city": "\\n  def f():\\n    pass\\n"}')],
    ),
    # Llama 3.1 to 3.3, and Gemma 3 as Google recommends: an object without tags
    (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        [call(0, "get_weather", PARIS)],
    ),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Paris"}}',
        [call(0, "get_weather", PARIS)],
    ),
    (
        "llama3_json",
        '\n{"name": "get_weather", "parameters": {"city": "Paris"}}; {"name": "now", "parameters": {}};',
        [call(0, "get_weather", PARIS), call(1, "now", "{}"), content(";")],
    ),
    (
        "llama3_json",
        '{"name": "now"}; {"name": "Bob"}',
        [call(0, "now", "{}"), content('; {"name": "Bob"}')],
    ),
    ("llama3_json", '; {"name": "now"}', [content('; {"name": "now"}')]),
    ("llama3_json", '{"name": "now", "age": 3}', [content('{"name": "now", "age": 3}')]),
    ("llama3_json", '{"name": "Bob", "parameters": 3}', [content('{"name": "Bob", "parameters": 3}')]),
    ("llama3_json", '{"answer": {"name": "now"}}', [content('{"answer": {"name": "now"}}')]),
    ("llama3_json", 'So: {"name": "now", "parameters": {}}', [content('So: {"name": "now", "parameters": {}}')]),
    # Llama 3.2 and 4, and Gemma 3 as Google recommends: a Python list of calls
    (
        "pythonic",
        '[get_weather(city="Paris", days=2), now()]',
        [call(0, "get_weather", '{"city": "Paris", "days": 2}'), call(1, "now", "{}")],
    ),
    (
        "pythonic",
        "<|python_start|>[get_weather(city='It\\'s \\x41\\u00e9\\n\"x\"', hourly=True, area={'a': [None, -1.5e3]})]"
        "<|python_end|>",
        [
            call(
                0,
                "get_weather",
                '{"city": "It\'s Aé\\n\\"x\\"", "hourly": true, "area": {"a": [null, -1.5e3]}}',
            )
        ],
    ),
    (
        "pythonic",
        '[get_weather(city="""a\n"b" (c)""")]',
        [call(0, "get_weather", '{"city": "a\\n\\"b\\" (c)"}')],
    ),
    ("pythonic", "[1, 2, 3]", [content("[1, 2, 3]")]),
    ("pythonic", "[see(a=1)] or not", [content("[see(a=1)] or not")]),
    ("pythonic", "[]", [content("[]")]),
    # Mistral up to tokenizer v7, and from v11 on
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}, "id": "VvvODy9mT"}, '
        '{"name": "now", "arguments": {}}]',
        [call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    (
        "mistral",
        'I look.[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}',
        [content("I look."), call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    (
        "mistral",
        '[TOOL_CALLS]get_weather[CALL_ID]VvvODy9mT[ARGS]{"city": "[TOOL_CALLS]"}[TOOL_CALLS]now{}',
        [call(0, "get_weather", '{"city": "[TOOL_CALLS]"}'), call(1, "now", "{}")],
    ),
    # FunctionGemma and Gemma 4: bare keys, strings between marks
    (
        "functiongemma",
        '<start_function_call>call:get_weather{city:<escape>Saint-Denis, "93" {\n<escape>,days:2}<end_function_call>'
        "<start_function_call>call:now{}<end_function_call>",
        [call(0, "get_weather", '{"city": "Saint-Denis, \\"93\\" {\\n", "days": 2}'), call(1, "now", "{}")],
    ),
    (
        "gemma4",
        '<|tool_call>call:get_weather{area:{lat:[1,2.5],<|"|>a b<|"|>:null},city:<|"|>C:\\new<|"|>,hourly:false}'
        "<tool_call|>",
        [
            call(
                0,
                "get_weather",
                '{"area": {"lat": [1, 2.5], "a b": null}, "city": "C:\\\\new", "hourly": false}',
            )
        ],
    ),
    # Gemma 2 and 3 as Google's cookbook prompts them
    (
        "tool_code",
        'I look.\n```tool_code\nprint(get_weather(city="Paris"))\nnow()\n```',
        [content("I look."), call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    ("tool_code", '```tool_code\n[get_weather(city="Paris")]\n```', [call(0, "get_weather", PARIS)]),
    # Seed-OSS and MiniMax-M2: texts in other tags
    (
        "seed_oss",
        "I look.\n<seed:tool_call>\n<function=get_weather>\n<parameter=city>São Paulo</parameter>\n"
        "<parameter=days>3</parameter>\n</function>\n</seed:tool_call>",
        [content("I look."), call(0, "get_weather", '{"city": "São Paulo", "days": 3}')],
    ),
    (
        "minimax_m2",
        'I look.\n<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">a <b>\nc</parameter>\n'
        '<parameter name="area">{"lat": [1.5]}</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n'
        "</minimax:tool_call>",
        [
            content("I look."),
            call(0, "get_weather", '{"city": "a <b>\\nc", "area": {"lat": [1.5]}}'),
            call(1, "now", "{}"),
        ],
    ),
    (
        "minicpm5",
        '<function name="get_weather"><param name="city"><![CDATA[a</param>\nb]]></param><param name="days">2</param>'
        '</function><function name="now"></function>',
        [call(0, "get_weather", '{"city": "a</param>\\nb", "days": 2}'), call(1, "now", "{}")],
    ),
    # GLM-4.5 to 4.7, with and without line feeds; GLM-4-0414 begins the answer with a name
    (
        "glm4_moe",
        "I look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris\n1</arg_value>\n"
        "<arg_key>hourly</arg_key>\n<arg_value>true</arg_value>\n</tool_call>\n<tool_call>now</tool_call>",
        [
            content("I look."),
            call(0, "get_weather", '{"city": "Paris\\n1", "hourly": true}'),
            call(1, "now", "{}"),
        ],
    ),
    (
        "glm4_moe",
        "<tool_call>get_weather<arg_key>days</arg_key><arg_value>2</arg_value></tool_call>Done",
        [call(0, "get_weather", '{"days": 2}'), content("Done")],
    ),
    ("glm4", 'get_weather\n{"city": "Paris"}', [call(0, "get_weather", PARIS)]),
    # Kimi K2: ids that hold the name
    (
        "kimi_k2",
        "I look.<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Paris"}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>{}'
        "<|tool_call_end|><|tool_calls_section_end|>",
        [content("I look."), call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    # Command R7B and A; Command R+
    (
        "command_a",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}},\n'
        '    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
        [call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    (
        "command_r",
        'Action: ```json\n[\n    {\n        "tool_name": "get_weather",\n        "parameters": {\n            "city": '
        '"Paris"\n        }\n    }\n]```',
        [call(0, "get_weather", PARIS)],
    ),
    # Apertus, Granite 3, Hunyuan, MiniMax-M1, OLMo 3
    (
        "apertus",
        '<|tools_prefix|>[{"get_weather": {"city": "Paris"}}, {"now": {}}]<|tools_suffix|>',
        [call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    (
        "granite3",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]',
        [call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
    (
        "hunyuan",
        '<tool_calls>\n[{"name": "get_weather", "arguments": {"city": "Paris"}}]\n</tool_calls>',
        [call(0, "get_weather", PARIS)],
    ),
    (
        "hunyuan",
        '<tool_calls>\n{"name": "now", "arguments": {}}\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n'
        "</tool_calls>",
        [call(0, "now", "{}"), call(1, "get_weather", PARIS)],
    ),
    (
        "olmo3",
        "I look.\n<function_calls>\nget_weather(city='Paris')\nnow()\n</function_calls>",
        [content("I look."), call(0, "get_weather", PARIS), call(1, "now", "{}")],
    ),
]
MALFORMED = [
    ("hermes", '<tool_call>{"name": now, "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 1,}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": NaN}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": 01}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "line\nfeed"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "\\v"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "\\u12g4"}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "now", "arguments": {"a": {"b": 1}'),
    ("hermes", '<tool_call>{"name": "", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"arguments": {}}</tool_call>'),
    ("hermes", "<tool_call>[]</tool_call>"),
    ("hermes", "<tool_call>\n"),
    ("hermes", "see <tool_ca"),
    ("qwen3_coder", "<tool_call>\n<function=now>\n<parameter=a>\nno end"),
    ("qwen3_coder", "<tool_call>\n<function=now>\n</tool_call>"),
    ("qwen3_coder", '<tool_call>\n{"name": "now"}\n</tool_call>'),
    ("llama3_json", '<|python_tag|>print("hello")'),
    ("llama3_json", '{"name": "now", "parameters": {"a": }}'),
    ("pythonic", "[now(1)]"),
    ("pythonic", "[now(a=b)]"),
    ("pythonic", "[now(a='x\ny')]"),
    ("pythonic", "[now() + now()]"),
    ("pythonic", "[now(), "),
    ("mistral", "[TOOL_CALLS] I do not know"),
    ("mistral", "[TOOL_CALLS]now[ARGS]now"),
    ("functiongemma", "<start_function_call>now{}<end_function_call>"),
    ("functiongemma", "<start_function_call>call:now{a:<escape>no end}<end_function_call>"),
    ("tool_code", "```tool_code\nimport os\n```"),
    ("tool_code", "```tool_code\nnow()"),
    ("glm4_moe", "<tool_call>now\n<arg_key>a</arg_key>\n<arg_value>no end"),
    ("glm4", 'made_up\n{"city": "Paris"}'),
    ("glm4", "now and then"),
    ("minimax_m2", '<minimax:tool_call>\n<invoke name="now">\n<parameter name="a">1</invoke>'),
    ("minicpm5", '<function name="now"><param name="a"><![CDATA[1</param></function>'),
    ("kimi_k2", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>now"),
    ("command_r", "Action: I do nothing."),
    ("command_a", '<|START_ACTION|>[{"tool_name": "now"'),
    ("apertus", "<|tools_prefix|>[{}]"),
    ("olmo3", "<function_calls>\nimport os\n</function_calls>"),
]


@pytest.mark.parametrize(("form", "text", "parts"), CASES)
def test_calls_and_text_are_told_apart(form: str, text: str, parts: list[Part]) -> None:
    assert parsed(parser(form), [text]) == parts
    for part in parts:
        if part.kind == "tool_call":
            json.loads(part.text)


@pytest.mark.parametrize(("form", "text"), MALFORMED)
def test_malformed_call_is_content(form: str, text: str) -> None:
    assert parsed(parser(form), [text]) == [content(text)]
    assert parsed(parser(form), text) == [content(text)]


@pytest.mark.parametrize(("form", "text", "parts"), CASES)
def test_parts_are_the_same_for_single_characters(form: str, text: str, parts: list[Part]) -> None:
    assert parsed(parser(form), text) == parts


@pytest.mark.parametrize("form", CALLS)
def test_calls_behind_reasoning_and_in_it(form: str) -> None:
    for name, text, parts in CASES:
        if name == form:
            found = parsed(parser(form, "<think>"), [f"<think>\nFirst {text} </think>\n\n{text}"])
            assert found == [reasoning(f"First {text.rstrip()}"), *parts], text


FRAGMENTS = [
    *(mark for form in CALLS.values() for mark in (*form.marks, *form.closers)),
    *(text for _, text, _ in CASES),
    *(text for _, text in MALFORMED),
    *(
        "<think>",
        "</think>",
        "<",
        "[",
        "{",
        '"',
        "\\",
        "\n",
        " ",
        "é🙂",
        "call:now{",
        "now(",
        ")",
        "]",
        "}",
        ";",
        "a=1",
    ),
]


@settings(max_examples=60)
@given(
    form=st.sampled_from([None, *CALLS]),
    texts=st.lists(st.sampled_from(FRAGMENTS), max_size=5),
    marks=st.sampled_from([None, "<think>"]),
    is_open=st.booleans(),
    tells=st.booleans(),
    data=st.data(),
)
def test_parts_do_not_depend_on_the_cuts(
    form: str | None, texts: list[str], marks: str | None, is_open: bool, tells: bool, data: st.DataObject
) -> None:
    text = "".join(texts)[: data.draw(st.integers(0, 400))]
    sizes = data.draw(st.lists(st.integers(1, 30), max_size=60))
    places = [0, *accumulate(sizes), len(text) + sum(sizes)]
    options = {"prompt_end": "<think>\n" if is_open else "", "tells_reasoning": tells}
    whole = parsed(parser(form, marks, **options), [text])
    pieces = [text[start:end] for start, end in pairwise(places)]
    assert parsed(parser(form, marks, **options), pieces) == whole
    if not any(part.kind == "tool_call" for part in whole) and (not tells or not marks):
        assert "".join(part.text for part in whole) == text


def test_without_tools_calls_are_content() -> None:
    text = '<tool_call>{"name": "now"}</tool_call>\n'
    assert parsed(parser("hermes", tools=[]), [text]) == [content(text)]


def test_text_is_not_held_back_longer_than_it_may_begin_a_mark() -> None:
    one = parser("hermes")
    shown = [[part.text for part in one.push(piece)] for piece in ("Hi", " ", "<", "b", "> <too", "l", "_call", ">")]
    assert shown == [["Hi"], [], [], [" <b"], [">"], [], [], []]
    assert joined(one.push("{no")) == [content(" <tool_call>{no")]
    bare = parser("llama3_json")
    assert bare.push('{"name": "Bo') == []
    assert bare.push('b"') == [content('{"name": "Bob"')]
    assert bare.push(', "age": 3') == [content(', "age": 3')]
    assert parser("llama3_json").push('{"answer"') == [content('{"answer"')]


def test_a_call_is_sent_when_it_is_whole_without_its_last_mark() -> None:
    one = parser("hermes")
    assert one.push('<tool_call>{"name": "now", "arguments": {"a": 1}') == []
    assert one.push("}") == [call(0, "now", '{"a": 1}')]
    assert one.push("\n</tool_call>") == []
    assert one.finish() == []


def test_tools_without_a_schema_are_read() -> None:
    text = "<function=now>\n<parameter=a>\n1\n</parameter>\n</function>"
    for parameters in (None, {}, {"properties": None}, {"properties": {"a": True}}, {"properties": {"a": {"type": 3}}}):
        tools = [{"type": "function", "function": {"name": "now", "parameters": parameters}}]
        (found,) = parsed(parser("qwen3_coder", tools=tools), [text])
        assert json.loads(found.text) in ({"a": "1"}, {"a": 1})
    assert parsed(parser("qwen3_coder", tools=TOOLS), [text]) == [call(0, "now", '{"a": "1"}')]
