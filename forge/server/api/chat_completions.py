"""/v1/chat/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from forge.config import SamplingParams
from forge.engine import TokenLogprobs
from forge.outputs import Chunk, Completion
from forge.server.api.common import DONE, Usage, finish_reason, merged, server_of, token_logprobs
from forge.server.errors import HTTPError, body
from forge.server.exchange import Event, EventStream, answer
from forge.server.parts import OutputParser, Part, Plain
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
    tools: list[dict[str, Any]] | None = Field(default=None, max_length=128)
    tool_choice: Literal["auto", "none"] | None = Field(default=None, description='"auto" or "none".')
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted, without effect.")
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
        self._server, self._chat, self._params = server, chat, params
        self._head: dict[str, Any] = {
            "id": new_id("chatcmpl-"),
            "created": int(time.time()),
            "model": server.settings.model_name,
            "system_fingerprint": None,
        }

    async def _encode(self) -> list[int]:
        chat = self._chat
        return await asyncio.to_thread(
            self._server.encoder.encode_chat,
            chat.messages,
            tools=None if chat.tool_choice == "none" else chat.tools,
            template_variables=chat.chat_template_kwargs,
            parse_special=False,
        )

    def _parser(self) -> OutputParser:
        return Plain()

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        with self._server.admitted(self._head["id"], "chat", self._params.n) as record:
            ids = await self._encode()
            record.prompt_tokens = len(ids)
            completions = await self._server.client.complete([ids], self._params)
            record.add_completions(completions)
        usage = Usage(len(ids), sum(c.timings.completion_tokens for c in completions))
        choices = [self._choice(completion) for completion in completions]
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usage.as_json()}

    def _choice(self, completion: Completion) -> dict[str, Any]:
        parser = self._parser()
        parts = [*parser.push(completion.text), *parser.finish()]
        message: dict[str, Any] = {"role": "assistant", "content": _joined(parts, "content"), "refusal": None}
        if reasoning := _joined(parts, "reasoning"):
            message["reasoning_content"] = reasoning
        calls = _tool_calls(parts)
        if calls:
            message["tool_calls"] = calls
            message["content"] = message["content"] or None
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self._logprobs(completion.logprobs),
            "finish_reason": finish_reason(completion.finish_reason, has_calls=bool(calls)),
        }

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""
        usage = Usage(0, 0)
        parsers = [self._parser() for _ in range(self._params.n)]
        has_calls = [False] * self._params.n
        wants_usage = bool(self._chat.stream_options and self._chat.stream_options.include_usage)
        with self._server.admitted(self._head["id"], "chat", self._params.n) as record:
            ids = await self._encode()
            usage.prompt = record.prompt_tokens = len(ids)
            yield []  # accepted: what follows is part of the stream
            yield [self._event({"role": "assistant", "content": ""}, index) for index in range(self._params.n)]
            async for chunks in self._server.client.stream([ids], self._params):
                record.add_chunks(chunks)
                events: list[Event] = []
                for chunk in merged(chunks):
                    parts = parsers[chunk.index].push(chunk.text)
                    if chunk.finish_reason is not None:
                        parts = [*parts, *parsers[chunk.index].finish()]
                    has_calls[chunk.index] |= any(part.kind == "tool_call" for part in parts)
                    events += self._chunk_events(chunk, parts, has_calls[chunk.index])
                    usage.completion += chunk.timings.completion_tokens if chunk.timings else 0
                if events:
                    yield events
        if wants_usage:
            yield [(None, {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": usage.as_json()})]
        yield [DONE]

    def _chunk_events(self, chunk: Chunk, parts: list[Part], has_calls: bool) -> list[Event]:
        deltas = [_delta(part) for part in parts]
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


def _joined(parts: list[Part], kind: str) -> str:
    return "".join(part.text for part in parts if part.kind == kind)


def _tool_calls(parts: list[Part]) -> list[dict[str, Any]]:
    calls: dict[int, dict[str, Any]] = {}
    for part in parts:
        if part.kind != "tool_call":
            continue
        call = calls.setdefault(
            part.call, {"id": new_id("call_"), "type": "function", "function": {"name": part.name, "arguments": ""}}
        )
        call["function"]["arguments"] += part.text
    return list(calls.values())


def _delta(part: Part) -> dict[str, Any]:
    if part.kind == "content":
        return {"content": part.text}
    if part.kind == "reasoning":
        return {"reasoning_content": part.text}
    call: dict[str, Any] = {"index": part.call, "function": {"arguments": part.text}}
    if part.name is not None:
        call |= {"id": new_id("call_"), "type": "function", "function": {"name": part.name, "arguments": part.text}}
    return {"tool_calls": [call]}
