"""/v1/chat/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from forge.config import SamplingParams
from forge.engine import TokenLogprobs
from forge.server.api.common import DONE, chat_logprobs, last_events, server_of, usage
from forge.server.api.generation import Output, chat_generation
from forge.server.api.messages import checked_messages
from forge.server.api.tools import Tool, shown_tools
from forge.server.errors import HTTPError
from forge.server.exchange import Event, respond
from forge.server.parts import Part
from forge.server.schemas import (
    NOT_CONSTRAINED,
    WITHOUT_EFFECT,
    Effort,
    Entries,
    Items,
    Logprobs,
    OpenAIBody,
    TokenCount,
    effort_variables,
)
from forge.server.settings import ServerSettings
from forge.server.state import Server, new_id

router = APIRouter()


class ChatBody(OpenAIBody):
    """The body of /v1/chat/completions."""

    refused: ClassVar[dict[str, str]] = {
        "functions": "it is the former form of tools",
        "function_call": "it is the former form of tool_choice",
        "audio": "the model writes text",
        "web_search_options": "the server looks nothing up",
        "verbosity": "no model of forge knows it",
    }
    messages: Items[dict[str, Any]] = Field(min_length=1)
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = Field(default=None, description="None: until the context is full.")
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    response_format: dict[str, Any] | None = Field(default=None, description='{"type": "text"} alone.')
    tools: Items[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Any = Field(default=None, description='"auto" or "none".')
    parallel_tool_calls: bool | None = Field(default=None, description="false: calls behind the first are left out.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")
    reasoning_effort: Effort | None = None
    prediction: dict[str, Any] | None = Field(default=None, description=f"{WITHOUT_EFFECT} It is about speed alone.")
    modalities: Items[Literal["text"]] | None = None
    store: bool | None = Field(default=None, description="true is refused: the server keeps no answers.")
    metadata: Entries[str] | None = Field(default=None, description=WITHOUT_EFFECT)
    service_tier: str | None = Field(default=None, description=WITHOUT_EFFECT)
    prompt_cache_key: str | None = Field(default=None, description=WITHOUT_EFFECT)
    safety_identifier: str | None = Field(default=None, description=WITHOUT_EFFECT)

    def params(self, settings: ServerSettings) -> SamplingParams:
        """The parameters of the request. Raises HTTPError for those that do not go together."""
        if self.response_format is not None and self.response_format != {"type": "text"}:
            kind = self.response_format.get("type")
            message = f"response_format {kind!r:.40} is not supported, only {{'type': 'text'}}: {NOT_CONSTRAINED}"
            raise HTTPError(400, message, "response_format", "unsupported_value")
        if self.store:
            raise HTTPError(400, "store is not supported: the server keeps no answers", "store", "unsupported_value")
        if self.top_logprobs is not None and not self.logprobs:
            raise HTTPError(400, "top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
        limits = self.max_tokens, self.max_completion_tokens
        if None not in limits and len(set(limits)) > 1:
            message = "max_tokens is the former name of max_completion_tokens: give one, or the same"
            raise HTTPError(400, message, "max_tokens", "invalid_value")
        return self.openai_sampling(
            settings,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )

    def template_variables(self) -> dict[str, Any]:
        """Variables of the chat template."""
        return effort_variables(self.reasoning_effort) | (self.chat_template_kwargs or {})


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, chat: ChatBody) -> Response:
    """Answer a conversation."""
    server = server_of(request)
    made = ChatAnswer(server, chat)
    return await respond(request, made, last_events, is_streamed=bool(chat.stream))


class ChatAnswer:
    """The answer to one request."""

    def __init__(self, server: Server, chat: ChatBody) -> None:
        self._server, self._chat = server, chat
        id = new_id("chatcmpl-")
        self._made = chat_generation(
            server,
            id,
            "chat",
            chat.params(server.settings),
            checked_messages(chat.messages, server),
            model=chat.model,
            tools=shown_tools(chat.tools, chat.tool_choice),
            template_variables=chat.template_variables(),
            one_call=chat.parallel_tool_calls is False,
        )
        self._head: dict[str, Any] = {
            "id": id,
            "created": int(time.time()),
            "model": self._made.model_name,
            "system_fingerprint": None,
        }

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        choices = [self._choice(output) for output in await self._made.complete()]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage(self._made)}

    def _choice(self, output: Output) -> dict[str, Any]:
        content, reasoning = _joined(output.parts, "content"), _joined(output.parts, "reasoning")
        calls = [self._call(part) for part in output.parts if part.kind == "tool_call"]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        if output.parts and not content:
            message["content"] = None
        return {
            "index": output.index,
            "message": message,
            "logprobs": self._logprobs(output.logprobs),
            "finish_reason": output.reason,
        }

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""
        async with aclosing(self._made.stream()) as arriving:
            has_begun = False
            async for outputs in arriving:
                if not has_begun:
                    has_begun = True
                    first = {"role": "assistant", "content": ""}
                    yield [self._event(first, index) for index in range(self._made.params.n)]
                if events := [event for output in outputs for event in self._output_events(output)]:
                    yield events
        if self._chat.wants_usage:
            yield [(None, self._chunk([], usage(self._made)))]
        yield [DONE]

    def _output_events(self, output: Output) -> list[Event]:
        deltas = [self._delta(part) for part in output.parts]
        logprobs = self._logprobs(output.logprobs) if output.logprobs else None
        if logprobs and not deltas:
            deltas = [{}]
        events = []
        for place, delta in enumerate(deltas):
            events.append(self._event(delta, output.index, logprobs=logprobs if place == 0 else None))
        if output.reason is not None:
            events.append(self._event({}, output.index, reason=output.reason))
        return events

    def _event(self, delta: dict[str, Any], index: int, *, logprobs: Any = None, reason: str | None = None) -> Event:
        return None, self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": choices}
        return chunk | {"usage": used} if self._chat.wants_usage else chunk

    def _logprobs(self, found: tuple[TokenLogprobs, ...] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {"content": chat_logprobs(found, self._server.encoder.tokenizer), "refusal": None}

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.kind == "tool_call":
            return {"tool_calls": [{"index": part.call, **self._call(part)}]}
        return {"content" if part.kind == "content" else "reasoning_content": part.text}

    def _call(self, part: Part) -> dict[str, Any]:
        function = {"name": part.name, "arguments": part.text}
        return {"id": self._server.output.new_call_id(), "type": "function", "function": function}


def _joined(parts: list[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)
