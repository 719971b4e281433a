"""Every --json names forge's version, the device, and the model with the SHA-256 that `sha256sum` shows."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import forge
from forge import _files
from forge.backend import select
from forge.cli import about, run
from forge.hub import hashes

ARCH = Path(__file__).parents[1] / "data" / "arch"
LLAMA = ARCH / "llama" / "model.gguf"
LONG_AGO = 10**18
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def sha256(path: Path) -> str:
    return hashes.sha256(path, lambda done, size: None)


def sha256sum(path: Path) -> str:
    return subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout[:64]


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a", "--max-tokens", "1", "-m"],
        ["logits", "a", "-m"],
        ["tokenize", "a", "-m"],
        ["inspect"],
        ["bench", "--prompt-tokens", "4", "--gen-tokens", "2", "--batch", "1", "--repetitions", "1", "-m"],
        ["perplexity", "TEXT", "-m"],
    ],
    ids=lambda command: command[0],
)
def test_commands_with_a_model(command: list[str], capsys: Captured, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b c d e")
    arguments = [str(tmp_path / "text") if part == "TEXT" else part for part in command]
    assert run([*arguments, str(LLAMA), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["forge"] == forge.__version__
    assert found["device"] == select("cpu").device
    assert (found["model"], found["model_sha256"]) == ("model.gguf", sha256sum(LLAMA))


@pytest.mark.parametrize("command", ["doctor", "kernels list"])
def test_commands_without_a_model(command: str, capsys: Captured) -> None:
    run([*command.split(), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found)[:4] == ["forge", "device", "model", "model_sha256"]
    assert (found["forge"], found["device"]) == (forge.__version__, select("cpu").device)
    assert (found["model"], found["model_sha256"]) == (None, None)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes were hashed, one item a block."""
    sizes: list[int] = []
    real = hashlib.sha256

    class Counted:
        def __init__(self) -> None:
            self.digest = real()

        def update(self, block: bytes) -> None:
            sizes.append(len(block))
            self.digest.update(block)

        def hexdigest(self) -> str:
            return self.digest.hexdigest()

    monkeypatch.setattr(hashes.hashlib, "sha256", Counted)
    return sizes


def write(path: Path, data: bytes, when: int = LONG_AGO) -> Path:
    path.write_bytes(data)
    os.utime(path, ns=(when, when))
    return path


def test_a_hash_is_kept_until_the_file_changes(
    cache: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_NS", -(10**18))
    path = write(tmp_path / "a", b"one")
    wanted = hashlib.new("sha256", b"one").hexdigest()
    assert [sha256(path) for _ in range(3)] == [wanted] * 3
    assert hashed == [3]
    assert json.loads((cache / "sha256.json").read_text())[str(path)][-1] == wanted
    write(path, b"two")  # of the same size, at the same time
    assert sha256(path) == hashlib.new("sha256", b"two").hexdigest()
    other = write(tmp_path / "b", b"six")
    os.replace(other, path)
    assert sha256(path) == hashlib.new("sha256", b"six").hexdigest()


def test_a_file_that_may_still_change_is_hashed_each_time(
    hashed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_NS", 10**18)
    path = tmp_path / "a"
    path.write_bytes(b"one")
    assert sha256(path) == sha256(path)
    assert hashed == [3, 3]


@pytest.mark.parametrize("held", ["", "[]", "[" * 5000, '{"PATH": "x"}', '{"PATH": []}', '{"PATH": [1, [2]]}', None])
def test_notes_that_are_no_notes_are_of_no_consequence(held: str | None, cache: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a", b"one")
    cache.mkdir()
    if held is None:
        (cache / "sha256.json").mkdir()
    else:
        (cache / "sha256.json").write_text(held.replace("PATH", str(path)))
    assert sha256(path) == hashlib.sha256(b"one").hexdigest()


def test_a_cache_that_cannot_be_written(
    cache: Path, hashed: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """`forge chat --lines --json` asks for every line."""
    monkeypatch.setattr(hashes, "_SETTLED_NS", -(10**18))
    cache.write_text("a file")
    path = write(tmp_path / "a", b"one")
    assert [sha256(path) for _ in range(3)] == [hashlib.new("sha256", b"one").hexdigest()] * 3
    assert hashed == [3]


def test_old_notes_are_dropped(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hashes, "_SETTLED_NS", -(10**18))
    monkeypatch.setattr(hashes, "_MAX_NOTED", 3)
    paths = [write(tmp_path / str(i), bytes([i])) for i in range(5)]
    for path in paths:
        sha256(path)
    assert list(json.loads((cache / "sha256.json").read_text())) == list(map(str, paths[2:]))


def test_json_of_a_sharded_model_holds_all_hashes(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"x-0000{i}-of-00002.gguf", bytes([i])) for i in (1, 2)]
    found: dict[str, Any] = about.about("cpu", paths[0])
    assert found["model"] == paths[0].name
    assert found["model_sha256"] == [sha256sum(path) for path in paths]
    shutil.copy(paths[0], tmp_path / "y.gguf")
    assert about.about("cpu", tmp_path / "y.gguf")["model_sha256"] == sha256sum(paths[0])


def test_json_of_a_directory_holds_the_hashes_of_its_weights(tmp_path: Path) -> None:
    folder = tmp_path / "models--o--r" / "snapshots" / ("0" * 40)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    single = write(folder / "model.safetensors", b"one")
    found: dict[str, Any] = about.about("cpu", folder)
    assert (found["model"], found["model_sha256"]) == ("o/r", sha256sum(single))
    single.unlink()
    shards = [write(folder / f"model-{i}-of-2.safetensors", bytes([i])) for i in (1, 2)]
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"b": shards[1].name, "a": shards[0].name}})
    )
    assert about.about("cpu", folder)["model_sha256"] == [sha256sum(path) for path in shards]
    folder.rename(tmp_path / "mine")
    assert about.about("cpu", tmp_path / "mine")["model"] == "mine"


def test_the_directory_that_one_is_in_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert _files.model_name(Path()) == tmp_path.name
    assert _files.model_name(Path("x/m.gguf")) == "m.gguf"
