"""What all endpoints of a server share."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from forge.runtime.encoder import PromptEncoder
from forge.server.engine_client import EngineClient
from forge.server.errors import HTTPError
from forge.server.settings import ServerSettings


@dataclass
class Server:
    """A model, its engine, and how they are served."""

    client: EngineClient
    encoder: PromptEncoder
    settings: ServerSettings
    created: int = field(default_factory=lambda: int(time.time()))
    num_admitted: int = 0
    """Choices that are queued or running."""

    def check_ready(self) -> None:
        """Raises HTTPError where the engine takes no requests."""
        if self.client.state == "loading":
            raise HTTPError(503, "the model is loading", code="loading", headers={"retry-after": "1"})
        if self.client.state != "ready":
            raise HTTPError(503, "the server is shutting down", code="shutting_down", headers={"retry-after": "5"})

    @contextmanager
    def admitted(self, num_choices: int) -> Iterator[None]:
        """A place in the queue. Raises HTTPError with status 429 where it is full."""
        self.check_ready()
        if self.num_admitted + num_choices > self.client.info["max_sequences"] + self.settings.max_queue:
            raise HTTPError(429, "too many requests are waiting", code="queue_full", headers={"retry-after": "1"})
        self.num_admitted += num_choices
        try:
            yield
        finally:
            self.num_admitted -= num_choices


def new_id(prefix: str) -> str:
    """A name for a request or an answer."""
    return f"{prefix}{secrets.token_hex(12)}"
