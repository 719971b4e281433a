"""`forge chat`: a conversation in the terminal, or an answer to a question, to stdin, or to each of its lines."""

from __future__ import annotations

import json
import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli import options, output, parts
from forge.errors import ForgeError, ParameterError

if TYPE_CHECKING:
    from forge.cli.chat.conversation import Conversation
    from forge.llm import LLM

_Question = Annotated[
    str | None,
    typer.Argument(
        metavar="QUESTION",
        help="Answer this and end; piped text goes below it, and - is that text alone. [default: talk]",
        show_default=False,
    ),
]
_Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        help="0 takes the most probable token each time. [default: 0.7 in a conversation, else 0]",
    ),
]
_OUR_VARIABLES = {"messages", "tools", "add_generation_prompt", "continue_final_message"}


@options.takes_groups(top_p=0.95)
def command(
    question: _Question = None,
    model: options.Model = options.DEFAULT_MODEL,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="Instructions. [default: the template's]")
    ] = None,
    assistant: Annotated[
        str | None, typer.Option("--assistant", metavar="TEXT", help="Begin each answer with this; the model goes on.")
    ] = None,
    lines: Annotated[bool, typer.Option("--lines", help="Answer each line of stdin, each by itself.")] = False,
    chat_template: options.ChatTemplate = None,
    chat_template_kwargs: Annotated[
        str | None,
        typer.Option(
            "--chat-template-kwargs", metavar="JSON", help="""Variables of the template: '{"name": value}'."""
        ),
    ] = None,
    no_think: Annotated[
        bool, typer.Option("--no-think", help="Answer without thinking first: enable_thinking=false in the template.")
    ] = False,
    no_context_shift: Annotated[
        bool,
        typer.Option("--no-context-shift", help="Refuse what does not fit; by default the oldest turns are dropped."),
    ] = False,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="N", help="Most tokens of an answer. [default: what the context holds]"),
    ] = None,
    temperature: _Temperature = None,
    *,
    sampling: dict[str, Any],
    loading: dict[str, Any],
    adapter: options.Adapter = None,
    timings: options.Timings = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer.")] = False,
) -> None:
    """Talk with a model, or answer QUESTION or what is piped in. /help shows the commands of a conversation."""
    from forge.cli.chat.conversation import Conversation
    from forge.config import SamplingParams

    is_piped = not output.is_terminal(sys.stdin)
    talks = question is None and not is_piped and not lines
    if temperature is None:  # a single answer is the same each time, as with forge generate
        temperature = 0.7 if talks else 0.0
    params = SamplingParams(max_tokens=max_tokens, temperature=temperature, **sampling)
    variables = _variables(chat_template_kwargs)
    if no_think:
        variables["enable_thinking"] = False
    if lines and question is not None:
        what = "--lines answers the lines of standard input"
        raise ParameterError(what, parameter="question", hint="leave out QUESTION")
    if talks and as_json:
        raise ParameterError("--json needs a QUESTION, or text on standard input", parameter="question")
    adapters = options.adapters_of([adapter] if adapter else [])
    with options.loaded(model, chat_template=chat_template, adapters=adapters, **loading) as llm:
        conversation = Conversation(llm, params, system, assistant or "", variables, drops=not no_context_shift)
        conversation.render_once()  # an error of the template comes before any input is read
        message = None if talks or lines else _message(question, is_piped)
        _check_variables(variables, llm, no_think)
        if talks:
            from forge.cli.chat.talk import talk

            talk(conversation)
        elif message is not None:
            _answer(conversation, message, as_json)
        else:
            _answer_lines(conversation, as_json)
        if timings:
            latest = conversation.timings
            parts.write(llm, latest.prefill_ms if latest else None)


def _message(question: str | None, is_piped: bool) -> str:
    """The question, and below it the text that is piped in."""
    if question is None or question == "-":
        question, is_piped = "", True
    elif sys.stdin is None:
        is_piped = False
    piped = ""
    if is_piped:
        output.await_stdin()
        try:
            piped = output.read_text("-").rstrip()
        except ForgeError as error:
            if not question or not isinstance(error.__context__, OSError):
                raise
            output.note(str(error))
    if question:
        options.check_text(question, "QUESTION")
    message = "\n".join(part for part in (question, piped) if part.strip())
    if not message:
        raise ForgeError("there is nothing to answer: give a QUESTION, or text on standard input")
    return message


def _answer(conversation: Conversation, message: str, as_json: bool) -> None:
    if as_json:
        output.write_json(conversation.answer_json(message))
    else:
        conversation.ask(message)


def _answer_lines(conversation: Conversation, as_json: bool) -> None:
    """Answer each line by itself, as soon as it arrives. A line that cannot be answered ends the command."""
    for number, line in enumerate(output.stdin_lines(), 1):
        if not line.strip():
            continue
        try:
            _answer(conversation, line, as_json)
        except ForgeError as error:
            where = f"standard input, line {number}"
            raise type(error)(f"{where}: {error.args[0]}", parameter=error.parameter, hint=error.hint) from None
        conversation.reset()


def _variables(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text) if text is not None else {}
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        message = """chat_template_kwargs must be a JSON object such as '{"enable_thinking": false}'"""
        raise ParameterError(message, parameter="chat_template_kwargs")
    for name in found.keys() & _OUR_VARIABLES:
        raise ParameterError(f"chat_template_kwargs must not set {name}", parameter="chat_template_kwargs")
    return found


def _check_variables(variables: dict[str, Any], llm: LLM, no_think: bool) -> None:
    """Write a note for each variable that the template never reads."""
    template = llm.chat_template
    assert template is not None  # render_once has passed
    for name in variables:
        if not re.search(rf"\b{re.escape(name)}\b", template.sources):
            flag = "--no-think" if no_think and name == "enable_thinking" else "--chat-template-kwargs"
            output.note(f"the chat template has no variable {name!r:.100}: {flag} changes nothing")
