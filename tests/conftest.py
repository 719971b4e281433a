"""Quick tests run first, and those that are not quick are named; the models that tests share."""

import gc
import os
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Processes side by side take all CPUs. Threads of BLAS beside them would only wait for each other, spinning.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest
from hypothesis import HealthCheck, settings

import forge
from forge import hub

# Many tests start Python, and each start would compile all of forge where the environment forbids to keep bytecode.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

# A busy machine is no fault of what is tested.
settings.register_profile("forge", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("forge")

DATA = Path(__file__).parent / "data"
REAL_MODELS = {"smollm2_path", "gemma3_path"}
MAX_QUICK_SECONDS = 0.8
"""Of processor time, children's included, from which on a quick test is named: twice what it should take on an idle
machine. On a busy one it grows less than the time on the clock."""
_before = pytest.StashKey[float]()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last; a test that needs a real model, by whatever fixture, must say that it is slow."""
    unmarked = [
        item.nodeid
        for item in items
        if REAL_MODELS.intersection(getattr(item, "fixturenames", ())) and not item.get_closest_marker("slow")
    ]
    if unmarked:
        raise pytest.UsageError(f"these tests load a real model: mark them slow: {', '.join(unmarked)}")
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


def pytest_collection_finish() -> None:
    """Thousands of collected tests live until the end: the garbage collector need not look at them again and again."""
    gc.collect()
    gc.freeze()


def cpu_seconds() -> float:
    """Of this process, and of the children that it has waited for."""
    return sum(os.times()[:4])


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    item.stash[_before] = cpu_seconds()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[Any]) -> Iterator[None]:
    report: Any = yield
    if report.when == "teardown" and not item.get_closest_marker("slow"):
        report.user_properties.append(("cpu_seconds", cpu_seconds() - item.stash[_before]))
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the quick tests that are slow. What the first test of a session or module sets up counts as its own."""
    found = {
        report.nodeid: seconds
        for report in chain(*terminalreporter.stats.values())
        for name, seconds in getattr(report, "user_properties", ())
        if name == "cpu_seconds" and seconds > MAX_QUICK_SECONDS
    }
    if found:
        terminalreporter.section(
            f"more than {MAX_QUICK_SECONDS} s of processor time: make them faster, or mark them slow"
        )
    for name in sorted(found, key=found.__getitem__, reverse=True):
        terminalreporter.line(f"{found[name]:.1f} s {name}")


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2 135M Instruct, Q4_1: fetched into the user's cache once."""
    return hub.pull("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M: fetched into the user's cache once."""
    return hub.pull("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[forge.LLM]:
    with forge.load(smollm2_path, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="session")
def gemma3(gemma3_path: Path) -> Iterator[forge.LLM]:
    """1.1 GB of float32 weights."""
    with forge.load(gemma3_path, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="session")
def arch_path() -> Callable[[str], Path]:
    """The GGUF of a tiny random model, by the name of its folder; its reference logits lie beside it."""

    def find(name: str) -> Path:
        path = DATA / "arch" / name / "model.gguf"
        assert path.is_file(), f"no such model: {path}"
        return path

    return find
