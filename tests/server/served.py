"""A `forge serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil

_ADDRESS = re.compile(r"at (http://\S+) \(chat page\)")


@dataclass
class Served:
    """A `forge serve` that was started. `url` and `client` are there when it is ready."""

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    """What it has written to stderr. A thread reads it: a full pipe would lose lines."""
    url: str = ""
    client: httpx.Client = field(default_factory=httpx.Client)

    def __post_init__(self) -> None:
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line)

    def text(self) -> str:
        """All that it wrote to stderr; when it has ended, to the end."""
        if self.process.poll() is not None:
            self._reader.join(10)
        return "".join(self.lines)

    def wait_until_ready(self) -> Served:
        """Wait until it serves. Raises AssertionError where it ends instead."""
        wait_for(lambda: _ADDRESS.search(self.text()) or self.process.poll() is not None)
        found = _ADDRESS.search(self.text())
        assert found, f"the server ended with {self.process.wait()}: {self.text()}"
        self.url = found[1]
        self.client = httpx.Client(base_url=found[1], timeout=60)
        return self


def start(model: str | Path, *options: str, **how: Any) -> Served:
    """Start a server. The caller stops it. how: further arguments of Popen."""
    command = [sys.executable, "-m", "forge", "serve", "-m", str(model), "--port", "0", "--device", "cpu", *options]
    return Served(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **how))


def serve(model: str | Path, *options: str) -> Served:
    """Start a server and wait until it is ready. The caller stops it."""
    return start(model, *options).wait_until_ready()


def stop(served: Served) -> None:
    """End a server at once, however it is."""
    served.client.close()
    served.process.kill()
    served.process.wait()
    served.text()
    assert served.process.stderr
    served.process.stderr.close()


def wait_for(is_true: Callable[[], Any], seconds: float = 120.0) -> None:
    """Wait until something is so. Raises AssertionError where it is not in time."""
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.02)


def number(served: Served, name: str) -> float:
    """A value of /metrics, summed over its labels."""
    text = served.client.get("/metrics").text
    found = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert found, text
    return sum(map(float, found))


def is_idle(served: Served) -> bool:
    """Whether nothing runs or waits, and no page has an owner."""
    return not any(
        number(served, f"forge_{name}")
        for name in ("num_requests_running", "num_requests_waiting", "kv_cache_pages_used")
    )


def engine_of(served: Served) -> psutil.Process:
    """The process of a server that computes."""
    [found] = psutil.Process(served.process.pid).children()
    return found
