"""LLM's methods for asyncio: the same results as the others', and cancellation that frees what it held."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Coroutine
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import CONTEXT, GREEDY, SEEDED, assert_idle, random_prompts, tiny_llm, wait_for

from forge import LLM, Completion, ContextLengthError, ForgeError, ParameterError
from forge.engine import ModelRunner
from forge.tokenizer.chat import ChatTemplate

LONG = replace(GREEDY, max_tokens=None)
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared() -> LLM:
    llm = tiny_llm("llama")
    llm.chat_template = ChatTemplate("[{{ messages[0].content }}]", name="m", special_tokens={})
    return llm


@pytest.fixture
def llm(shared: LLM) -> Any:
    yield shared
    assert_idle(shared)


def run(task: Coroutine[Any, Any, Any]) -> Any:
    async def in_time() -> Any:
        return await asyncio.wait_for(task, 60)

    return asyncio.run(in_time())


def ids(completions: Any) -> Any:
    return [c.ids for c in completions] if isinstance(completions, list) else completions.ids


@pytest.mark.parametrize("prompt", ["Hello", [1, 2, 3], ["a", "b"], [[1], [2, 3]], []], ids=repr)
@pytest.mark.parametrize("n", [1, 2])
def test_agenerate_gives_what_generate_gives(llm: LLM, prompt: Any, n: int) -> None:
    params = replace(SEEDED, n=n)
    found = run(llm.agenerate(prompt, params, max_tokens=9))
    assert ids(found) == ids(llm.generate(prompt, params, max_tokens=9))
    assert isinstance(found, Completion) == (prompt in ("Hello", [1, 2, 3]) and n == 1)


def test_astream_gives_what_stream_gives(llm: LLM) -> None:
    params = replace(SEEDED, n=2, logprobs=1)

    async def read() -> list[Any]:
        return [chunk async for chunk in llm.astream("Hello", params)]

    found, expected = run(read()), list(llm.stream("Hello", params))
    for choice in range(2):
        pairs = zip(
            [chunk for chunk in found if chunk.index == choice],
            [chunk for chunk in expected if chunk.index == choice],
            strict=True,
        )
        for one, other in pairs:
            assert replace(one, timings=None) == replace(other, timings=None)


def test_achat_and_astream_chat_give_what_chat_gives(llm: LLM) -> None:
    expected = llm.chat(MESSAGES, SEEDED)
    assert isinstance(expected, Completion)
    assert run(llm.achat(MESSAGES, SEEDED)).ids == expected.ids

    async def read() -> str:
        return "".join([chunk.text async for chunk in llm.astream_chat(MESSAGES, SEEDED)])

    assert run(read()) == expected.text


def test_tasks_run_together_and_each_gives_what_it_gives_alone(llm: LLM) -> None:
    prompts = random_prompts(20, 30, seed=3)
    expected = [ids(llm.generate(prompt, SEEDED)) for prompt in prompts]

    async def read(prompt: list[int]) -> list[int]:
        return [token async for chunk in llm.astream(prompt, SEEDED) for token in chunk.ids]

    async def all_together() -> list[Any]:
        whole = [llm.agenerate(prompt, SEEDED) for prompt in prompts[::2]]
        streams = [read(prompt) for prompt in prompts[1::2]]
        return await asyncio.gather(*whole, *streams)

    found = run(all_together())
    assert [one.ids for one in found[:10]] == expected[::2]
    assert found[10:] == expected[1::2]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_cancelling_a_task_aborts_its_request(llm: LLM, is_streamed: bool) -> None:
    begun = threading.Event()
    step = llm.engine.step

    async def read() -> None:
        if is_streamed:
            async for _ in llm.astream([1, 2], LONG):
                pass
        else:
            await llm.agenerate([1, 2], LONG)

    def slow() -> Any:
        begun.set()
        return step()

    async def cancel() -> None:
        task = asyncio.create_task(read())
        assert await asyncio.to_thread(begun.wait, 30)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine, "step", slow)
        run(cancel())
    assert_idle(llm)


def test_a_stream_that_is_left_is_aborted(llm: LLM) -> None:
    async def leave() -> None:
        async for _ in llm.astream([1, 2], LONG):
            break
        gc.collect()
        chunks = llm.astream([1, 2], LONG)
        await anext(chunks)
        await chunks.aclose()

    run(leave())
    assert_idle(llm)


def test_a_step_that_fails_is_raised_by_the_tasks_that_wait_for_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("once")

    async def read() -> None:
        async for _ in llm.astream([1, 2], GREEDY):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "forward", fails)
        for task in (llm.agenerate([1, 2], GREEDY), read()):
            with pytest.raises(MemoryError, match="once"):
                run(task)
    assert run(llm.agenerate([1, 2], GREEDY)).ids == llm.generate([1, 2], GREEDY).ids


def test_what_cannot_run_is_refused_with_the_errors_of_the_other_methods(llm: LLM) -> None:
    with pytest.raises(ParameterError, match="one prompt"):
        llm.astream(["a", "b"])
    with pytest.raises(ParameterError, match="did you mean temperature"):
        llm.astream("a", temprature=1)
    with pytest.raises(ContextLengthError):
        run(llm.agenerate([1] * CONTEXT))
    with pytest.raises(ContextLengthError):
        run(anext(llm.astream([1] * CONTEXT)))


def test_closing_the_model_ends_tasks_as_aborted_and_refuses_others() -> None:
    llm = tiny_llm("llama")

    async def read() -> str | None:
        reason = None
        async for chunk in llm.astream([1, 2], LONG):
            reason = chunk.finish_reason
            if llm._loop._refusal is None:
                llm._loop.stop()
        return reason

    assert run(read()) == "abort"
    with pytest.raises(ForgeError, match="closed"):
        run(llm.agenerate([1, 2]))


@pytest.mark.parametrize("moment", ["while the thread ends", "behind its end"])
def test_a_request_that_is_sent_as_the_model_closes_is_refused(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    loop, is_closing, start, close = llm._loop, threading.Event(), llm._loop._start, llm.engine.close

    def close_when_sent() -> None:
        is_closing.set()
        while moment == "while the thread ends" and loop._inbox.empty():
            time.sleep(0.001)
        close()

    def start_and_stop() -> None:
        """The request has passed the check, and is not sent yet."""
        start()
        loop.stop()
        wait_for(is_closing.is_set if moment == "while the thread ends" else lambda: loop._has_ended)

    monkeypatch.setattr(llm.engine, "close", close_when_sent)
    monkeypatch.setattr(loop, "_start", start_and_stop)
    with pytest.raises(ForgeError, match="closed"):
        run(llm.agenerate([1, 2]))


def test_a_request_whose_event_loop_is_gone_ends(llm: LLM) -> None:
    event_loop = asyncio.new_event_loop()
    chunks = llm.astream([1, 2], LONG)
    event_loop.run_until_complete(anext(chunks))
    event_loop.close()
    assert_idle(llm)  # the next delivery finds that nobody waits
    del chunks
