"""Messages as OpenAI clients send them, through templates that expect them in different forms."""

from typing import Any

import pytest

from forge.errors import ChatTemplateError, ParameterError
from forge.tokenizer.chat import ChatTemplate

USER = {"role": "user", "content": "Hi"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}
EACH = "{% for m in messages %}"
CHATML = EACH + "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


def render(source: str, messages: Any, **options: Any) -> str:
    return ChatTemplate(source, name="m.gguf", special_tokens={}).render(messages, **options)


def call(arguments: Any, **fields: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}], **fields}


# Contents

LOOP = "{% for p in m.content %}{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (EACH + "{{ m.content }}{% endfor %}", "one\ntwo"),
        (EACH + "{{ '<' + m.content + '>' }}{% endfor %}", "<one\ntwo>"),
        (EACH + "{{ m.content | trim }}{% endfor %}", "one\ntwo"),
        (EACH + "{{ m.content.strip() }}{% endfor %}", "one\ntwo"),
        (EACH + "{{ m.content | tojson }}{% endfor %}", r'"one\ntwo"'),
        (EACH + "{{ m | tojson(separators=(',', ':')) }}{% endfor %}", r'{"role":"user","content":"one\ntwo"}'),
        # What is no string is dropped without a word.
        (EACH + "{% if m.content is string %}{{ m.content }}{% endif %}{% endfor %}", "one\ntwo"),
        (EACH + "{% set c = m.content if m.content is string else '' %}{{ c }}{% endfor %}", "one\ntwo"),
        (EACH + LOOP + "{% endfor %}", "onetwo"),
        (EACH + "{{ m.content | map(attribute='text') | join('|') }}{% endfor %}", "one|two"),
        (EACH + "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}{% endfor %}", "onetwo"),
        (EACH + "{{ m.content[0]['text'] }}+{{ m.content[1].text }}{% endfor %}", "one+two"),
    ],
)
def test_parts_are_joined_or_passed_as_the_template_expects(source: str, text: str) -> None:
    assert render(source, [PARTS]) == text


def test_a_template_may_read_parts_of_users_alone() -> None:
    source = EACH + "{% if m.role == 'user' %}" + LOOP + "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}"
    assert render(source, [{"role": "system", "content": "s"}, PARTS]) == "[s]onetwo"


@pytest.mark.parametrize("content", ["Hi", [{"type": "text", "text": "Hi"}]])
@pytest.mark.parametrize("source", [EACH + LOOP + "{% endfor %}", EACH + "{{ m.content[0].text }}{% endfor %}"])
def test_a_template_that_reads_parts_alone_gets_strings_as_parts(source: str, content: Any) -> None:
    assert render(source, [{"role": "user", "content": content}]) == "Hi"


def test_what_conversations_without_a_role_showed_is_not_taken_for_those_with_it() -> None:
    """As in Gemma 3's first template: the system message is read as parts, the others as strings, too."""
    source = "{% set s = messages[0].content[0].text if messages[0].role == 'system' else '' %}" + EACH
    source += "{% if m.role != 'system' %}{% if m.content is string %}{{ s + m.content }}{% else %}{{ s }}" + LOOP
    chat = ChatTemplate(source + "{% endif %}{% endif %}{% endfor %}", name="m.gguf", special_tokens={})
    user = {"role": "user", "content": "Hi"}
    assert chat.render([user]) == "Hi"
    assert chat.render([{"role": "system", "content": "s"}, user]) == "sHi"


def test_the_form_does_not_depend_on_what_texts_say() -> None:
    source = EACH + "{% if m.content is string %}{{ m.content }}{% else %}none{% endif %}{% endfor %}"
    for text in ("", " ", "None", "'text': 'x'", "none", "forgetext000000", "[{'type': 'text', 'text': 'x'}]"):
        assert render(source, [{"role": "user", "content": [{"type": "text", "text": text}]}]) == text


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, r"content\[1\] has the type 'image_url'"),
        ({"type": "image"}, "type 'image'"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "type 'input_audio'"),
        ({"type": "no\nsense"}, r"type 'no\\nsense'"),
        ({"type": "text", "text": None}, "needs a string text"),
        ({"text": "x"}, "must be a mapping with a type"),
        ("x", "must be a mapping with a type"),
    ],
)
def test_parts_that_are_no_text_are_named(part: Any, said: str) -> None:
    with pytest.raises(ParameterError, match=rf"^messages\[1\]: .*{said}[^\n]*$"):
        render(CHATML, [USER, {"role": "user", "content": [{"type": "text", "text": "a"}, part]}])


# Tool calls

CALLS = "{% for c in m.tool_calls %}"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (EACH + "{{ '<' + m.content + '>' }}{% if m.tool_calls %}call{% endif %}{% endfor %}", "<Hi><>call"),
        (EACH + "{{ m.content }}|{% endfor %}", "Hi||"),
        (EACH + "{% if m.content is none %}call{% else %}{{ m.content }}|{% endif %}{% endfor %}", "Hi|call"),
        (EACH + "{% if m.content is defined %}{{ m.content + '|' }}{% else %}call{% endif %}{% endfor %}", "Hi|call"),
        (EACH + "{% if m['content'] %}{{ m['content'] }}{% endif %}|{% endfor %}", "Hi||"),
        (EACH + "{% if 'tool_calls' in m %}call{% else %}{{ m.content }}|{% endif %}{% endfor %}", "Hi|call"),
    ],
)
@pytest.mark.parametrize("content", [{"content": None}, {}])
def test_a_tool_call_without_content_is_accepted(source: str, text: str, content: dict[str, Any]) -> None:
    assert render(source, [USER, call({"city": "Rome"}, **content)]) == text


@pytest.mark.parametrize("arguments", [{"city": "Zürich", "n": [1, None]}, '{"city": "Zürich", "n": [1, null]}'])
@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ c.function.arguments | tojson }}", '{"city": "Zürich", "n": [1, null]}'),
        ("{{ c.function.arguments }}", '{"city": "Zürich", "n": [1, null]}'),
        ("{{ '```' + c.function.arguments + '```' }}", '```{"city": "Zürich", "n": [1, null]}```'),
        ("{{ c.function | tojson }}", '{"name": "weather", "arguments": {"city": "Zürich", "n": [1, null]}}'),
        ("{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }};{% endfor %}", "city=Zürich;n=[1, None];"),
        ("{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}", "city=Zürich;n=[1, None];"),
        (
            "{% if c.function.arguments is string %}text{% else %}{{ c.function.arguments | tojson }}{% endif %}",
            '{"city": "Zürich", "n": [1, null]}',
        ),
        ("{{ c.id }} {{ c.type }}", "c1 function"),
    ],
)
def test_arguments_are_a_mapping_or_json_text(source: str, text: str, arguments: Any) -> None:
    source = EACH + CALLS + source + "{% endfor %}{% endfor %}"
    assert render(source, [USER, call(arguments, content=None)]) == text


def test_reasoning_and_content_beside_calls_are_one_text_if_the_template_refuses_two() -> None:
    message = call("{}", content="I look.", reasoning_content="Where?")
    both = EACH + "({{ m.thinking }}){{ m.content }}{{ m.tool_calls[0].function.arguments }}{% endfor %}"
    assert render(both, [message]) == "(Where?)I look.{}"
    one = EACH + "{% if m.thinking and m.content %}{{ raise_exception('two') }}{% endif %}{% endfor %}" + both
    assert render(one, [message]) == "(Where?\n\nI look.){}"


def test_arguments_of_a_call_without_a_function_field() -> None:
    message = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": '{"a": 1}'}]}
    assert render(EACH + CALLS + "{{ c.arguments.a + 1 }}{% endfor %}{% endfor %}", [USER, message]) == "2"


@pytest.mark.parametrize("arguments", ["", "not JSON", "[1]", '"x"', "3", '{"a": ', "[" * 100_000, "9" * 5000])
def test_arguments_that_are_no_json_object_stay_as_they_are(arguments: str) -> None:
    assert render(EACH + CALLS + "{{ c.function.arguments }}{% endfor %}{% endfor %}", [call(arguments)]) == arguments


def test_a_template_that_needs_both_an_empty_content_and_json_text() -> None:
    source = EACH + "{{ m.content + '|' }}" + CALLS + "{{ c.function.arguments + ';' }}{% endfor %}{% endfor %}"
    assert render(source, [PARTS, call({"a": 1}, content=None)]) == 'one\ntwo||{"a": 1};'


def test_tool_messages_names_and_ids_reach_the_template() -> None:
    source = EACH + "{{ m.role }} {{ m.name }} {{ m.tool_call_id }} {{ m.content }}{% endfor %}"
    message = {"role": "tool", "name": "weather", "tool_call_id": "c1", "content": "21"}
    assert render(source, [message]) == "tool weather c1 21"
    assert render(source, [{**message, "content": [{"type": "text", "text": "21"}]}]) == "tool weather c1 21"


def test_fields_that_clients_leave_null_are_not_there() -> None:
    source = EACH + "{{ m | length }}{{ 'tool_calls' in m }}{{ m.name is defined }}{% endfor %}"
    message = {"role": "assistant", "content": "x", "tool_calls": None, "function_call": None, "name": None}
    assert render(source, [message]) == render(source, [{**message, "tool_calls": []}]) == "2FalseFalse"


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        ("x", "tool_calls must be a list"),
        ({"a": 1}, "tool_calls must be a list"),
        ([3], r"tool_calls\[0\] must be a mapping with a function"),
        ([{"function": "f"}], r"tool_calls\[0\] must be a mapping with a function"),
        ([{"function": {"arguments": {}}}], r"tool_calls\[0\] must be a mapping with a function"),
        ([{"function": {"name": "f", "arguments": 3}}], r"tool_calls\[0\]: arguments must be JSON text or a mapping"),
    ],
)
def test_calls_of_another_form_are_named(calls: Any, said: str) -> None:
    with pytest.raises(ParameterError, match=rf"^messages\[1\]: {said}[^\n]*$"):
        render(CHATML, [USER, {"role": "assistant", "content": None, "tool_calls": calls}])


def test_what_a_template_refuses_is_said_whatever_the_form() -> None:
    with pytest.raises(ChatTemplateError, match=r"template: one call at a time$"):
        render("{{ raise_exception('one call at a time') }}", [PARTS, call({"a": 1}, content=None)])
    source = EACH + "{{ '<' + m.content + '>' }}{% endfor %}{{ raise_exception('one call at a time') }}"
    with pytest.raises(ChatTemplateError, match=r"template: one call at a time$"):
        render(source, [PARTS])


# Tools

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


def test_tools_that_a_template_ignores_are_an_error() -> None:
    with pytest.raises(ChatTemplateError, match=r"^m\.gguf: chat template: it ignores tools[^\n]*chat_template=FILE$"):
        render(CHATML, [USER], tools=TOOLS)
    assert "weather" in render("{{ tools | tojson }}" + CHATML, [USER], tools=TOOLS)
    assert render("{% if tools %}yes{% endif %}", [USER], tools=TOOLS) == "yes"


def test_a_tool_without_a_description_has_an_empty_one_if_the_template_needs_it() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]

    def shown(what: str) -> str:
        source = "{% for tool in tools or [] %}{{ tool.function.name + WHAT }}{% endfor %}{{ messages[0].content }}"
        return render(source.replace("WHAT", what), [USER], tools=tools)

    assert shown("'//' + tool.function.description") == "weather//Hi"
    assert shown("tool.function | string") == "weather{'name': 'weather'}Hi"
    with pytest.raises(ChatTemplateError, match="has no attribute 'other'"):
        shown("tool.function.other")


def test_tools_reach_a_template_that_reads_them_by_another_name() -> None:
    tools = [{"type": "function", "function": {"name": "weather"}}]
    source = "{% for tool in xml_tools or [] %}<{{ tool.function.name }}>{% endfor %}{{ messages[0].content }}"
    assert render(source, [USER], tools=tools) == "<weather>Hi"
    assert render(source, [USER]) == "Hi"
    assert render(source, [USER], xml_tools=tools) == "<weather>Hi"


def test_an_empty_list_of_tools_is_none_in_the_template() -> None:
    assert render("{{ tools is none }}", [USER], tools=[]) == render("{{ tools is none }}", [USER]) == "True"
    for tools in ("weather", {"name": "weather"}, 3):
        with pytest.raises(ParameterError, match="tools: must be a list"):
            render(CHATML, [USER], tools=tools)


def test_where_tools_are_given_the_template_for_them_is_used() -> None:
    template = ChatTemplate(
        "chat", name="m", special_tokens={"bos_token": "<s>"}, tool_use="{{ bos_token }}{{ tools }}"
    )
    assert template.render([USER]) == template.render([USER], tools=[]) == "chat"
    assert template.render([USER], tools=[1]) == "<s>[1]"
    assert template.render([USER, {"role": "tool", "content": "x"}]) == "chat"


# The final message, continued


def said(text: Any) -> list[dict[str, Any]]:
    return [USER, {"role": "assistant", "content": text}]


HEAD = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
THINKING = (
    EACH + "{% set c = m.content %}{% set r = '' %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n{{ r }}\n</think>\n\n{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
)


@pytest.mark.parametrize(
    ("source", "text", "end"),
    [
        (CHATML, "The", "The"),
        (CHATML, "im_end", "im_end"),
        (CHATML, "<|im_end|>", "<|im_end|>"),
        (CHATML, "", ""),
        (CHATML, " \n", " \n"),
        (CHATML, "Hi \n\n", "Hi \n\n"),
        (CHATML.replace("m.content", "m.content | trim"), " Hi \n\n", "Hi"),
        (CHATML.replace("m.content", "m.content.strip('\\n')"), "Hi \n\n", "Hi "),
        (CHATML.replace("m.content", "m.content | trim ~ '\\n'"), "Hi\n", "Hi"),
        (CHATML.replace("m.content", "m.content ~ '\\n'"), "Hi\n", "Hi\n"),
        (THINKING, "<think>\nhm\n</think>\n\nSo", "<think>\nhm\n</think>\n\nSo"),
        (THINKING, "<think>hm</think>So", "<think>\nhm\n</think>\n\nSo"),
        (THINKING, "So", "<think>\n\n</think>\n\nSo"),
    ],
)
def test_a_continued_prompt_ends_where_the_content_ends(source: str, text: str, end: str) -> None:
    found = render(source, said(text), continue_final_message=True)
    assert found.replace("user\nHi\n", "user\nHi") == HEAD + end  # some write a line feed behind the user's, too


def test_what_is_continued_may_be_said_before_and_after() -> None:
    source = "About {{ messages[-1].content }}: " + CHATML + "as said"
    assert render(source, said("as said"), continue_final_message=True) == f"About as said: {HEAD}as said"


def test_the_last_of_several_parts_is_continued() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two "}]
    source = EACH + "{% if m.content is string %}{{ m.content }}{% else %}" + LOOP + "{% endif %}<end>{% endfor %}"
    assert render(CHATML, said(parts), continue_final_message=True) == HEAD + "one \ntwo "
    assert render(source, said(parts), continue_final_message=True) == "Hi<end>one two "


@pytest.mark.parametrize(
    "source",
    [
        CHATML.replace("m.content", "m.content | upper"),
        CHATML.replace("m.content", "m.content[:3]"),
        CHATML.replace("m.content", "m.content | replace('n', 'm')"),
        CHATML.replace("m.content", "m.content | reverse"),
        CHATML.replace("m.content", "m.content | length"),
        "{{ messages[0].content }}",
    ],
)
def test_a_message_that_the_template_changes_cannot_be_continued(source: str) -> None:
    with pytest.raises(ChatTemplateError, match=r"^m\.gguf: chat template: it changes the final message[^\n]*$"):
        render(source, said("an answer"), continue_final_message=True)


@pytest.mark.parametrize(
    ("messages", "options", "reason"),
    [
        ([USER], {}, "the last message must be the assistant's"),
        (said("x"), {"add_generation_prompt": True}, "add_generation_prompt"),
        ([USER, call({})], {}, "no content to continue"),
    ],
)
def test_a_message_that_cannot_be_continued_is_refused(messages: Any, options: Any, reason: str) -> None:
    with pytest.raises(ParameterError, match=rf"^continue_final_message: [^\n]*{reason}"):
        render(CHATML, messages, continue_final_message=True, **options)


def test_the_answer_is_opened_unless_the_final_message_is_continued() -> None:
    source = CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    assert render(source, [USER]) == render(source, [USER], add_generation_prompt=True) == HEAD
    assert render(source, [USER], add_generation_prompt=False) == HEAD.removesuffix("<|im_start|>assistant\n")
    assert render(source, said("x"), continue_final_message=True, add_generation_prompt=False) == HEAD + "x"
