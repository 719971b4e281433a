"""Work of the engine's thread: what nobody waits for any more ends, and passes and requests take turns."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import pytest
from tiny_models import GREEDY, assert_idle, tiny_llm

from forge import ForgeError
from forge.engine import Sampled
from forge.runtime.request import Pass, Request
from forge.runtime.waiters import Waiter
from forge.runtime.work import Work

LONG = replace(GREEDY, max_tokens=None)


def test_a_request_that_delivers_nothing_before_its_end_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    loop, step, runs, is_gone = llm._loop, llm.engine.step, threading.Event(), threading.Event()

    def wait_and_step() -> object:
        runs.set()
        assert is_gone.wait(60)
        return step()

    monkeypatch.setattr(llm.engine, "step", wait_and_step)
    waiter = loop.waiter()
    request = llm._request([[1, 2, 3]], replace(LONG, n=2), waiter, is_streamed=False)
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


def test_passes_and_requests_take_turns() -> None:
    """A pass waits for as many steps as the one before had parts, and no longer."""
    llm = tiny_llm("llama")
    work, done = Work(llm.engine), []

    def parts(name: str) -> Generator[None, None, None]:
        for _ in range(2):
            done.append(name)
            yield

    def step() -> list[Sampled]:
        done.append("step")
        return make_step()

    waiter, make_step = llm._loop.waiter(), llm.engine.step
    llm.engine.step = step  # type: ignore[method-assign]
    work.add(Request([[1, 2]], LONG, llm.tokenizer, weakref.ref(waiter), is_streamed=False))
    for name in "ab":
        work.add_pass(Pass(parts(name), weakref.ref(waiter)))
    while work.passes:
        work.run()
    assert done == [*["a", "step"] * 2, "step", *["b", "step"] * 2, "step"]
    work.end(ForgeError("closed"))
    assert_idle(llm)


def test_an_id_that_cannot_become_text_ends_its_request_alone() -> None:
    llm = tiny_llm("llama")
    expected, work = llm.generate([1, 2], GREEDY).ids, Work(llm.engine)
    waiters = [llm._loop.waiter() for _ in range(2)]
    first, second = (
        Request([[1, 2]], GREEDY, llm.tokenizer, weakref.ref(waiter), is_streamed=False) for waiter in waiters
    )
    for request in (first, second):
        work.add(request)

    def fail(_: Sampled) -> bool:
        raise ForgeError("no text")

    first.choices[0].push = fail  # type: ignore[method-assign]
    while work:
        work.run()
    with pytest.raises(ForgeError, match="no text"):
        waiters[0].get()
    assert waiters[1].get() is None
    assert second.completions()[0].ids == expected
    assert_idle(llm)


@pytest.mark.parametrize("use", ["generate", "stream", "logits"])
def test_an_interrupt_that_is_kept_with_its_frames_ends_what_it_hit(use: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a notebook keeps it: the caller's waiter lives on."""
    llm = tiny_llm("llama", max_step_tokens=2, max_sequences=2)
    runner, has_left, steps = llm.engine.runner, threading.Event(), []
    batch = runner._batch

    def step(*arguments: Any, **options: Any) -> Any:
        assert has_left.wait(60)
        steps.append(1)
        return batch(*arguments, **options)

    def interrupt(_: Waiter) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "_batch", step)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: llm.generate([1, 2, 3], LONG),
        "stream": lambda: next(llm.stream([1, 2, 3], LONG)),
        "logits": lambda: llm.logits([3] * 90),
    }
    with monkeypatch.context() as patch:
        patch.setattr(Waiter, "get", interrupt)
        with pytest.raises(KeyboardInterrupt) as kept:
            calls[use]()
    has_left.set()
    assert_idle(llm)
    assert len(steps) <= 1
    assert kept.traceback


def test_what_came_before_the_refusal_is_given() -> None:
    def refuse() -> str:
        waiter.deliver("result")
        return "closed"

    waiter = Waiter(refuse)
    assert waiter.get() == "result"


def test_what_nobody_waited_for_when_it_arrived_does_not_begin() -> None:
    llm = tiny_llm("llama")
    work, waiter = Work(llm.engine), llm._loop.waiter()
    gone = weakref.ref(waiter)
    del waiter
    work.add(Request([[1, 2]], LONG, llm.tokenizer, gone, is_streamed=False))
    work.add_pass(Pass(iter(()), gone))  # type: ignore[arg-type]
    assert not work
    assert_idle(llm)
