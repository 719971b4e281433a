"""What a model holds, it gives back: closed, failed or interrupted, and whoever keeps objects and errors of it."""

from __future__ import annotations

import gc
import itertools
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_models import ARCH, GREEDY

import forge
from forge import LLM, OutOfMemoryError, loading
from forge.backend import NUMPY
from forge.backend.numpy import NumpyBackend
from forge.engine import Engine
from forge.formats.checkpoint import Checkpoint
from forge.models.feed_forward import FeedForward
from forge.models.weights import Weights
from forge.runtime import process

LLAMA = ARCH / "llama" / "model.gguf"
TESTS = str(Path(__file__).parents[1])


@pytest.fixture(autouse=True)
def nothing_else_is_loaded() -> Iterator[None]:
    """Other tests' models are not this process' here."""
    others = process._watched.copy()
    process._watched.clear()
    yield
    process._watched.update(others)


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Memory comes back at once, not when the garbage collector finds it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Made:
    """Weak references to all arrays that models and their state get."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._refs: list[weakref.ref[Any]] = []
        empty, allocate = NumpyBackend.empty, Weights._allocate
        monkeypatch.setattr(NumpyBackend, "empty", lambda *args: self._watch(empty(*args)))
        monkeypatch.setattr(Weights, "_allocate", lambda *args: self._watch(allocate(*args)))

    def _watch(self, array: Any) -> Any:
        self._refs.append(weakref.ref(array))
        return array

    def counts(self) -> tuple[int, int]:
        """How many were made, and how many there still are."""
        return len(self._refs), sum(one() is not None for one in self._refs)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Made:
    return Made(monkeypatch)


def load(**settings: Any) -> LLM:
    return forge.load(LLAMA, device="cpu", context=64, **settings)


def test_a_closed_model_leaves_no_array_whatever_a_notebook_keeps(made: Made, no_collector: None) -> None:
    kept: list[Any] = []
    for _ in range(2):
        with load() as llm:
            stream = llm.stream([1, 2], GREEDY)
            kept += [llm, llm.generate([1, 2, 3], max_tokens=2), stream, next(stream), llm.generate, llm.engine]
            try:
                llm.generate([10**9])
            except forge.ForgeError as error:  # as sys.last_value does, with its frames
                kept.append(error)
        count, left = made.counts()
        assert count >= 10
        assert left == 0


@pytest.mark.parametrize(("is_used", "runs_ahead"), [(False, False), (False, True), (True, False)])
def test_a_model_that_is_dropped_leaves_no_array(
    is_used: bool, runs_ahead: bool, made: Made, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    llm = load()
    if is_used:
        llm.generate([1, 2], max_tokens=2)
    del llm
    process.wait_for_closed()
    count, left = made.counts()
    assert count > 8
    assert left == 0


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_failed_load_leaves_no_array_though_its_error_is_kept(
    runs_ahead: bool, made: Made, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", runs_ahead)
    outer = ValueError("of the caller")

    def fails(*_: Any) -> None:
        raise RuntimeError("late")

    def caller() -> None:
        mine = [1, 2]
        try:
            raise outer
        except ValueError:
            load()
        mine.clear()

    monkeypatch.setattr(Engine, "warm_up", fails)
    with pytest.raises(RuntimeError, match="late") as kept:
        caller()
    count, left = made.counts()
    assert (count > 8, left) == (True, 0)
    lines = [entry.name for entry in kept.traceback]
    assert lines[-3:] == ["nothing_kept", "_assembled", "fails"] or {"load", "_assembled", "fails"} <= set(lines)
    assert kept.value.__context__ is outer
    assert outer.__traceback__ is not None
    assert outer.__traceback__.tb_frame.f_locals["mine"] == [1, 2]  # the caller's own are left alone


def test_a_failure_within_the_warm_up_s_own_functions_leaves_no_array(
    made: Made, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU. A traceback keeps the functions that failed, and what these refer to from outside of them."""

    def fails(*_: Any) -> None:
        raise RuntimeError("in a step")

    monkeypatch.setattr(NumpyBackend, "prepare", lambda self, run, progress=None: run())
    monkeypatch.setattr(FeedForward, "__call__", fails)
    with pytest.raises(RuntimeError, match="in a step") as kept:
        load()
    count, left = made.counts()
    assert (count > 8, left) == (True, 0)
    assert "run_typical_steps" in [entry.name for entry in kept.traceback]


def test_a_failure_of_a_thread_that_reads_weights_leaves_no_array(
    made: Made, no_collector: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Checkpoint.load_rows, itertools.count()

    def fails(*args: Any) -> Any:
        if next(calls) == 5:
            raise RuntimeError("in a thread")
        return real(*args)

    monkeypatch.setattr(Checkpoint, "load_rows", fails)
    with pytest.raises(RuntimeError, match="in a thread") as kept:
        load()
    count, left = made.counts()
    assert (count > 5, left) == (True, 0)
    assert kept.value.__traceback__ is not None


def test_a_model_that_an_interrupt_closes_is_given_back_though_it_was_never_used(made: Made) -> None:
    """And the next load waits until it is."""
    kept: list[Any] = []

    def cell() -> None:
        with load() as llm:
            kept.append(llm)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as error:
        cell()
    process.wait_for_closed()
    assert made.counts() == (16, 0)
    assert error.value.__traceback__ is not None
    assert process.loaded() == []


def test_a_second_load_says_what_the_first_one_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    with load() as first:
        assert not [note for note in first.notes if note.startswith("memory: ")]
        size = f"{first.nbytes / 1e9:.2f} GB"
        with load() as second:
            held = f"this process has loaded model.gguf ({size}), which LLM.close() gives back"
            assert [note for note in second.notes if note.startswith("memory: ")] == [f"memory: {held}"]
            monkeypatch.setattr(NUMPY, "free_bytes", lambda: 500_000)
            two = held.replace(", which", f", model.gguf ({size}), which")
            with pytest.raises(OutOfMemoryError) as error:
                load()
            assert error.value.args[0].endswith(f"free on {NUMPY.device}; {two}")
            assert error.value.hint == (
                "close it, or free some memory, use a smaller model, or a larger memory_fraction"
            )
            assert error.value.parameter == "memory_fraction"
            assert forge.plan_memory(LLAMA, device="cpu", context=64).problem == str(error.value)
    with pytest.raises(OutOfMemoryError) as error:
        load()
    assert "this process" not in str(error.value)


def test_a_model_on_another_device_is_not_blamed() -> None:
    class Other(NumpyBackend):
        device = "another"

    with load():
        assert list(loading.loaded_text(NUMPY))
        assert list(loading.loaded_text(Other())) == []


INTERRUPTS = f"""
import sys
sys.path.insert(0, {TESTS!r})
import gc, signal, time
import forge
from forge.backend import NUMPY
from forge.runtime import process
from tiny_models import ARCH

PATH = ARCH / "llama" / "model.gguf"
signal.signal(signal.SIGALRM, signal.default_int_handler)

def rss():
    gc.collect()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmRSS"))

def use(many):
    with forge.load(PATH, device="cpu", context=512, max_sequences=4) as llm:
        for _ in range(many):
            found = llm.generate([[1, 2], [3]], max_tokens=3, ignore_eos=True)
            text = [token for chunk in llm.stream([1, 2], max_tokens=3, ignore_eos=True) for token in chunk.ids]
        return [one.ids for one in found], text, llm

*right, _ = use(1)
begun = time.perf_counter()
use(1)
whole = time.perf_counter() - begun
before, interrupted, held = rss(), 0, 0
for number in range({{count}}):
    try:
        signal.setitimer(signal.ITIMER_REAL, whole * (number + 1) / {{count}})
        use(3)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt as error:
        sys.last_value = error
        interrupted += 1
    process.wait_for_closed()
    if process.loaded():  # the alarm came between the load and the `with` block: the error's frames have the model
        held += 1
        sys.last_value = None
        process.wait_for_closed()
        gc.collect()
        assert process.loaded() == [], number
    *found, _ = use(1)
    assert found == right, number
print(interrupted > {{count}} // 2, held <= {{count}} // 20, rss() - before < 20_000, flush=True)
"""


@pytest.mark.parametrize("count", [pytest.param(150, marks=pytest.mark.slow)])
def test_interrupts_at_many_moments_of_load_and_use_leave_a_process_that_loads_again(count: int) -> None:
    """The alarm comes at evenly spread moments of loading, generating and streaming, in the main thread."""
    code = INTERRUPTS.format(count=count)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert (done.stdout, done.returncode) == ("True True True\n", 0), done.stderr
