"""/v1/completions"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.responses import Response

from forge.config import SamplingParams
from forge.engine import TokenLogprobs
from forge.server.api.common import DONE, Usage, finish_reason, merged, server_of
from forge.server.errors import HTTPError, body
from forge.server.exchange import Event, EventStream, answer
from forge.server.schemas import Logprobs, SamplingBody, StreamOptions, TokenId
from forge.server.state import Server, new_id

router = APIRouter()


class CompletionBody(SamplingBody):
    """The body of /v1/completions."""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    logprobs: Logprobs | None = None
    echo: bool | None = None
    stream_options: StreamOptions | None = None

    def prompts(self, most: int) -> list[str | list[int]]:
        """The prompts. Raises HTTPError for too many."""
        prompt = self.prompt
        if isinstance(prompt, str) or not prompt or isinstance(prompt[0], int):
            return [prompt]  # type: ignore[list-item]  # the first one tells of which kind all are
        if len(prompt) > most:
            raise HTTPError(400, f"prompt may hold {most} prompts, not {len(prompt)}", "prompt", "invalid_value")
        return list(prompt)


@router.post("/v1/completions")
async def completions(request: Request, wanted: CompletionBody) -> Response:
    """Continue texts."""
    server = server_of(request)
    params = wanted.sampling(server.settings, max_tokens=wanted.max_tokens, logprobs=wanted.logprobs)
    made = TextAnswer(server, wanted, params)
    if not wanted.stream:
        return await answer(request, made.complete())

    def on_error(error: HTTPError) -> list[Event]:
        return [(None, body(error, "/")), DONE]

    return EventStream(made.events(), on_error, send_seconds=server.settings.send_seconds)


class TextAnswer:
    """The answer to one request. Its choices are the n of the first prompt, then the second prompt's, and so on."""

    def __init__(self, server: Server, wanted: CompletionBody, params: SamplingParams) -> None:
        self._server, self._wanted, self._params = server, wanted, params
        self._prompts = wanted.prompts(server.settings.max_prompts)
        self._num_choices = len(self._prompts) * params.n
        self._head: dict[str, Any] = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": server.settings.model_name,
            "system_fingerprint": None,
        }

    async def _encode(self) -> list[list[int]]:
        encode = self._server.encoder.encode_prompt
        return await asyncio.to_thread(lambda: [encode(prompt) for prompt in self._prompts])

    def _echoed(self, index: int, ids: list[list[int]]) -> str:
        """The text of a choice's prompt, where it is wanted."""
        if not self._wanted.echo:
            return ""
        place = index // self._params.n
        prompt = self._prompts[place]
        return prompt if isinstance(prompt, str) else self._server.encoder.tokenizer.decode(ids[place])

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        with self._server.admitted(self._head["id"], "completion", self._num_choices) as record:
            ids = await self._encode()
            record.prompt_tokens = sum(map(len, ids))
            found = await self._server.client.complete(ids, self._params)
            record.add_completions(found)
        choices = [
            self._choice(
                index,
                self._echoed(index, ids) + one.text,
                self._logprobs(one.logprobs, 0) if one.logprobs is not None else None,
                finish_reason(one.finish_reason),
            )
            for index, one in enumerate(found)
        ]
        usage = Usage(sum(map(len, ids)), sum(one.timings.completion_tokens for one in found))
        return {**self._head, "choices": choices, "usage": usage.as_json()}

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""
        options = self._wanted.stream_options
        with self._server.admitted(self._head["id"], "completion", self._num_choices) as record:
            ids = await self._encode()
            record.prompt_tokens = sum(map(len, ids))
            usage = Usage(record.prompt_tokens, 0)
            lengths = [0] * self._num_choices
            yield []
            if self._wanted.echo:
                yield [self._event(index, self._echoed(index, ids)) for index in range(self._num_choices)]
            async for chunks in self._server.client.stream(ids, self._params):
                record.add_chunks(chunks)
                events = []
                for chunk in merged(chunks):
                    logprobs = self._logprobs(chunk.logprobs, lengths[chunk.index]) if chunk.logprobs else None
                    lengths[chunk.index] += len(chunk.text)
                    reason = chunk.finish_reason and finish_reason(chunk.finish_reason)
                    if chunk.text or logprobs or reason:
                        events.append(self._event(chunk.index, chunk.text, logprobs, reason))
                    usage.completion += chunk.timings.completion_tokens if chunk.timings else 0
                if events:
                    yield events
        if options and options.include_usage:
            yield [(None, {**self._head, "choices": [], "usage": usage.as_json()})]
        yield [DONE]

    def _event(self, index: int, text: str, logprobs: Any = None, reason: str | None = None) -> Event:
        return None, {**self._head, "choices": [self._choice(index, text, logprobs, reason)]}

    def _choice(self, index: int, text: str, logprobs: Any, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, found: tuple[TokenLogprobs, ...], offset: int) -> dict[str, Any]:
        text_of = self._server.encoder.tokenizer.token_text
        tokens = [text_of(one.id) for one in found]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [one.logprob for one in found],
            "top_logprobs": [{text_of(id): logprob for id, logprob in one.top} for one in found],
            "text_offset": offsets,
        }
