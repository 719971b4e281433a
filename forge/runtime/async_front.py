"""The methods of `LLM` for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any, Literal, overload

from forge.config import SamplingParams
from forge.errors import ParameterError
from forge.hooks.scope import Scope, entered
from forge.keywords import keywords
from forge.outputs import Chunk, Completion
from forge.runtime.encoder import Messages, Prompt
from forge.runtime.front import Front
from forge.runtime.prompts import is_single, prompts_of, sampling_params
from forge.runtime.waiters import AsyncWaiter


class AsyncFront(Front):
    """Base of `LLM`: generation for tasks of asyncio, which run together in one batch.

    Texts become ids in threads of their own, so that the event loop does not wait for them either.
    """

    @overload
    async def agenerate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, n: Literal[1] = 1, **overrides: Any
    ) -> Completion: ...
    @overload
    async def agenerate(
        self, prompt: Prompt, params: SamplingParams | None = None, *, n: int, **overrides: Any
    ) -> list[Completion]: ...
    @overload
    async def agenerate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, **overrides: Any
    ) -> list[Completion]: ...
    @keywords(SamplingParams)
    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        *,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Complete a prompt, or a list of prompts together. Cancelling the task aborts the request.

        Args:
            prompt: As in `generate`.
            params: As in `generate`.
            adapter: As in `generate`.
            **overrides: As in `generate`.

        Returns:
            What `generate` does.

        Raises:
            ForgeError: As in `generate`.
        """
        params = sampling_params(params, overrides)
        prompts, single = prompts_of(prompt)
        ids = await asyncio.to_thread(lambda: [self.encode_prompt(one) for one in prompts])
        completions = await self._acomplete(ids, params, adapter)
        return completions[0] if single and params.n == 1 else completions

    @keywords(SamplingParams)
    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None, **overrides: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Complete one prompt, piece by piece: ``async for chunk in llm.astream(...)``.

        Closing the iterator (`aclose`), or cancelling the task that reads it, aborts the request.

        Args:
            prompt: As in `stream`.
            params: As in `stream`.
            adapter: As in `generate`.
            **overrides: As in `stream`.

        Returns:
            An asynchronous iterator of chunks, as `stream` gives them.

        Raises:
            ParameterError: At once, where a parameter cannot be used or a keyword is unknown.
            ForgeError: As in `stream`, but where the first chunk is read.
        """
        if not is_single(prompt):
            raise ParameterError("astream takes one prompt; agenerate takes a list of them", parameter="prompt")
        self._slot_of(adapter)
        own = sampling_params(params, overrides)
        return self._achunks(lambda: self.encode_prompt(prompt), own, adapter, entered(self._loop))

    @overload
    async def achat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: Literal[1] = 1,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        **overrides: Any,
    ) -> Completion: ...
    @overload
    async def achat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        n: int,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        **overrides: Any,
    ) -> list[Completion]: ...
    @keywords(SamplingParams)
    async def achat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        adapter: str | None = None,
        **overrides: Any,
    ) -> Completion | list[Completion]:
        """Answer a conversation in the model's own chat format. Cancelling the task aborts the request.

        Args:
            messages: As in `chat`.
            params: As in `chat`.
            tools: As in `chat`.
            template_variables: As in `chat`.
            continue_final_message: As in `chat`.
            parse_special: As in `chat`.
            adapter: As in `generate`.
            **overrides: As in `chat`.

        Returns:
            What `chat` does.

        Raises:
            ForgeError: As in `chat`.
        """
        params = sampling_params(params, overrides)
        ids = await asyncio.to_thread(
            self.encode_chat,
            messages,
            tools=tools,
            template_variables=template_variables,
            continue_final_message=continue_final_message,
            parse_special=parse_special,
        )
        completions = await self._acomplete([ids], params, adapter)
        return completions[0] if params.n == 1 else completions

    @keywords(SamplingParams)
    def astream_chat(
        self,
        messages: Messages,
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Any] | None = None,
        template_variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        parse_special: bool = True,
        adapter: str | None = None,
        **overrides: Any,
    ) -> AsyncGenerator[Chunk, None]:
        """Answer a conversation, piece by piece: ``async for chunk in llm.astream_chat(...)``.

        Closing the iterator (`aclose`), or cancelling the task that reads it, aborts the request.

        Args:
            messages: As in `chat`.
            params: As in `chat`.
            tools: As in `chat`.
            template_variables: As in `chat`.
            continue_final_message: As in `chat`.
            parse_special: As in `chat`.
            adapter: As in `generate`.
            **overrides: As in `chat`.

        Returns:
            An asynchronous iterator of chunks, as `stream` gives them.

        Raises:
            ParameterError: At once, where a parameter cannot be used or a keyword is unknown.
            ForgeError: As in `chat`, but where the first chunk is read.
        """

        def encode() -> list[int]:
            return self.encode_chat(
                messages,
                tools=tools,
                template_variables=template_variables,
                continue_final_message=continue_final_message,
                parse_special=parse_special,
            )

        self._slot_of(adapter)
        return self._achunks(encode, sampling_params(params, overrides), adapter, entered(self._loop))

    async def _acomplete(
        self, prompts: list[list[int]], params: SamplingParams, adapter: str | None
    ) -> list[Completion]:
        waiter = AsyncWaiter()
        request = self._request(prompts, params, waiter, adapter, is_streamed=False)
        try:
            if prompts:
                self._loop.submit(request)
                await waiter.get()
        finally:
            self._loop.cancel(request)
        return request.completions()

    async def _achunks(
        self, encode: Callable[[], list[int]], params: SamplingParams, adapter: str | None, scopes: list[Scope[Any]]
    ) -> AsyncGenerator[Chunk, None]:
        ids = await asyncio.to_thread(encode)
        waiter = AsyncWaiter()
        request = self._request([ids], params, waiter, adapter, is_streamed=True, scopes=scopes)
        try:
            self._loop.submit(request)
            running = params.n
            while running:
                for chunk in await waiter.get():
                    running -= chunk.finish_reason is not None
                    yield chunk
        finally:
            self._loop.cancel(request)
