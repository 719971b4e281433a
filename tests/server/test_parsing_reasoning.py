"""Reasoning between marks, and which format a chat template asks for."""

import re

import pytest
from parsed import REASONING, call, content, parsed, parser, reasoning

from forge.server.parsing import OutputFormat
from forge.server.parts import Part

# What is characteristic of templates that models are published with.
TEMPLATES = [
    (
        "Qwen2.5",
        '{{ \'<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n\' }}',
        "hermes",
        None,
    ),
    ("Qwen3", "{{ '<tool_call>' }}{% if '</think>' in content %}{{ '<think>' }}{% endif %}", "hermes", "<think>"),
    ("Qwen3-Coder", "{{ '<tool_call>\\n<function=f>\\n<parameter=a>\\n' }}", "qwen3_coder", None),
    ("Qwen3.5", "{{ '<tool_call>\\n<function=f>\\n<parameter=a>\\n<think></think>' }}", "qwen3_coder", "<think>"),
    ("Llama 3.1", "{{ '\"parameters\": dictionary of argument name and its value}. ' }}", "llama3_json", None),
    ("Llama 3.2", "{{ '[func_name1(params_name1=params_value1, params_name2=params_value2...)] ' }}", "pythonic", None),
    ("Mistral 7B v0.3", "{{ '[TOOL_CALLS] [' }}", "mistral", None),
    ("Ministral 3", "{{ '[TOOL_CALLS]' + name + '[ARGS]' }}{{ '[THINK]' }}{{ '[/THINK]' }}", "mistral", "[THINK]"),
    ("FunctionGemma", "{{ '<start_function_call>call:' }}", "functiongemma", None),
    ("Gemma 4", "{{ '<|tool_call>call:' }}{{ '<|channel>thought\\n<channel|>' }}", "gemma4", "<|channel>thought"),
    ("DeepSeek R1", "{% set content = content.split('</think>')[-1] %}", None, "<think>"),
    ("Seed-OSS", "{{ '<seed:think></seed:think><seed:tool_call>\\n<function=f>\\n' }}", "seed_oss", "<seed:think>"),
    ("gpt-oss", "{{ '<|start|>assistant<|channel|>analysis<|message|>' }}", "harmony", None),
    ("Muse Glimmer", "{{ ' to=self' }}{{ '<atem:invoke name=\"' }}", "muse_glimmer", None),
    ("GLM-4.6", "<tool_call>{f}\n<arg_key>{a}</arg_key>{{ '</think>' }}", "glm4_moe", "<think>"),
    ("GLM-4-0414", "[gMASK]<sop>{{ '<|assistant|>' }}{{ '<|observation|>' }}", "glm4", None),
    ("MiniMax-M2", "{%- set begin = '<minimax:tool_call>' -%}<invoke name=\"f\"></think>", "minimax_m2", "<think>"),
    ("MiniCPM5", "{{ '<function name=\"' }}{{ '<param name=\"' }}{{ '</think>' }}", "minicpm5", "<think>"),
    ("Kimi K2", "<|tool_call_begin|>{{ id }}<|tool_call_argument_begin|>", "kimi_k2", None),
    ("Command A", "<|START_ACTION|>[ <|END_THINKING|>", "command_a", "<|START_THINKING|>"),
    ("Command R+", "{{ 'Action:\\n```json\\n[' }}{{ 'tool_name' }}", "command_r", None),
    ("Apertus", "{%- set begin = '<|tools_prefix|>' -%}", "apertus", None),
    ("Granite 3.3", "{{ 'respond only with <|tool_call|> followed by a JSON list' }}</think>", "granite3", "<think>"),
    ("Hunyuan", "{{ '<tool_calls>' }}{{ '</think>' }}", "hunyuan", "<think>"),
    ("OLMo 3", "{{ '<functions>' }}{{ '<function_calls>' }}", "olmo3", None),
    ("SmolLM2", "{{ '<|im_start|>' + message['role'] }}", None, None),
]


@pytest.mark.parametrize(("model", "template", "calls", "start"), TEMPLATES)
def test_the_template_decides_the_format(model: str, template: str, calls: str | None, start: str | None) -> None:
    found = OutputFormat.of(template)
    assert (found.calls and found.calls.name) == calls, model
    assert (found.reasoning and found.reasoning.start) == start, model


@pytest.mark.parametrize("start", REASONING)
def test_reasoning_is_told_apart(start: str) -> None:
    end = REASONING[start].end
    for text in (f"{start}\nI think.\n\nSo.\n{end}\n\n Yes.\n", f"\n{start}I think.\n\nSo.{end}Yes.\n"):
        parts = [reasoning("I think.\n\nSo."), content("Yes.\n")]
        assert parsed(parser(None, start), [text]) == parts
        assert parsed(parser(None, start), text) == parts


CASES: list[tuple[str, str, list[Part]]] = [
    ("begins in the prompt", "I think.\n</think>\n\nYes.", [reasoning("I think."), content("Yes.")]),
    ("never ends", "I think. </thin", [reasoning("I think. </thin")]),
    ("is empty", "\n\n</think>\n\nYes.", [content("Yes.")]),
    ("ends the answer", "I think.</think>\n", [reasoning("I think.")]),
    ("holds its own mark", "a <think> b</think>c</think>", [reasoning("a <think> b"), content("c</think>")]),
    ("holds a call", '<tool_call>{"name": "now"}</think>c', [reasoning('<tool_call>{"name": "now"}'), content("c")]),
    ("stands before a call", 'a</think>\n<tool_call>{"name": "now"}', [reasoning("a"), call(0, "now", "{}")]),
]


@pytest.mark.parametrize(("name", "text", "parts"), CASES)
def test_reasoning_that_the_prompt_opens(name: str, text: str, parts: list[Part]) -> None:
    for pieces in ([text], text):
        assert parsed(parser("hermes", "<think>", prompt_end="<|im_start|>assistant\n<think>\n"), pieces) == parts, name


@pytest.mark.parametrize(
    "text",
    ["No thought.", " \nNo <think>x</think>", "<thin", "<", "", " \n", "</think>x", "So: <think>\n", "a\n\n", "<b>x"],
)
def test_text_that_does_not_begin_with_the_mark_is_content(text: str) -> None:
    for pieces in ([text], text):
        for form in (None, "hermes"):
            assert parsed(parser(form, "<think>"), pieces) == ([content(text)] if text else []), form


def test_a_prompt_that_closes_the_reasoning_leaves_content() -> None:
    one = parser(None, "<think>", prompt_end="<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert parsed(one, ["Yes."]) == [content("Yes.")]


@pytest.mark.parametrize("prompt_end", ["", "<think>\n"])
def test_reasoning_stays_in_the_content_if_it_is_not_told_apart(prompt_end: str) -> None:
    text = '\n\nI <tool_call>{"name": "now"} think.\n</think>\n\n Yes. '
    text = text if prompt_end else f"<think>{text}"
    for form in (None, "hermes"):
        for pieces in ([text], text):
            assert parsed(parser(form, "<think>", prompt_end=prompt_end, tells_reasoning=False), pieces) == [
                content(text)
            ]
    called = f'{text}\n<tool_call>{{"name": "now"}}</tool_call>'
    one = parser("hermes", "<think>", prompt_end=prompt_end, tells_reasoning=False)
    assert parsed(one, called) == [content(text.rstrip()), call(0, "now", "{}")]


def test_reasoning_streams_as_it_comes() -> None:
    one = parser(None, "<think>")
    pieces = ["<th", "ink>", "\n", "I", " think", ".\n", "</thi", "nk>", "\n\n", "Yes", " ", "!"]
    shown = [[(part.kind[0], part.text) for part in one.push(piece)] for piece in pieces]
    assert shown == [
        [],
        [],
        [],
        [("r", "I")],
        [("r", " think")],
        [("r", ".")],
        [],
        [],
        [],
        [("c", "Yes")],
        [("c", " ")],
        [("c", "!")],
    ]


def test_ids_of_calls_have_the_form_that_the_template_accepts() -> None:
    assert all(re.fullmatch("[A-Za-z0-9]{9}", OutputFormat.of("[TOOL_CALLS]").new_call_id()) for _ in range(20))
    assert re.fullmatch("call_[0-9a-f]{24}", OutputFormat.of("<tool_call>").new_call_id())
    assert OutputFormat().new_call_id() != OutputFormat().new_call_id()


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("</think><answer></answer>", "<think>\nI think.\n</think>\n<answer>\nYes: </b>.\n</answer>\n"),
        ("</think><response></response>", "\n<think>I think.</think>\n\n<response>\nYes: </b>.\n</response>"),
        (
            "<|END_THINKING|><|START_RESPONSE|><|END_RESPONSE|>",
            "<|START_THINKING|>I think.<|END_THINKING|><|START_RESPONSE|>Yes: </b>.<|END_RESPONSE|>",
        ),
    ],
)
def test_marks_around_the_answer_are_left_out(template: str, text: str) -> None:
    for pieces in ([text], text):
        one = OutputFormat.of(template).parser([], "", tells_reasoning=True)
        assert parsed(one, pieces) == [reasoning("I think."), content("Yes: </b>.")]


def test_marks_of_an_answer_within_text_are_content() -> None:
    form = OutputFormat.of("<answer></answer>")
    for text in ("So <answer>x</answer>", "<answer", "</answer> x", " x\n"):
        for pieces in ([text], text):
            assert parsed(form.parser([], "", tells_reasoning=True), pieces) == [content(text)]
