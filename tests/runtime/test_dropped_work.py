"""Work that nobody waits for any more ends, although its caller says nothing: an interrupt may hit the clean-up."""

from __future__ import annotations

import threading
from collections.abc import Generator
from dataclasses import replace

import pytest
from tiny_models import GREEDY, assert_idle, tiny_llm

from forge.runtime.request import Pass


def test_a_request_that_delivers_nothing_before_its_end_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    loop, step, runs, is_gone = llm._loop, llm.engine.step, threading.Event(), threading.Event()

    def wait_and_step() -> object:
        runs.set()
        assert is_gone.wait(60)
        return step()

    monkeypatch.setattr(llm.engine, "step", wait_and_step)
    waiter = loop.waiter()
    request = llm._request([[1, 2, 3]], replace(GREEDY, n=2, max_tokens=None), waiter, is_streamed=False)
    loop.submit(request)
    assert runs.wait(60)
    del waiter
    is_gone.set()
    assert_idle(llm)
    assert [choice.finish_reason for choice in request.choices] == ["abort", "abort"]


def test_a_pass_is_closed() -> None:
    llm = tiny_llm("llama")
    loop, runs, is_closed = llm._loop, threading.Event(), threading.Event()

    def endless() -> Generator[None, None, None]:
        try:
            while True:
                runs.set()
                yield
        finally:
            is_closed.set()

    waiter = loop.waiter()
    current = Pass(endless(), loop.watch(waiter))  # kept, as by a caller's error
    loop._put(loop.work.add_pass, current)
    assert runs.wait(60)
    del waiter
    assert is_closed.wait(60)
    assert_idle(llm)
