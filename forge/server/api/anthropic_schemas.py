"""Requests of Anthropic's API, and the conversations in OpenAI's form that they stand for."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from forge.config import SamplingParams
from forge.server.api.tools import Function, Tool, ToolName, shown_tools
from forge.server.errors import HTTPError
from forge.server.schemas import (
    NOT_CONSTRAINED,
    WITHOUT_EFFECT,
    Body,
    Effort,
    Items,
    ModelName,
    SamplingBody,
    Strict,
    TokenCount,
    at_most,
    effort_variables,
)
from forge.server.settings import ServerSettings

_BILLING = re.compile(r"\Ax-anthropic-billing-header:[^\n]*\n?")
"""Claude Code's note: it differs for each conversation, so no prompt would begin as one in the prefix cache does."""
CacheControl = Annotated[dict[str, Any] | None, Field(description=WITHOUT_EFFECT)]
"""The prefix cache needs no marks."""


class Text(Body):
    type: Literal["text"]
    text: str
    cache_control: CacheControl = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None


class Thinking(Body):
    type: Literal["thinking"]
    thinking: str
    signature: str = Field(default="", description=f"{WITHOUT_EFFECT} The server signs nothing.")


class ToolUse(Body):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any]
    cache_control: CacheControl = None
    caller: dict[str, Any] | None = Field(default=None, description=WITHOUT_EFFECT)


class ToolResult(Body):
    type: Literal["tool_result"]
    tool_use_id: str
    content: str | Items[Text] | None = None
    is_error: bool | None = Field(default=None, description='true: "Error: " stands before the content.')
    cache_control: CacheControl = None


Block = Annotated[Text | Thinking | ToolUse | ToolResult, Field(discriminator="type")]


class Message(Body):
    role: Literal["user", "assistant", "system"]
    content: str | Items[Block]


class AnthropicTool(Body):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Strict = None
    cache_control: CacheControl = None
    eager_input_streaming: bool | None = Field(default=None, description=WITHOUT_EFFECT)
    allowed_callers: Items[Literal["direct"]] | None = Field(default=None, description=WITHOUT_EFFECT)
    defer_loading: Literal[False] | None = Field(default=None, description="The model is shown all tools.")


class ToolChoice(Body):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: TokenCount | None = Field(default=None, description=WITHOUT_EFFECT)
    display: Literal["summarized"] | None = Field(
        default=None, description=f"{WITHOUT_EFFECT} Reasoning is given as it is."
    )


class ContextManagement(Body):
    """Changes of the conversation."""

    edits: Items[dict[str, Any]] | None = Field(default=None, description="None is applied, as the answer says.")


class OutputConfig(Body):
    """How the model is to answer."""

    effort: Effort | None = None
    format: dict[str, Any] | None = Field(default=None, description="Refused.")


class CountBody(Body):
    """The body of /v1/messages/count_tokens."""

    refused: ClassVar[dict[str, str]] = {
        "mcp_servers": "the server calls no other one",
        "container": "the server runs no code",
        "output_format": NOT_CONSTRAINED,
    }
    model: str = ModelName
    messages: Items[Message] = Field(min_length=1)
    system: str | Items[Text] | None = None
    tools: Items[AnthropicTool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = Field(default=None, description='Of the type "auto" or "none".')
    thinking: ThinkingConfig | None = None
    context_management: ContextManagement | None = None
    output_config: OutputConfig | None = None
    cache_control: CacheControl = None

    @model_validator(mode="after")
    def _has_no_format(self) -> Self:
        if self.output_config and self.output_config.format is not None:
            field = "output_config.format"
            raise HTTPError(400, f"this is not supported: {NOT_CONSTRAINED}", field, "unsupported_value")
        return self

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last message."""
        last = self.messages[-1]
        is_text = isinstance(last.content, str) or all(isinstance(block, Text) for block in last.content)
        return last.role == "assistant" and is_text and bool(last.content)

    @property
    def one_call(self) -> bool:
        """Whether calls behind the first one are unwanted."""
        return bool(self.tool_choice and self.tool_choice.disable_parallel_tool_use)

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown, in OpenAI's form. Raises HTTPError for a choice that constrains it."""
        tools = [
            Tool(
                type="function",
                function=Function(name=tool.name, description=tool.description, parameters=tool.input_schema),
            )
            for tool in self.tools or ()
        ]
        return shown_tools(tools, self.tool_choice and self.tool_choice.type)

    def template_variables(self) -> dict[str, Any]:
        """Whether and how much the model is to think, as Qwen's templates and others like them have it."""
        found = effort_variables(self.output_config.effort if self.output_config else None)
        return found if self.thinking is None else found | {"enable_thinking": self.thinking.type != "disabled"}

    def conversation(self) -> list[dict[str, Any]]:
        """The messages in OpenAI's form."""
        found: list[dict[str, Any]] = []
        if system := _system(self.system or ""):
            found.append({"role": "system", "content": system})
        for place, message in enumerate(self.messages):
            where = f"messages.{place}.content"
            if message.role == "system":
                _add(found, {"role": "user", "content": _texts(message.content, where)})
            elif isinstance(message.content, str):
                _add(found, {"role": message.role, "content": message.content})
            elif message.role == "assistant":
                found.append(_assistant(message.content, where))
            else:
                for one in _user(message.content, where):
                    _add(found, one)
        return found


class MessagesBody(CountBody, SamplingBody):
    """The body of /v1/messages."""

    max_tokens: TokenCount
    stop_sequences: Items[str] | None = None
    metadata: dict[str, Any] | None = Field(default=None, description=WITHOUT_EFFECT)
    service_tier: Literal["auto", "standard_only"] | None = Field(default=None, description=WITHOUT_EFFECT)
    thread: dict[str, Any] | None = Field(default=None, description="Refused: Anthropic's client goes on without.")

    def params(self, settings: ServerSettings) -> SamplingParams:
        """The parameters of the request. Raises HTTPError for what the server does not allow."""
        if self.thread is not None:
            raise HTTPError(400, "the server keeps no conversations", "thread", "thread_unsupported_request")
        stop = self.stop_sequences or []
        at_most("stop_sequences", len(stop), settings.max_stop)
        return self.sampling(stop=stop, max_tokens=self.max_tokens)


def _system(system: str | list[Text]) -> Any:
    """The system prompt without a note for billing."""
    if isinstance(system, str):
        return _BILLING.sub("", system)
    return [{"type": "text", "text": text} for block in system if (text := _BILLING.sub("", block.text))]


def _add(found: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Add a message. Those of the user in a row are one, as in Anthropic's API: many templates refuse two.

    A line feed is between their texts: there are templates that put nothing between parts.
    """
    if not (found and found[-1]["role"] == message["role"] == "user"):
        found.append(message)
        return
    before, after = _parts(found[-1]["content"]), _parts(message["content"])
    if before and after:
        *before, last = before
        first, *after = after
        before.append({"type": "text", "text": f"{last['text']}\n{first['text']}"})
    found[-1]["content"] = before + after


def _parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return content


def _texts(content: str | list[Block], where: str) -> list[dict[str, Any]]:
    """A system message amid others, which is the user's: templates know one system message, the first."""
    if isinstance(content, str):
        return _parts(content)
    texts = []
    for place, block in enumerate(content):
        if not isinstance(block, Text):
            raise HTTPError(400, "a system message has text alone", f"{where}.{place}", "invalid_value")
        texts.append(_text(block))
    return texts


def _result(block: ToolResult) -> Any:
    """The content of a result. Templates know no mark of an error."""
    before = "Error: " if block.is_error else ""
    if not isinstance(block.content, list):
        return before + (block.content or "")
    texts = [one.text for one in block.content] or [""]
    return [{"type": "text", "text": text} for text in (before + texts[0], *texts[1:])]


def _text(block: Text) -> dict[str, Any]:
    return {"type": "text", "text": block.text}


def _assistant(blocks: list[Any], where: str) -> dict[str, Any]:
    """One message, with the calls of its blocks."""
    texts = [_text(block) for block in blocks if isinstance(block, Text)]
    message: dict[str, Any] = {"role": "assistant", "content": texts or None}
    if thoughts := [block.thinking for block in blocks if isinstance(block, Thinking)]:
        message["reasoning_content"] = "\n".join(thoughts)
    calls = []
    for place, block in enumerate(blocks):
        if isinstance(block, ToolResult):
            raise _misplaced(f"{where}.{place}", "the user's")
        if isinstance(block, ToolUse):
            function = {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)}
            calls.append({"id": block.id, "type": "function", "function": function})
    return message | ({"tool_calls": calls} if calls else {})


def _user(blocks: list[Any], where: str) -> list[dict[str, Any]]:
    """Results of calls as messages of their own, and texts between them as the user's."""
    found: list[dict[str, Any]] = []
    for place, block in enumerate(blocks):
        if isinstance(block, ToolResult):
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": _result(block)})
        elif not isinstance(block, Text):
            raise _misplaced(f"{where}.{place}", "the assistant's")
        elif found and found[-1]["role"] == "user":
            found[-1]["content"].append(_text(block))
        else:
            found.append({"role": "user", "content": [_text(block)]})
    return found or [{"role": "user", "content": ""}]


def _misplaced(field: str, whose: str) -> HTTPError:
    return HTTPError(400, f"such a block belongs to a message of {whose}", field, "invalid_value")
