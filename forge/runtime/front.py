"""What all ways to use a model share: requests that wait for the engine."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from typing import Any

from forge.config import SamplingParams, with_bias
from forge.engine import Engine
from forge.errors import ParameterError
from forge.hooks.scope import Scope, bound, entered
from forge.keywords import shown
from forge.outputs import Chunk, Completion
from forge.runtime import process
from forge.runtime.encoder import PromptEncoder
from forge.runtime.loop import EngineLoop
from forge.runtime.request import Hold, Request
from forge.tokenizer import Tokenizer
from forge.tokenizer.chat import ChatTemplate


class Front(PromptEncoder):
    """Base of `LLM`: an engine's thread in front of which texts become ids."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        name: str,
        adapters: tuple[str, ...] = (),
        fingerprints: Mapping[str | None, str] | None = None,
    ) -> None:
        """name: the model's, for messages. adapters: Names of those in the model's slots, in order. fingerprints: As
        `models.fingerprints` gives them."""
        super().__init__(tokenizer, chat_template, engine.context, name)
        self.engine, self.adapters, self._fingerprints = engine, adapters, fingerprints or {}
        self._loop = EngineLoop(engine, name)
        process.watch(self._loop)

    def _slot_of(self, adapter: str | None) -> int:
        """The slot of an adapter; -1 for None. Raises ParameterError for a name that there is not."""
        if adapter is None:
            return -1
        if adapter not in self.adapters:
            there = f"there are: {', '.join(map(shown, self.adapters))}" if self.adapters else "load was given none"
            raise ParameterError(f"adapter {shown(adapter)} is not loaded; {there}", parameter="adapter")
        return self.adapters.index(adapter)

    def _request(
        self,
        prompts: list[list[int]],
        params: SamplingParams,
        waiter: Any,
        adapter: str | None = None,
        hold: Hold | None = None,
        *,
        is_streamed: bool,
        scopes: list[Scope[Any]] | None = None,
    ) -> Request:
        """A request that is not submitted yet. Raises what is wrong with it in the caller's thread.

        waiter: What the engine's thread calls `deliver` of. The caller alone holds it. hold: What is computed of the
        prompts, which all begin with it. scopes: Blocks whose hooks it has. None = those that the caller is in.
        """
        for ids in prompts:
            self.engine.check(ids, params)
        scopes = entered(self._loop) if scopes is None else scopes
        most = self.engine.context if params.max_tokens is None else params.max_tokens
        hooks = bound(scopes, prompts, most - 1, params.n) if scopes else None
        if suppressed := self.tokenizer.suppressed_ids:
            params = with_bias(params, dict.fromkeys(suppressed, -math.inf))
        watched, slot = self._loop.watch(waiter), self._slot_of(adapter)
        if hold:
            hold.use()
        return Request(prompts, params, self.tokenizer, watched, slot, hold, hooks, is_streamed=is_streamed)

    def _complete(
        self, prompts: list[list[int]], params: SamplingParams, adapter: str | None, hold: Hold | None = None
    ) -> list[Completion]:
        waiter = self._loop.waiter()
        request = self._request(prompts, params, waiter, adapter, hold, is_streamed=False)
        try:
            if prompts:
                self._loop.submit(request)
                waiter.get()
        finally:
            self._loop.cancel(request)
        return request.completions()

    def _stream(
        self, ids: list[int], params: SamplingParams, adapter: str | None, hold: Hold | None = None
    ) -> Generator[Chunk, None, None]:
        self.engine.check(ids, params)  # now, not when the first chunk is read
        self._slot_of(adapter)
        self._loop.check()
        return self._chunks(ids, params, adapter, hold, entered(self._loop))

    def _chunks(
        self, ids: list[int], params: SamplingParams, adapter: str | None, hold: Hold | None, scopes: list[Scope[Any]]
    ) -> Generator[Chunk, None, None]:
        waiter = self._loop.waiter()
        request = self._request([ids], params, waiter, adapter, hold, is_streamed=True, scopes=scopes)
        try:
            self._loop.submit(request)
            running = params.n
            while running:
                for chunk in waiter.get():
                    running -= chunk.finish_reason is not None
                    yield chunk
        finally:
            self._loop.cancel(request)
