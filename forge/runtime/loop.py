"""The engine's thread: it alone runs steps. Callers submit work to it and wait for what it delivers."""

from __future__ import annotations

import sys
import time
from _thread import start_new_thread
from collections.abc import Callable, Generator
from contextlib import closing, suppress
from itertools import count
from queue import Empty, SimpleQueue
from threading import Lock, get_ident
from typing import Any, TypeVar
from weakref import ref

from forge.engine import Engine, Sequence
from forge.errors import ForgeError
from forge.runtime.request import Hold, Pass, Request, deliver
from forge.runtime.waiters import Waiter
from forge.runtime.work import Work

T = TypeVar("T")
_CLOSED = "the model is closed: load it again"
_EXITS = "the interpreter is exiting"
_FORKED = (
    "loaded before the process was forked, on a GPU or while requests were running: load it in the child, or use "
    "multiprocessing's spawn"
)
_NUMBERS = count()
_POLL_S = 0.0005
"""A lock of `threading.Event` would be held where a signal handler that waits for the same interrupts the wait."""


class EngineLoop:
    """A daemon thread that owns an engine. It starts with the first request and ends with `close`.

    What callers do comes down to one call of `SimpleQueue.put`, which is reentrant. So it may happen anywhere: in a
    signal handler, in a destructor that the garbage collector calls, in the engine's thread itself. An interrupt in a
    caller's thread cannot tear a step. A caller holds its waiter; the loop has weak references to waiters, and ends the
    requests of those that are gone.
    """

    def __init__(self, engine: Engine, name: str) -> None:
        """name: the model's, for messages."""
        self._engine, self._name = engine, name
        self._refusal: str | None = None
        """Why no work is taken any more."""
        self._num_forks = 0
        self.number = next(_NUMBERS)
        """Later ones have larger numbers."""
        self.nbytes, self.device = 0, engine.runner.device
        """Bytes of the device's memory that the model takes, as planned."""
        self.work = Work(engine)
        self._begin()

    def _begin(self) -> None:
        self._inbox: SimpleQueue[Any] = SimpleQueue()
        """Pairs of a method and what it handles, and weak references to waiters that are gone."""
        self._owner = Lock()
        """Held by the thread that runs steps. A second thread ends at once."""
        self._thread_id: int | None = None
        self._is_idle = True
        self._has_thread = False
        """Whether one was started, which may not run yet."""
        self._is_stopping = self._frees = False
        self._has_ended = False

    # Called by any thread

    @property
    def name(self) -> str:
        return self._name

    @property
    def has_ended(self) -> bool:
        """Whether the model's memory was given back, or is another process'."""
        return self._has_ended

    @property
    def is_closed(self) -> bool:
        """Whether no work is taken any more."""
        return self._refusal is not None

    def check(self) -> None:
        """Raises ForgeError where no work is taken."""
        if self._refusal is not None:
            raise self._refused()

    def _refused(self) -> ForgeError:
        return ForgeError(f"{self._name}: {self._refusal}")

    def waiter(self) -> Waiter:
        """A place where a thread waits for its next request."""
        forks_before = self._num_forks

        def refusal() -> str | None:
            if self._num_forks != forks_before:
                return f"{self._name}: {_FORKED}"
            has_ended = self._has_ended or sys.is_finalizing()  # which leaves no thread
            return f"{self._name}: {self._refusal or _EXITS}" if has_ended else None

        return Waiter(refusal, self._engine.runner.backend.released)

    def watch(self, waiter: Any) -> ref[Any]:
        """A weak reference to a waiter. The loop is told when the waiter is gone."""
        watched = ref(waiter, self._inbox.put)
        hash(watched)  # which can be computed while the waiter lives
        return watched

    def submit(self, request: Request) -> None:
        """Queue a request. Raises ForgeError where no work is taken."""
        self._put(self.work.add, request)

    def submit_pass(self, parts: Generator[object, None, Any], waiter: Any) -> Pass:
        """Queue a generator, whose result the waiter gets. It ends with its waiter."""
        current = Pass(parts, self.watch(waiter))
        self._put(self.work.add_pass, current)
        return current

    def cancel(self, request: Request) -> None:
        """End a request before the next step, unless it has ended. Nothing more of it is delivered."""
        if not request.is_finished:
            self._inbox.put((self.work.cancel, request))

    def hold(self, sequence: Sequence) -> Hold:
        """What keeps the pages of a state's sequence. Called by the engine's thread."""
        return Hold(sequence, lambda state: self._inbox.put((self.work.release, state)))

    def run(self, parts: Generator[object, None, T]) -> T:
        """What a generator returns that runs in the engine's thread, one item between two steps.

        It needs nothing of its caller meanwhile: a signal handler, within the caller's wait, may use the model too. The
        generators of several callers run one after the other. One that the engine's thread itself wants, for a user's
        function within a step, runs at once, and takes free pages alone.
        """
        if get_ident() == self._thread_id:
            self.check()
            with self._engine.scheduler.within_step():
                return _result_of(parts)
        waiter = self.waiter()
        current = self.submit_pass(parts, waiter)
        try:
            result: T = waiter.get()
            return result
        finally:
            self._inbox.put((self.work.end_pass, current))

    def close(self, *, waits: bool = True) -> None:
        """End all requests as aborted, stop the thread, let go of the model. waits: For the step under way, and until
        memory is given back."""
        if self._has_ended:
            return
        self.stop()
        if get_ident() != self._thread_id and not sys.is_finalizing():
            try:
                self._start()  # this thread may be interrupted: that one frees all
            except RuntimeError:  # no thread can be started, as at the interpreter's exit
                self._run()
            while waits and not self._has_ended:
                time.sleep(_POLL_S)

    def stop(self, *, frees: bool = True) -> None:
        """As `close`, without waiting. frees: whether the model is let go of; False where the process ends anyway."""
        self._refusal = self._refusal or (_CLOSED if frees else _EXITS)
        self._inbox.put((self._stop, frees))

    def abandon(self) -> None:
        """As `stop`, where the model's object is gone. What never ran has no thread that would free it: a message to
        that would be a cycle of references, and keep all until the garbage collector comes."""
        self._refusal = self._refusal or _CLOSED
        if self._has_thread:
            self.stop()

    def wait_for_end(self, seconds: float) -> None:
        """Wait until the thread has ended, if there is one, for so long at most."""
        deadline = time.monotonic() + seconds
        while self._has_thread and not self._has_ended and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _put(self, handle: Callable[[Any], None], sent: Request | Pass) -> None:
        self.check()
        if get_ident() == self._thread_id:
            raise ForgeError(
                f"{self._name}: a request cannot wait for the step that runs this function",
                hint="use logits, score or a state of the model here, or call from another thread",
            )
        self._start()
        self._inbox.put((handle, sent))
        if self._has_ended:  # since the check
            self._reject()

    def _start(self) -> None:
        """Start the thread, unless there is one. Where two callers start one each, the second one ends at once.

        A signal handler may do it while its thread is within `threading.Thread.start`, whose lock another `Thread`
        would wait for.
        """
        if self._thread_id is None:
            self._has_thread = True
            start_new_thread(self._run, ())

    # Called by the engine's thread

    def _run(self) -> None:
        if not self._owner.acquire(blocking=False):
            return
        self._thread_id = get_ident()
        try:
            self._receive()
            while not self._is_stopping:
                self.work.run()
                self._receive()
        except BaseException as error:
            self._frees, self._refusal = True, f"the engine's thread has failed: {type(error).__name__}: {error}"
            self.work.fail_all(self._refused())
            raise
        finally:
            self._end()

    def _receive(self) -> None:
        """Take what callers have sent. Wait for it where nothing can run."""
        waits = not self.work.can_run()
        while waits or not self._inbox.empty():
            self._is_idle = waits
            message = self._inbox.get()
            self._is_idle = waits = False
            if isinstance(message, ref):
                self.work.drop(message)
            else:
                handle, sent = message
                handle(sent)

    def _stop(self, frees: bool) -> None:
        self._is_stopping, self._frees = True, frees

    def _end(self) -> None:
        """End what runs, and refuse what comes."""
        self._refusal = self._refusal or _CLOSED
        try:
            self.work.end(self._refused())
            if self._frees:
                self._engine.close()
        finally:
            self._is_idle = True
            self._has_ended = True
            self._reject()

    def _reject(self) -> None:
        """Answer what was sent when nobody takes it any more. Two threads may do it together."""
        with suppress(Empty):
            while True:
                message = self._inbox.get_nowait()
                if not isinstance(message, ref) and isinstance(message[1], Request | Pass):
                    deliver(message[1], self._refused())

    # Called where the process forks: the first one before it, the others in the child

    def settle(self, seconds: float) -> None:
        """Wait until work that nobody waits for any more has ended, for so long at most."""
        deadline = time.monotonic() + seconds
        while (not self._is_idle or self.work) and not self.work.has_waiters and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def is_busy(self) -> bool:
        """Whether the thread was at work, or work was under way, when the process forked."""
        return not self._is_idle or bool(self.work) or self._engine.is_busy

    def survives(self) -> bool:
        """A GPU's driver does not survive a fork."""
        return not self._engine.runner.is_asynchronous

    def restart(self) -> None:
        """The child has no thread: the next request starts one."""
        self._num_forks += 1
        if not self._has_ended:
            self._begin()

    def lose(self) -> None:
        """The model is the parent's alone: every call says so, and nothing is freed."""
        self._num_forks += 1
        self._refusal = self._refusal or _FORKED
        self._begin()
        self._has_ended = True


def _result_of(parts: Generator[object, None, T]) -> T:
    """Run a generator to its end."""
    with closing(parts):
        while True:
            try:
                next(parts)
            except StopIteration as end:
                result: T = end.value
                return result
