"""The engine's thread: what callers do to it, and what fails in it, harms no other request."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import CONTEXT, GREEDY, SEEDED, assert_idle, random_prompts, settle, tiny_llm, wait_for

import forge
from forge import LLM, Completion, ForgeError, OutOfMemoryError
from forge.backend import NUMPY
from forge.backend.numpy import NumpyBackend
from forge.models.feed_forward import FeedForward
from forge.runtime.waiters import PATIENCE_S

PACKAGE = str(Path(forge.__file__).parent)
SHORT = replace(SEEDED, max_tokens=2)
LONG = replace(GREEDY, max_tokens=None)


@pytest.fixture(scope="module")
def shared() -> LLM:
    return tiny_llm("llama")


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert_idle(shared)


class Steps:
    """Each step of an engine waits until it is allowed."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self._allowed, self._step = threading.Semaphore(0), llm.engine.step
        self.done = 0
        monkeypatch.setattr(llm.engine, "step", self._run)

    def _run(self) -> Any:
        assert self._allowed.acquire(timeout=60)
        self.done += 1
        return self._step()

    def allow(self, count: int) -> None:
        self._allowed.release(count)


def ids(completions: Any) -> Any:
    return [one.ids for one in completions] if isinstance(completions, list) else completions.ids


def in_threads(*calls: Callable[[], Any]) -> list[Any]:
    """What each call gives, or the error that it raises; all at once."""
    found: list[Any] = [None] * len(calls)

    def work(number: int) -> None:
        try:
            found[number] = calls[number]()
        except BaseException as error:
            found[number] = error

    threads = [threading.Thread(target=work, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads)
    return found


# Interrupts in the caller's thread


def interrupt() -> None:
    raise KeyboardInterrupt


def interrupted(call: Callable[[], Any], number: int, handle: Callable[[], Any] = interrupt) -> bool:
    """Whether a call runs as many bytecodes of forge's in this thread; before that one a signal's handler runs."""
    count = 0

    def trace(frame: Any, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == "opcode":
            count += 1
            if count == number:
                handle()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(before)
    return count >= number


def half_read(llm: LLM) -> None:
    stream = llm.stream([1, 2, 3], LONG)
    next(stream)
    stream.close()


CALLS: dict[str, Callable[[LLM], Any]] = {
    "generate": lambda llm: llm.generate([[1, 2, 3], [4, 5]], SHORT),
    "stream": lambda llm: list(llm.stream([1, 2, 3], replace(SHORT, n=2))),
    "half a stream": half_read,
    "logits": lambda llm: llm.logits([1, 2, 3]),
}


def interrupt_everywhere(llm: LLM, call: Callable[[LLM], Any], monkeypatch: pytest.MonkeyPatch, every: int) -> int:
    """The number of bytecodes of the call."""
    expected = llm.generate([7, 8], SHORT)
    assert isinstance(expected, Completion)
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: 1 << 40)  # it reads files, which an interrupt may leave open
    number = 1
    while interrupted(lambda: call(llm), number):
        found = llm.generate([7, 8], SHORT)
        assert isinstance(found, Completion)
        assert (found.ids, found.text) == (expected.ids, expected.text), f"bytecode {number}"
        number += every
    return number


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_interrupt_at_some_bytecodes_of_a_call_leaves_the_model_as_it_was(
    llm: LLM, call: Callable[[LLM], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupt_everywhere(llm, call, monkeypatch, every=53) > 300


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_interrupt_at_any_bytecode_of_a_call_leaves_the_model_as_it_was(
    llm: LLM, call: Callable[[LLM], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert interrupt_everywhere(llm, call, monkeypatch, every=1) > 300


def call_within_calls(use: Callable[[LLM], Any], monkeypatch: pytest.MonkeyPatch, every: int) -> None:
    """A handler makes the same call at each so many-th bytecode of a call, the first one of a model."""
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: 1 << 40)  # many bytecodes that have nothing to do with it
    expected, number, goes_on = use(tiny_llm("llama")), 1, True
    while goes_on:
        llm = tiny_llm("llama")
        found: list[Any] = []
        goes_on = interrupted(
            lambda llm=llm, found=found: found.append(use(llm)),  # type: ignore[misc]
            number,
            lambda llm=llm, found=found: found.append(use(llm)),  # type: ignore[misc]
        )
        assert found == [expected] * (2 if goes_on else 1), f"bytecode {number}"
        assert_idle(llm)
        llm.close()
        number += every
    assert number > 300


NESTED: dict[str, Callable[[LLM], Any]] = {
    "generate": lambda llm: ids(llm.generate([[1, 2, 3], [4, 5]], SHORT)),
    "stream": lambda llm: [token for chunk in llm.stream([1, 2, 3], SHORT) for token in chunk.ids],
    "logits": lambda llm: llm.logits([1, 2, 3]).tolist(),
}


@pytest.mark.parametrize("use", NESTED.values(), ids=NESTED)
def test_a_signal_handler_at_some_bytecodes_of_a_model_s_first_call_may_use_it(
    use: Callable[[LLM], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_within_calls(use, monkeypatch, every=211)


@pytest.mark.slow
@pytest.mark.parametrize("use", NESTED.values(), ids=NESTED)
def test_a_signal_handler_at_many_bytecodes_of_a_model_s_first_call_may_use_it(
    use: Callable[[LLM], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    call_within_calls(use, monkeypatch, every=7)


def test_a_signal_handler_within_the_start_of_a_thread_may_use_a_model_for_the_first_time() -> None:
    llm = tiny_llm("llama")
    with threading._active_limbo_lock:  # type: ignore[attr-defined]
        assert len(ids(llm.generate([1, 2], SHORT))) == 2
        llm.close()


SIGINTS = """
import os, random, signal, sys, threading, time
sys.path.insert(0, {tests!r})
from tiny_models import SEEDED, assert_idle, tiny_llm
from forge.tokenizer.chat import ChatTemplate

llm = tiny_llm("llama")
llm.chat_template = ChatTemplate("{{{{ messages[0].content }}}}", name="m", special_tokens={{}})
messages = [{{"role": "user", "content": "Hi"}}]
uses = {{
    "generate": lambda: [c.ids for c in llm.generate([[1, 2], [3]], SEEDED)],
    "stream": lambda: [token for chunk in llm.stream([1, 2], SEEDED) for token in chunk.ids],
    "chat": lambda: llm.chat(messages, SEEDED).ids,
}}
expected, seconds = {{}}, {{}}
for name, use in uses.items():
    use()
    start = time.perf_counter()
    expected[name] = use()
    seconds[name] = time.perf_counter() - start
rng = random.Random(0)
within = 0
for number in range({count}):
    name = list(uses)[number % 3]
    go, delay = threading.Event(), rng.uniform(0, 1.2 * seconds[name])

    def send():
        go.wait()
        time.sleep(delay)
        os.kill(os.getpid(), signal.SIGINT)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        go.set()
        use = uses[name]
        use()
        within -= 1
        sender.join()
        time.sleep(5)
        print("no interrupt")
    except KeyboardInterrupt:
        within += 1
    sender.join()
    for name, use in uses.items():
        assert use() == expected[name], (number, name)
    assert_idle(llm)
print("all equal, within a call:", within > {count} // 3)
"""


def child(code: str, seconds: float = 580) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds, check=False)


TESTS = str(Path(__file__).parents[1])


@pytest.mark.slow
def test_300_interrupts_of_the_system_at_random_moments_leave_the_model_as_it_was() -> None:
    done = child(SIGINTS.format(tests=TESTS, count=300))
    assert (done.stdout, done.stderr, done.returncode) == ("all equal, within a call: True\n", "", 0)


@pytest.mark.parametrize("use", ["generate", "logits", "attention", "perplexity"])
def test_a_signal_handler_within_a_pass_that_holds_all_pages_may_use_the_model(
    use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass goes on without its caller, which waits for the handler."""
    llm = tiny_llm("llama", num_pages=CONTEXT // 8, max_step_tokens=2)
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: ids(llm.generate([[1, 2], [3]], SEEDED)),
        "logits": lambda: llm.logits([3] * 90).tolist(),
        "attention": lambda: llm.attention([3] * 90).tolist(),
        "perplexity": lambda: llm.perplexity([3] * 90),
    }
    expected = {name: call() for name, call in calls.items()}
    runner, main = llm.engine.runner, threading.get_ident()
    batch, found = runner._batch, {}
    within = threading.Event()

    def handle(*_: object) -> None:
        within.set()
        found.update((name, call()) for name, call in calls.items())

    def signalling(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(runner, "_batch", batch)
        signal.pthread_kill(main, signal.SIGUSR1)
        assert within.wait(60)
        return batch(*arguments, **options)

    before = signal.signal(signal.SIGUSR1, handle)
    try:
        monkeypatch.setattr(runner, "_batch", signalling)
        assert calls[use]() == expected[use]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert found == expected
    assert_idle(llm)


# Requests of many threads


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True], ids=["", "as on a GPU"])
def test_64_threads_with_requests_of_all_kinds_each_get_what_they_get_alone(
    ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = random_prompts(64, 30, seed=4)
    alone = tiny_llm("llama")

    def streamed(llm: LLM, prompt: list[int]) -> list[list[int]]:
        found: list[list[int]] = [[], []]
        for chunk in llm.stream(prompt, replace(SEEDED, n=2)):
            found[chunk.index] += chunk.ids
        return found

    def dropped(llm: LLM, prompt: list[int]) -> list[int]:
        return next(llm.stream(prompt, GREEDY)).ids

    kinds: list[Callable[[LLM, list[int]], Any]] = [
        lambda llm, prompt: [c.ids for c in llm.generate([prompt, prompt[::-1]], SEEDED)],
        lambda llm, prompt: [c.text for c in llm.generate(prompt, replace(SEEDED, n=3, stop="e"))],
        streamed,
        dropped,
        lambda llm, prompt: llm.logits(prompt).argmax(1).tolist(),
    ]
    calls = [(kinds[number % len(kinds)], prompt) for number, prompt in enumerate(prompts)]
    expected = [kind(alone, prompt) for kind, prompt in calls]
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", ahead)
    llm = tiny_llm("llama", num_pages=5 * CONTEXT // 8, max_sequences=10)
    assert in_threads(*(lambda kind=kind, prompt=prompt: kind(llm, prompt) for kind, prompt in calls)) == expected
    assert_idle(llm)


# Callers that leave


def raise_in_the_loop(stream: Iterator[Any]) -> None:
    for _ in stream:
        raise ZeroDivisionError


@pytest.mark.parametrize("way", ["raises", "drops"])
def test_a_caller_that_leaves_frees_its_pages_within_two_steps(
    llm: LLM, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = Steps(llm, monkeypatch)
    other = llm.stream([5] * 10, LONG)
    steps.allow(3)
    next(other)
    streams = [llm.stream([1, 2, 3], LONG)]
    steps.allow(3)
    if way == "raises":
        with pytest.raises(ZeroDivisionError):
            raise_in_the_loop(streams.pop())
    else:
        next(streams[0])
        (left,) = [s for s in list(llm._loop.work.choices) if s.num_prompt == 3]
        while steps.done < 6:
            time.sleep(0.001)
        streams.clear()
        steps.allow(2)
        while left.finish_reason is None:
            time.sleep(0.001)
        assert left.finish_reason == "abort"  # a third step would wait, and fail
        assert left.pages == []
    steps.allow(1000)
    other.close()
    settle(llm)
    assert_idle(llm)


def test_a_request_whose_caller_is_gone_without_a_word_ends(llm: LLM) -> None:
    """As where an interrupt hits the caller's clean-up."""
    stream = llm.stream([1, 2, 3], LONG)
    next(stream)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm._loop, "cancel", lambda request: None)
        del stream
        gc.collect()
    assert_idle(llm)


def test_a_model_that_is_dropped_ends_its_thread_and_is_freed() -> None:
    llm = tiny_llm("llama")
    llm.generate([1, 2], SHORT)
    thread, held = llm._loop._thread_id, weakref.ref(llm.engine)
    assert thread in sys._current_frames()
    del llm
    wait_for(lambda: thread not in sys._current_frames())
    gc.collect()
    assert held() is None


def test_the_engine_s_own_thread_is_told_that_it_cannot_wait_for_itself(llm: LLM) -> None:
    def within() -> Generator[None, None, str]:
        for use in (lambda: llm.generate([1], SHORT), lambda: list(llm.stream([1], SHORT))):
            with pytest.raises(ForgeError, match="cannot wait for the step"):
                use()
        yield
        return "told"

    assert llm._loop.run(within()) == "told"


def within_a_step(llm: LLM, use: Callable[[], Any], requests: int) -> tuple[list[Any], list[list[int]]]:
    """What a function gives that the engine's thread calls between forward and sampling, where a user's is called."""
    found: list[Any] = []
    sample = llm.engine.runner.sample

    def sampled(*arguments: Any) -> Any:
        if not found and len(llm.engine.scheduler.running) == requests:
            try:
                found.append(use())
            except ForgeError as error:
                found.append(error)
        return sample(*arguments)

    llm.engine.runner.sample = sampled  # type: ignore[method-assign]
    ids = [completion.ids for completion in llm.generate([[1, 2, 3]] * requests, LONG)]
    assert_idle(llm)
    return found, ids


def test_passes_run_within_a_step_of_requests_which_go_on_as_without_them() -> None:
    llm = tiny_llm("llama")
    expected, logits = [c.ids for c in llm.generate([[1, 2, 3]] * 2, LONG)], llm.logits([5] * 40)
    found, ids = within_a_step(llm, lambda: llm.logits([5] * 40), 2)
    np.testing.assert_allclose(found[0], logits, rtol=0, atol=1e-5)
    assert ids == expected


def test_a_pass_within_a_step_takes_no_pages_of_its_requests() -> None:
    llm = tiny_llm("llama", num_pages=12)
    expected = [c.ids for c in llm.generate([[1, 2, 3]] * 2, LONG)]
    found, ids = within_a_step(llm, lambda: llm.logits([5] * 90), 2)
    assert isinstance(found[0], OutOfMemoryError)
    assert str(found[0]) == (
        "a pass over 90 positions needs pages of the KV cache that others hold: requests under way, which "
        "take 2 of 12 pages (all positions): wait for them, or load with a larger context"
    )
    assert ids == expected


# Steps that fail


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "any"])
@pytest.mark.parametrize(
    ("methods", "error"),
    [(["launch"], RuntimeError), (["asarray", "empty"], OutOfMemoryError)],
    ids=["op", "allocation"],
)
def test_a_failure_ends_the_requests_of_its_step_and_no_others(
    methods: list[str], error: type[Exception], every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend fails at each so many-th call, while two requests run and a third one waits for room."""
    prompts = random_prompts(3, 12, seed=8)
    params = replace(SEEDED, max_tokens=3)
    llm = tiny_llm("llama", max_sequences=2)
    expected = [ids(llm.generate(prompt, params)) for prompt in prompts]
    calls = fails_at = 0

    def failing(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == fails_at:
                raise error(f"call {calls}")
            return call(*arguments, **options)

        return counted

    for name in methods:
        monkeypatch.setattr(NumpyBackend, name, failing(getattr(NumpyBackend, name)))
    outcomes: set[int] = set()
    fails_at += every
    while True:
        calls = 0
        streams = [llm.stream(prompt, params) for prompt in prompts]
        found = in_threads(*(lambda s=stream: [t for c in s for t in c.ids] for stream in streams))
        if calls < fails_at:
            break
        failed = [isinstance(one, error) for one in found]
        outcomes.add(sum(failed))
        for one, wanted, has_failed in zip(found, expected, failed, strict=True):
            assert (str(one) == f"call {fails_at}") if has_failed else (one == wanted)
        assert_idle(llm)
        later = fails_at // every % 3
        assert ids(llm.generate(prompts[later], params)) == expected[later]
        fails_at += every
    assert found == expected
    most = 1 if error is OutOfMemoryError else 2
    assert outcomes == set(range(1, most + 1)) if every == 1 else max(outcomes) <= most
    assert fails_at > 40


def test_a_pass_that_fails_raises_in_its_caller_and_frees_its_pages(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise MemoryError("once")

    expected = llm.logits([1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(type(llm.engine.runner), "_batch", fails)
        for use in (llm.logits, llm.attention, llm.perplexity):
            with pytest.raises(MemoryError, match="once"):
                use([1, 2, 3])
            assert_idle(llm)
    np.testing.assert_array_equal(llm.logits([1, 2, 3]), expected)


def test_a_step_that_fails_before_its_sequences_are_known_ends_all_requests(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the same step would fail for ever, and nobody would hear of it."""

    def fails(**_: bool) -> Any:
        raise MemoryError("no step")

    expected = llm.generate([1, 2], SHORT)
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "schedule", fails)
        found = in_threads(lambda: llm.generate([1, 2], SHORT), lambda: list(llm.stream([1, 2], SHORT)))
        assert [repr(one) for one in found] == ["MemoryError('no step')"] * 2
    assert_idle(llm)
    again = llm.generate([1, 2], SHORT)
    assert isinstance(again, Completion)
    assert isinstance(expected, Completion)
    assert again.ids == expected.ids


def test_a_failure_of_the_thread_itself_raises_in_every_caller_and_frees_the_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is no abort: nobody asked for one."""
    llm = tiny_llm("llama", max_step_tokens=4)
    monkeypatch.setattr(sys, "unraisablehook", lambda _: None)
    steps = Steps(llm, monkeypatch)

    def fails() -> Any:
        raise RuntimeError("a fault")

    monkeypatch.setattr(llm._loop.work, "_can_run_part", lambda: False)  # the pass must not end before the failure

    def break_it() -> None:
        while len(llm._loop.work.choices) < 2 or not llm._loop.work.passes:
            steps.allow(1)
            time.sleep(0.05)
        monkeypatch.setattr(llm._loop.work, "can_run", fails)
        steps.allow(1000)

    calls = [lambda: llm.generate([1] * 9, LONG), lambda: list(llm.stream([1, 2], LONG)), lambda: llm.logits([1] * 9)]
    found = in_threads(*calls, break_it)[:3]
    for one in (*found, *in_threads(*calls)):
        assert isinstance(one, ForgeError)
        assert str(one).endswith("the engine's thread has failed: RuntimeError: a fault")
    wait_for(lambda: llm._loop._has_ended)
    assert not hasattr(llm.engine.runner, "model")  # no close would free it any more
    assert all(pool.num_free == pool.num_pages for pool in llm.engine.pools)


def test_passes_without_end_that_need_all_pages_leave_requests_every_second_step() -> None:
    """A request whose pages a pass takes has its ids computed again, in steps of 4: it needs several between passes."""
    llm = tiny_llm("llama", num_pages=CONTEXT // 8, max_sequences=4, max_step_tokens=4)
    expected = llm.generate([1, 2, 3], SEEDED)
    rows = llm.logits([5] * 90)
    has_ended = threading.Event()
    num_passes = [0] * 3

    def passes(number: int) -> None:
        while not has_ended.is_set():
            np.testing.assert_array_equal(llm.logits([5] * 90), rows)
            num_passes[number] += 1
            assert sum(num_passes) < 1000

    def generate() -> Any:
        try:
            return llm.generate([1, 2, 3], SEEDED)
        finally:
            has_ended.set()

    found = in_threads(generate, *(lambda number=number: passes(number) for number in range(3)))
    assert isinstance(expected, Completion)
    assert found[0].ids == expected.ids
    assert found[1:] == [None] * 3
    assert sum(num_passes) < 30
    assert_idle(llm)


def functions(error: BaseException) -> list[str]:
    """Names of the functions of its traceback."""
    return [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]


def test_each_caller_of_a_failed_step_gets_an_error_of_its_own(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else their tracebacks would be mixed: raising adds to an error's."""
    original = OutOfMemoryError("no room", parameter="context", hint="use less")

    def fails(**_: bool) -> Any:
        raise original

    def first() -> Any:
        return llm.generate([1, 2], SHORT)

    def second() -> Any:
        return list(llm.stream([1, 2], SHORT))

    async def third() -> Any:
        return await llm.agenerate([1, 2], SHORT)

    def all_wait() -> Any:
        while len(llm._loop.work.choices) < 3:
            steps.allow(1)
            time.sleep(0.01)
        monkeypatch.setattr(llm.engine.scheduler, "schedule", fails)
        steps.allow(1000)

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.scheduler, "schedule", lambda **_: [])  # nothing runs before all wait
        steps = Steps(llm, patch)
        found = in_threads(first, second, lambda: asyncio.run(third()), all_wait)[:3]
    monkeypatch.undo()
    assert len({id(error) for error in (*found, original)}) == 4
    for error, name in zip(found, ("first", "second", "third"), strict=True):
        assert isinstance(error, OutOfMemoryError)
        assert (str(error), error.parameter, error.hint) == ("no room: use less", "context", "use less")
        assert error.__cause__ is original
        assert {"first", "second", "third", "fails"} & set(functions(error)) == {name}
    assert "fails" in functions(original)
    assert not {"first", "second", "third"} & set(functions(original))


@pytest.mark.parametrize("runs_ahead", [False, True], ids=["waits for ids", "runs ahead"])
@pytest.mark.parametrize(
    ("use", "steps"),
    [("generate", 0), ("generate", 1), ("logits", 0), ("attention", 0)],
    ids=["prompt", "decode", "logits", "attention"],
)
def test_an_error_that_is_kept_keeps_no_memory_of_its_step(
    use: str, steps: int, runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a notebook keeps the last one: else a shorter request runs out of memory too, and close frees little."""
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    llm = tiny_llm("llama")
    model = llm.engine.runner.model
    calls, real, right = itertools.count(), FeedForward.__call__, steps * llm.config.num_layers

    def fails(*args: Any) -> Any:
        if next(calls) < right:
            return real(*args)
        raise MemoryError("once")

    with monkeypatch.context() as patch:
        patch.setattr(FeedForward, "__call__", fails)
        with pytest.raises(MemoryError, match="once") as kept:
            getattr(llm, use)([1, 2, 3])
    held = weakref.ref(model)
    del model
    llm.close()
    gc.collect()
    assert held() is None
    assert kept.value.__cause__ is not None
    assert "hidden" in functions(kept.value.__cause__)  # where it happened can still be seen


# The end


def test_a_closed_model_says_so() -> None:
    llm = tiny_llm("llama")
    llm.close()  # before its thread has begun
    llm.close()
    for use in (
        lambda: llm.generate([1, 2]),
        lambda: llm.stream([1, 2]),
        lambda: llm.logits([1, 2]),
        lambda: llm.attention([1, 2]),
        lambda: llm.perplexity([1, 2]),
    ):
        with pytest.raises(ForgeError, match=r"model.gguf: the model is closed: load it again$"):
            use()
    assert llm.tokenizer.decode([50])
    assert "llama" in repr(llm)


def test_close_frees_a_model_where_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 starts none while handlers of atexit run."""

    def fails(*_: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    llm = tiny_llm("llama")
    monkeypatch.setattr("forge.runtime.loop.start_new_thread", fails)
    llm.close()
    assert not hasattr(llm.engine.runner, "model")
    with pytest.raises(ForgeError, match="the model is closed"):
        llm.generate([1])


def test_close_ends_all_that_other_threads_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama", max_step_tokens=4)
    steps = Steps(llm, monkeypatch)
    calls = [lambda: llm.generate([1] * 9, LONG), lambda: list(llm.stream([1, 2], LONG)), lambda: llm.logits([1] * 9)]

    def close() -> None:
        while len(llm._loop.work.choices) < 2:
            steps.allow(1)
            time.sleep(0.01)
        llm.close()

    def allow_later() -> None:
        """The step under way takes longer than callers wait at a time."""
        while llm._loop._refusal is None:
            time.sleep(0.01)
        time.sleep(3 * PATIENCE_S)
        steps.allow(1000)

    completion, chunks, rows, nothing = in_threads(*calls, close, allow_later)[:4]
    assert completion.finish_reason == chunks[-1].finish_reason == "abort"
    assert isinstance(rows, ForgeError) or rows.shape[0] == 9
    assert nothing is None
    assert_idle(llm)


RESIDENT = """
import sys
sys.path.insert(0, {tests!r})
import gc
import itertools
from tiny_models import SEEDED, tiny_llm

def resident():
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

sizes = []
for number in range(20):
    llm = tiny_llm("llama", num_pages=3000)
    ids = llm.generate([1, 2, 3], SEEDED).ids
    full = resident()
    llm.close()
    sizes.append(resident())
kept = [llm]
print(sizes[-1] / sizes[1] < 1.05, full - sizes[-1] > 20_000)
"""


@pytest.mark.slow
def test_close_gives_memory_back_even_where_the_model_object_is_kept() -> None:
    done = child(RESIDENT.format(tests=TESTS))
    assert (done.stdout, done.stderr, done.returncode) == ("True True\n", "", 0)


EXIT = """
import os, sys, threading, time
sys.path.insert(0, {tests!r})
from tiny_models import GREEDY, tiny_llm

llm = tiny_llm("llama")
streams = [llm.stream([number, 2], GREEDY, max_tokens=None) for number in range(5)]
for stream in streams:
    next(stream)
step = llm.engine.step
within = threading.Event()

def slow():
    within.set()
    time.sleep({seconds})
    return step()

llm.engine.step = slow
streams.append(llm.stream([1], GREEDY))
threading.Thread(target=lambda: next(streams[-1]), daemon=True).start()
within.wait()
print("ends")
"""


@pytest.mark.parametrize("seconds", [pytest.param(0, marks=pytest.mark.slow), 100])
def test_the_interpreter_ends_while_streams_run_and_prints_nothing(seconds: int) -> None:
    """Whether steps are short, or take longer than anybody waits."""
    done = child(EXIT.format(tests=TESTS, seconds=seconds), seconds=60)
    assert (done.stdout, done.stderr, done.returncode) == ("ends\n", "", 0)


LEFTOVERS = """
import functools, sys, threading, time
sys.path.insert(0, {tests!r})
from tiny_models import GREEDY, tiny_llm

busy, fresh = tiny_llm("llama"), tiny_llm("llama")
stream = busy.stream([1, 2], GREEDY, max_tokens=None)
next(stream)
busy.engine.step = functools.partial(time.sleep, 100)  # a function of this module's would keep the module alive
time.sleep(0.2)

class Leftover:
    def __init__(self, name, call):
        self.name, self.call = name, call

    def __del__(self, said=print):
        try:
            said(self.name, self.call())
        except Exception as error:
            said(self.name, str(error).partition(": ")[2])

left = [
    Leftover("generate", lambda generate=fresh.generate: generate([1], GREEDY)),
    Leftover("busy", lambda generate=busy.generate: generate([1], GREEDY)),
    Leftover("close", lambda close=busy.close: close()),
    Leftover("close", lambda close=fresh.close: close()),
]
"""


def test_destructors_that_use_a_model_at_the_interpreter_s_exit_do_not_hang() -> None:
    """No thread runs any more then, nor can one be started."""
    done = child(LEFTOVERS.format(tests=TESTS), seconds=60)
    assert (done.stderr, done.returncode) == ("", 0)
    exits = "the interpreter is exiting"
    assert sorted(done.stdout.splitlines()) == [f"busy {exits}", "close None", "close None", f"generate {exits}"]
