"""A server of a tiny model with a chat template, in processes of its own, for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from cli_runs import with_template
from scripted import CONTROLS, SCRIPTS, write_scripted
from scripted import TEMPLATE as SAYS
from served import Served, serve, stop

import forge

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


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


@pytest.fixture(scope="session")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server whose model says what `scripted.SCRIPTS` has for the last message, or for the variable `say`."""
    path = tmp_path_factory.mktemp("scripted") / "scripted.gguf"
    found = serve(write_scripted(path, SAYS, SCRIPTS, CONTROLS))
    yield found
    stop(found)
