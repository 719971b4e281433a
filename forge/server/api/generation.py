"""One request's answers: encoded, generated, taken apart. An API only writes what comes in its own form."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal

from forge.config import SamplingParams
from forge.engine import TokenLogprobs
from forge.outputs import Chunk, Completion
from forge.server.errors import HTTPError
from forge.server.parts import OutputParser, Part, Plain
from forge.server.state import Record, Server

Reason = Literal["stop", "length", "tool_calls"]


@dataclass
class Output:
    """What is new of one choice.

    Attributes:
        index: Number of the choice, among those of all prompts.
        parts: New parts.
        logprobs: One entry for each new token, if they are wanted. Else None.
        reason: Why the choice ended, with its last parts. "tool_calls" = it stopped behind a call. Else None.
        stop_string: The stop string that ended it. Else None.
    """

    index: int
    parts: list[Part]
    logprobs: tuple[TokenLogprobs, ...] | None
    reason: Reason | None
    stop_string: str | None


class Generation:
    """The answers to one request.

    Attributes:
        id: The answer's, for the client and the log.
        prompts: Ids of the prompts, as soon as they are encoded.
        completion_tokens: How many were generated, as far as choices have ended.
        model_name: The name of what answers, the model's or an adapter's.
        cached_tokens: How many of the prompts' tokens the prefix cache had, as far as choices have ended.
    """

    def __init__(
        self,
        server: Server,
        id: str,
        endpoint: str,
        params: SamplingParams,
        encode: Callable[[], list[list[int]]],
        *,
        model: str,
        num_prompts: int = 1,
        parser: Callable[[list[int]], OutputParser] = lambda _: Plain(),
        one_call: bool = False,
    ) -> None:
        """
        Args:
            endpoint: For the log.
            encode: Gives the ids of the prompts; runs in a thread.
            model: The name that the request gives: an adapter's, or any.
            parser: Makes a parser of an answer, by the ids of its prompt.
            one_call: Calls of tools behind the first one are left out.
        """
        self.id, self.params = id, replace(params, timeout=server.settings.request_seconds)
        self._adapter = server.adapter_of(model)
        self.model_name = self._adapter or server.settings.model_name
        self.prompts: list[list[int]] = []
        self.completion_tokens = self.cached_tokens = 0
        self._server, self._endpoint, self._encode, self._parser = server, endpoint, encode, parser
        self._num_choices, self._one_call = num_prompts * params.n, one_call
        self._parsers: list[OutputParser] = []
        self._has_calls = [False] * self._num_choices

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    async def complete(self) -> list[Output]:
        """Each choice as a whole."""
        with self._admitted() as record:
            await self._begin(record)
            found = await self._server.client.complete(self.prompts, self.params, self._adapter)
            record.add_completions(found)
            _check(found)
        return [self._output(index, one) for index, one in enumerate(found)]

    async def stream(self) -> AsyncGenerator[list[Output], None]:
        """What is new, as it comes. The first list is empty: the request is accepted."""
        with self._admitted() as record:
            await self._begin(record)
            async with aclosing(self._server.client.stream(self.prompts, self.params, self._adapter)) as arriving:
                async for chunks in arriving:
                    record.add_chunks(chunks)
                    yield [self._output(chunk.index, chunk) for chunk in merged(chunks)]
                    _check(chunks)  # behind the text that there is

    def _admitted(self) -> AbstractContextManager[Record]:
        field = "n" if self.params.n > 1 else "prompt"
        return self._server.admitted(self.id, self._endpoint, self._num_choices, field)

    async def _begin(self, record: Record) -> None:
        self.prompts = await asyncio.to_thread(self._encode)
        record.prompt_tokens = self.prompt_tokens
        self._parsers = [self._parser(ids) for ids in self.prompts for _ in range(self.params.n)]

    def _output(self, index: int, new: Chunk | Completion) -> Output:
        parts = self._parsers[index].push(new.text)
        if new.timings is not None:
            parts += self._parsers[index].finish()
            self.completion_tokens += new.timings.completion_tokens
            if index % self.params.n == 0:  # a prompt's other choices start from its first one's
                self.cached_tokens += new.timings.cached_tokens
        if self._one_call:
            parts = [part for part in parts if not part.call]
        self._has_calls[index] |= any(part.kind == "tool_call" for part in parts)
        reason: Reason | None = None
        if new.finish_reason in ("stop", "length"):
            reason = "tool_calls" if self._has_calls[index] and new.finish_reason == "stop" else new.finish_reason
        return Output(index, parts, new.logprobs, reason, new.stop_string)


def chat_generation(
    server: Server,
    id: str,
    endpoint: str,
    params: SamplingParams,
    messages: list[dict[str, Any]],
    *,
    model: str,
    tools: list[dict[str, Any]],
    template_variables: Mapping[str, Any] | None = None,
    continues: bool = False,
    one_call: bool = False,
) -> Generation:
    """The answer to a conversation, as OpenAI's chat API has it.

    Args:
        model: As of `Generation`.
        tools: What the model is shown.
        continues: The answer goes on with the last message, which is the assistant's.
        one_call: Calls of tools behind the first one are left out.
    """
    if tools and server.output.calls:
        params = replace(params, stop=(*params.stop, *server.output.calls.stop))
    return Generation(
        server,
        id,
        endpoint,
        params,
        lambda: [encoded(server, messages, tools, template_variables, continues=continues)],
        model=model,
        parser=lambda ids: server.parser(tools, ids),
        one_call=one_call,
    )


def encoded(
    server: Server,
    messages: list[dict[str, Any]],
    tools: list[dict[str, Any]],
    template_variables: Mapping[str, Any] | None = None,
    *,
    continues: bool = False,
) -> list[int]:
    """The ids of a conversation. Names of control tokens in it are text."""
    return server.encoder.encode_chat(
        messages,
        tools=tools,
        template_variables=template_variables,
        continue_final_message=continues,
        parse_special=False,
    )


def _check(found: Sequence[Chunk | Completion]) -> None:
    """Raises HTTPError where an answer has no proper end."""
    for new in found:
        if new.finish_reason == "error":
            raise HTTPError(500, "the model computed logits that are not finite", code="not_finite")
        if new.finish_reason == "abort":
            raise HTTPError(503, "the server is shutting down", code="shutting_down")


def merged(chunks: list[Chunk]) -> list[Chunk]:
    """Chunks of which those of one choice are one, in the order of their first ones."""
    found: dict[int, Chunk] = {}
    for chunk in chunks:
        before = found.get(chunk.index)
        if before is not None:
            logprobs = None if chunk.logprobs is None else (*(before.logprobs or ()), *chunk.logprobs)
            text, ids = before.text + chunk.text, before.ids + chunk.ids
            chunk = replace(chunk, text=text, ids=ids, logprobs=logprobs)
        found[chunk.index] = chunk
    return list(found.values())


def joined(parts: list[Part]) -> list[Part]:
    """Parts of which neighbours that are text of the same kind are one."""
    found: list[tuple[Part, list[str]]] = []
    for part in parts:
        if found and part.kind == found[-1][0].kind and part.kind != "tool_call":
            found[-1][1].append(part.text)
        else:
            found.append((part, [part.text]))
    return [replace(part, text="".join(texts)) for part, texts in found]
