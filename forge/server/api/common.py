"""What the endpoints of OpenAI's API share."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

from fastapi import Request

from forge.engine import TokenLogprobs
from forge.server.api.generation import Generation
from forge.server.errors import HTTPError, body
from forge.server.exchange import Event
from forge.server.schemas import Items, TokenId, at_most
from forge.server.state import Server
from forge.tokenizer import Tokenizer

DONE: Event = (None, "[DONE]")
_LEAST_LOGPROB = -9999.0
"""OpenAI's word for less: JSON has no infinity."""


def server_of(request: Request) -> Server:
    """The server that a request came to."""
    server: Server = request.app.state.server
    return server


def last_events(error: HTTPError) -> list[Event]:
    """The end of a stream in which an error happens."""
    return [(None, body(error, "/")), DONE]


def usage(made: Generation) -> dict[str, Any]:
    """Numbers of tokens."""
    prompt, completion = made.prompt_tokens, made.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": made.cached_tokens},
    }


def chat_logprobs(found: tuple[TokenLogprobs, ...], tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """Log probabilities as the chat endpoint reports them."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": tokenizer.token_text(id),
            "logprob": max(logprob, _LEAST_LOGPROB),
            "bytes": list(tokenizer.token_bytes(id)),
        }

    return [{**entry(one.id, one.logprob), "top_logprobs": [entry(*top) for top in one.top]} for one in found]


def text_logprobs(found: tuple[TokenLogprobs, ...], tokenizer: Tokenizer, offset: int) -> dict[str, Any]:
    """Log probabilities as the completions endpoint reports them. offset: Characters of the tokens before."""
    tokens = [tokenizer.token_text(one.id) for one in found]
    return {
        "tokens": tokens,
        "token_logprobs": [max(one.logprob, _LEAST_LOGPROB) for one in found],
        "top_logprobs": [
            {tokenizer.token_text(id): max(logprob, _LEAST_LOGPROB) for id, logprob in one.top} for one in found
        ],
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=offset)),
    }


Prompts = str | Items[TokenId] | Items[str] | Items[Items[TokenId]]


def encoded_prompts(
    field: str, given: Prompts, server: Server, most: int
) -> tuple[list[str | list[int]], Callable[[], list[list[int]]]]:
    """The prompts of a field that holds one or several, and what encodes them. Raises HTTPError for too many."""
    is_one = isinstance(given, str) or not given or isinstance(given[0], int)
    prompts: list[Any] = [given] if is_one else list(given)
    at_most(field, len(prompts), most)
    return prompts, lambda: [server.encoder.encode_prompt(prompt) for prompt in prompts]
