"""The formats of models' answers, and which of them a chat template asks for."""

from __future__ import annotations

from dataclasses import dataclass

from forge.server.parsing import calls
from forge.server.parsing.calls import Reader


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


CALL_FORMATS = (  # the first one that fits counts
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
    CallFormat(  # the outer tag is often forgotten
        name="qwen3_coder",
        signs=("<function=", "<parameter="),
        marks=("<tool_call>", "<function="),
        read=calls.xml_call,
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


def call_format(template: str) -> CallFormat | None:
    """The format of a model with this chat template."""
    return next((one for one in CALL_FORMATS if all(sign in template for sign in one.signs)), None)


def reasoning_format(template: str) -> ReasoningFormat | None:
    """The marks of a model with this chat template."""
    return next((one for one in REASONING_FORMATS if one.end in template), None)
