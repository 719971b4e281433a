"""The table of launch choices: what it gives by default, and what of a stored file is believed."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.backend.gpu import GPU
from forge.devtools.variants import Recorder
from forge.errors import ForgeError
from forge.formats.ggml import BLOCK_FORMATS, GGMLType
from forge.ops.quant import FORMATS
from forge.tuning import Choices, store
from forge.tuning.lds import FEW_FORMATS, WITHOUT_LINES
from forge.tuning.spec import ANY, Kernel, Row
from forge.tuning.table import KERNELS

ARCH = "gfx1100"


@pytest.fixture(autouse=True)
def separate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))


def of_floats(inner: int) -> tuple[int, int, int]:
    """BLOCK, ROWS, MIN_BLOCKS as they were measured, before there was a table. So are the functions below."""
    plans = ((512, 64, 8, 10), (1024, 64, 4, 10), (2048, 256, 2, 4), (8192, 512, 2, 2), (16_384, 512, 2, 1))
    return next((block, rows, blocks) for most, block, rows, blocks in plans if inner <= most)


def of_blocks(name: str, inner: int, op: str) -> tuple[int, int, int, int]:
    unit = BLOCK_FORMATS[GGMLType[name]].weights_per_thread
    is_gated = op == "rms_gated"
    is_new = name in WITHOUT_LINES
    rows = 2 if is_gated or is_new or (unit == 32 and name != "Q8_0") else 1
    is_large = (
        is_gated or is_new or name in ("Q3_K", "Q5_K", "Q6_K") or (op == "rms_linear" and rows == 2 and inner > 4096)
    )
    return 512, 16 if name in ("Q2_K", "Q3_K", "IQ4_XS") else 32, rows, 1 if is_large else 2


@pytest.mark.parametrize(
    "arch", ["", "sm_90", "sm_120", "gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1151", "gfx1201"]
)
@pytest.mark.parametrize("draws", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_every_gpu_gets_what_was_chosen_before_there_was_a_table(arch: str, draws: int) -> None:
    device, rng = Recorder(), np.random.default_rng(draws)
    device.arch = arch
    for _ in range(draws):
        op = str(rng.choice(["linear", "rms_linear", "rms_gated"]))
        inner = int(rng.integers(1, 16_385)) if rng.integers(4) else 512 << int(rng.integers(6))
        outer = int(rng.choice([1, 2, 4096, 8191, 8192, 128_256]))
        floats = device.choice("matvec_f16", op=op, inner=inner, outer=outer)
        assert tuple(floats.values()) == of_floats(inner)
        name = str(rng.choice(FORMATS))
        blocks = device.choice("matvec_quant", op=op, format=name, inner=inner, outer=outer)
        wanted = of_blocks(name, inner, op)
        if arch == "sm_90" and name == "Q4_K":  # rows that came later
            if op == "rms_linear" and inner <= 2048 and outer <= 8191:
                wanted = (512, 32, 2, 1) if outer <= 4096 else (512, 16, 1, 1)
            elif op == "linear" and inner <= 4096 and outer <= 2048:
                wanted = (512, 64, 2, 1)
        assert tuple(blocks.values()) == wanted
        assert device.choice("norm", width=int(rng.integers(1, 1 << 17))) == {"MAX_THREADS": 1024}
        dim, rows = int(rng.integers(1, 257)), int(rng.integers(1, 65))
        attention = device.choice("attention_decode", dim=dim, packed=int(rng.integers(1, 5)), rows=rows)
        few = (256, 1, 2 if dim <= 64 else 1, 64)
        if arch.startswith("sm_"):  # chosen later, on an H200
            few = (256, 2, 1, 128) if dim <= 64 and rows > 1 else few
            many = (128, 1, 4 if dim <= 128 else 2, 64)
        else:
            many = (128, 1, 4, 64) if dim <= 128 else (256, 1, 1, 64)
        assert tuple(attention.values()) == (few if rows <= 16 else many)


def test_an_architecture_takes_its_own_rows_and_others_the_general_ones() -> None:
    rows = (Row({"width": 8}, (1,), "gfx11"), Row({"width": 8}, (2,)), Row({}, (3,), "sm_90"), Row({}, (4,)))
    kernel = Kernel({"width": (8, ANY)}, {"X": (1, 2, 3, 4)}, lambda shape, values: True, "by hand", rows)
    found = {arch: [kernel.row(arch, {"width": width})["X"] for width in (8, 9)] for arch in ("gfx1103", "gfx90a", "")}
    assert found == {"gfx1103": [1, 4], "gfx90a": [2, 4], "": [2, 4]}
    assert [kernel.row("sm_90", {"width": width})["X"] for width in (8, 9)] == [2, 3]


def classes(name: str) -> list[Any]:
    import itertools

    return list(itertools.product(*KERNELS[name].classes.values()))


def architectures(kernel: Kernel) -> set[str]:
    """One of each row's, and one that no row names."""
    return {"", *(row.arch if isinstance(row.arch, str) else row.arch[0] for row in kernel.rows)}


@pytest.mark.parametrize("name", KERNELS)
def test_rows_end_where_classes_do_and_hold_what_may_be_tried(name: str) -> None:
    kernel = KERNELS[name]
    assert set(kernel.classes.get("format", FORMATS)) - {"F16"} in (
        set(FORMATS),
        set(FEW_FORMATS),
        set(FORMATS) - set(WITHOUT_LINES),
    )
    assert kernel.measured
    for row in kernel.rows:
        for what, limit in row.when.items():
            assert ({limit} if isinstance(limit, int) else set(limit)) <= {*kernel.classes[what], ANY}
    assert kernel.rows[-1].when == {}
    for one in classes(name):
        shape = kernel.named(one)
        assert kernel.class_of(shape) == one
        permitted = kernel.permitted(shape)
        for arch in architectures(kernel):
            assert kernel.row(arch, shape) in permitted
        assert len(permitted) <= 42
        for values in permitted:  # on a multiprocessor, which registers are for
            threads = values.get("BLOCK", values.get("THREADS", 256)) * values.get("MIN_BLOCKS", 1)
            assert (256 if "MIN_BLOCKS" in values else 128) <= threads <= 1024


def measured(**changed: Any) -> store.Measured:
    row: dict[str, Any] = {
        "kernel": "matvec_f16",
        "shape": {"op": "linear", "inner": 2048, "outer": 8191},
        "values": {"BLOCK": 128, "ROWS": 4, "MIN_BLOCKS": 4},
        "default_us": 5.5,
        "us": 5,
    }
    return store.Measured(**(row | changed))


def test_what_is_saved_is_in_force_for_its_class_of_shapes_alone() -> None:
    save(measured())
    norm = measured(kernel="norm", shape={"width": 4096}, values={"MAX_THREADS": 256})
    path = save(norm)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        device = tuned_device()
    assert device.choice("matvec_f16", op="linear", inner=1025, outer=8191) == measured().values
    assert device.choice("norm", width=2049) == {"MAX_THREADS": 256}
    others = [("linear", 2049, 8191), ("linear", 1024, 8191), ("rms_linear", 2048, 8191), ("linear", 2048, 8192)]
    for op, inner, outer in others:
        assert tuple(device.choice("matvec_f16", op=op, inner=inner, outer=outer).values()) == of_floats(inner)
    found = store.read(ARCH)
    assert (found.path, found.fault) == (path, "")
    assert re.fullmatch(r"measured \d{4}-\d\d-\d\d on a GPU by forge 0.0", found.origin)
    assert found.choices == (measured(), norm)
    save(measured(us=4))
    assert store.read(ARCH).choices == (measured(us=4), norm)
    assert os.listdir(path.parent) == ["gfx1100.json"]
    assert not store.load("gfx1101", can_compile=True).tuned
    assert store.remove(ARCH) == path
    assert store.remove(ARCH) is None
    assert store.read(ARCH) == store.Stored(path)


def save(*rows: store.Measured) -> Path:
    return store.save(ARCH, "a GPU", "0.0", list(rows))


def tuned_device() -> GPU:
    device = Recorder()
    device.tuning = store.load(ARCH, can_compile=True)
    return device


def test_where_nothing_can_be_compiled_the_tables_variants_are_used() -> None:
    path = save(measured())
    with pytest.warns(UserWarning, match="there is no compiler here") as told:
        choices = store.load(ARCH, can_compile=False)
    assert str(told[0].message).startswith(f"{path} is not used")
    assert not choices.tuned
    store.remove(ARCH)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.load(ARCH, can_compile=False)


def test_a_disk_that_does_not_take_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tuning").write_text("a file")
    assert store.read(ARCH).fault == ""
    with pytest.raises(ForgeError, match=r"gfx1100.json: cannot be written: .*FORGE_CACHE"):
        save(measured())
    (tmp_path / "tuning").unlink()
    (tmp_path / "tuning" / "gfx1100.json").mkdir(parents=True)
    with pytest.raises(ForgeError, match=r"gfx1100.json: cannot be removed: "):
        store.remove(ARCH)
    monkeypatch.delenv("FORGE_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("forge._files.cache_dir", no_cache)
    assert store.read(ARCH) == store.Stored(None)
    with pytest.raises(ForgeError, match="no cache directory"):
        save(measured())


def no_cache() -> Path:
    from forge.errors import DownloadError

    raise DownloadError("no cache directory")


def choice(found: Any) -> Any:
    return found["choices"][0]


HOSTILE: dict[str, Callable[[Any], object]] = {
    "no device": lambda f: f.pop("device"),
    "one more": lambda f: f.update(more=1),
    "a long name": lambda f: f.update(device="x" * 201),
    "an escape": lambda f: f.update(device="\x1b[2J"),
    "a number for a date": lambda f: f.update(date=2026),
    "no list": lambda f: f.update(choices={}),
    "a list in it": lambda f: f["choices"].append([]),
    "twice": lambda f: f["choices"].append(choice(f)),
    "an unknown kernel": lambda f: choice(f).update(kernel="rope"),
    "a list for a kernel": lambda f: choice(f).update(kernel=["norm"]),
    "another kernel": lambda f: choice(f).update(kernel="norm"),
    "no shape": lambda f: choice(f).update(shape=None),
    "an unknown class": lambda f: choice(f)["shape"].update(inner=2047),
    "a number as text": lambda f: choice(f)["shape"].update(inner="2048"),
    "a float for a number": lambda f: choice(f)["shape"].update(inner=2048.0),
    "a list for a class": lambda f: choice(f)["shape"].update(op=[]),
    "an unknown define": lambda f: choice(f)["values"].update(X=1),
    "names of an older version": lambda f: choice(f).update(values={"BLOCK": 128, "ROWS": 4, "CORE_BLOCKS": 4}),
    "no candidate": lambda f: choice(f)["values"].update(BLOCK=96),
    "a text for a value": lambda f: choice(f)["values"].update(BLOCK="1 -DX"),
    "true": lambda f: choice(f)["values"].update(ROWS=True),
    "true for a time": lambda f: choice(f).update(us=True),
    "too many at once": lambda f: choice(f)["values"].update(ROWS=8),
    "no time": lambda f: choice(f).update(us=0),
    "no number": lambda f: choice(f).update(us=float("nan")),
    "endless": lambda f: choice(f).update(default_us=10**400),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_is_not_valid_is_ignored_with_a_warning(name: str) -> None:
    path = save(measured())
    found = json.loads(path.read_text())
    HOSTILE[name](found)
    path.write_text(json.dumps(found))
    assert_refused(path, "holds what this version's `forge tune` does not write")


def test_a_file_of_another_gpu_is_ignored_with_a_warning() -> None:
    path = save(measured())
    path.write_text(path.read_text().replace('"arch": "gfx1100"', '"arch": "sm_90"'))
    assert_refused(path, "is for sm_90, not for gfx1100")


def assert_refused(path: Path, fault: str) -> None:
    with pytest.warns(UserWarning, match="is not used") as told:
        choices = store.load(ARCH, can_compile=True)
    (line,) = [str(warning.message) for warning in told]
    assert line.startswith(f"{path} ")
    assert fault in line
    assert line.endswith(", and is not used: `forge tune` measures anew, `forge tune --reset` removes it")
    assert "\n" not in line
    assert not choices.tuned
    save(measured())  # whatever was there is replaced
    assert store.read(ARCH).choices == (measured(),)


@pytest.mark.parametrize(
    ("data", "fault"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b"\xff\xfe\x00", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"null", "holds what this version's `forge tune` does not write"),
        (b" " * (1 << 20) + b"{}", "cannot be read: it has more than 1048576 bytes"),
    ],
)
def test_a_file_that_is_no_table_is_ignored(data: bytes, fault: str) -> None:
    path = save(measured())
    path.write_bytes(data)
    assert_refused(path, fault)


def test_what_is_no_file_is_ignored() -> None:
    path = save(measured())
    path.unlink()
    os.mkfifo(path)
    assert_refused(path, "cannot be read: it is not a regular file")
    path.unlink()
    path.symlink_to(path.name)
    assert_refused(path, "cannot be read: Too many levels of symbolic links")


def test_choices_note_what_is_asked_for() -> None:
    device = Recorder()
    assert isinstance(device.tuning, Choices)
    for width in (8, 16, 8):
        device.choice("norm", width=width)
    assert device.tuning.asked == [("norm", {"width": 8}), ("norm", {"width": 16})]
