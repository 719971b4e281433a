"""A `forge serve` in a process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx

_ADDRESS = re.compile(r"at (http://\S+) \(chat page\)")


@dataclass
class Served:
    """A running `forge serve`."""

    process: subprocess.Popen[str]
    url: str
    client: httpx.Client


def serve(model: str | Path, *options: str) -> Served:
    """Start a server and wait until it is ready. The caller stops the process."""
    command = [sys.executable, "-m", "forge", "serve", "-m", str(model), "--port", "0", "--device", "cpu", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    seen = []
    for line in process.stderr:
        seen.append(line)
        if found := _ADDRESS.search(line):
            return Served(process, found[1], httpx.Client(base_url=found[1], timeout=60))
    raise AssertionError(f"the server ended with {process.wait()}: {''.join(seen)}")


def stop(served: Served) -> None:
    served.client.close()
    served.process.kill()
    served.process.communicate()
