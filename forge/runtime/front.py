"""What all ways to use a model share: requests that wait for the engine."""

from __future__ import annotations

import math
from collections.abc import Generator
from typing import Any

from forge.config import SamplingParams, with_bias
from forge.engine import Engine
from forge.outputs import Chunk, Completion
from forge.runtime import process
from forge.runtime.encoder import PromptEncoder
from forge.runtime.loop import EngineLoop
from forge.runtime.request import Request
from forge.tokenizer import Tokenizer
from forge.tokenizer.chat import ChatTemplate


class Front(PromptEncoder):
    """Base of `LLM`: an engine's thread in front of which texts become ids."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, chat_template: ChatTemplate | None, name: str) -> None:
        """name: the model's, for messages."""
        super().__init__(tokenizer, chat_template, engine.context, name)
        self.engine = engine
        self._loop = EngineLoop(engine, name)
        process.watch(self._loop)

    def _request(self, prompts: list[list[int]], params: SamplingParams, waiter: Any, *, is_streamed: bool) -> Request:
        """A request that is not submitted yet. Raises what is wrong with it in the caller's thread.

        waiter: What the engine's thread calls `deliver` of. The caller alone holds it.
        """
        for ids in prompts:
            self.engine.check(ids, params)
        if suppressed := self.tokenizer.suppressed_ids:
            params = with_bias(params, dict.fromkeys(suppressed, -math.inf))
        return Request(prompts, params, self.tokenizer, self._loop.watch(waiter), is_streamed=is_streamed)

    def _complete(self, prompts: list[list[int]], params: SamplingParams) -> list[Completion]:
        waiter = self._loop.waiter()
        request = self._request(prompts, params, waiter, is_streamed=False)
        try:
            if prompts:
                self._loop.submit(request)
                waiter.get()
        finally:
            self._loop.cancel(request)
        return request.completions()

    def _stream(self, ids: list[int], params: SamplingParams) -> Generator[Chunk, None, None]:
        self.engine.check(ids, params)  # now, not when the first chunk is read
        self._loop.check()
        return self._chunks(ids, params)

    def _chunks(self, ids: list[int], params: SamplingParams) -> Generator[Chunk, None, None]:
        waiter = self._loop.waiter()
        request = self._request([ids], params, waiter, is_streamed=True)
        try:
            self._loop.submit(request)
            running = params.n
            while running:
                for chunk in waiter.get():
                    running -= chunk.finish_reason is not None
                    yield chunk
        finally:
            self._loop.cancel(request)
