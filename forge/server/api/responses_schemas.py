"""Requests of OpenAI's Responses API, and the conversations that they stand for."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from forge.config import SamplingParams
from forge.server.api.messages import known_role
from forge.server.api.tools import Function, Tool, shown_tools
from forge.server.errors import HTTPError
from forge.server.schemas import (
    NOT_CONSTRAINED,
    WITHOUT_EFFECT,
    Body,
    Effort,
    Entries,
    Items,
    SamplingBody,
    TokenCount,
    effort_variables,
)
from forge.server.state import Server

_NO_STATE = "the server keeps no answers: send the whole conversation as input"
ItemId = Annotated[str | None, Field(description=WITHOUT_EFFECT)]
Status = Annotated[Literal["in_progress", "completed", "incomplete"] | None, Field(description=WITHOUT_EFFECT)]


class Text(Body):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = Field(default=None, description=WITHOUT_EFFECT)
    logprobs: list[Any] | None = Field(default=None, description=WITHOUT_EFFECT)


class Message(Body):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[Text]
    id: ItemId = None
    status: Status = None
    phase: str | None = Field(default=None, description=WITHOUT_EFFECT)


class FunctionCall(Body):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: ItemId = None
    status: Status = None


class FunctionCallOutput(Body):
    type: Literal["function_call_output"]
    call_id: str
    output: str | Items[Text]
    id: ItemId = None
    status: Status = None


class ReasoningText(Body):
    type: Literal["reasoning_text", "summary_text"]
    text: str


class Reasoning(Body):
    type: Literal["reasoning"]
    summary: Items[ReasoningText] = Field(default_factory=list)
    content: Items[ReasoningText] | None = None
    id: ItemId = None
    status: Status = None
    encrypted_content: None = None


def _kind(item: Any) -> str:
    """Messages may come without a type."""
    kind = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", "")
    return kind if isinstance(kind, str) else ""


Item = Annotated[
    Annotated[Message, Tag("message")]
    | Annotated[FunctionCall, Tag("function_call")]
    | Annotated[FunctionCallOutput, Tag("function_call_output")]
    | Annotated[Reasoning, Tag("reasoning")],
    Discriminator(_kind),
]


class FunctionTool(Function):
    """A tool, whose function's fields are its own."""

    type: Literal["function"]


class TextFormat(Body):
    type: Literal["text"]


class TextConfig(Body):
    format: TextFormat | None = Field(default=None, description=f"No other one: {NOT_CONSTRAINED}.")


class StreamOptions(Body):
    include_obfuscation: bool | None = Field(default=None, description=WITHOUT_EFFECT)


class ReasoningConfig(Body):
    effort: Effort | None = None
    summary: str | None = Field(default=None, description="Accepted, without effect: reasoning is given as it is.")


class ResponsesBody(SamplingBody):
    """The body of /v1/responses."""

    refused: ClassVar[dict[str, str]] = {
        "previous_response_id": _NO_STATE,
        "conversation": _NO_STATE,
        "prompt": "the server has no stored prompts",
        "max_tool_calls": "it is about tools that the server would call itself",
        "top_logprobs": "this endpoint gives no log probabilities",
    }
    input: str | Items[Item]
    instructions: str | None = None
    max_output_tokens: TokenCount | None = Field(default=None, description="None: until the context is full.")
    tools: Items[FunctionTool] | None = Field(default=None, max_length=128)
    tool_choice: Any = Field(default=None, description='"auto" or "none".')
    parallel_tool_calls: bool | None = Field(default=None, description="false: calls behind the first are left out.")
    text: TextConfig | None = None
    include: Items[Literal["reasoning.encrypted_content"]] | None = Field(
        default=None, description=f"{WITHOUT_EFFECT} Reasoning is given in the open."
    )
    truncation: Literal["disabled"] | None = None
    stream_options: StreamOptions | None = None
    reasoning: ReasoningConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")
    store: bool | None = Field(default=None, description=f"true is refused: {_NO_STATE}.")
    background: bool | None = Field(default=None, description="true is refused.")
    metadata: Entries[str] | None = Field(default=None, description="Comes back with the answer.")
    service_tier: str | None = Field(default=None, description=WITHOUT_EFFECT)
    prompt_cache_key: str | None = Field(default=None, description=WITHOUT_EFFECT)
    safety_identifier: str | None = Field(default=None, description=WITHOUT_EFFECT)
    client_metadata: dict[str, Any] | None = Field(default=None, description=WITHOUT_EFFECT)
    user: str | None = Field(default=None, max_length=512, description=WITHOUT_EFFECT)

    def params(self) -> SamplingParams:
        """The parameters of the request. Raises HTTPError for what the server does not do."""
        for name, why in (("store", _NO_STATE), ("background", "an answer ends when its client leaves")):
            if getattr(self, name):
                raise HTTPError(400, f"{name} is not supported: {why}", name, "unsupported_value")
        return self.sampling(max_tokens=self.max_output_tokens)

    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return effort_variables(self.reasoning.effort if self.reasoning else None) | (self.chat_template_kwargs or {})

    def shown_tools(self) -> list[dict[str, Any]]:
        """The tools that the model is shown, as in the chat API."""
        tools = [
            Tool(
                type="function",
                function=Function(name=tool.name, description=tool.description, parameters=tool.parameters),
            )
            for tool in self.tools or ()
        ]
        return shown_tools(tools, self.tool_choice)

    def conversation(self, server: Server) -> list[dict[str, Any]]:
        """The input as messages of the chat API: reasoning and calls are those of one message of the assistant."""
        found: list[dict[str, Any]] = []
        if self.instructions is not None:
            found.append({"role": "system", "content": _content(self.instructions)})
        if isinstance(self.input, str):
            return [*found, {"role": "user", "content": self.input}]
        for item in self.input:
            if isinstance(item, FunctionCallOutput):
                found.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
            elif isinstance(item, Message) and item.role != "assistant":
                role, content = known_role(item.role, server), _content(item.content)
                if found and role == found[-1]["role"] == "system":  # templates know one system message, the first
                    found[-1]["content"] += content
                else:
                    found.append({"role": role, "content": content})
            else:
                _add_to_answer(found, item)
        if not found:
            raise HTTPError(400, "input is empty", "input", "invalid_value")
        return found


def _add_to_answer(found: list[dict[str, Any]], item: Message | FunctionCall | Reasoning) -> None:
    """Add an item to the assistant's last message, or to a new one where it belongs behind that."""
    last = found[-1] if found and found[-1]["role"] == "assistant" else None
    if isinstance(item, FunctionCall):
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        if last is None:
            found.append({"role": "assistant", "content": None, "tool_calls": [call]})
        else:
            last.setdefault("tool_calls", []).append(call)
    elif isinstance(item, Message):
        if last is None or last["content"] is not None or "tool_calls" in last:
            found.append({"role": "assistant", "content": _content(item.content)})
        else:
            last["content"] = _content(item.content)
    else:
        text = "\n".join(part.text for part in (item.content or item.summary))
        found.append({"role": "assistant", "content": None, "reasoning_content": text})


def _content(content: str | list[Text]) -> list[dict[str, Any]]:
    """Parts of text."""
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    return [{"type": "text", "text": text} for text in texts]
