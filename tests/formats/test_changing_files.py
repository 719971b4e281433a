"""Files that are truncated, rewritten or replaced while they are read: an error in one line, and never a signal."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import pytest
from gguf_files import U16, Typed, write_gguf

import forge
from forge import FormatError, loading
from forge.formats import checkpoint, gguf, source
from forge.formats.source import Source

MODEL = Path(__file__).parents[1] / "data" / "arch" / "gemma3" / "model.gguf"
SIZE = MODEL.stat().st_size

TRUNCATED = """
import itertools, os, pathlib, shutil, sys
import forge
from forge import loading
from forge.formats import checkpoint, gguf

source, path = map(pathlib.Path, sys.argv[1:])
size = source.stat().st_size
dequantize, from_metadata = checkpoint.dequantize, loading.Tokenizer.from_metadata
calls = itertools.count()

def then(at, function):
    def called(*arguments, **options):
        if next(calls) == at:
            os.truncate(path, offset)
        return function(*arguments, **options)
    return called

ends = set()
for offset in sorted({0, 1, 4095, 4096, size - 1, *range(0, size, size // 15)}):
    for at in (None, 0, 7, 40):
        shutil.copy(source, path)
        calls = itertools.count()
        loading.Tokenizer.from_metadata = then(0, from_metadata) if at is None else from_metadata
        checkpoint.dequantize = dequantize if at is None else then(at, dequantize)
        try:
            forge.load(path, device="cpu")
        except forge.FormatError as error:
            ends.add(str(error).replace(str(offset), "OFFSET", 1) if offset > 1 else "")
        else:
            ends.add("loaded")
print(sorted(ends - {""}))
"""


@pytest.mark.slow
def test_a_file_truncated_while_it_is_loaded_is_an_error(tmp_path: Path) -> None:
    """Before its tokenizer is read, and in the middle of its weights, at many offsets; in a child, which must live."""
    path = tmp_path / "model.gguf"
    command = [sys.executable, "-c", TRUNCATED, str(MODEL), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    message = f"{path}: changed from {SIZE} to OFFSET bytes while it was read: load it again when it is whole"
    assert done.stdout == f"{[message]}\n"


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(bytes(SIZE))


def grow(path: Path) -> None:
    os.truncate(path, SIZE + 1)


def replace(path: Path) -> None:
    other = path.with_name("other")
    shutil.copy(MODEL, other)
    os.replace(other, path)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shutil.copy(MODEL, tmp_path / "model.gguf")
    os.utime(tmp_path / "model.gguf", (1e9, 1e9))  # file systems count time in ticks
    return tmp_path / "model.gguf"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (rewrite, "was written to while it was read: load it again when it is whole"),
        (grow, f"changed from {SIZE} to {SIZE + 1} bytes while it was read"),
        (replace, "was replaced while it was read: load it again"),
    ],
)
@pytest.mark.parametrize("at", [0, 30])
def test_a_file_that_is_another_one_meanwhile_is_an_error(
    model: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None], words: str, at: int
) -> None:
    """The file changes while every thread that loads waits: tensors are left for each to read."""
    dequantize, calls, changes = checkpoint.dequantize, iter(range(1000)), Lock()

    def changing(*arguments: Any) -> Any:
        with changes:
            if next(calls) == at:
                change(model)
        return dequantize(*arguments)

    monkeypatch.setattr(checkpoint, "dequantize", changing)
    with pytest.raises(FormatError) as caught:
        forge.load(model, device="cpu")
    assert str(caught.value).startswith(f"{model}: {words}")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_deleted_while_it_is_loaded_is_still_there(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loading.Tokenizer.from_metadata
    monkeypatch.setattr(
        loading.Tokenizer, "from_metadata", lambda *args, **options: model.unlink() or real(*args, **options)
    )
    with forge.load(model, device="cpu") as llm:
        assert llm.generate([1, 2], max_tokens=2, ignore_eos=True).finish_reason == "length"


def test_blocks_of_a_changed_file_are_not_read(model: Path) -> None:
    """As a GPU takes them: without conversion."""
    file = gguf.read(model)
    name = "blk.3.ffn_up.weight"
    before = file.raw(name).copy()
    np.testing.assert_array_equal(file.raw(name), before)
    os.utime(model, (1e9 + 1, 1e9 + 1))
    with pytest.raises(FormatError, match="was written to"):
        file.raw(name)


def test_reads_may_be_short_and_may_fail(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of network file systems, and of more than 2 GiB at once."""
    real = os.preadv
    with gguf.read(model) as file:
        whole = {name: file.load(name) for name in file.tensors}
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, start: real(fd, [buffers[0][:1001]], start))
    with gguf.read(model) as file:
        for name, wanted in whole.items():
            np.testing.assert_array_equal(file.load(name), wanted)

        def broken(*_: Any) -> int:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

        monkeypatch.setattr(os, "preadv", broken)
        with pytest.raises(FormatError, match=r"model\.gguf: cannot be read at byte \d+: Stale file handle"):
            file.load("output_norm.weight")


def test_a_shard_that_changes_is_named(tmp_path: Path) -> None:
    for number in (1, 2):
        keys = {"split.no": Typed(U16, number - 1), "split.count": Typed(U16, 2)}
        tensors = {f"{number}": np.full(8, number, np.float32)}
        write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf", keys, tensors)
    with gguf.read(tmp_path / "m-00001-of-00002.gguf") as file:
        assert file.load("2").tolist() == [2.0] * 8
        os.truncate(tmp_path / "m-00002-of-00002.gguf", 40)
        assert file.load("1").tolist() == [1.0] * 8
        with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf: changed from \d+ to 40 bytes"):
            file.load("2")
        file.check_path()
        shutil.copy(MODEL, tmp_path / "other")
        os.replace(tmp_path / "other", tmp_path / "m-00002-of-00002.gguf")
        with pytest.raises(FormatError, match=r"m-00002-of-00002\.gguf: was replaced"):
            file.check_path()


def test_too_little_address_space_for_a_header_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(source.mmap, "mmap", none)
    with pytest.raises(forge.OutOfMemoryError, match=r"model\.gguf: no address space for \d+ MB of its header: Cannot"):
        gguf.read(MODEL)


def test_a_file_is_closed_with_its_source() -> None:
    before = len(os.listdir("/proc/self/fd"))
    opened = Source(MODEL)
    assert len(os.listdir("/proc/self/fd")) == before + 1
    del opened
    assert len(os.listdir("/proc/self/fd")) == before
    with gguf.read(MODEL):
        assert len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


WATCHED = """
import sys
import forge

def progress(stage, done, total):
    global share
    if stage == "loading weights" and done >= share * total:
        share = 2  # once
        print("now", flush=True)

share = float(sys.argv[2])
try:
    forge.load(sys.argv[1], device="cpu", progress=progress)
except forge.FormatError as error:
    print(error)
"""


@pytest.mark.slow
@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.6, 0.9])
def test_a_real_file_truncated_at_any_time_is_an_error(share: float, smollm2_path: Path, tmp_path: Path) -> None:
    """By another process, while threads read it. What was read before may be all that was wanted."""
    path = tmp_path / "model.gguf"
    shutil.copy(smollm2_path, path)
    command = [sys.executable, "-c", WATCHED, str(path), str(share)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout
        assert child.stdout.readline() == "now\n"
        os.truncate(path, 1 << 20)
        shown, _ = child.communicate(timeout=60)
    assert child.returncode == 0
    assert shown == "" or (shown.count("\n") == 1 and str(path) in shown)
