"""A cache of its own, and servers on the loopback."""

import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import fake_hub
import pytest
from fake_hub import FakeHub
from hub_servers import Server


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own that already holds another model."""
    cache = tmp_path / "cache"
    (cache / "models").mkdir(parents=True)
    (cache / "models" / "other.gguf").write_bytes(b"precious")
    monkeypatch.setenv("FORGE_CACHE", str(cache))
    return cache


@pytest.fixture
def index(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """pip reads nothing but the loopback index: no user configuration, one try."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "UV_")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    settings = {"CONFIG_FILE": "/dev/null", "INDEX_URL": f"{server.url}/simple", "RETRIES": "0", "TIMEOUT": "30"}
    for key, value in settings.items():
        monkeypatch.setenv(f"PIP_{key}", value)
    return server


@pytest.fixture
def fake_uv(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No pip, and a `uv` that unpacks `payload/` into --target, or runs `payload/fail` and exits with 2."""
    payload = tmp_path / "payload"
    payload.mkdir()
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    uv.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\n[ -f {payload}/fail ] && {{ . {payload}/fail; exit 2; }}\n'
        f'while [ "$1" != --target ]; do shift; done\ncp -r {payload}/. "$2"\n'
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", f"{uv.parent}:{os.environ['PATH']}")
    monkeypatch.setitem(sys.modules, "pip", None)
    return payload


@pytest.fixture
def the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of its own, and an empty cache for it; nobody waits between tries."""
    from huggingface_hub import constants

    for name in [name for name in os.environ if name.startswith("HF_") or "_proxy" in name.lower()]:
        monkeypatch.delenv(name)
    with fake_hub.running() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        yield hub
