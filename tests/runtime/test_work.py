"""Requests under way, without a thread: what the end of some costs where there are many."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import ref

import pytest
from tiny_models import GREEDY, assert_idle, tiny_llm

from forge import LLM
from forge.engine import Sequence
from forge.runtime.request import Request
from forge.runtime.waiters import Waiter


def count_operations(call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytecodes of a call, and comparisons of sequences within functions of C, such as a search in a list."""
    count = 0

    def compare(one: object, other: object) -> bool:
        nonlocal count
        count += 1
        return one is other

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    with monkeypatch.context() as patch:
        patch.setattr(Sequence, "__eq__", compare)
        patch.setattr(Sequence, "__hash__", object.__hash__)
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(before)
    return count


def add(llm: LLM, count: int, n: int) -> tuple[Request, Waiter]:
    """A request of many prompts, under way."""
    waiter = Waiter(lambda: None)
    params = replace(GREEDY, n=n)
    request = Request([[1, 2, 3]] * count, params, llm.tokenizer, ref(waiter), is_streamed=False)
    llm._loop.work.add(request)
    return request, waiter


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num_steps", [0, 1, 3])
def test_cancelling_twice_as_many_prompts_beside_twice_as_many_takes_twice_the_work(
    num_steps: int, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    for size in (100, 200):
        llm = tiny_llm("llama")
        work = llm._loop.work
        ahead, ahead_waits = add(llm, size, n)
        request, waits = add(llm, size, n)
        for _ in range(num_steps):
            work.run()
        counts.append(count_operations(lambda work=work, request=request: work.cancel(request), monkeypatch))  # type: ignore[misc]
        work.cancel(ahead)
        del ahead_waits, waits
        assert_idle(llm)
    assert counts[1] < 2.2 * counts[0]


def test_the_end_of_a_request_takes_no_more_work_where_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    for others in (1, 200):
        llm = tiny_llm("llama")
        work = llm._loop.work
        held = [add(llm, 1, 2) for _ in range(others)]
        request, waits = add(llm, 1, 2)
        counts.append(count_operations(lambda work=work, request=request: work.drop(request.waiter), monkeypatch))  # type: ignore[misc]
        for one, _ in held:
            work.cancel(one)
        del waits
        assert_idle(llm)
    assert counts[1] < 1.2 * counts[0]
