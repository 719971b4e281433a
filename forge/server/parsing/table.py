"""The formats of models' answers, and which of them a chat template asks for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from forge.server.parsing import calls, tags
from forge.server.parsing.calls import Reader


@dataclass(frozen=True, kw_only=True)
class MessageFormat:
    """Answers that are messages `<|start|>HEADER<|message|>TEXT<|end|>`, the first header begun by the prompt.

    Attributes:
        ends: Marks at the end of a message.
        reasoning: Found in the header of a message of reasoning.
        call: Found in the header of a call. Its group is the tool's name.
    """

    ends: tuple[str, ...]
    reasoning: re.Pattern[str]
    call: re.Pattern[str]


@dataclass(frozen=True, kw_only=True)
class CallFormat:
    """How a model writes calls of tools.

    Attributes:
        name: For messages and tests.
        signs: Texts that the source of such a model's chat template holds, all of them.
        marks: Begin a call, wherever they stand.
        bare: Begins a call without a mark, at the beginning of an answer and behind a call.
        read: Reads what follows the mark.
        read_bare: Reads what begins with `bare`.
        closers: May follow a call, and are left out then.
        separators: May stand between calls and the white space there.
        stop: Ends the answer: what follows is not the model's to write.
        id_length: Letters and digits of a call's id, for templates that refuse ids of another form. None = any form.
        messages: The answer is a series of messages. None = it is one text, with marks.
    """

    name: str
    signs: tuple[str, ...]
    marks: tuple[str, ...] = ()
    read: Reader
    bare: str | None = None
    read_bare: Reader | None = None
    closers: tuple[str, ...] = ()
    separators: str = ""
    stop: tuple[str, ...] = ()
    id_length: int | None = None
    messages: MessageFormat | None = None


CALL_FORMATS = (  # the first one that fits counts
    CallFormat(  # gpt-oss, https://github.com/openai/harmony
        name="harmony",
        signs=("<|channel|>analysis<|message|>",),
        read=calls.named_call,
        messages=MessageFormat(
            ends=("<|end|>", "<|return|>", "<|call|>"),
            reasoning=re.compile(r"<\|channel\|>\s*analysis"),
            call=re.compile(r"to=functions\.([^\s<]+)"),
        ),
    ),
    CallFormat(
        name="muse_glimmer",
        signs=("<atem:invoke name=", "to=self"),
        marks=("<atem:function_calls>", '<atem:invoke name="'),
        read=tags.invoke("atem:invoke", "atem:parameter", "<atem:function_calls>"),
        closers=("</atem:function_calls>",),
        messages=MessageFormat(
            ends=("<|eom|>", "<|eot|>"),
            reasoning=re.compile(r"to=self\b"),
            call=re.compile(r"to=(?!(?:self|user)\b)([^\s<]+)"),
        ),
    ),
    CallFormat(
        name="functiongemma",
        signs=("<start_function_call>",),
        marks=("<start_function_call>",),
        read=calls.gemma_call,
        closers=("<end_function_call>",),
        stop=("<start_function_response>",),
    ),
    CallFormat(
        name="gemma4",
        signs=("<|tool_call>",),
        marks=("<|tool_call>",),
        read=calls.gemma_call,
        closers=("<tool_call|>",),
    ),
    CallFormat(
        name="mistral",
        signs=("[TOOL_CALLS]",),
        marks=("[TOOL_CALLS]",),
        read=calls.mistral_calls,
        id_length=9,
    ),
    CallFormat(
        name="seed_oss",
        signs=("<seed:tool_call>",),
        marks=("<seed:tool_call>", "<function="),
        read=tags.xml_call,
        closers=("</seed:tool_call>",),
    ),
    CallFormat(
        name="minimax_m2",
        signs=("<minimax:tool_call>", "<invoke name="),
        marks=("<minimax:tool_call>", '<invoke name="'),
        read=tags.invoke("invoke", "parameter"),
        closers=("</minimax:tool_call>",),
    ),
    CallFormat(
        name="minicpm5",
        signs=('<function name="', '<param name="'),
        marks=('<function name="',),
        read=tags.invoke("function", "param"),
    ),
    CallFormat(
        name="kimi_k2",
        signs=("<|tool_call_begin|>", "<|tool_call_argument_begin|>"),
        marks=("<|tool_calls_section_begin|><|tool_call_begin|>", "<|tool_call_begin|>"),
        read=calls.kimi_calls,
        closers=("<|tool_call_end|><|tool_calls_section_end|>", "<|tool_call_end|>"),
    ),
    CallFormat(
        name="command_a",
        signs=("<|START_ACTION|>",),
        marks=("<|START_ACTION|>",),
        read=calls.json_calls,
        closers=("<|END_ACTION|>",),
    ),
    CallFormat(
        name="command_r",
        signs=("Action:", "```json", "tool_name"),
        marks=("Action:",),
        read=calls.json_block,
    ),
    CallFormat(
        name="apertus",
        signs=("<|tools_prefix|>",),
        marks=("<|tools_prefix|>",),
        read=calls.keyed_calls,
        closers=("<|tools_suffix|>",),
        stop=("<|tools_suffix|>",),
    ),
    CallFormat(
        name="granite3",
        signs=("<|tool_call|>",),
        marks=("<|tool_call|>",),
        read=calls.json_calls,
    ),
    CallFormat(  # Hunyuan, and MiniMax-M1 with an object a line
        name="hunyuan",
        signs=("<tool_calls>",),
        marks=("<tool_calls>",),
        read=calls.json_lines,
        closers=("</tool_calls>",),
    ),
    CallFormat(
        name="olmo3",
        signs=("<function_calls>", "<functions>"),
        marks=("<function_calls>",),
        read=calls.python_lines,
    ),
    CallFormat(
        name="glm4_moe",
        signs=("<tool_call>", "<arg_key>"),
        marks=("<tool_call>",),
        read=tags.key_value_call,
        stop=("<|observation|>",),
    ),
    CallFormat(  # the outer tag is often forgotten
        name="qwen3_coder",
        signs=("<function=", "<parameter="),
        marks=("<tool_call>", "<function="),
        read=tags.xml_call,
        closers=("</tool_call>",),
    ),
    CallFormat(
        name="hermes",
        signs=("<tool_call>",),
        marks=("<tool_call>",),
        read=calls.json_calls,
        closers=("</tool_call>",),
    ),
    CallFormat(  # Llama 3.2 and 4, and what Google recommends for Gemma 3
        name="pythonic",
        signs=("[func_name1(",),
        marks=("<|python_start|>", "<|python_tag|>"),
        read=calls.pythonic_calls,
        bare="[",
        read_bare=calls.pythonic_calls,
        closers=("<|python_end|>",),
    ),
    CallFormat(  # GLM-4-0414
        name="glm4",
        signs=("<|observation|>", "<|assistant|>", "[gMASK]"),
        read=calls.name_and_json,
        bare="",
        read_bare=calls.name_and_json,
        stop=("<|observation|>",),
    ),
    CallFormat(
        name="tool_code",
        signs=("```tool_code",),
        marks=("```tool_code",),
        read=calls.python_lines,
    ),
    CallFormat(  # Llama 3.1 to 4, and what Google recommends for Gemma 3
        name="llama3_json",
        signs=("dictionary of argument name",),
        marks=("<|python_tag|>", "<|python_start|>"),
        read=calls.json_calls,
        bare="{",
        read_bare=calls.bare_json_calls,
        closers=("<|python_end|>",),
        separators=";,",
    ),
)


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around what a model thinks before it answers. Such a model's chat template holds the second one."""

    start: str
    end: str


REASONING_FORMATS = (  # the first one that fits counts
    ReasoningFormat("<think>", "</think>"),
    ReasoningFormat("[THINK]", "[/THINK]"),
    ReasoningFormat("<seed:think>", "</seed:think>"),
    ReasoningFormat("<thinking>", "</thinking>"),
    ReasoningFormat("<|channel>thought", "<channel|>"),
    ReasoningFormat("<|START_THINKING|>", "<|END_THINKING|>"),
)


ANSWER_MARKS = (  # around the content; the first ones that fit count
    ("<|START_RESPONSE|>", "<|END_RESPONSE|>"),
    ("<|START_TEXT|>", "<|END_TEXT|>"),
    ("<answer>", "</answer>"),
    ("<response>", "</response>"),
)


def call_format(template: str) -> CallFormat | None:
    """The format of a model with this chat template."""
    return next((one for one in CALL_FORMATS if all(sign in template for sign in one.signs)), None)


def reasoning_format(template: str) -> ReasoningFormat | None:
    """The marks of a model with this chat template."""
    return next((one for one in REASONING_FORMATS if one.end in template), None)


def answer_marks(template: str) -> tuple[str, str] | None:
    """The marks around the content of a model with this chat template."""
    return next((marks for marks in ANSWER_MARKS if all(mark in template for mark in marks)), None)
