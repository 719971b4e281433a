"""How many threads BLAS gets: what was asked for, what the process may use, less what others keep busy."""

from __future__ import annotations

import _thread
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forked import in_a_child
from threadpoolctl import ThreadpoolController, threadpool_limits
from tiny_models import ARCH

import forge
from forge.backend import threads
from forge.backend.threads import THREADS, Threads, usable_cpus
from forge.cli import run

V1 = "32 23 0:29 / /cg/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
V2 = "29 23 0:26 / /cg rw - cgroup2 cgroup2 rw\n"
MODEL = ARCH / "llama" / "model.gguf"


@pytest.fixture
def sixteen_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_two_threads_of_a_core_count_once(tmp_path: Path, sixteen_cpus: None) -> None:
    assert usable_cpus(tmp_path) == 16  # nothing is known about cores
    for cpu in range(16):
        where = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        where.mkdir(parents=True)
        (where / "thread_siblings_list").write_text(f"{cpu % 8},{cpu % 8 + 8}\n")
    assert usable_cpus(tmp_path) == 8


@pytest.mark.parametrize(
    ("own", "outer", "wanted"),
    [
        ("max 100000", "max 100000", 16),
        ("400000 100000", "max 100000", 4),
        ("max 100000", "250000 100000", 2),  # what is left of a third would only be waited for
        ("600000 100000", "350000 100000", 3),
        ("50000 100000", "max 100000", 1),
        ("0 100000", "max", 1),
        *(
            (damaged, "300000 100000", 3)
            for damaged in ("", "max", "1 0", "x y", "1 2 3", "-1 100000", "9" * 30 + " 1")
        ),
    ],
)
def test_cpu_time_of_nested_groups(tmp_path: Path, sixteen_cpus: None, own: str, outer: str, wanted: int) -> None:
    write(tmp_path, proc__self__cgroup="0::/a/b\n", proc__self__mountinfo=V2)
    write(tmp_path / "cg", **{"a__cpu.max": outer, "a__b__cpu.max": own})
    assert usable_cpus(tmp_path) == wanted


@pytest.mark.parametrize(("quota", "wanted"), [("-1", 16), ("300000", 3), ("", 16), ("nine", 16)])
def test_cpu_time_in_version_1(tmp_path: Path, sixteen_cpus: None, quota: str, wanted: int) -> None:
    write(tmp_path, proc__self__cgroup="7:cpu,cpuacct:/a\n", proc__self__mountinfo=V1)
    write(tmp_path / "cg/cpu/a", **{"cpu.cfs_quota_us": quota, "cpu.cfs_period_us": "100000"})
    assert usable_cpus(tmp_path) == wanted


class Pool:
    def __init__(self, num_threads: int) -> None:
        self.num_threads = num_threads

    def set_num_threads(self, count: int) -> None:
        self.num_threads = count


class Machine:
    """CPUs that work for others and for this process, as the system shows them."""

    def __init__(self, root: Path, cpus: int, patch: pytest.MonkeyPatch) -> None:
        self.root, self.cpus = root, cpus
        self.now = self.own = self.others = 0.0
        patch.setattr(os, "sched_getaffinity", lambda _: set(range(cpus)))
        patch.setattr(os, "sysconf", lambda _: 100)
        patch.setattr(threads.time, "monotonic", lambda: self.now)
        patch.setattr(threads.time, "process_time", lambda: self.own)
        self.passes(0, 0, 0)
        self.threads = Threads(root)
        self.pool = Pool(cpus)
        self.threads._pools = [self.pool]

    def passes(self, seconds: float, others: float, own: float) -> None:
        """Time passes while so many CPUs work for others, and so many for this process."""
        self.now += seconds
        self.others += others * seconds
        self.own += own * seconds
        ticks = round(100 * (self.own + self.others) / self.cpus)
        rows = [f"cpu{cpu} {ticks} 0 0 {7 * ticks} 5 0 0 0 3 0\n" for cpu in range(self.cpus)]
        rows.append(f"cpu{self.cpus} 999999 0 0 0 0 0 0 0 0 0\n")  # not for this process
        write(self.root, proc__stat="cpu  1 2 3 4\n" + "".join(rows) + "intr 5\nctxt 6\n")


@pytest.mark.parametrize(
    ("cpus", "others", "own", "wanted"),
    [
        (2, 0.0, 2.0, 2),
        (2, 0.2, 1.8, 2),  # what runs on any desktop
        (2, 0.67, 1.33, 1),  # three threads that share two CPUs
        (2, 1.0, 1.0, 1),
        (2, 2.0, 0.1, 1),  # never none
        (16, 0.0, 16.0, 16),
        (16, 1.0, 15.0, 15),
        (16, 5.6, 10.4, 10),
    ],
)
def test_cpus_that_others_keep_busy_are_left_to_them(
    cpus: int, others: float, own: float, wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, cpus, monkeypatch)
    machine.threads.use(None)
    assert machine.pool.num_threads == cpus
    machine.passes(0.1, others, own)
    machine.threads.adjust()
    assert machine.pool.num_threads == cpus  # it is too early to tell
    for _ in range(3):
        machine.passes(1.0, others, own)
        machine.threads.adjust()
        assert machine.pool.num_threads == wanted
    machine.passes(1.0, 0.0, wanted)  # the others end
    machine.threads.adjust()
    assert machine.pool.num_threads == cpus


def test_behind_a_pause_it_is_looked_again_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, 2, monkeypatch)
    machine.threads.use(None)
    machine.passes(100.0, 0.0, 0.0)  # nobody does anything; then both begin
    machine.threads.adjust()
    machine.passes(0.4, 1.0, 1.0)
    machine.threads.adjust()
    assert machine.pool.num_threads == 1


def test_what_was_asked_for_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, 4, monkeypatch)
    for count in (3, 1, 8):
        machine.threads.use(count)
        machine.passes(5.0, 4.0, 0.0)
        machine.threads.adjust()
        assert (machine.pool.num_threads, machine.threads.count) == (count, count)
    machine.threads.use(None)
    assert (machine.pool.num_threads, machine.threads.count) == (4, 4)


def test_a_number_that_the_program_or_the_user_set_is_not_exceeded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(tmp_path, 8, monkeypatch)
    machine.pool.num_threads = 2  # OPENBLAS_NUM_THREADS=2
    machine.threads.use(None)
    machine.passes(2.0, 0.0, 2.0)
    machine.threads.adjust()
    assert machine.pool.num_threads == 2
    machine.pool.num_threads = 1  # threadpoolctl, around a call
    machine.passes(2.0, 0.0, 2.0)
    machine.threads.adjust()
    assert machine.pool.num_threads == 1


@pytest.mark.parametrize("text", ["", "cpu0\n", "cpu0 1 2 x 4 5 6 7 8\n", "\n\n \n", "cpu0 " + "9" * 40, "cpu\xff 1"])
def test_a_damaged_load_is_no_load(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, 4, monkeypatch)
    machine.threads.use(None)
    machine.passes(2.0, 0.0, 0.0)
    write(tmp_path, proc__stat=text)
    machine.threads.adjust()
    assert machine.pool.num_threads == 4


def test_a_blas_that_cannot_be_told_is_said_if_a_number_is_asked_for() -> None:
    untold = Threads()
    untold._pools = []
    untold.use(None)
    untold.adjust()
    with pytest.raises(forge.ParameterError, match=r"^threads cannot be set"):
        untold.use(2)


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    for pool in ThreadpoolController().select(user_api="blas").lib_controllers:  # its next caller may be any thread
        getattr(pool, "clear_controlling_thread", lambda force: None)(force=True)
    THREADS.use(None)


def test_load_sets_the_threads_of_numpy_s_blas_which_compute_the_same(restored: None) -> None:
    from threadpoolctl import threadpool_info

    found: dict[int, Any] = {}
    for count in (1, np.int64(2), 3):
        with forge.load(MODEL, device="cpu", context=64, threads=count) as llm:
            assert {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"} == {count}
            assert THREADS.count == count
            found[count] = llm.logits(list(range(40)))
    np.testing.assert_allclose(found[2], found[1], rtol=0, atol=1e-4)  # BLAS sums in another order
    np.testing.assert_allclose(found[3], found[1], rtol=0, atol=1e-4)


def in_a_thread(call: Callable[[], object]) -> None:
    """In one as the engine's is: `threading` did not start it."""
    ended = threading.Event()
    _thread.start_new_thread(lambda: (call(), ended.set()), ())
    assert ended.wait(60)


def ends_within_the_start_of_a_thread(call: Callable[[], object]) -> bool:
    """Whether a call in a thread as the engine's ends while this one holds what `Thread.start` holds."""
    ended: list[object] = []
    with threading._active_limbo_lock:  # type: ignore[attr-defined]
        _thread.start_new_thread(lambda: ended.append(call()), ())
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            time.sleep(0.001)
    return bool(ended)


def test_any_thread_sets_the_number_of_the_process(restored: None) -> None:
    """threadpoolctl obeys the first one alone."""
    THREADS.use(2)
    in_a_thread(lambda: THREADS.use(1))
    assert THREADS.current == 1
    with threadpool_limits(2):
        assert THREADS.current == 2
    THREADS.use(2)
    assert THREADS.current == 2


def test_a_fork_sets_it_where_a_thread_that_is_gone_has_set_it_before(restored: None) -> None:
    in_a_thread(lambda: threadpool_limits(2))
    assert in_a_child(lambda: THREADS.use(1) or THREADS.current) == "1"


def test_it_is_set_while_an_interrupted_thread_holds_python_s_lock_of_threads(restored: None) -> None:
    """A signal handler may run within the start of a thread, and wait for the engine's thread, which sets it."""
    THREADS.use(2)
    assert ends_within_the_start_of_a_thread(lambda: THREADS.use(1))
    assert THREADS.current == 1


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True, 1025])
def test_a_number_of_threads_that_cannot_be_is_refused(count: Any) -> None:
    with pytest.raises(forge.ParameterError, match=r"^threads must be"):
        forge.load(MODEL, device="cpu", threads=count)


@pytest.mark.parametrize("command", [["logits", "abc"], ["perplexity", "-"], ["bench"]], ids=lambda c: c[0])
def test_the_command_line_passes_threads_on(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.cli.output.read_text", lambda _: "a b c d")
    assert run([*command, "-m", str(MODEL), "--threads", "0"]) == 2
    assert capsys.readouterr().err.strip() == "forge: --threads must be in [1, 1024], not 0"


def test_threads_on_the_command_line_reach_blas() -> None:
    code = (
        "import json, sys; from forge.cli import run; from threadpoolctl import threadpool_info; "
        f"code = run(['logits', 'abc', '-m', {str(MODEL)!r}, '--threads', '2', '--json']); "
        "print(json.dumps([code, [p['num_threads'] for p in threadpool_info() if p['user_api'] == 'blas']]))"
    )
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert json.loads(done.stdout.splitlines()[-1]) == [0, [2]]


@pytest.fixture
def three() -> Iterator[Threads]:
    """On three threads of BLAS."""
    with threadpool_limits(3, user_api="blas"):
        yield Threads()


def test_work_is_shared_while_an_interrupted_thread_holds_python_s_lock_of_threads(three: Threads) -> None:
    assert ends_within_the_start_of_a_thread(lambda: three.share(lambda start, stop: None, 3))


@pytest.mark.parametrize("available", [0, 1])
def test_where_the_system_gives_no_more_threads_fewer_do_all_parts(
    three: Threads, available: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, started = threads.start_new_thread, []

    def limited(*call: Any) -> int:
        if len(started) == available:
            raise RuntimeError("can't start new thread")
        started.append(call)
        return start(*call)

    monkeypatch.setattr(threads, "start_new_thread", limited)
    done: list[int] = []
    for _ in range(2):
        three.share(lambda start, stop: done.extend(range(start, stop)), 7)
    assert sorted(done) == sorted([*range(7), *range(7)])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_every_part_of_shared_work_is_done_once_by_as_many_threads_as_blas_has(three: Threads, size: int) -> None:
    done, barrier = [], threading.Barrier(min(size, 3))

    def work(start: int, stop: int) -> None:
        barrier.wait(60)  # all parts are under way at once
        done.append((start, stop))

    for _ in range(3):
        done.clear()
        three.share(work, size)
        assert [number for part in sorted(done) for number in range(*part)] == list(range(size))
        assert len(done) == min(size, 3)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_shared_work_that_fails_raises_when_all_other_parts_have_ended(three: Threads, failing: int) -> None:
    ended = []

    def work(start: int, stop: int) -> None:
        if start == failing:
            raise KeyError(start)
        time.sleep(0.05)
        ended.append(start)

    for _ in range(2):
        ended.clear()
        with pytest.raises(KeyError, match=str(failing)):
            three.share(work, 3)
        assert sorted(ended) == sorted({0, 1, 2} - {failing})


def test_threads_that_wait_for_work_hold_nothing_of_the_last(three: Threads) -> None:
    class Work:
        def __call__(self, start: int, stop: int) -> None: ...

    work = Work()
    alive = weakref.ref(work)
    three.share(work, 3)
    del work
    deadline = time.monotonic() + 60
    while alive() is not None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert alive() is None


def test_work_is_shared_in_a_fork_too(three: Threads) -> None:
    three.share(lambda start, stop: None, 3)

    def shared() -> list[int]:
        done: list[int] = []
        three.share(lambda start, stop: done.append(start), 3)
        return sorted(done)

    assert in_a_child(shared) == "[0, 1, 2]"
