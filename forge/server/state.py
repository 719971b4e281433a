"""What all endpoints of a server share: the engine, the encoder, and a record of each request."""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from forge.outputs import Chunk, Completion
from forge.runtime.encoder import PromptEncoder
from forge.server import errors
from forge.server.engine_client import EngineClient
from forge.server.errors import HTTPError
from forge.server.log import LOG
from forge.server.metrics import Metrics
from forge.server.parsing import OutputFormat
from forge.server.parts import OutputParser
from forge.server.settings import ServerSettings

_PROMPT_END = 32
"""Tokens at the end of a prompt in which a mark that opens the reasoning lies, with white space behind it."""


@dataclass
class Record:
    """What a request has taken so far, for its log line and the metrics."""

    id: str
    endpoint: str
    metrics: Metrics
    prompt_tokens: int = 0
    completion_tokens: int = 0
    started: float = field(default_factory=time.perf_counter)
    first: float | None = None
    """When the first token was there."""
    last: float = 0.0

    def add_chunks(self, chunks: Collection[Chunk]) -> None:
        """Count the tokens of a stream's new chunks."""
        now = time.perf_counter()
        self._add(sum(len(chunk.ids) for chunk in chunks), now, now)
        for chunk in chunks:
            if chunk.timings:
                self.metrics.add(chunk.timings)

    def add_completions(self, completions: list[Completion]) -> None:
        """Count the tokens of answers that came as a whole."""
        for one in completions:
            self.metrics.add(one.timings)
            begun = self.started + one.timings.prefill_ms / 1000
            self._add(len(one.ids), begun, begun + one.timings.decode_ms / 1000)

    def _add(self, tokens: int, first: float, last: float) -> None:
        if tokens:
            self.first = first if self.first is None else min(self.first, first)
            self.last = max(self.last, last)
            self.completion_tokens += tokens

    def __str__(self) -> str:
        line = f"{self.id} {self.endpoint}: {self.prompt_tokens} + {self.completion_tokens} tokens"
        if self.first is not None:
            line += f", first after {self.first - self.started:.2f} s"
            if self.completion_tokens > 1 and self.last > self.first:
                line += f", {(self.completion_tokens - 1) / (self.last - self.first):.1f} tokens/s"
        return line


@dataclass
class Server:
    """A model, its engine, and how they are served."""

    client: EngineClient
    encoder: PromptEncoder
    settings: ServerSettings
    metrics: Metrics = field(default_factory=Metrics)
    created: int = field(default_factory=lambda: int(time.time()))
    num_admitted: int = 0
    """Choices that are queued or running."""

    @cached_property
    def output(self) -> OutputFormat:
        """How the model's answers are to be read."""
        template = self.encoder.chat_template
        return OutputFormat.of(template.sources if template else "")

    def parser(self, tools: list[dict[str, Any]], prompt: list[int]) -> OutputParser:
        """A parser for one answer. tools: What the model was shown. prompt: Its ids, which may open the reasoning.

        Raises HTTPError where the server does not know the form of the model's calls.
        """
        if tools and self.output.calls is None:
            message = "tools: the server does not know in which form this model's chat template has tools called"
            raise HTTPError(400, message, "tools", "unsupported_value")
        end = self.encoder.tokenizer.decode(prompt[-_PROMPT_END:])
        return self.output.parser(tools, end, tells_reasoning=self.settings.reasoning)

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's "model" names; None for the model itself, which any other name is."""
        return model if model in self.settings.adapters else None

    def check_ready(self) -> None:
        """Raises HTTPError where the engine takes no requests."""
        if self.client.state == "loading":
            raise HTTPError(503, "the model is loading", code="loading", headers={"retry-after": "1"})
        if self.client.state != "ready":
            raise HTTPError(503, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})

    @contextmanager
    def admitted(self, id: str, endpoint: str, num_choices: int, field: str = "n") -> Iterator[Record]:
        """A place in the queue for a request, and its record. field: What asks for so many choices.

        Raises HTTPError: with status 429 where the queue is full, 400 where it never has so much room.
        """
        self.check_ready()
        places = self.client.info["max_sequences"] + self.settings.max_queue
        if num_choices > places:
            message = f"{field}: {num_choices} answers in all, and {places} run and wait at most"
            raise HTTPError(400, message, field, "too_many")
        if self.num_admitted + num_choices > places:
            raise HTTPError(429, "too many requests are waiting", code="queue_full", headers={"retry-after": "1"})
        self.num_admitted += num_choices
        end: str | None
        record, end = Record(id, endpoint, self.metrics), ", the client left"
        try:
            yield record
            end = ""
        except Exception as error:
            found = errors.from_error(error)
            end = f", {found.code}: {found}" if found.status >= 500 else None  # others may quote what the client sent
            raise
        finally:
            self.num_admitted -= num_choices
            if end is not None:
                LOG.info("%s%s", record, end)


def new_id(prefix: str) -> str:
    """A name for a request or an answer."""
    return f"{prefix}{secrets.token_hex(12)}"
