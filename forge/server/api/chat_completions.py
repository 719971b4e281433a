"""/v1/chat/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from forge.config import SamplingParams
from forge.engine import TokenLogprobs
from forge.outputs import Chunk, Completion
from forge.server.api.common import DONE, Usage, finish_reason, merged, server_of, token_logprobs
from forge.server.api.tools import Tool, shown_tools
from forge.server.errors import HTTPError, body
from forge.server.exchange import Event, EventStream, answer
from forge.server.parts import OutputParser, Part
from forge.server.schemas import Logprobs, SamplingBody, StreamOptions
from forge.server.state import Server, new_id

router = APIRouter()


class ChatBody(SamplingBody):
    """The body of /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    stream_options: StreamOptions | None = None
    response_format: dict[str, Any] | None = Field(default=None, description='{"type": "text"} alone.')
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Any = Field(default=None, description='"auto" or "none".')
    parallel_tool_calls: bool | None = Field(default=None, description="false: calls behind the first are left out.")
    chat_template_kwargs: dict[str, Any] | None = Field(default=None, description="Variables of the chat template.")
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = Field(default=None, description="Accepted, without effect.")
    service_tier: str | None = Field(default=None, description="Accepted, without effect.")


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, chat: ChatBody) -> Response:
    """Answer a conversation."""
    server = server_of(request)
    params = _params(chat, server)
    made = ChatAnswer(server, chat, params)
    if not chat.stream:
        return await answer(request, made.complete())

    def on_error(error: HTTPError) -> list[Event]:
        return [(None, body(error, "/")), DONE]

    return EventStream(made.events(), on_error, send_seconds=server.settings.send_seconds)


def _params(chat: ChatBody, server: Server) -> SamplingParams:
    if (kind := (chat.response_format or {}).get("type", "text")) != "text":
        message = f"response_format {kind!r:.40} is not supported: the server does not constrain what a model writes"
        raise HTTPError(400, message, "response_format", "unsupported_value")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise HTTPError(400, "top_logprobs needs logprobs to be true", "top_logprobs", "invalid_value")
    if chat.max_tokens is not None and chat.max_completion_tokens is not None:
        raise HTTPError(400, "max_tokens is the former name of max_completion_tokens: give one", "max_tokens")
    return chat.sampling(
        server.settings,
        max_tokens=chat.max_completion_tokens or chat.max_tokens,
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
    )


class ChatAnswer:
    """The answer to one request."""

    def __init__(self, server: Server, chat: ChatBody, params: SamplingParams) -> None:
        self._server, self._chat = server, chat
        self._tools = shown_tools(chat.tools, chat.tool_choice)
        calls = server.output.calls
        self._params = replace(params, stop=(*params.stop, *calls.stop)) if self._tools and calls else params
        self._head: dict[str, Any] = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": server.settings.model_name,
            "system_fingerprint": None,
        }

    async def _encode(self) -> list[int]:
        return await asyncio.to_thread(
            self._server.encoder.encode_chat,
            self._chat.messages,
            tools=self._tools,
            template_variables=self._chat.chat_template_kwargs,
            parse_special=False,
        )

    def _parts(self, parser: OutputParser, text: str, *, ends: bool) -> list[Part]:
        parts = [*parser.push(text), *(parser.finish() if ends else ())]
        return [part for part in parts if not part.call or self._chat.parallel_tool_calls is not False]

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        with self._server.admitted(self._head["id"], "chat", self._params.n) as record:
            ids = await self._encode()
            record.prompt_tokens = len(ids)
            parsers = [self._server.parser(self._tools, ids) for _ in range(self._params.n)]
            completions = await self._server.client.complete([ids], self._params)
            record.add_completions(completions)
        usage = Usage(len(ids), sum(c.timings.completion_tokens for c in completions))
        choices = [self._choice(*found) for found in zip(completions, parsers, strict=True)]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage.as_json()}

    def _choice(self, completion: Completion, parser: OutputParser) -> dict[str, Any]:
        parts = self._parts(parser, completion.text, ends=True)
        content, reasoning = _joined(parts, "content"), _joined(parts, "reasoning")
        calls = [self._call(part) for part in parts if part.kind == "tool_call"]
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reasoning:
            message["reasoning_content"] = reasoning
        if calls:
            message["tool_calls"] = calls
        if parts and not content:
            message["content"] = None
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": finish_reason(completion.finish_reason, has_calls=bool(calls)),
        }

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""
        usage = Usage(0, 0)
        has_calls = [False] * self._params.n
        wants_usage = bool(self._chat.stream_options and self._chat.stream_options.include_usage)
        with self._server.admitted(self._head["id"], "chat", self._params.n) as record:
            ids = await self._encode()
            usage.prompt = record.prompt_tokens = len(ids)
            parsers = [self._server.parser(self._tools, ids) for _ in range(self._params.n)]
            yield []  # accepted: what follows is part of the stream
            yield [self._event({"role": "assistant", "content": ""}, index) for index in range(self._params.n)]
            async for chunks in self._server.client.stream([ids], self._params):
                record.add_chunks(chunks)
                events: list[Event] = []
                for chunk in merged(chunks):
                    ends = chunk.finish_reason is not None
                    parts = self._parts(parsers[chunk.index], chunk.text, ends=ends)
                    has_calls[chunk.index] |= any(part.kind == "tool_call" for part in parts)
                    events += self._chunk_events(chunk, parts, has_calls[chunk.index])
                    usage.completion += chunk.timings.completion_tokens if chunk.timings else 0
                if events:
                    yield events
        if wants_usage:
            yield [(None, {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.as_json()})]
        yield [DONE]

    def _chunk_events(self, chunk: Chunk, parts: list[Part], has_calls: bool) -> list[Event]:
        deltas = [self._delta(part) for part in parts]
        logprobs = self._logprobs(chunk.logprobs) if chunk.logprobs else None
        if logprobs and not deltas:
            deltas = [{}]
        events = []
        for place, delta in enumerate(deltas):
            events.append(self._event(delta, chunk.index, logprobs=logprobs if place == 0 else None))
        if chunk.finish_reason is not None:
            reason = finish_reason(chunk.finish_reason, has_calls=has_calls)
            events.append(self._event({}, chunk.index, reason=reason))
        return events

    def _event(self, delta: dict[str, Any], index: int, *, logprobs: Any = None, reason: str | None = None) -> Event:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return None, {**self._head, "object": "chat.completion.chunk", "choices": [choice]}

    def _logprobs(self, found: tuple[TokenLogprobs, ...] | None) -> dict[str, Any] | None:
        if found is None:
            return None
        return {"content": token_logprobs(found, self._server.encoder.tokenizer), "refusal": None}

    def _delta(self, part: Part) -> dict[str, Any]:
        if part.kind == "tool_call":
            return {"tool_calls": [{"index": part.call, **self._call(part)}]}
        return {"content" if part.kind == "content" else "reasoning_content": part.text}

    def _call(self, part: Part) -> dict[str, Any]:
        function = {"name": part.name, "arguments": part.text}
        return {"id": self._server.output.new_call_id(), "type": "function", "function": function}


def _joined(parts: list[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)
