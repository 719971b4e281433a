"""Requests of Anthropic's API, and the conversations in OpenAI's form that they stand for."""

from __future__ import annotations

import json
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from forge.config import SamplingParams
from forge.server.api.tools import Function, Tool, ToolName, shown_tools
from forge.server.errors import HTTPError
from forge.server.schemas import WITHOUT_EFFECT, Body, ModelName, SamplingBody, TokenCount, at_most
from forge.server.settings import ServerSettings

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
    signature: str = Field(default="", description="Not checked: the server signs nothing.")


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
    content: str | list[Text] | None = None
    is_error: bool | None = Field(default=None, description="Accepted, without effect: templates know no such mark.")
    cache_control: CacheControl = None


Block = Annotated[Text | Thinking | ToolUse | ToolResult, Field(discriminator="type")]


class Message(Body):
    role: Literal["user", "assistant"]
    content: str | list[Block]


class AnthropicTool(Body):
    type: Literal["custom"] | None = None
    name: ToolName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: Literal[False] | None = Field(default=None, description="The server does not constrain the arguments.")
    cache_control: CacheControl = None


class ToolChoice(Body):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class ThinkingConfig(Body):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: TokenCount | None = Field(default=None, description="Accepted, without effect.")
    display: Literal["summarized"] | None = Field(default=None, description="Reasoning is given as it is.")


class CountBody(Body):
    """The body of /v1/messages/count_tokens."""

    refused: ClassVar[dict[str, str]] = {
        "mcp_servers": "the server calls no other one",
        "container": "the server runs no code",
        "output_config": "the server does not constrain what a model writes",
        "output_format": "the server does not constrain what a model writes",
        "context_management": "the server changes no conversation",
    }
    model: str = ModelName
    messages: list[Message] = Field(min_length=1)
    system: str | list[Text] | None = None
    tools: list[AnthropicTool] | None = Field(default=None, max_length=128)
    tool_choice: ToolChoice | None = Field(default=None, description='Of the type "auto" or "none".')
    thinking: ThinkingConfig | None = None
    cache_control: CacheControl = None

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
        """Whether the model is to think, as Qwen's templates and others like them have it."""
        return {} if self.thinking is None else {"enable_thinking": self.thinking.type != "disabled"}

    def conversation(self) -> list[dict[str, Any]]:
        """The messages in OpenAI's form."""
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": _content(self.system)})
        for place, message in enumerate(self.messages):
            if isinstance(message.content, str):
                found.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                found.append(_assistant(message.content, f"messages.{place}.content"))
            else:
                found += _user(message.content, f"messages.{place}.content")
        return found


class MessagesBody(CountBody, SamplingBody):
    """The body of /v1/messages."""

    max_tokens: TokenCount
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = Field(default=None, description=WITHOUT_EFFECT)
    service_tier: Literal["auto", "standard_only"] | None = Field(default=None, description=WITHOUT_EFFECT)

    def params(self, settings: ServerSettings) -> SamplingParams:
        """The parameters of the request. Raises HTTPError for what the server does not allow."""
        stop = self.stop_sequences or []
        at_most("stop_sequences", len(stop), settings.max_stop)
        return self.sampling(stop=stop, max_tokens=self.max_tokens)


def _content(content: str | list[Text]) -> Any:
    return content if isinstance(content, str) else [_text(block) for block in content]


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
            content = _content(block.content or "")
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        elif not isinstance(block, Text):
            raise _misplaced(f"{where}.{place}", "the assistant's")
        elif found and found[-1]["role"] == "user":
            found[-1]["content"].append(_text(block))
        else:
            found.append({"role": "user", "content": [_text(block)]})
    return found or [{"role": "user", "content": ""}]


def _misplaced(field: str, whose: str) -> HTTPError:
    return HTTPError(400, f"such a block belongs to a message of {whose}", field, "invalid_value")
