"""`forge list` and `forge rm`: what lies in the caches, and what goes when a model is removed."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, Reply
from hub_servers import BODY, add, make_model, unpack

from forge import hub
from forge.cli import run
from forge.errors import DownloadError, ModelNotFoundError

Captured = pytest.CaptureFixture[str]
REPO = "good/repo"


@pytest.fixture
def both(the_hub: FakeHub, cache: Path) -> FakeHub:
    """A Hub with some files, and empty caches."""
    (cache / "models" / "other.gguf").unlink()
    the_hub.add(REPO, "m-Q4_K_M.gguf", "m-Q8_0.gguf", "m-F16.gguf", "m-BF16.gguf")
    return the_hub


def tree(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def hf() -> Path:
    return hub.caches()[1]


def listed() -> dict[str, tuple[int, str]]:
    return {item.name: (item.bytes, item.state) for item in hub.stored()}


def cut(the_hub: FakeHub, name: str, count: int = 100) -> None:
    """A download that breaks off."""

    def change(method: str, path: str, reply: Reply) -> None:
        if method == "GET" and "/resolve/" in path:
            reply.status, reply.send = (200, count) if reply.status == 200 else (503, None)

    the_hub.spoil = change
    with pytest.raises(DownloadError):
        hub.pull(name)
    the_hub.spoil = lambda method, path, reply: None


# ---- list


def test_an_empty_cache_lists_no_models(both: FakeHub, capsys: Captured, tmp_path: Path) -> None:
    assert hub.stored() == []
    assert run(["list"]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err == (f"forge: no model in {tmp_path}/cache or {tmp_path}/hf: forge pull smollm2 fetches one\n")
    assert run(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["models"], found["bytes"]) == ([], 0)
    assert found["caches"] == {"forge": f"{tmp_path}/cache", "huggingface": f"{tmp_path}/hf"}
    assert not (tmp_path / "hf").exists()  # looking makes nothing


def test_stored_models_are_listed_with_sizes(
    both: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    add(monkeypatch, make_model([BODY]))
    add(monkeypatch, make_model([BODY], "bad"))
    (cache / "models" / "tiny.gguf").write_bytes(BODY)
    (cache / "models" / "bad.gguf").write_bytes(BODY[:1000])
    (cache / "models" / ".pull" / "bad" / "tmp-x" / "wheels").mkdir(parents=True)
    (cache / "models" / ".pull" / "bad" / "tmp-x" / "wheels" / "a.whl").write_bytes(bytes(77))
    both.add(REPO, *(f"d/s-{n:05}-of-00003.gguf" for n in (1, 2, 3)))
    first = hub.pull(f"hf:{REPO}/m-Q8_0.gguf")
    hub.pull(f"hf:{REPO}/d/s-00001-of-00003.gguf")
    both.add(REPO, "m-Q8_0.gguf", "x.gguf", revision="feat/x", body=b"GGUF x")
    both.commits["feat/x"] = "f" * 40
    hub.pull(f"hf:{REPO}@feat%2Fx/x.gguf")
    cut(both, f"hf:{REPO}/m-F16.gguf", 7)
    (first.parents[2] / "snapshots" / ("a" * 40)).mkdir()
    (first.parents[2] / "snapshots" / ("a" * 40) / "old.gguf").symlink_to(f"../../blobs/{first.resolve().name}")
    (first.parent / "config.json").write_text("{}")
    expected = {
        "tiny": (len(BODY), "complete"),
        "bad": (77, "partial"),  # its file is listed as well, below
        f"hf:{REPO}/m-Q8_0.gguf": (19, "complete"),
        f"hf:{REPO}/d/s-00001-of-00003.gguf": (93, "complete"),
        f"hf:{REPO}@feat%2Fx/x.gguf": (6, "complete"),
        f"hf:{REPO}@{'a' * 40}/old.gguf": (19, "complete"),
        f"hf:{REPO}/m-F16.gguf": (7, "partial"),
    }
    assert listed() == expected
    assert [(item.bytes, item.state) for item in hub.stored() if item.name == "bad"] == [
        (1000, "damaged"),
        (77, "partial"),
    ]
    assert run(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("7 models, 513.2 kB")
    rows = [line.split() for line in lines if "bad" in line]
    assert rows == [["bad", "1", "kB", "damaged"], ["bad", "77", "bytes", "partial"]]
    assert run(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {item["name"] for item in found["models"]} == set(expected)
    assert found["bytes"] == len(BODY) + 1000 + 77 + 19 + 93 + 6 + 7  # the old link is to the same file
    assert all(Path(item["path"]).exists() for item in found["models"])
    for name in expected:  # every name is one that commands take
        if expected[name][1] == "complete":
            assert hub.resolve(name, download=False).exists()


@pytest.mark.parametrize(
    "path",
    [
        "models--a", "models--a--b--c/snapshots/x", "datasets--a--b/snapshots", "models--a--b/snapshots/notes/x.gguf",
        f"models--a--b/snapshots/{COMMIT}/a\nb.gguf", f"models--a--b/snapshots/{COMMIT}/d.gguf/x", ".locks/x", "x",
        "models--a--b/.forge", "models--a--b/.forge/x", "models--a--b/.forge/x/y", "models--a--b/.forge/a\nb.gguf/x",
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["file", "pipe", "loop", "dangling"])
def test_other_things_in_the_cache_are_passed_over(both: FakeHub, path: str, kind: str) -> None:
    place = hf() / path
    place.parent.mkdir(parents=True)
    {
        "file": lambda: place.write_bytes(b"GGUF"),
        "pipe": lambda: os.mkfifo(place),
        "loop": lambda: place.symlink_to(place),
        "dangling": lambda: place.symlink_to("nowhere"),
    }[kind]()
    assert hub.stored() == []


def test_every_name_that_is_listed_can_be_removed(both: FakeHub) -> None:
    """Also where a ref has a name that no name of the Hub has."""
    folder = hf() / "models--a--b"
    for path, content in (("refs/x\ny", COMMIT), (f"snapshots/{COMMIT}/m.gguf", "GGUF"), (".forge/n.gguf/e", "GG")):
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(content)
    assert listed() == {f"hf:a/b@{COMMIT}/m.gguf": (4, "complete"), "hf:a/b/n.gguf": (2, "partial")}
    assert [hub.remove(name) for name in listed()] == [4, 2]
    assert listed() == {}


# ---- rm: the catalog


def test_a_known_model_is_removed(
    fake_uv: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured, the_hub: FakeHub, tmp_path: Path
) -> None:
    model = add(monkeypatch, make_model([BODY]))
    unpack(fake_uv, model, [BODY])
    hub.pull("tiny")
    (cache / "models" / ".pull" / "tiny" / "tmp-old").mkdir()
    (cache / "models" / ".pull" / "tiny" / "tmp-old" / "part").write_bytes(bytes(1000))
    monkeypatch.chdir(tmp_path)
    Path("tiny").write_bytes(b"mine")  # a file wins for -m; here a name means the cache
    assert run(["rm", "tiny"]) == 0
    assert capsys.readouterr().out == "tiny: removed, 513 kB freed\n"
    assert tree(cache) == ["models", "models/.pull", "models/other.gguf", "sha256.json"]
    assert Path("tiny").read_bytes() == b"mine"
    assert run(["rm", "tiny"]) == 1
    assert capsys.readouterr().err == f"forge: tiny is not in the cache {cache}\n"


def test_what_a_killed_pull_left_is_removed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    place = cache / "models" / ".pull" / "tiny" / "tmp-x"
    place.mkdir(parents=True)
    (place / "part").write_bytes(bytes(500))
    assert hub.remove("tiny") == 500
    assert tree(cache) == ["models", "models/.pull", "models/other.gguf"]


def test_a_file_with_another_name_frees_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add(monkeypatch, make_model([BODY]))
    (cache / "models" / "tiny.gguf").write_bytes(BODY)
    os.link(cache / "models" / "tiny.gguf", tmp_path / "mine.gguf")
    assert hub.remove("tiny") == 0
    assert (tmp_path / "mine.gguf").read_bytes() == BODY


def test_what_a_pull_moves_meanwhile_counts_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch, the_hub: FakeHub
) -> None:
    add(monkeypatch, make_model([BODY]))
    place = cache / "models" / ".pull" / "tiny" / "tmp-now"
    place.mkdir(parents=True)
    (place / "a").write_bytes(b"12")
    (place / "b").write_bytes(b"345")
    walk = os.walk

    def move(top: Path) -> Iterator[tuple[str, list[str], list[str]]]:
        for found in walk(top):
            (place / "a").unlink()
            yield found

    monkeypatch.setattr(os, "walk", move)
    assert listed() == {"tiny": (3, "partial")}


def test_a_model_that_is_being_pulled_stays(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    (cache / "models" / "tiny.gguf").write_bytes(BODY)
    lock = cache / "models" / ".pull" / "tiny" / "lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match=r"^tiny is being fetched by another process: wait for its end"):
            hub.remove("tiny")
    assert (cache / "models" / "tiny.gguf").read_bytes() == BODY


# ---- rm: the Hugging Face cache


@pytest.mark.parametrize(
    "name", [f"hf:{REPO}/m-Q8_0.gguf", f"hf:{REPO}:q8_0", f"https://huggingface.co/{REPO}/blob/main/m-Q8_0.gguf"]
)
def test_a_file_of_the_hub_is_removed(both: FakeHub, capsys: Captured, name: str) -> None:
    hub.pull(f"hf:{REPO}")
    before = tree(hf())
    hub.pull(f"hf:{REPO}/m-Q8_0.gguf")
    assert run(["rm", name]) == 0
    assert capsys.readouterr().out == f"{name}: removed, 19 bytes freed\n"
    assert tree(hf()) == before
    assert hub.remove(f"hf:{REPO}") == 21
    assert tree(hf()) == []
    with pytest.raises(ModelNotFoundError, match=f"^hf:{REPO} is not in the Hugging Face cache {hf()}: `forge list`"):
        hub.remove(f"hf:{REPO}")


def test_a_part_that_came_is_removed(both: FakeHub) -> None:
    hub.pull(f"hf:{REPO}/m-F16.gguf")
    before = tree(hf())
    cut(both, f"hf:{REPO}/m-Q8_0.gguf", 9)
    cut(both, f"hf:{REPO}", 5)
    assert hub.remove(f"hf:{REPO}/m-Q8_0.gguf") == 9
    assert listed()[f"hf:{REPO}/m-Q4_K_M.gguf"] == (5, "partial")
    assert hub.remove(f"hf:{REPO}:Q4_K_M") == 5
    assert tree(hf()) == before


def test_remove_deletes_only_the_named_file(both: FakeHub) -> None:
    for name in ("m-F16.gguf", "m-BF16.gguf"):
        hub.pull(f"hf:{REPO}/{name}")
    with pytest.raises(ModelNotFoundError, match=r"several files may be meant: m-BF16.gguf, m-F16.gguf: name one"):
        hub.remove(f"hf:{REPO}")
    with pytest.raises(ModelNotFoundError, match=r"the cache has no such file: it has m-BF16.gguf, m-F16.gguf"):
        hub.remove(f"hf:{REPO}:Q8_0")
    assert hub.remove(f"hf:{REPO}:F16") == 18
    assert list(listed()) == [f"hf:{REPO}/m-BF16.gguf"]


def test_all_shards_of_a_model_are_removed(both: FakeHub) -> None:
    both.add(REPO, *(f"s-Q8_0-{n:05}-of-00002.gguf" for n in (1, 2)))
    hub.pull(f"hf:{REPO}/s-Q8_0-00001-of-00002.gguf")
    assert hub.remove(f"hf:{REPO}:Q8_0") == 2 * len("GGUF of s-Q8_0-00001-of-00002.gguf")
    assert tree(hf()) == []


def test_removing_a_model_keeps_blobs_that_others_share(both: FakeHub) -> None:
    first = hub.pull(f"hf:{REPO}/m-F16.gguf")
    both.commits["main"] = "f" * 40
    second = hub.pull(f"hf:{REPO}/m-F16.gguf")
    copy = first.with_name("copy.gguf")
    copy.symlink_to(os.readlink(first))
    assert hub.remove(f"hf:{REPO}@{COMMIT}/m-F16.gguf") == 0
    assert not first.exists()
    assert second.read_bytes() == b"GGUF of m-F16.gguf"
    assert hub.remove(f"hf:{REPO}/m-F16.gguf") == 0
    assert copy.read_bytes() == b"GGUF of m-F16.gguf"
    assert hub.remove(f"hf:{REPO}/copy.gguf") == 18
    assert tree(hf()) == []


def test_remove_without_a_revision_deletes_all_revisions(both: FakeHub) -> None:
    hub.pull(f"hf:{REPO}/m-F16.gguf")
    both.add(REPO, "m-F16.gguf", body=b"GGUF newer")
    both.commits["main"] = "f" * 40
    hub.pull(f"hf:{REPO}/m-F16.gguf")
    assert hub.remove(f"hf:{REPO}/m-F16.gguf") == 18 + 10
    assert tree(hf()) == []


def test_other_files_of_a_repository_stay(both: FakeHub) -> None:
    path = hub.pull(f"hf:{REPO}/m-F16.gguf")
    (path.parents[2] / "blobs" / "other").write_bytes(b"{}")
    (path.parent / "config.json").symlink_to("../../blobs/other")
    hub.remove(f"hf:{REPO}/m-F16.gguf")
    assert (path.parent / "config.json").read_bytes() == b"{}"
    assert (path.parents[2] / "refs" / "main").read_text() == COMMIT


def test_a_file_that_is_being_fetched_stays(both: FakeHub) -> None:
    path = hub.pull(f"hf:{REPO}/m-F16.gguf")
    lock = hf() / ".locks" / "models--good--repo" / f"{path.resolve().name}.lock"
    lock.parent.mkdir(parents=True)
    with open(lock, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DownloadError, match="is being fetched by another process"):
            hub.remove(f"hf:{REPO}/m-F16.gguf")
    assert path.exists()
    hub.remove(f"hf:{REPO}/m-F16.gguf")
    assert tree(hf()) == []


# ---- rm: nothing outside the caches


def link_to_outside(path: Path, outside: Path) -> None:
    path.unlink()
    path.symlink_to(outside)


OUTSIDE: dict[str, Callable[[Path, Path], object]] = {
    "a link to a file": lambda path, outside: link_to_outside(path, outside / "m-F16.gguf"),
    "a relative link": lambda path, outside: link_to_outside(
        path, Path(os.path.relpath(outside / "m-F16.gguf", path.parent))
    ),
    "a blob that is a link": lambda path, outside: link_to_outside(path.resolve(), outside / "m-F16.gguf"),
    "the snapshot": lambda path, outside: (path.unlink(), path.parent.rmdir(), path.parent.symlink_to(outside)),
    "all snapshots": lambda path, outside: (
        (outside / COMMIT).mkdir(),
        (outside / COMMIT / "m-F16.gguf").write_bytes(b"kept"),
        path.parents[1].rename(path.parents[1].with_name("away")),
        path.parents[1].symlink_to(outside),
    ),
}


@pytest.mark.parametrize("how", OUTSIDE)
def test_links_that_lead_out_of_the_cache(both: FakeHub, tmp_path: Path, how: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "m-F16.gguf").write_bytes(b"precious")
    path = hub.pull(f"hf:{REPO}/m-F16.gguf")
    OUTSIDE[how](path, outside)
    before = {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()}
    refusal = pytest.raises(DownloadError, match="leads out of the cache") if "snapshot" in how else nullcontext()
    with refusal:
        hub.remove(f"hf:{REPO}/m-F16.gguf")
    assert {file: file.read_bytes() for file in outside.rglob("*") if file.is_file()} == before


def test_links_of_the_own_cache(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add(monkeypatch, make_model([BODY]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my.gguf").write_bytes(BODY)
    (tmp_path / "mine" / "lock").write_bytes(b"mine")
    (cache / "models" / "tiny.gguf").symlink_to(tmp_path / "mine" / "my.gguf")
    assert hub.remove("tiny") == 0
    assert (tmp_path / "mine" / "my.gguf").read_bytes() == BODY
    (cache / "models" / "tiny.gguf").write_bytes(BODY)
    (cache / "models" / ".pull" / "tiny").symlink_to(tmp_path / "mine")
    with pytest.raises(DownloadError, match=r"\.pull/tiny leads out of the cache"):
        hub.remove("tiny")
    assert tree(tmp_path / "mine") == ["lock", "my.gguf"]


@pytest.mark.parametrize(
    "name",
    [
        "other.gguf",
        "../cache/models/other.gguf",
        "/etc/hostname",
        ".",
        "..",
        "",
        "models",
        "*",
        "a\nb",
        "nul\0",
        "tiny/x",
    ],
)
def test_what_is_no_name_in_the_caches(
    cache: Path, name: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(cache / "models")
    assert run(["rm", "--", name]) == 1
    line = capsys.readouterr().err
    assert "is no name of a model in the caches" in line
    assert line.count("\n") == 1
    assert (cache / "models" / "other.gguf").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "name", ["hf:../../x.gguf", "hf:o/r/../../x.gguf", "hf:o/r@../../x.gguf", "hf:o/r\n", "hf:o/r@..%2f..%2fx/y.gguf"]
)
def test_hostile_names_remove_nothing(both: FakeHub, name: str) -> None:
    (hf().parent / "x.gguf").write_bytes(b"precious")
    with pytest.raises(ModelNotFoundError):
        hub.remove(name)
    assert (hf().parent / "x.gguf").read_bytes() == b"precious"


def test_a_directory_in_the_place_of_a_file_stays(both: FakeHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    (cache / "models" / "tiny.gguf").mkdir()
    with pytest.raises(DownloadError, match=r"tiny\.gguf is a directory: remove it yourself"):
        hub.remove("tiny")
    assert (cache / "models" / "tiny.gguf").is_dir()
