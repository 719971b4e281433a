"""A server of a tiny model with a chat template, in processes of its own, for all tests of a session."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cli_runs import with_template

import forge

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
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


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return with_template(tmp_path_factory.mktemp("served") / "tiny.gguf", TEMPLATE)


@pytest.fixture(scope="session")
def llm(model_path: str) -> Iterator[forge.LLM]:
    """The served model in this process: what a server answers is compared with it."""
    with forge.load(model_path, device="cpu", progress=False) as llm:
        yield llm


@pytest.fixture(scope="session")
def served(model_path: str) -> Iterator[Served]:
    found = serve(model_path)
    yield found
    stop(found)


@pytest.fixture
def client(served: Served) -> httpx.Client:
    return served.client
