"""/v1/responses: OpenAI's Responses API, without state"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from forge.server.api.common import server_of
from forge.server.api.generation import Reason, chat_generation
from forge.server.api.responses_schemas import ResponsesBody
from forge.server.errors import HTTPError
from forge.server.exchange import Event, respond
from forge.server.parts import Part
from forge.server.state import Server, new_id

router = APIRouter()


@router.post("/v1/responses")
async def responses(request: Request, wanted: ResponsesBody) -> Response:
    """Answer a conversation."""
    server = server_of(request)
    made = ResponseAnswer(server, wanted)
    return await respond(request, made, made.failed, is_streamed=bool(wanted.stream))


class ResponseAnswer:
    """The answer to one request: an object that events build."""

    def __init__(self, server: Server, wanted: ResponsesBody) -> None:
        self._server = server
        params = wanted.params()
        self._made = chat_generation(
            server,
            new_id("resp_"),
            "responses",
            params,
            wanted.conversation(server),
            model=wanted.model,
            tools=wanted.shown_tools(),
            template_variables=wanted.template_variables(),
            one_call=wanted.parallel_tool_calls is False,
        )
        self._response: dict[str, Any] = {
            "id": self._made.id,
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": wanted.instructions,
            "max_output_tokens": wanted.max_output_tokens,
            "metadata": wanted.metadata or {},
            "model": self._made.model_name,
            "output": [],
            "parallel_tool_calls": wanted.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": wanted.tool_choice or "auto",
            "tools": [{"strict": False, **tool.model_dump(exclude_none=True)} for tool in wanted.tools or ()],
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
        }
        self._output: list[dict[str, Any]] = self._response["output"]
        self._open: _TextItem | None = None
        self._reasoning: list[str] = []
        self._number = 0

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        [output] = await self._made.complete()
        for part in output.parts:
            self._add(part)
        assert output.reason
        self._end(output.reason)
        return self._response

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""
        async with aclosing(self._made.stream()) as arriving:
            has_begun = False
            async for outputs in arriving:
                if not has_begun:
                    has_begun = True
                    yield [self._state("response.created"), self._state("response.in_progress")]
                for output in outputs:
                    if events := [event for part in output.parts for event in self._add(part)]:
                        yield events
                    if output.reason is not None:
                        yield self._end(output.reason)

    def failed(self, error: HTTPError) -> list[Event]:
        """The last event of a stream in which an error happens."""
        code = "server_error" if error.status >= 500 else "invalid_prompt"
        self._response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return [self._state("response.failed")]

    def _add(self, part: Part) -> list[Event]:
        if part.kind == "tool_call":
            return [*self._closed("completed"), *self._call(part)]
        events: list[Event] = []
        if self._open is None or self._open.kind != part.kind:
            events += self._closed("completed")
            self._open = _TextItem(part.kind, len(self._output))
            self._output.append(self._open.item)
            events += self._numbered(self._open.opening())
        if part.kind == "reasoning":
            self._reasoning.append(part.text)
        return events + self._numbered(self._open.delta(part.text))

    def _call(self, part: Part) -> list[Event]:
        place, id = len(self._output), new_id("fc_")
        item = {
            "id": id,
            "type": "function_call",
            "call_id": self._server.output.new_call_id(),
            "name": part.name,
            "arguments": part.text,
            "status": "completed",
        }
        self._output.append(item)
        at = {"output_index": place, "item_id": id}
        begun = item | {"arguments": "", "status": "in_progress"}
        return self._numbered(
            [
                ("response.output_item.added", {"output_index": place, "item": begun}),
                ("response.function_call_arguments.delta", {**at, "delta": part.text}),
                ("response.function_call_arguments.done", {**at, "name": part.name, "arguments": part.text}),
                ("response.output_item.done", {"output_index": place, "item": item}),
            ]
        )

    def _closed(self, status: str) -> list[Event]:
        """The end of the open item."""
        if self._open is None:
            return []
        events = self._numbered(self._open.closing(status))
        self._open = None
        return events

    def _end(self, reason: Reason) -> list[Event]:
        is_cut = reason == "length"
        status = "incomplete" if is_cut else "completed"
        events = self._closed(status)
        self._response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "usage": self._usage(),
        }
        return [*events, self._state(f"response.{status}")]

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self._made.prompt_tokens, self._made.completion_tokens
        reasoning = self._server.encoder.tokenizer.encode("".join(self._reasoning), add_special=False)
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": self._made.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": completion,
            "output_tokens_details": {"reasoning_tokens": min(len(reasoning), completion)},
            "total_tokens": prompt + completion,
        }

    def _state(self, kind: str) -> Event:
        """An event that shows the whole answer so far."""
        [event] = self._numbered([(kind, {"response": self._response | {"output": list(self._output)}})])
        return event

    def _numbered(self, events: list[tuple[str, dict[str, Any]]]) -> list[Event]:
        numbered: list[Event] = []
        for kind, fields in events:
            numbered.append((kind, {"type": kind, "sequence_number": self._number, **fields}))
            self._number += 1
        return numbered


class _TextItem:
    """An item of an answer whose text comes in pieces: a message, or reasoning."""

    def __init__(self, kind: str, index: int) -> None:
        self.kind = kind
        self._name = "output_text" if kind == "content" else "reasoning_text"
        self._texts: list[str] = []
        self.item: dict[str, Any] = {"status": "in_progress", "content": []}
        if kind == "content":
            self.item |= {"id": new_id("msg_"), "type": "message", "role": "assistant"}
        else:
            self.item |= {"id": new_id("rs_"), "type": "reasoning", "summary": []}
        self._item_at = {"output_index": index}
        self._at = {"output_index": index, "item_id": self.item["id"], "content_index": 0}
        self._logprobs: dict[str, Any] = {"logprobs": []} if kind == "content" else {}

    def opening(self) -> list[tuple[str, dict[str, Any]]]:
        return [
            ("response.output_item.added", {**self._item_at, "item": self.item.copy()}),
            ("response.content_part.added", {**self._at, "part": self._part("")}),
        ]

    def delta(self, text: str) -> list[tuple[str, dict[str, Any]]]:
        self._texts.append(text)
        return [(f"response.{self._name}.delta", {**self._at, "delta": text, **self._logprobs})]

    def closing(self, status: str) -> list[tuple[str, dict[str, Any]]]:
        text = "".join(self._texts)
        self.item |= {"status": status, "content": [self._part(text)]}
        return [
            (f"response.{self._name}.done", {**self._at, "text": text, **self._logprobs}),
            ("response.content_part.done", {**self._at, "part": self._part(text)}),
            ("response.output_item.done", {**self._item_at, "item": self.item}),
        ]

    def _part(self, text: str) -> dict[str, Any]:
        part: dict[str, Any] = {"type": self._name, "text": text}
        return part | {"annotations": [], "logprobs": []} if self.kind == "content" else part
