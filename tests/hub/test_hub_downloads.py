"""Bytes from a Hub that lies, breaks off or is slow: what is refused leaves nothing, what was cut is resumed."""

import hashlib
import os
import resource
import threading
from pathlib import Path

import fake_hub
import pytest
from fake_hub import COMMIT, FakeHub, Reply
from hub_servers import BODY, Recorder

from forge import hub
from forge.errors import DownloadError
from forge.hub import client

NAME = "hf:good/repo/m.gguf"
PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
ETAG = hashlib.sha256(BODY).hexdigest()


@pytest.fixture
def one(the_hub: FakeHub) -> FakeHub:
    the_hub.add("good/repo", "m.gguf", body=BODY)
    return the_hub


def cache_dir() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def left(root: Path | None = None) -> list[str]:
    """Every file and link below the cache."""
    root = root or cache_dir()
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_symlink() or not path.is_dir())


def partials() -> list[Path]:
    return [path for path in cache_dir().rglob(".forge/**/*") if path.is_file()]


def spoil(the_hub: FakeHub, **values: object) -> None:
    """Every answer to a GET of the file gets these values."""

    def change(method: str, path: str, reply: Reply) -> None:
        if method == "GET" and "/resolve/" in path:
            for key, value in values.items():
                setattr(reply, key, value)

    the_hub.spoil = change


def announce(the_hub: FakeHub, **headers: str | None) -> None:
    """Every answer about the file has these headers, or lacks them."""

    def change(method: str, path: str, reply: Reply) -> None:
        for key, value in headers.items():
            reply.headers.pop(key.replace("_", "-"), None)
            if value is not None:
                reply.headers[key.replace("_", "-")] = value

    the_hub.spoil = change


# ---- what is refused leaves nothing


@pytest.mark.parametrize(
    ("body", "kind", "message"),
    [
        (PAGE, "text/html", "the server sent an HTML page instead of a GGUF file"),
        (PAGE, "application/octet-stream", "the server sent an HTML page instead of a GGUF file"),
        (b"\n  " + PAGE, "text/html; charset=utf-8", "the server sent an HTML page instead of a GGUF file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "text/plain", r"no GGUF file: it begins with b'version h?'"),
        (b"GGUB" + BODY[4:], "application/octet-stream", r"no GGUF file: it begins with b'GGUB.*'"),
        (b"\0\x1b[1m", "application/octet-stream", r"no GGUF file: it begins with b'\\x00.*'"),
        (b"GGU", "application/octet-stream", "no GGUF file: it has 3 bytes"),
        (b"", "application/octet-stream", "no GGUF file: it has 0 bytes"),
    ],
    ids=["html", "html as bytes", "html behind blanks", "lfs pointer", "other magic", "controls", "short", "empty"],
)
def test_a_download_that_is_no_gguf_file_is_refused(the_hub: FakeHub, body: bytes, kind: str, message: str) -> None:
    the_hub.add("good/repo", "m.gguf")
    the_hub.repos["good/repo"]["main"]["m.gguf"] = body
    announce(the_hub, Content_Type=kind)
    for _ in range(2):
        with pytest.raises(DownloadError, match=f"^{NAME}: .*{message}") as caught:
            hub.resolve(NAME)
        assert str(caught.value).isprintable()
        assert left() == []
        assert list(cache_dir().rglob("*")) == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"body": BODY + b"x"}, f"announced {len(BODY)} bytes and then '{len(BODY) + 1}'"),
        ({"body": BODY[:-1]}, f"announced {len(BODY)} bytes and then '{len(BODY) - 1}'"),
        ({"body": BODY + b"x", "chunked": True}, f"announced {len(BODY)} bytes and sent more"),
        ({"body": BODY * 9, "chunked": True}, f"announced {len(BODY)} bytes and sent more"),
        ({"body": BODY[:-1], "chunked": True}, f"announced {len(BODY)} bytes and sent {len(BODY) - 1}"),
        ({"body": b"GG", "chunked": True}, f"announced {len(BODY)} bytes and sent 2"),
        ({"body": BODY[:-1] + b"x"}, f"SHA-256 of what came is [0-9a-f]{{64}}, announced was {ETAG}"),
        ({"body": PAGE}, "and then '54'"),
        ({"body": PAGE.ljust(len(BODY))}, "HTML page"),
    ],
    ids=["long", "short", "long, chunked", "endless", "short, chunked", "tiny", "other bytes", "page", "padded page"],
)
def test_bytes_other_than_announced(one: FakeHub, values: dict[str, object], message: str) -> None:
    spoil(one, **values)
    with pytest.raises(DownloadError, match=f"^{NAME}: .*{message}"):
        hub.resolve(NAME)
    assert list(cache_dir().rglob("*")) == []
    one.spoil = lambda method, path, reply: None
    assert hub.resolve(NAME).read_bytes() == BODY


def test_a_refused_file_leaves_the_one_that_was_there(one: FakeHub) -> None:
    path = hub.resolve(NAME)
    before = left()
    one.add("good/repo", "m.gguf", body=b"GGUF new")
    one.commits["main"] = "f" * 40
    spoil(one, body=b"GGUF bad")
    with pytest.raises(DownloadError, match="SHA-256"):
        hub.resolve(NAME)
    assert left() == before
    assert hub.resolve(NAME, download=False) == path
    assert path.read_bytes() == BODY


def test_a_file_that_changes_on_the_way(one: FakeHub) -> None:
    spoil(one, headers={"ETag": '"other"', "X-Repo-Commit": COMMIT})
    with pytest.raises(DownloadError, match="the file changed on the Hub meanwhile: run it again"):
        hub.resolve(NAME)
    assert left() == []


HOSTILE = ["../../../evil", "..", ".", "a/b", "/evil", "a\\b", "x" * 300, "", "a b", "%2e%2e", "a.lock", "-x", "\xe9"]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize("header", ["ETag", "X_Linked_ETag", "X_Repo_Commit"])
def test_headers_that_would_become_names(one: FakeHub, tmp_path: Path, header: str, value: str) -> None:
    value = f'"{value}"' if "ETag" in header else value
    headers: dict[str, str | None] = {header: value}
    if header == "ETag":
        headers["X_Linked_ETag"] = None
    announce(one, **headers)
    what = "commit" if header == "X_Repo_Commit" else "etag"
    with pytest.raises(DownloadError, match=f"^{NAME}: the server announces (the|no) {what}") as caught:
        hub.resolve(NAME)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300
    assert list(tmp_path.rglob("*")) == []
    assert one.asked("GET") == []


@pytest.mark.parametrize("value", ["0123", "main", COMMIT.upper(), COMMIT + "0", "refs/heads/main"])
def test_a_commit_that_is_none(one: FakeHub, value: str) -> None:
    announce(one, X_Repo_Commit=value)
    with pytest.raises(DownloadError, match="the server announces the commit"):
        hub.resolve(NAME)
    assert left() == []


@pytest.mark.parametrize("value", ["-1", "1e9", "9" * 30, "0x10", "", "\xb2"])
def test_a_length_that_is_none(one: FakeHub, value: str) -> None:
    def change(method: str, path: str, reply: Reply) -> None:
        reply.headers["X-Linked-Size"] = value
        if method == "HEAD":
            reply.chunked = True  # no Content-Length either

    one.spoil = change
    with pytest.raises(DownloadError, match=r"the server announces (the|no) length"):
        hub.resolve(NAME)
    assert left() == []


@pytest.mark.parametrize("etag", ['W/"abc-12_3"', '"0123456789abcdef0123456789abcdef01234567"', "bare"])
def test_etags_of_other_forms_are_accepted(one: FakeHub, etag: str) -> None:
    announce(one, X_Linked_ETag=None, X_Linked_Size=None, ETag=etag)
    path = hub.resolve(NAME)
    assert path.read_bytes() == BODY
    assert path.resolve().name == etag.removeprefix("W/").strip('"')


def test_a_web_page_instead_of_the_hub_is_refused(one: FakeHub) -> None:
    def change(method: str, path: str, reply: Reply) -> None:
        reply.headers, reply.body = {"Content-Type": "text/html"}, PAGE

    one.spoil = change
    with pytest.raises(DownloadError, match="the server sent an HTML page instead of the file"):
        hub.resolve(NAME)
    assert left() == []


# ---- the cache's layout is huggingface_hub's


def test_huggingface_hub_finds_what_was_fetched(one: FakeHub) -> None:
    import huggingface_hub

    path = hub.resolve(NAME)
    assert left() == [
        f"models--good--repo/blobs/{ETAG}",
        "models--good--repo/refs/main",
        f"models--good--repo/snapshots/{COMMIT}/m.gguf",
    ]
    assert os.readlink(path) == f"../../blobs/{ETAG}"
    cache = str(cache_dir())
    assert huggingface_hub.try_to_load_from_cache("good/repo", "m.gguf", cache_dir=cache) == str(path)
    (repo,) = huggingface_hub.scan_cache_dir(cache).repos
    assert (repo.repo_id, repo.size_on_disk) == ("good/repo", len(BODY))
    fetched = huggingface_hub.hf_hub_download("good/repo", "m.gguf", cache_dir=cache, local_files_only=True)
    assert fetched == str(path)


def test_what_huggingface_hub_fetched_is_found(one: FakeHub) -> None:
    blob = cache_dir() / "models--good--repo" / "blobs" / ETAG
    for path in (blob, blob.parents[1] / "refs" / "main", blob.parents[1] / "snapshots" / COMMIT / "x"):
        path.parent.mkdir(parents=True)
    blob.write_bytes(BODY)
    (blob.parents[1] / "refs" / "main").write_text(COMMIT)
    place = blob.parents[1] / "snapshots" / COMMIT / "m.gguf"
    place.symlink_to(f"../../blobs/{ETAG}")
    assert hub.resolve(NAME, download=False) == place
    assert hub.resolve(NAME) == place
    place.unlink()
    assert hub.resolve(NAME) == place  # the blob is there, so only the link is made
    assert one.asked("GET") == []


def test_one_blob_serves_snapshots_of_two_commits(one: FakeHub) -> None:
    first = hub.resolve(NAME)
    one.commits["main"] = "f" * 40
    second = hub.resolve(NAME)
    assert first != second
    assert first.samefile(second)
    assert len(one.asked("GET")) == 1


@pytest.mark.parametrize("force", [False, True])
def test_a_damaged_file_in_the_cache(one: FakeHub, force: bool) -> None:
    path = hub.resolve(NAME)
    path.resolve().write_bytes(BODY[::-1] if force else BODY[:-1])
    assert hub.pull(NAME, force=force) == path
    assert path.read_bytes() == BODY
    count = len(one.asked("GET"))
    assert hub.pull(NAME, force=force) == path
    assert len(one.asked("GET")) == count == 2


# ---- a download that is cut


def test_an_interrupted_download_continues(one: FakeHub) -> None:
    half = len(BODY) // 2
    cuts = [half, 100, None]

    def change(method: str, path: str, reply: Reply) -> None:
        if method == "GET":
            reply.send = cuts.pop(0)

    one.spoil = change
    seen = Recorder()
    assert hub.resolve(NAME, progress=seen).read_bytes() == BODY
    assert one.ranges() == [None, f"bytes={half}-", f"bytes={half + 100}-"]
    seen.check("downloading m.gguf", len(BODY))
    assert partials() == []


def test_a_download_that_breaks_off_goes_on_with_the_next_call(one: FakeHub) -> None:
    spoil(one, send=1000)
    with pytest.raises(DownloadError, match=f"^{NAME}: cannot get it from {one.url} .*: check the network"):
        hub.resolve(NAME)
    assert len(one.asked("GET")) == 5
    (partial,) = partials()
    assert partial.read_bytes() == BODY[:5000]
    assert not list(cache_dir().rglob("*.lock"))
    assert not hub_has_it()
    one.spoil = lambda method, path, reply: None
    seen = Recorder()
    assert hub.resolve(NAME, progress=seen).read_bytes() == BODY
    assert one.ranges()[-1] == "bytes=5000-"
    assert seen.calls["downloading m.gguf"][0] == (5000, len(BODY))
    assert partials() == []


def hub_has_it() -> bool:
    try:
        return bool(hub.resolve(NAME, download=False))
    except DownloadError:
        return False


def test_an_interrupt_keeps_what_came(one: FakeHub) -> None:
    spoil(one, send=2000)

    def stop(stage: str, done: int, total: int | None) -> None:
        if partials() and partials()[0].stat().st_size:
            raise KeyboardInterrupt

    with pytest.raises((KeyboardInterrupt, DownloadError)):
        hub.resolve(NAME, progress=stop)
    assert partials()[0].read_bytes() == BODY[: partials()[0].stat().st_size]
    one.spoil = lambda method, path, reply: None
    assert hub.resolve(NAME).read_bytes() == BODY


def test_a_server_without_ranges_starts_again(one: FakeHub) -> None:
    calls = []

    def change(method: str, path: str, reply: Reply) -> None:
        if method == "GET":
            calls.append(path)
            reply.status, reply.body, reply.send = 200, BODY, 3000 if len(calls) < 3 else None
            reply.headers.pop("Content-Range", None)

    one.spoil = change
    assert hub.resolve(NAME).read_bytes() == BODY
    assert one.ranges() == [None, "bytes=3000-", "bytes=3000-"]


def test_a_server_that_begins_again_and_breaks_off_is_left(the_hub: FakeHub) -> None:
    """Each second answer is a MB longer than the one before, and none goes on: it would never end."""
    body = b"GGUF" + bytes(3 << 20)
    the_hub.add("good/repo", "m.gguf", body=body)
    lengths = iter([2 << 20, 1000] * 50)

    def change(method: str, path: str, reply: Reply) -> None:
        if method == "GET":
            reply.status, reply.body, reply.send = 200, body, next(lengths)
            reply.headers.pop("Content-Range", None)

    the_hub.spoil = change
    with pytest.raises(DownloadError, match="cannot get it from"):
        hub.resolve(NAME)
    assert len(the_hub.asked("GET")) <= 8


def test_a_reason_is_one_short_line() -> None:
    assert client.reason(ValueError("x" * 20_000 + "\nmore")) == "x" * 300
    assert client.reason(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    ("status", "value"),
    [
        (206, "bytes 0-9/512004"),
        (206, "bytes 1001-512003/512004"),
        (206, "bytes 1000-512003/512005"),
        (206, "bytes 1000-512003"),
        (206, "x" * 1000),
        (206, None),
        (416, "bytes */512004"),
    ],
)
def test_a_range_that_was_not_asked_for(one: FakeHub, status: int, value: str | None) -> None:
    spoil(one, send=200)
    with pytest.raises(DownloadError, match="check the network"):
        hub.resolve(NAME)
    assert partials()[0].stat().st_size == 1000

    def change(method: str, path: str, reply: Reply) -> None:
        if method == "GET":
            reply.status = status
            reply.headers.pop("Content-Range")
            reply.headers |= {"Content-Range": value} if value else {}

    one.spoil = change
    with pytest.raises(DownloadError, match="the server sent other bytes than those that were asked for"):
        hub.resolve(NAME)
    assert list(cache_dir().rglob("*")) == []
    one.spoil = lambda method, path, reply: None
    assert hub.resolve(NAME).read_bytes() == BODY


@pytest.mark.parametrize(
    ("part", "reason"),
    [(BODY[:100] + b"x" * 100, "SHA-256"), (b"x" * 200, "no GGUF file"), (BODY + b"longer", ""), (BODY, "")],
    ids=["other bytes", "other magic", "too long", "complete"],
)
def test_a_partial_file_of_other_bytes_is_not_continued(one: FakeHub, part: bytes, reason: str) -> None:
    place = cache_dir() / "models--good--repo" / ".forge" / "m.gguf" / ETAG
    place.parent.mkdir(parents=True)
    place.write_bytes(part)
    if reason:
        with pytest.raises(DownloadError, match=reason):
            hub.resolve(NAME)
        assert list(cache_dir().rglob("*")) == []
    assert hub.resolve(NAME).read_bytes() == BODY


def test_a_newer_file_does_not_go_on_with_the_part_of_an_older(one: FakeHub) -> None:
    spoil(one, send=1000)
    with pytest.raises(DownloadError):
        hub.resolve(NAME)
    one.spoil = lambda method, path, reply: None
    one.add("good/repo", "m.gguf", body=b"GGUF new")
    assert hub.resolve(NAME).read_bytes() == b"GGUF new"
    assert one.ranges()[-1] is None


def test_large_files_come_in_pieces(one: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PIECE_BYTES", 200_000)
    assert hub.resolve(NAME).read_bytes() == BODY
    assert one.ranges() == ["bytes=0-199999", "bytes=200000-399999", "bytes=400000-"]


@pytest.mark.parametrize("failures", [2, 99])
def test_a_hub_that_is_down_is_asked_again(one: FakeHub, failures: int) -> None:
    def change(method: str, path: str, reply: Reply) -> None:
        if len(one.log) <= failures:
            reply.status = 503

    one.spoil = change
    if failures == 99:
        with pytest.raises(DownloadError, match=r"cannot get it from .* \(503 Service Unavailable\)"):
            hub.resolve(NAME)
        assert len(one.log) == 3
    else:
        assert hub.resolve(NAME).read_bytes() == BODY


# ---- what lies in the way


@pytest.mark.parametrize("kind", ["pipe", "directory"])
def test_a_lock_of_the_hub_that_is_no_file(one: FakeHub, kind: str) -> None:
    lock = cache_dir() / ".locks" / "models--good--repo" / f"{ETAG}.lock"
    lock.parent.mkdir(parents=True)
    os.mkfifo(lock) if kind == "pipe" else lock.mkdir()
    with pytest.raises(DownloadError, match=f"^{NAME}: the lock {lock} is not a regular file: remove it$"):
        hub.resolve(NAME)
    assert one.asked("GET") == []


@pytest.mark.parametrize("place", [f"snapshots/{COMMIT}/m.gguf", f"blobs/{ETAG}"])
def test_a_directory_in_the_way_is_said_before_the_download(one: FakeHub, place: str) -> None:
    path = cache_dir() / "models--good--repo" / place
    path.mkdir(parents=True)
    with pytest.raises(DownloadError, match=f"^{NAME}: {path} is a directory, and the model's file belongs there"):
        hub.resolve(NAME)
    assert one.asked("GET") == []


@pytest.mark.parametrize("place", [f"snapshots/{COMMIT}/m.gguf", f"blobs/{ETAG}", "refs/main"])
def test_pipes_in_the_cache_do_not_hang(one: FakeHub, place: str) -> None:
    path = cache_dir() / "models--good--repo" / place
    path.parent.mkdir(parents=True)
    os.mkfifo(path)
    assert not hub_has_it()
    assert hub.resolve(NAME).read_bytes() == BODY
    assert hub_has_it()


def test_a_part_that_is_a_pipe(one: FakeHub) -> None:
    place = cache_dir() / "models--good--repo" / ".forge" / "m.gguf" / ETAG
    place.parent.mkdir(parents=True)
    os.mkfifo(place)
    with pytest.raises(DownloadError, match=f"{place} is not a regular file"):
        hub.resolve(NAME)


def test_too_little_space_on_the_disk_of_the_hub_is_said_before(one: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(method: str, path: str, reply: Reply) -> None:
        reply.headers["X-Linked-Size"] = str(10**17)

    one.spoil = change
    with pytest.raises(DownloadError, match=r"100000000000 MB are missing, and \d+ MB are free in .* set HF_HOME to"):
        hub.resolve(NAME)
    assert one.asked("GET") == []
    assert list(cache_dir().rglob("*")) == []


def test_two_at_once_download_once(one: FakeHub) -> None:
    started = threading.Event()

    def change(method: str, path: str, reply: Reply) -> None:
        if method == "GET":
            started.wait(60)

    one.spoil = change
    results: list[Path] = []
    seen = [Recorder(), Recorder()]
    threads = [
        threading.Thread(target=lambda note=note: results.append(hub.resolve(NAME, progress=note))) for note in seen
    ]
    for thread in threads:
        thread.start()
    while not any("waiting for another download of m.gguf" in note.calls for note in seen):
        threads[0].join(0.01)
    started.set()
    for thread in threads:
        thread.join(60)
    assert [path.read_bytes() for path in results] == [BODY, BODY]
    assert len(one.asked("GET")) == 1


# ---- redirects


def test_the_token_stays_with_the_hub(one: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with fake_hub.running() as store:
        store.add("a/b", "m.gguf", body=BODY)
        announced = {"X-Linked-ETag": f'"{ETAG}"', "X-Linked-Size": str(len(BODY)), "X-Repo-Commit": COMMIT}

        def change(method: str, path: str, reply: Reply) -> None:
            if path.startswith("/good/repo/"):  # the repository has moved, on the same host
                reply.status, reply.headers, reply.body = 307, {"Location": "/new/repo/resolve/main/m.gguf"}, b""
            else:
                reply.status, reply.body = 302, b""
                reply.headers = announced | {"Location": f"{store.url}/a/b/resolve/main/m.gguf"}

        one.spoil = change
        assert hub.resolve(NAME).read_bytes() == BODY
        assert {headers.get("authorization") for _, _, headers in one.log} == {"Bearer hf_secret"}
        assert [(method, headers.get("authorization")) for method, _, headers in store.log] == [("GET", None)]


@pytest.mark.parametrize(
    "target",
    [
        *("/good/repo/resolve/main/m.gguf", "file:///etc/passwd", "http://[", "", "x:y"),
        *(f"http://{'a' * 64}.invalid/", "http://a..invalid/"),  # names that are none
    ],
)
def test_redirects_that_lead_nowhere(one: FakeHub, target: str) -> None:
    def change(method: str, path: str, reply: Reply) -> None:
        reply.status, reply.body = 302, b""
        reply.headers["Location"] = target

    one.spoil = change
    with pytest.raises(DownloadError, match=f"^{NAME}: "):
        hub.resolve(NAME)
    assert len(one.log) <= 60
    assert [path for path in cache_dir().rglob("*") if path.is_file()] == []


def test_a_token_that_cannot_be_sent_is_not_shown(one: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    with pytest.raises(DownloadError, match=f"^{NAME}: cannot set up the connection: ") as caught:
        hub.resolve(NAME)
    assert "cret" not in str(caught.value)


def test_a_redirect_has_an_etag_of_its_own(one: FakeHub) -> None:
    def change(method: str, path: str, reply: Reply) -> None:
        if path.startswith("/good/"):
            reply.status, reply.body = 307, b"Temporary Redirect"
            reply.headers = {
                "ETag": 'W/"12-redirect"',
                "X-Repo-Commit": COMMIT,
                "Location": "/new/repo/resolve/main/m.gguf",
            }

    one.add("new/repo", "m.gguf", body=BODY)
    one.spoil = change
    path = hub.resolve(NAME)
    assert path.read_bytes() == BODY
    assert path.resolve().name == ETAG


def test_a_hub_that_does_not_answer_is_asked_once(one: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    path = hub.resolve(NAME)
    asked = len(one.log)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.05)
    late = threading.Event()
    one.spoil = lambda method, path, reply: late.wait(10) and None
    assert hub.resolve(NAME) == path
    assert len(one.log) == asked + 1
    late.set()


def test_the_password_of_an_endpoint_is_not_shown(monkeypatch: pytest.MonkeyPatch, one: FakeHub) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://me:secret@127.0.0.1:9")
    with pytest.raises(DownloadError, match=r"cannot get it from http://\*\*\*\*@127\.0\.0\.1:9 \(.*refused") as caught:
        hub.resolve(NAME)
    assert "secret" not in str(caught.value)


def test_a_disk_that_fills_up_during_a_download_is_named(one: FakeHub) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(
            DownloadError, match=f"^{NAME}: no space left in {cache_dir()}: free some space or set HF_HOME"
        ):
            hub.resolve(NAME)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert hub.resolve(NAME).read_bytes() == BODY
    assert one.ranges() == [None, "bytes=200000-"]
