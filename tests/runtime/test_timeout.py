"""A request that takes longer than its `timeout` ends with an error, wherever it is, and no other notices."""

from __future__ import annotations

import asyncio
import pickle
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_models import GREEDY, SEEDED, assert_idle, random_prompts, tiny_llm

import forge
from forge import LLM, RequestTimeoutError
from forge.runtime.request import Request
from forge.runtime.waiters import Waiter

LATE = replace(GREEDY, timeout=1e-9)
LONG = replace(SEEDED, timeout=1000.0)


def submitted(llm: LLM, prompt: list[int], params: forge.SamplingParams) -> tuple[Request, Waiter]:
    """A request that runs when the test runs the work."""
    waiter = llm._loop.waiter()
    request = llm._request([prompt], params, waiter, is_streamed=True)
    llm._loop.work.add(request)
    return request, waiter


def pass_seconds(seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.runtime.work.time", SimpleNamespace(perf_counter=lambda: time.perf_counter() + seconds))


def read_to_the_end(waiter: Waiter) -> list[forge.Chunk]:
    """All chunks of one choice. Raises what was delivered if it is an error."""
    chunks: list[forge.Chunk] = []
    while not chunks or chunks[-1].finish_reason is None:
        chunks += waiter.get()
    return chunks


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    ("steps", "where"),
    [(0, "not begun"), (2, "in the middle of its prompt"), (8, "while ids come")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_request_ends_when_its_time_is_up_wherever_it_is(
    steps: int, where: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    [prompt, other] = random_prompts(2, 30, seed=6)
    prompt = (prompt * 40)[:40]
    expected = tiny_llm("llama").generate(other, SEEDED).ids
    llm = tiny_llm("llama", max_step_tokens=10, max_sequences=5)
    work = llm._loop.work
    neighbour, neighbour_waits = submitted(llm, other, SEEDED)
    work.run()
    request, waits = submitted(llm, prompt, replace(LONG, n=n))
    for _ in range(steps):
        work.run()
    first = request.choices[0].sequence
    found = "not begun" if not first.pages else "in the middle of its prompt" if not first.completion else None
    assert (found or "while ids come") == where
    pass_seconds(999, monkeypatch)
    work.run()
    assert not request.is_finished
    pass_seconds(1001, monkeypatch)
    work.run()
    assert request.is_finished
    assert [choice.sequence.pages for choice in request.choices] == [[]] * n
    message = r"^the request did not end within 1000 s: give it more time, or fewer max_tokens$"
    with pytest.raises(RequestTimeoutError, match=message) as raised:
        read_to_the_end(waits)
    assert raised.value.parameter == "timeout"
    while work:
        work.run()
    assert [token for chunk in read_to_the_end(neighbour_waits) for token in chunk.ids] == expected
    assert neighbour.is_finished
    assert_idle(llm)


def test_a_request_that_waits_for_its_turn_ends_too_and_those_behind_it_move_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = tiny_llm("llama", max_sequences=1)
    work = llm._loop.work
    held = [submitted(llm, [1 + number], replace(SEEDED, timeout=[None, 5, None][number])) for number in range(3)]
    for _ in range(3):
        work.run()
    pass_seconds(6, monkeypatch)
    while work:
        work.run()
    reasons = [request.choices[0].finish_reason for request, _ in held]
    assert reasons == ["length", "abort", "length"]
    with pytest.raises(RequestTimeoutError):
        held[1][1].get()
    assert_idle(llm)


def test_every_way_to_call_raises_it() -> None:
    llm = tiny_llm("llama")

    async def streamed() -> Any:
        return [chunk async for chunk in llm.astream([1, 2], LATE)]

    for call in (
        lambda: llm.generate([1, 2], LATE),
        lambda: llm.generate([[1, 2], [3]], GREEDY, timeout=1e-9),
        lambda: list(llm.stream([1, 2], LATE)),
        lambda: asyncio.run(llm.agenerate([1, 2], LATE)),
        lambda: asyncio.run(streamed()),
    ):
        with pytest.raises(TimeoutError, match="did not end within 1e-09 s") as raised:
            call()
        assert isinstance(raised.value, forge.ForgeError)
    assert llm.generate([1, 2], GREEDY, timeout=3600).ids == llm.generate([1, 2], GREEDY).ids
    assert not llm._loop.work._timed
    assert_idle(llm)


def test_the_error_is_the_same_in_another_process() -> None:
    error = RequestTimeoutError("the request did not end", parameter="timeout", hint="wait")
    other = pickle.loads(pickle.dumps(error))
    assert (type(other), str(other), other.parameter, other.hint) == (
        RequestTimeoutError,
        "the request did not end: wait",
        "timeout",
        "wait",
    )
