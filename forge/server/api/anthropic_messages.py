"""/v1/messages and /v1/messages/count_tokens: Anthropic's API"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from forge.server.api.anthropic_schemas import CountBody, MessagesBody
from forge.server.api.common import server_of
from forge.server.api.generation import Output, chat_generation, encoded, joined
from forge.server.errors import HTTPError, body
from forge.server.exchange import Event, answer, respond
from forge.server.parts import Part
from forge.server.state import Server, new_id

router = APIRouter()
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_DELTAS = {
    # kind of a part: (type of its block's deltas, their field)
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "tool_call": ("input_json_delta", "partial_json"),
}


@router.post("/v1/messages")
async def messages(request: Request, wanted: MessagesBody) -> Response:
    """Answer a conversation."""
    server = server_of(request)
    made = MessageAnswer(server, wanted)
    return await respond(request, made, _last_events, is_streamed=bool(wanted.stream))


@router.post("/v1/messages/count_tokens")
async def count_tokens(request: Request, wanted: CountBody) -> Response:
    """How many tokens a conversation takes."""
    server = server_of(request)

    async def work() -> dict[str, Any]:
        given = wanted.conversation(), wanted.shown_tools(), wanted.template_variables()
        return {"input_tokens": len(await asyncio.to_thread(encoded, server, *given, continues=wanted.continues))}

    return await answer(request, work())


def _last_events(error: HTTPError) -> list[Event]:
    return [("error", body(error, "/v1/messages"))]


class MessageAnswer:
    """The answer to one request."""

    def __init__(self, server: Server, wanted: MessagesBody) -> None:
        self._server, self._wanted = server, wanted
        self._made = chat_generation(
            server,
            new_id("msg_"),
            "messages",
            wanted.params(server.settings),
            wanted.conversation(),
            model=wanted.model,
            tools=wanted.shown_tools(),
            template_variables=wanted.template_variables(),
            continues=wanted.continues,
            one_call=wanted.one_call,
        )
        self._edits: dict[str, Any] = {"context_management": {"applied_edits": []}} if wanted.context_management else {}
        """The server changes no conversation, and says so where it is asked to."""
        self._index = -1
        """Of the open block."""
        self._kind: str | None = None

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        [output] = await self._made.complete()
        blocks = [self._block(part) for part in joined(output.parts)]
        return self._message(blocks, output)

    def _block(self, part: Part) -> dict[str, Any]:
        if part.kind == "content":
            return {"type": "text", "text": part.text}
        if part.kind == "reasoning":
            return {"type": "thinking", "thinking": part.text, "signature": ""}
        call = self._server.output.new_call_id()
        return {"type": "tool_use", "id": call, "name": part.name, "input": json.loads(part.text or "{}")}

    def _message(self, content: list[dict[str, Any]], output: Output | None) -> dict[str, Any]:
        return {
            "id": self._made.id,
            "type": "message",
            "role": "assistant",
            "model": self._made.model_name,
            "content": content,
            **self._stop(output),
            **self._edits,
            "usage": self._usage(),
        }

    def _stop(self, output: Output | None) -> dict[str, Any]:
        """Why the answer ended."""
        if output is None or output.reason is None:
            return {"stop_reason": None, "stop_sequence": None}
        if output.stop_string in (self._wanted.stop_sequences or ()):
            return {"stop_reason": "stop_sequence", "stop_sequence": output.stop_string}
        return {"stop_reason": _STOP_REASONS[output.reason], "stop_sequence": None}

    def _usage(self) -> dict[str, int]:
        return {
            "input_tokens": self._made.prompt_tokens - self._made.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._made.cached_tokens,
            "output_tokens": self._made.completion_tokens,
        }

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""
        async with aclosing(self._made.stream()) as arriving:
            has_begun = False
            async for outputs in arriving:
                if not has_begun:
                    has_begun = True
                    yield [_event("message_start", message=self._message([], None))]
                for output in outputs:
                    if events := [event for part in output.parts for event in self._part_events(part)]:
                        yield events
                    if output.reason is not None:
                        delta = _event("message_delta", delta=self._stop(output), **self._edits, usage=self._usage())
                        yield [*self._closed(), delta, _event("message_stop")]

    def _part_events(self, part: Part) -> list[Event]:
        """A delta, in a block that is opened for it where another one, or a call, is open."""
        opening: list[Event] = []
        if part.kind != self._kind or part.kind == "tool_call":
            opening = self._closed()
            self._index, self._kind = self._index + 1, part.kind
            block = self._block(Part(part.kind, "", part.call, part.name))
            opening.append(_event("content_block_start", index=self._index, content_block=block))
        kind, field = _DELTAS[part.kind]
        return [*opening, _event("content_block_delta", index=self._index, delta={"type": kind, field: part.text})]

    def _closed(self) -> list[Event]:
        """The end of the open block."""
        if self._kind is None:
            return []
        self._kind = None
        return [_event("content_block_stop", index=self._index)]


def _event(kind: str, **fields: Any) -> Event:
    return kind, {"type": kind, **fields}
