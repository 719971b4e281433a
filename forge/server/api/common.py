"""What the endpoints of OpenAI's API share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fastapi import Request

from forge.engine import FinishReason, TokenLogprobs
from forge.outputs import Chunk
from forge.server.errors import HTTPError
from forge.server.exchange import Event
from forge.server.state import Server
from forge.tokenizer import Tokenizer

DONE: Event = (None, "[DONE]")


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    server: Server = request.app.state.server
    return server


@dataclass
class Usage:
    """Numbers of tokens."""

    prompt: int
    completion: int

    def as_json(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


def finish_reason(reason: FinishReason, *, has_calls: bool = False) -> str:
    """OpenAI's word. Raises HTTPError where the answer has no proper end."""
    if reason == "error":
        raise HTTPError(500, "the model computed logits that are not finite", code="not_finite")
    if reason == "abort":
        raise HTTPError(503, "the server is shutting down", code="shutting_down")
    return "tool_calls" if has_calls and reason == "stop" else reason


def token_logprobs(found: tuple[TokenLogprobs, ...], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Log probabilities as the chat endpoint reports them."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        text = tokenizer.token_text(id)
        return {"token": text, "logprob": max(logprob, -9999.0), "bytes": list(text.encode())}

    return [{**entry(one.id, one.logprob), "top_logprobs": [entry(*top) for top in one.top]} for one in found]


def merged(chunks: list[Chunk]) -> list[Chunk]:
    """Chunks of which those of one choice are one, in the order of their first ones."""
    found: dict[int, Chunk] = {}
    for chunk in chunks:
        before = found.get(chunk.index)
        if before is None:
            found[chunk.index] = chunk
            continue
        found[chunk.index] = Chunk(
            before.text + chunk.text,
            before.ids + chunk.ids,
            chunk.index,
            None if chunk.logprobs is None else (*(before.logprobs or ()), *chunk.logprobs),
            chunk.finish_reason,
            chunk.timings,
        )
    return list(found.values())
