"""/v1/completions"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from forge.config import SamplingParams
from forge.server.api.common import DONE, Prompts, encoded_prompts, last_events, server_of, text_logprobs, usage
from forge.server.api.generation import Generation, Output
from forge.server.errors import HTTPError
from forge.server.exchange import Event, respond
from forge.server.schemas import Logprobs, OpenAIBody, TokenCount
from forge.server.settings import ServerSettings
from forge.server.state import Server, new_id

router = APIRouter()
_DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""


class CompletionBody(OpenAIBody):
    """The body of /v1/completions."""

    refused: ClassVar[dict[str, str]] = {"suffix": "the server does not fill in the middle"}
    prompt: Prompts
    max_tokens: TokenCount | None = _DEFAULT_MAX_TOKENS
    logprobs: Logprobs | None = None
    echo: bool | None = None
    best_of: int | None = None

    def params(self, settings: ServerSettings) -> SamplingParams:
        """The parameters of the request. Raises HTTPError for those that do not go together."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            message = "best_of other than n is not supported: the server gives all the choices that it makes"
            raise HTTPError(400, message, "best_of", "unsupported_value")
        if self.echo and self.logprobs is not None:
            message = "echo with logprobs is not supported: the server gives no log probabilities of the prompt"
            raise HTTPError(400, message, "echo", "unsupported_value")
        most = self.max_tokens or _DEFAULT_MAX_TOKENS
        return self.openai_sampling(settings, max_tokens=most, logprobs=self.logprobs)


@router.post("/v1/completions")
async def completions(request: Request, wanted: CompletionBody) -> Response:
    """Continue texts."""
    server = server_of(request)
    made = TextAnswer(server, wanted)
    return await respond(request, made, last_events, is_streamed=bool(wanted.stream))


class TextAnswer:
    """The answer to one request. Its choices are the n of the first prompt, then the second prompt's, and so on."""

    def __init__(self, server: Server, wanted: CompletionBody) -> None:
        self._wanted, self._tokenizer = wanted, server.encoder.tokenizer
        self._prompts, encode = encoded_prompts("prompt", wanted.prompt, server, server.settings.max_prompts)
        params, id = wanted.params(server.settings), new_id("cmpl-")
        self._made = Generation(
            server, id, "completion", params, encode, model=wanted.model, num_prompts=len(self._prompts)
        )
        self._lengths = [0] * len(self._prompts) * params.n
        """Characters of the tokens so far, for each choice."""
        self._head: dict[str, Any] = {
            "id": id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": self._made.model_name,
            "system_fingerprint": None,
        }

    def _echoed(self, index: int) -> str:
        """The text of a choice's prompt, where it is wanted."""
        if not self._wanted.echo:
            return ""
        place = index // self._made.params.n
        prompt = self._prompts[place]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(self._made.prompts[place])

    async def complete(self) -> dict[str, Any]:
        """The whole answer."""
        outputs = await self._made.complete()
        choices = [self._choice(output, self._echoed(output.index)) for output in outputs]
        return {**self._head, "choices": choices, "usage": usage(self._made)}

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """The answer as it is made."""
        async with aclosing(self._made.stream()) as arriving:
            echoes = bool(self._wanted.echo)
            async for outputs in arriving:
                if echoes:
                    echoes = False
                    empty = [Output(index, [], None, None, None) for index in range(len(self._lengths))]
                    yield [self._event(one, self._echoed(one.index)) for one in empty]
                if events := [self._event(one) for one in outputs if one.parts or one.logprobs or one.reason]:
                    yield events
                elif not outputs:
                    yield []  # accepted: what follows is part of the stream
        if self._wanted.wants_usage:
            yield [(None, self._chunk([], usage(self._made)))]
        yield [DONE]

    def _event(self, output: Output, before: str = "") -> Event:
        return None, self._chunk([self._choice(output, before)])

    def _chunk(self, choices: list[dict[str, Any]], used: dict[str, Any] | None = None) -> dict[str, Any]:
        chunk = {**self._head, "choices": choices}
        return chunk | {"usage": used} if self._wanted.wants_usage else chunk

    def _choice(self, output: Output, before: str = "") -> dict[str, Any]:
        logprobs = None
        if output.logprobs is not None:
            logprobs = text_logprobs(output.logprobs, self._tokenizer, self._lengths[output.index])
            self._lengths[output.index] += sum(map(len, logprobs["tokens"]))
        text = before + "".join(part.text for part in output.parts)
        return {"index": output.index, "text": text, "logprobs": logprobs, "finish_reason": output.reason}
