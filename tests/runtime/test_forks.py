"""A model in a fork of its process: it works where nothing was under way, else it says so; it never hangs."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from forked import SECONDS, in_a_child
from tiny_models import CONTEXT, GREEDY, settle, tiny_llm

from forge import LLM, ForgeError
from forge.backend.numpy import NumpyBackend
from forge.runtime.waiters import Waiter

WORDS = "loaded before the process was forked"


@contextmanager
def generating(llm: LLM, call: Callable[[], Any] | None = None) -> Iterator[None]:
    """Another thread is in the middle of a step."""
    use = call or (lambda: llm.generate([1, 2, 3], GREEDY))
    within, ended = threading.Event(), threading.Event()
    forward = llm.engine.runner.forward

    def waits(*arguments: Any, **options: Any) -> Any:
        within.set()
        assert ended.wait(20 * SECONDS)
        return forward(*arguments, **options)

    llm.engine.runner.forward = waits  # type: ignore[method-assign]
    thread = threading.Thread(target=use, daemon=True)
    thread.start()
    assert within.wait(SECONDS)
    llm.engine.runner.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        ended.set()
        thread.join(SECONDS)


def uses(llm: LLM) -> dict[str, Callable[[], Any]]:
    return {
        "generate": lambda: llm.generate([1, 2], GREEDY),
        "stream": lambda: list(llm.stream("ab", GREEDY)),
        "logits": lambda: llm.logits([1, 2, 3]),
        "attention": lambda: llm.attention([1, 2, 3]),
        "perplexity": lambda: llm.perplexity([1, 2, 3]),
    }


def test_a_fork_beside_a_thread_that_generates_raises_in_every_use() -> None:
    """It hung each time: the thread held the lock, and is not there any more."""
    llm = tiny_llm("llama", max_step_tokens=4)
    with generating(llm):
        for name, use in uses(llm).items():
            found = in_a_child(use)
            assert found.startswith("ForgeError: "), (name, found)
            assert WORDS in found
            assert "spawn" in found
            assert "\n" not in found


def test_a_fork_beside_another_model_s_thread_raises_too() -> None:
    """That thread may have been within BLAS, which both use."""
    idle, busy = tiny_llm("llama"), tiny_llm("llama")
    with generating(busy):
        assert WORDS in in_a_child(uses(idle)["generate"])
    assert "Completion" in in_a_child(uses(idle)["generate"])


def test_a_fork_beside_a_pass_over_all_positions_raises() -> None:
    llm = tiny_llm("llama", max_step_tokens=2)
    rows = llm.engine.logits([1] * 20)
    next(rows)
    assert WORDS in in_a_child(uses(llm)["generate"])
    rows.close()
    with generating(llm, lambda: llm.logits([1] * 20)):
        for name, use in uses(llm).items():
            found = in_a_child(use)
            assert WORDS in found, (name, found)
    settle(llm)
    assert "Completion" in in_a_child(uses(llm)["generate"])


def threaded(call: Callable[[], str]) -> str:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(call()))
    thread.start()
    thread.join(2 * SECONDS)
    return found[0]


def test_a_fork_where_nothing_runs_works_on_the_cpu() -> None:
    llm = tiny_llm("llama")
    expected = llm.generate([1, 2], GREEDY).ids
    assert in_a_child(lambda: uses(llm)["generate"]().ids) == repr(expected)
    for use in uses(llm).values():
        found = in_a_child(use)
        assert "Error" not in found, found
    # nor does a fork of a thread's that is not the main one, or of a fork
    assert threaded(lambda: in_a_child(lambda: uses(llm)["generate"]().ids)) == repr(expected)
    assert in_a_child(lambda: in_a_child(lambda: uses(llm)["generate"]().ids)) == repr(repr(expected))


@pytest.mark.slow  # it sleeps for seconds
def test_a_fork_right_behind_a_call_works_although_the_thread_is_not_at_rest_yet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = tiny_llm("llama")
    expected = llm.generate([1, 2], GREEDY).ids
    deliver = Waiter.deliver

    def slowly(self: Waiter, message: object) -> None:
        deliver(self, message)
        time.sleep(0.1)

    monkeypatch.setattr(Waiter, "deliver", slowly)
    for call in uses(llm).values():
        call()
        assert in_a_child(lambda: uses(llm)["generate"]().ids) == repr(expected)


def test_a_gpu_is_never_used_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", True)
    llm = tiny_llm("llama")
    for use in uses(llm).values():
        assert WORDS in in_a_child(use)
    assert llm.generate([1, 2], GREEDY).ids


def test_a_half_read_stream_says_so_in_the_child_and_goes_on_in_the_parent() -> None:
    llm = tiny_llm("llama")
    expected = llm.generate([1, 2], GREEDY).ids
    stream = llm.stream([1, 2], GREEDY)
    found = list(next(stream).ids)
    assert WORDS in in_a_child(lambda: list(stream))
    assert found + [token for chunk in stream for token in chunk.ids] == expected


def test_a_child_that_cannot_use_a_model_can_still_leave_it() -> None:
    """Its attributes are there, `with` ends, and streams that it drops are dropped."""
    llm = tiny_llm("llama")
    streams = [llm.stream([1, 2], GREEDY)]
    next(streams[0])

    def leave() -> object:
        unraisable: list[object] = []
        sys.unraisablehook = unraisable.append
        with llm:
            streams.clear()
            gc.collect()
            return llm.context, llm.tokenizer.decode([1]) != "", "llama" in repr(llm), unraisable

    with generating(llm):
        assert in_a_child(leave) == repr((CONTEXT, True, True, []))


@pytest.mark.parametrize("use", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_model_that_is_to_be_sent_to_another_process_says_so(use: Callable[[LLM], Any]) -> None:
    """As an argument of a process that multiprocessing spawns."""
    with pytest.raises(ForgeError, match=r"model.gguf: a loaded model cannot be copied, or sent to another process"):
        use(tiny_llm("llama"))


@pytest.mark.slow
def test_forks_at_any_moment_of_a_thread_s_work_never_hang() -> None:
    llm = tiny_llm("llama")
    expected = llm.generate([1, 2], GREEDY).ids
    ended = threading.Event()

    def work() -> None:
        while not ended.is_set():
            llm.generate([1, 2, 3], GREEDY, max_tokens=80)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        found = [in_a_child(lambda: uses(llm)["generate"]().ids) for _ in range(20)]
    finally:
        ended.set()
        thread.join(SECONDS)
    assert all(text == repr(expected) or WORDS in text for text in found), found
    assert any(WORDS in text for text in found)


inherited: LLM | None = None
"""Set in the parent. A child that is no fork imports this module anew."""


def ids_of_a_model_of_its_own() -> list[int]:
    return tiny_llm("llama").generate([1, 2], GREEDY).ids


def ids_of_the_parent_s_model() -> list[int] | None:
    return inherited.generate([1, 2], GREEDY).ids if inherited else None


def use_a_model_that_was_sent(llm: LLM) -> None:
    llm.generate([1, 2], GREEDY)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 on: other threads may hold locks
@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("spawn", "forkserver"))]
)
def test_processes_of_multiprocessing_load_their_own_model_whatever_the_parent_does(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fork may use the parent's too, if nothing was under way."""
    llm = tiny_llm("llama")
    expected = llm.generate([1, 2], GREEDY).ids
    monkeypatch.setattr(sys.modules[__name__], "inherited", llm)
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(1, context) as pool:
        assert pool.submit(ids_of_a_model_of_its_own).result(SECONDS) == expected
        assert pool.submit(ids_of_the_parent_s_model).result(SECONDS) == (expected if method == "fork" else None)
        with pytest.raises(ForgeError, match="cannot be copied, or sent to another process: load it there"):
            pool.submit(use_a_model_that_was_sent, llm).result(SECONDS)
    with generating(llm), ProcessPoolExecutor(1, context) as pool:
        assert pool.submit(ids_of_a_model_of_its_own).result(SECONDS) == expected
        if method == "fork":
            with pytest.raises(ForgeError, match=WORDS):
                pool.submit(ids_of_the_parent_s_model).result(SECONDS)
    assert llm.generate([1, 2], GREEDY).ids == expected
