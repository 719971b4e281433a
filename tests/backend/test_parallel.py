"""Jobs on several threads: each runs once, errors and Ctrl-C end them, wherever they come."""

import gc
import sys
import threading
import time
import weakref
from types import FrameType
from typing import Any

import pytest

from forge.backend import parallel


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_each_job_runs_once_and_is_told_of_on_the_caller_s_thread(threads: int) -> None:
    ran: list[tuple[int, int]] = []
    ended: list[tuple[int, int]] = []
    parallel.run_all(
        lambda job: ran.append((job, threading.get_ident())),
        range(100),
        threads,
        lambda job: ended.append((job, threading.get_ident())),
    )
    assert sorted(job for job, _ in ran) == sorted(job for job, _ in ended) == list(range(100))
    assert threading.get_ident() not in {thread for _, thread in ran}
    assert {thread for _, thread in ended} == {threading.get_ident()}


def test_jobs_run_at_the_same_time() -> None:
    meeting = threading.Barrier(3)
    parallel.run_all(lambda _: meeting.wait(10), range(3), 3, lambda _: None)


def unexpected(_: int) -> None:
    pytest.fail("no job was given")


def test_no_jobs_end_at_once() -> None:
    parallel.run_all(unexpected, [], 4, unexpected)


def test_without_threads_of_the_system_the_caller_s_does_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(parallel, "start_new_thread", refuse)
    ran: list[int] = []
    ended: list[int] = []
    parallel.run_all(ran.append, range(5), 4, ended.append)
    assert ran == ended == list(range(5))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("fails", ["job", "ended"])
def test_an_error_is_raised_when_the_jobs_that_run_have_ended(fails: str, threads: int) -> None:
    begun: list[int] = []
    done: list[int] = []

    def do(job: int) -> None:
        begun.append(job)
        if fails == "job" and job == 2:
            raise ValueError(job)
        time.sleep(0.01)
        done.append(job)

    def ended(job: int) -> None:
        if fails == "ended" and job == 2:
            raise ValueError(job)

    with pytest.raises(ValueError, match="2"):
        parallel.run_all(do, range(1000), threads, ended)
    count = len(begun)
    assert len(done) == count - (fails == "job")
    time.sleep(0.03)
    assert len(begun) == count < 1000


def test_an_error_keeps_no_job_alive() -> None:
    class Job:
        pass

    def fail(_: Job) -> None:
        raise ValueError("no")

    job = Job()
    is_alive = weakref.ref(job)
    gc.disable()
    try:
        with pytest.raises(ValueError, match="no") as raised:
            parallel.run_all(fail, [job], 1, lambda _: None)
        del raised, job
        assert is_alive() is None
    finally:
        gc.enable()


def test_ctrl_c_at_any_line_ends_it_and_its_threads() -> None:
    """The executor of concurrent.futures hangs at about one line of a hundred: its threads wait for a lock."""
    interrupts = 0
    for line in range(10_000):
        running = begun = 0
        results: list[str] = []

        def do(_: int) -> None:
            nonlocal running, begun
            begun += 1
            running += 1
            time.sleep(0.0005)
            running -= 1

        def run(left: int, results: list[str]) -> None:
            def trace(frame: FrameType, event: str, _: Any) -> Any:
                nonlocal left
                left -= event == "line"
                if left < 0:
                    sys.settrace(None)
                    raise KeyboardInterrupt
                return trace

            sys.settrace(trace)
            try:
                parallel.run_all(do, range(4), 1, lambda _: None)
                results.append("ended")
            except KeyboardInterrupt:
                results.append("interrupted")
            finally:
                sys.settrace(None)

        # A thread of its own: the interrupt of a trace function may leave it with an exception that nothing handles.
        caller = threading.Thread(target=run, args=(line, results), daemon=True)
        caller.start()
        caller.join(30)
        count = begun
        until = time.monotonic() + 30
        while running and time.monotonic() < until:  # a thread that the interrupt left without its number
            time.sleep(0.001)
        time.sleep(0.001)
        assert (running, begun) == (0, count)
        if results == ["ended"]:
            break
        assert results == ["interrupted"], line
        interrupts += 1
    assert interrupts > 30
