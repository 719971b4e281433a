"""Each test runs once for each GPU, or for the one that its module names, on a machine with it; both at the same time.

The session that was started collects the tests and hands them to one child session a GPU, a process that finds itself
on such a machine (this file is at work there too), whose reports it passes on.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import pytest

HERE = Path(__file__).parent
TARGETS = ("gfx942", "gfx1100")
INSIDE = os.environ.get("VIRTUAL_ROCM_GFX")
_MAX_SILENCE_SECONDS = 900  # a test has 600
_REPORTS = "VIRTUAL_ROCM_REPORTS"
_children = pytest.StashKey["dict[str, Child]"]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("clang++-19", "ld.lld-19", "llvm-readelf-19", "llvm-nm-19") if not shutil.which(name)]
    if missing and not INSIDE and not os.environ.get("FORGE_REQUIRE_TOOLCHAIN"):
        reason = f"no {' and no '.join(missing)}: scripts/install-toolchain installs them"
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests of what does not depend on the GPU name one in their module, to save time."""
    metafunc.fixturenames.append("gfx")
    metafunc.parametrize("gfx", getattr(metafunc.module, "ON", TARGETS), scope="session")


class Child:
    """A session on a virtual machine, and what it has reported so far."""

    def __init__(self, gfx: str, items: list[pytest.Item], scratch: Path) -> None:
        from virtual_rocm.libraries import environment

        scratch.mkdir()
        names, reports = scratch / "tests", scratch / "reports"
        names.write_text("\n".join(item.nodeid for item in items))
        reports.touch()
        self.log = scratch / "log"
        root = items[0].config.rootpath
        self.process: subprocess.Popen[bytes] | None = None
        with open(self.log, "w") as log:
            try:
                found = environment(gfx, scratch)
            except Exception:  # no network, say: each test is to tell of it
                traceback.print_exc(file=log)
            else:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--rootdir={root}", f"@{names}"],
                    env={**found, _REPORTS: str(reports), "VIRTUAL_ROCM_SHARED": str(scratch.parent)},
                    cwd=root,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # so that it can be ended with all that it has started
                )
        self.file: IO[bytes] = open(reports, "rb")  # noqa: SIM115 (a pipe would stop the child when nobody reads)
        self.found: dict[str, list[Any]] = {}
        self.rest = b""

    def reports(self, item: pytest.Item) -> list[Any]:
        """The reports of a test, when it has run."""
        last = time.monotonic()
        while not any(report["when"] == "teardown" for report in self.found.get(item.nodeid, ())):
            ended = self.process is None or self.process.poll() is not None
            if self._read():
                last = time.monotonic()
                continue
            if time.monotonic() - last > _MAX_SILENCE_SECONDS:
                self.end()
            if ended:
                return [*self.found.get(item.nodeid, ()), self._lost(item)]
            time.sleep(0.02)
        return self.found[item.nodeid]

    def _read(self) -> bool:
        data = self.file.read()
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            report = json.loads(line)
            self.found.setdefault(report["nodeid"], []).append(report)
        return bool(data)

    def _lost(self, item: pytest.Item) -> dict[str, Any]:
        ended = f"ended with {self.process.returncode} before this test" if self.process else "did not start"
        report = pytest.TestReport(
            item.nodeid,
            item.location,
            dict.fromkeys(item.keywords, 1),
            "failed",
            f"the session on the virtual machine {ended}:\n{self.log.read_text()[-5000:]}",
            "call",
        )
        data: dict[str, Any] = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        return data

    def end(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


if INSIDE is None:

    def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if HERE not in item.path.parents or item.get_closest_marker("skip"):  # pytest asks for all tests of the session
            return None
        children = item.session.stash.get(_children, None)
        if children is None:
            items = [each for each in item.session.items if HERE in each.path.parents]
            scratch = item.config._tmp_path_factory.mktemp("virtual_rocm")  # type: ignore[attr-defined]
            children = item.session.stash[_children] = {
                gfx: Child(gfx, mine, scratch / gfx)
                for gfx in TARGETS
                if (mine := [each for each in items if each.callspec.params["gfx"] == gfx])  # type: ignore[attr-defined]
            }
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in children[item.callspec.params["gfx"]].reports(item):  # type: ignore[attr-defined]
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            if isinstance(report.longrepr, list):  # of a skipped test: JSON has no tuples
                report.longrepr = tuple(report.longrepr)
            item.ihook.pytest_runtest_logreport(report=report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def pytest_sessionfinish(session: pytest.Session) -> None:
        for child in session.stash.get(_children, {}).values():
            child.end()
            child.file.close()

else:

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(item: pytest.Item, call: Any) -> Iterator[None]:
        report = yield
        data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        with open(os.environ[_REPORTS], "a") as file:
            file.write(json.dumps(data) + "\n")
        return report


@pytest.fixture
def device(gfx: str) -> Any:
    """The virtual GPU, as `device="hip"` finds it now: some tests have new ones made."""
    from forge.backend import select

    found = select("hip")
    assert found.arch == gfx
    return found


@pytest.fixture(autouse=True)
def only_kernels_of_forge() -> Iterator[None]:
    """Whatever a test does, or a fixture did before it, launches no kernel of CuPy's."""
    from virtual_rocm.runtime import DEVICE

    DEVICE.launches.clear()
    yield
    assert not DEVICE.foreign
