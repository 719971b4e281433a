"""Prebuilt code objects: what is built is used, and whatever else lies in its place is named and never used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from kernel_sources import replace_source

from forge.backend import compilers, kernel_cache, sources
from forge.backend.kernel_cache import check, obtain
from forge.cli import doctor, run
from forge.devtools.variants import case_variants, model_variants
from forge.errors import DeviceError

if not shutil.which("clang++-19") and os.environ.get("FORGE_REQUIRE_TOOLCHAIN"):
    raise RuntimeError("no clang++-19, and FORGE_REQUIRE_TOOLCHAIN is set: run scripts/install-toolchain")
needs_clang = pytest.mark.skipif(not shutil.which("clang++-19"), reason="no clang++-19: run scripts/install-toolchain")

STEP = sources.Variant("decode_state", ())
NORM = sources.Variant("norm", (("BLOCK", 64), ("PIECES", 1), ("OUT", "f16"), ("VECTOR", 4)))
ARCH = "gfx1100"
MODEL = str(Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def separate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test sees the user's cache, or what another was warned of."""
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("FORGE_KERNELS", raising=False)
    monkeypatch.setattr(kernel_cache, "_warned", set())


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    kernel_cache.build({ARCH: [STEP, NORM], "gfx942": [STEP, NORM]}, store)
    return store


@pytest.fixture
def store(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(built, tmp_path / "kernels"))


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir()}


def obtain_step() -> tuple[bytes | None, list[str]]:
    """What is loaded for STEP, and the warnings."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        code = obtain(STEP, ARCH)
    return code, [str(warning.message) for warning in told]


def fake_object(target: str, machine: int = 224) -> bytes:
    header = b"\x7fELF\x02\x01\x01".ljust(18, b"\0") + machine.to_bytes(2, "little") + bytes(44)
    length = bytes([0xA0 | len(target)] if len(target) < 32 else [0xD9, len(target)])  # MessagePack
    return header + b"\xadamdhsa.target" + length + target.encode()


def put(store: Path, code: bytes, /, **changed: Any) -> Path:
    """A file of STEP whose note is right but for what is changed."""
    path = store / ARCH / "decode_state.hsaco"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(code)
    about = {"arch": ARCH, "source": kernel_cache._source_hash(STEP), "code": hashlib.sha256(code).hexdigest()}
    path.with_suffix(".json").write_text(json.dumps(about | changed))
    return path


@needs_clang
def test_what_is_built_is_an_object_for_its_gpu_and_is_found(built: Path) -> None:
    names = {f"{arch}/{v.name}.{end}" for arch in (ARCH, "gfx942") for v in (STEP, NORM) for end in ("hsaco", "json")}
    assert files(built) == names
    for arch in (ARCH, "gfx942"):
        for variant in (STEP, NORM):
            checked = check(built, variant, arch)
            assert (checked.state, checked.fault) == ("valid", "")
            assert checked.code == (built / arch / f"{variant.name}.hsaco").read_bytes()
            shown = subprocess.run(
                ["llvm-readelf-19", "--notes", "-s", checked.path], capture_output=True, text=True, check=True
            ).stdout
            assert f"amdgcn-amd-amdhsa--{arch}\n" in shown
            for kernel in sources.signatures(variant.file):
                assert f" {kernel}.kd\n" in shown
    assert "19." in json.loads((built / ARCH / "decode_state.json").read_text())["compiler"]


@needs_clang
def test_a_second_build_compiles_only_what_is_not_valid(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (store / ARCH / "decode_state.hsaco").read_bytes()
    (store / ARCH / "decode_state.hsaco").write_bytes(before[:-1])
    results = kernel_cache.build({ARCH: [STEP, NORM], "gfx942": [STEP, NORM]}, store)
    assert [(r.arch, r.built, r.present) for r in results] == [(ARCH, 1, 1), ("gfx942", 0, 2)]
    assert results[0].num_bytes == sum(path.stat().st_size for path in (store / ARCH).glob("*.hsaco"))
    assert (store / ARCH / "decode_state.hsaco").read_bytes() == before  # the same compiler writes the same bytes
    monkeypatch.setenv("PATH", "")
    assert kernel_cache.build({ARCH: [STEP, NORM]}, store)[0].built == 0  # needs no compiler


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def grow(path: Path) -> None:
    os.truncate(path, 1 << 40)  # takes no disk


def loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content)

    write.__name__ = content[:12]
    return write


def edited(**changed: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    write.__name__ = f"edited {changed}"
    return write


SPOILT: list[tuple[str, Callable[[Path], Any], str, str]] = [
    *(("hsaco", spoil, "corrupt", "SHA-256") for spoil in (flip, cut, empty)),
    ("hsaco", grow, "corrupt", "more than"),
    ("hsaco", loop, "corrupt", "symbolic links"),
    ("hsaco", directory, "corrupt", "directory"),
    ("hsaco", pipe, "corrupt", "not a regular file"),
    ("json", Path.unlink, "corrupt", "no decode_state.json beside it (No such file"),
    *(("json", spoil, "corrupt", "no decode_state.json beside it") for spoil in (loop, directory)),
    *(("json", spoil, "corrupt", "none of forge's") for spoil in (cut, empty, grow, pipe)),
    *(
        ("json", text(content), "corrupt", "none of forge's")
        for content in ("[]", "7", '"x"', "null", "[" * 50_000, "1" * 5000, '{"arch"', "\0", "{}x")
    ),
    *(("json", text(content), "corrupt", "SHA-256") for content in ("{}", '{"code": [1]}', '{"code": null}')),
    ("json", edited(code="0" * 64), "corrupt", "SHA-256"),
    ("json", edited(arch="gfx942"), "foreign", "for another GPU"),
    ("json", edited(arch={}), "foreign", "for another GPU"),
    ("json", edited(source="0" * 64), "stale", "another version"),
    ("json", edited(source=None), "stale", "another version"),
]


@needs_clang
@pytest.mark.parametrize(("end", "spoil", "state", "fault"), SPOILT)
def test_a_spoilt_file_is_refused_named_and_replaced(
    end: str, spoil: Callable[[Path], Any], state: str, fault: str, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = store / ARCH / "decode_state.hsaco"
    good = path.read_bytes()
    spoil(path.with_suffix(f".{end}"))
    checked = check(store, STEP, ARCH)
    assert (checked.state, checked.code) == (state, b"")
    assert fault in checked.fault
    assert check(store, NORM, ARCH).state == "valid"
    monkeypatch.setenv("FORGE_KERNELS", str(store))
    # What the compiler makes of the kernel is these bytes again: test_a_second_build_compiles_only_what_is_not_valid.
    monkeypatch.setattr(kernel_cache, "compile_variant", lambda variant, arch, compiler: good)
    code, lines = obtain_step()
    assert code == good
    assert lines[0] == f"{path} {checked.fault}; compiled anew"
    # A directory is left to its owner: it is the one thing that cannot be replaced, and the next store is used.
    assert check(store, STEP, ARCH).state == (state if spoil is directory else "valid")
    assert obtain_step() == (good, [])


@needs_clang
def test_a_file_of_another_gpu_is_foreign_whatever_its_note_says(store: Path) -> None:
    for end in ("hsaco", "json"):
        shutil.copy(store / "gfx942" / f"decode_state.{end}", store / ARCH / f"decode_state.{end}")
    assert check(store, STEP, ARCH)[::2] == ("foreign", "is a code object for gfx942")
    edited(arch=ARCH)(store / ARCH / "decode_state.json")
    assert check(store, STEP, ARCH)[::2] == ("foreign", "is a code object for gfx942")


@pytest.mark.parametrize(
    ("code", "state", "fault"),
    [
        (fake_object("amdgcn-amd-amdhsa--gfx1100"), "valid", ""),
        (fake_object("amdgcn-amd-amdhsa--gfx1100:xnack-"), "valid", ""),
        (fake_object("amdgcn-amd-amdhsa-unknown-gfx1100"), "valid", ""),
        (fake_object("amdgcn-amd-amdhsa--gfx1101"), "foreign", "is a code object for gfx1101"),
        (fake_object("amdgcn-amd-amdhsa--gfx11000"), "foreign", "is a code object for gfx11000"),
        (fake_object("amdgcn-amd-amdhsa--gfx1100", machine=62), "foreign", "is no AMD code object"),  # x86
        (fake_object("amdgcn-amd-amdhsa--gfx1100")[1:], "foreign", "is no AMD code object"),
        (fake_object("nvptx64-nvidia-cuda--sm_90"), "foreign", "is no AMD code object"),
        (b"\x7fELF\x02\x01", "foreign", "is no AMD code object"),
        (b"", "foreign", "is no AMD code object"),
        (b"__CLANG_OFFLOAD_BUNDLE__" + bytes(100), "foreign", "is no AMD code object"),
    ],
)
def test_bytes_that_match_their_note_are_still_looked_into(code: bytes, state: str, fault: str, tmp_path: Path) -> None:
    put(tmp_path, code)
    checked = check(tmp_path, STEP, ARCH)
    assert checked.state == state
    assert fault in checked.fault


@pytest.mark.parametrize("changed", ["kernel", "prelude"])
def test_a_changed_source_makes_files_stale(changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, fake_object(f"amdgcn-amd-amdhsa--{ARCH}"))
    assert check(tmp_path, STEP, ARCH).state == "valid"
    source = sources.source("decode_state")
    edited = source + "\n" if changed == "kernel" else source.replace("#define DEVICE", "#define  DEVICE", 1)
    assert edited != source
    replace_source(monkeypatch, "decode_state", edited)
    assert check(tmp_path, STEP, ARCH).state == "stale"


def test_changed_options_make_files_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, fake_object(f"amdgcn-amd-amdhsa--{ARCH}"))
    monkeypatch.setattr(kernel_cache, "FLAGS", (*kernel_cache.FLAGS, "-O2"))
    assert check(tmp_path, STEP, ARCH).state == "stale"
    wide, narrow = (
        sources.Variant("norm", (("BLOCK", n), ("PIECES", 1), ("OUT", "f16"), ("VECTOR", 4))) for n in (64, 128)
    )
    assert kernel_cache._source_hash(wide) != kernel_cache._source_hash(narrow)


def test_stores_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "cache" / "kernels"
    assert kernel_cache.stores() == [second]
    monkeypatch.setenv("FORGE_KERNELS", str(first))
    assert kernel_cache.stores() == [first, second]
    put(second, code := fake_object(f"amdgcn-amd-amdhsa--{ARCH}"))
    assert obtain(STEP, ARCH) == code
    put(first, other := code + b"\0")
    assert obtain(STEP, ARCH) == other
    put(first, other, source="")
    assert obtain(STEP, ARCH) == code  # the next one serves, and nothing is wrong


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_only_valid_files_are_used(tmp_path: Path) -> None:
    store = tmp_path / "cache" / "kernels"
    with pytest.raises(DeviceError) as none:
        obtain(STEP, ARCH)
    line = str(none.value)
    assert "\n" not in line
    for part in (f"kernel decode_state on {ARCH}", str(store), "hipcc", "clang >= 19", "kernels build --arch gfx1100"):
        assert part in line
    put(store, code := fake_object(f"amdgcn-amd-amdhsa--{ARCH}"))
    assert obtain(STEP, ARCH) == code
    faults: tuple[tuple[str, bytes, dict[str, str]], ...] = (
        ("is stale", code, {"source": "0"}),
        ("is damaged", code, {"code": "0"}),
        ("is a code object for gfx942", fake_object("amdgcn-amd-amdhsa--gfx942"), {}),
    )
    for fault, held, changed in faults:
        path = put(store, held, **changed)
        with pytest.raises(DeviceError, match=re.escape(f"{path} {fault}")):
            obtain(STEP, ARCH)
    with pytest.raises(DeviceError, match="there is no compiler for AMD GPUs: install ROCm's hipcc, or clang >= 19"):
        kernel_cache.build({ARCH: [STEP]}, store)


@pytest.mark.usefixtures("no_compiler")
def test_hipcc_compiles_what_no_valid_file_holds_for_each_gpu(tmp_path: Path) -> None:
    """GPUs of one compute capability have code of their own, in one process and one cache (cupy#9830)."""
    log, code = tmp_path / "log", {arch: fake_object(f"amdgcn-amd-amdhsa--{arch}") for arch in (ARCH, "gfx1101")}
    for arch, held in code.items():
        (tmp_path / f"--offload-arch={arch}").write_bytes(held)
    script(
        tmp_path / "bin" / "hipcc",
        f'if [ "$1" = --version ]; then exit; fi\necho x >> {log}\n'
        'for a; do case "$a" in --offload-arch=*) arch=$a;; esac; done\n'
        f'while [ "$1" != -o ]; do shift; done; /bin/cat "{tmp_path}/$arch" > "$2"',
    )
    for _ in range(2):
        assert {arch: obtain(STEP, arch) for arch in code} == code
    assert log.read_text() == "x\nx\n"
    path = put(tmp_path / "cache" / "kernels", code[ARCH], code="0")
    damaged = f"{path} is damaged: its SHA-256 is not the one noted beside it; compiled anew"
    assert obtain_step() == (code[ARCH], [damaged])
    assert obtain_step() == (code[ARCH], [])


@pytest.mark.usefixtures("no_compiler")
def test_hipcc_is_asked_for_a_code_object(tmp_path: Path) -> None:
    log, code = tmp_path / "log", tmp_path / "code"
    code.write_bytes(fake_object(f"amdgcn-amd-amdhsa--{ARCH}"))
    hipcc = script(
        tmp_path / "bin" / "hipcc",
        f'echo "$@" >> {log}\nif [ "$1" = --version ]; then echo "AMD clang version 20.0.0git (x)"; exit; fi\n'
        f'while [ "$1" != -o ]; do shift; done; /bin/cat {code} > "$2"',
    )
    kernel_cache.build({ARCH: [NORM]}, tmp_path / "out")
    assert check(tmp_path / "out", NORM, ARCH).code == code.read_bytes()
    about = json.loads((tmp_path / "out" / ARCH / f"{NORM.name}.json").read_text())
    assert about["compiler"] == "AMD clang version 20.0.0git (x)"
    arguments = log.read_text().splitlines()[-1].split()
    wanted = {"--genco", "--no-gpu-bundle-output", "-nogpuinc", "-O3", "--offload-arch=gfx1100", "-DBLOCK=64"}
    assert wanted <= set(arguments)
    assert compilers.find_compiler() == compilers.Compiler(str(hipcc), True, "AMD clang version 20.0.0git (x)")


@pytest.mark.usefixtures("no_compiler")
def test_the_newest_clang_from_19_on_is_taken(tmp_path: Path) -> None:
    def clang(name: str, version: str) -> None:
        script(tmp_path / "bin" / name, f"echo '{version}'")
        compilers._newest_clang.cache_clear()
        compilers._version.cache_clear()

    def found() -> str | None:
        compiler = compilers.find_compiler()
        return os.path.basename(compiler.path) if compiler else None

    for name, version, wanted in (
        ("clang++-18", "clang version 18.1.8", None),
        ("clang++", "gibberish", None),
        ("clang++", "clang version 19.0.0", "clang++"),
        ("clang++-21", "Ubuntu clang version 21.1.0-++", "clang++-21"),
        ("clang++-20", "clang version 20.1.0", "clang++-21"),
        ("clang++-99x", "clang version 99.0.0", "clang++-21"),
        ("clang++-22", "clang version 17.0.6", "clang++-21"),
    ):
        clang(name, version)
        assert found() == wanted
    compilers._newest_clang.cache_clear()


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "echo 'kernel.hip:3: error: too hard' >&2; exit 1",
            "decode_state.hip: exit code 1: kernel.hip:3: error: too hard",
        ),
        ("kill -9 $$", "decode_state.hip: Killed"),
        ("kill -11 $$", "decode_state.hip: Segmentation fault"),
        ("echo 'PLEASE submit'; echo 'clang: error: frontend failed'; exit 139", "exit code 139: clang: error: front"),
        ("/bin/sleep 100", "decode_state.hip: no end in 0.3 seconds"),
        ("trap '' TERM; /bin/sleep 100 & wait", "decode_state.hip: no end in 0.3 seconds"),
        ("while :; do echo 0123456789abcdef; done", "decode_state.hip: it wrote more than 1 MiB"),
        ('"$0" --fork & exit 1', "decode_state.hip: exit code 1"),
        ("exit 0", "No such file"),
        ('while [ "$1" != -o ]; do shift; done; echo ELF > "$2"', "wrote no code object for gfx1100"),
        ('while [ "$1" != -o ]; do shift; done; echo half > "$2"; exit 1', "exit code 1"),
    ],
)
def test_a_compiler_that_fails_leaves_nothing(
    body: str, message: str, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "_COMPILE_SECONDS", 0.3 if "no end" in message else 60)
    monkeypatch.setattr("forge.devtools.variants.model_variants", lambda *_, **__: [STEP])
    forked = 'if [ "$1" = --fork ]; then exec /bin/sleep 5; fi\n'
    script(tmp_path / "bin" / "hipcc", f'{forked}if [ "$1" = --version ]; then exit; fi\n{body}')
    out = tmp_path / "out"
    with pytest.raises(DeviceError, match=re.escape(message)):
        kernel_cache.build({ARCH: [STEP]}, out)
    assert not out.exists()
    assert run(["kernels", "build", "-m", MODEL, "--arch", ARCH, "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err.splitlines()[-1]


@needs_clang
def test_a_write_that_fails_leaves_what_was_there(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flip(store / ARCH / "decode_state.hsaco")
    before = {name: (store / name).read_bytes() for name in files(store)}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(DeviceError, match=f"{store}: cannot be written: No space left on device: choose another"):
            kernel_cache.build({ARCH: [STEP]}, store)
        assert {name: (store / name).read_bytes() for name in files(store)} == before
        patched.setenv("FORGE_KERNELS", str(store))
        code, lines = obtain_step()  # it runs all the same
        assert compilers.target(code or b"") == ARCH
        full = "{} (No space left on device)".format
        assert lines[-1] == f"compiled kernels cannot be kept in {full(store)} or {full(kernel_cache.stores()[1])}"
    assert {name: (store / name).read_bytes() for name in files(store)} == before


@needs_clang
@pytest.mark.parametrize(
    ("count", "variants"), [(2, [STEP]), pytest.param(4, [STEP, NORM], marks=pytest.mark.slow)], ids=["2", "4"]
)
def test_builds_at_the_same_time_leave_valid_files_and_nothing_else(
    count: int, variants: list[sources.Variant], tmp_path: Path
) -> None:
    with ThreadPoolExecutor(count) as pool:
        tasks = [pool.submit(kernel_cache.build, {ARCH: variants}, tmp_path / "out") for _ in range(count)]
        assert all(task.result()[0].num_bytes for task in tasks)
    assert files(tmp_path / "out") == {f"{ARCH}/{v.name}.{end}" for v in variants for end in ("hsaco", "json")}
    assert {check(tmp_path / "out", variant, ARCH).state for variant in variants} == {"valid"}


@needs_clang
def test_a_clang_builds_into_the_first_store_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = obtain(STEP, ARCH)
    assert code is not None
    assert files(tmp_path / "cache" / "kernels") == {f"{ARCH}/decode_state.hsaco", f"{ARCH}/decode_state.json"}
    monkeypatch.setenv("PATH", "")
    assert obtain(STEP, ARCH) == code


def test_a_store_that_cannot_be_one_is_named(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.devtools.variants.model_variants", lambda *_, **__: [STEP])
    (tmp_path / "file").write_text("")
    assert check(tmp_path / "file", STEP, ARCH).state == "missing"
    assert kernel_cache.survey(tmp_path / "file") == {}
    if compilers.find_compiler():
        assert run(["kernels", "build", "-m", MODEL, "--arch", ARCH, "--out", str(tmp_path / "file")]) == 1
        assert f"{tmp_path}/file: cannot be written: Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize("arch", ["", "gfx", "gfx11000", "GFX1100", "sm_90", "gfx1100:xnack+", "../gfx942", "gfx110g"])
def test_a_name_of_no_gpu_is_wrong_usage(arch: str, capsys: Captured) -> None:
    assert run(["kernels", "build", "--arch", arch]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("forge: --arch must be an AMD GPU's, such as gfx1100")
    assert captured.err.count("\n") == 1


@needs_clang
def test_a_gpu_that_the_compiler_does_not_know_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    assert run(["kernels", "build", "-m", MODEL, "--arch", "gfx9999", "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "does not know gfx9999: check the name, or use a newer compiler" in line
    assert not (tmp_path / "out").exists()


def test_build_needs_an_arch_where_there_is_no_amd_gpu(capsys: Captured) -> None:
    assert run(["kernels", "build"]) == 2
    assert "name one, such as --arch gfx1100" in capsys.readouterr().err


@pytest.mark.slow
@needs_clang
def test_build_and_list_on_the_command_line(tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forge.devtools.variants.model_variants", lambda *_, **__: [STEP, NORM])
    out = tmp_path / "out"
    args = ("-m", MODEL, "--arch", ARCH, "--arch", "gfx942", "--out", str(out))
    assert run(["kernels", "build", *args]) == 0
    captured = capsys.readouterr()
    size = {arch: sum(path.stat().st_size for path in (out / arch).glob("*.hsaco")) for arch in (ARCH, "gfx942")}
    assert f"{ARCH}: 2 built, none were there; {size[ARCH] / 1000:.4g} kB in {out}/{ARCH}\n" in captured.out
    assert captured.err == "forge: compiling kernels (4)\n"
    assert run(["kernels", "build", *args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["directory"] == str(out)
    assert found["archs"][1] == {
        "arch": "gfx942", "directory": str(out / "gfx942"), "built": 0, "present": 2, "num_bytes": size["gfx942"],
    }  # fmt: skip
    shutil.copy(out / "gfx942" / "decode_state.hsaco", out / ARCH / "decode_state.hsaco")
    (out / "gfx942" / "norm-GONE=1.hsaco").write_bytes(b"12")
    (out / "gfx942" / "gone.hsaco").write_bytes(b"345")
    (out / "gfx942" / "decode_state.json").write_text("no")
    (out / "other").mkdir()
    assert run(["kernels", "list", "-m", MODEL, "--out", str(out), "--json"]) == 0
    rows = {row.pop("arch"): row for row in json.loads(capsys.readouterr().out)["archs"]}
    counts = {
        arch: tuple(row[s] for s in ("valid", "stale", "corrupt", "foreign", "missing")) for arch, row in rows.items()
    }
    assert counts == {ARCH: (1, 0, 1, 0, 1), "gfx942": (1, 1, 2, 0, 1)}
    assert rows["gfx942"]["num_bytes"] == size["gfx942"] + 5
    assert run(["kernels", "list", "--out", str(out)]) == 0
    captured = capsys.readouterr()
    assert re.search(rf"gfx942 +1 +1 +2 +0 .* {out}/gfx942", captured.out)
    assert "missing" not in captured.out
    assert "`forge kernels build --arch GFX` replaces them" in captured.err
    assert run(["kernels", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["archs"] == []


@pytest.mark.usefixtures("no_compiler")
def test_doctor_asks_for_a_compiler_only_where_files_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forge.devtools.variants.model_variants", lambda *_, **__: [STEP])
    finding = doctor._kernels(ARCH, MODEL)
    assert f"0 of 1 that {MODEL} launches are prebuilt for gfx1100; compiler: none" in finding.found
    assert "forge kernels build -m MODEL --arch gfx1100" in finding.fix
    assert "clang >= 19" in finding.fix
    assert doctor._kernels(ARCH, "smollm2").found == "0 prebuilt for gfx1100; compiler: none"  # it is not here
    path = put(tmp_path / "cache" / "kernels", fake_object(f"amdgcn-amd-amdhsa--{ARCH}"))
    assert doctor._kernels(ARCH, MODEL)[1:] == (
        f"1 of 1 that {MODEL} launches are prebuilt for gfx1100; compiler: none",
        "",
    )
    other = doctor._kernels(ARCH, "smollm2")
    assert other.found == "1 prebuilt for gfx1100; compiler: none"
    assert other.fix
    path.write_bytes(b"")
    assert doctor._kernels(ARCH, MODEL).fix
    hipcc = script(tmp_path / "bin" / "hipcc", "exit 1")
    assert doctor._kernels(ARCH, "smollm2")[1:] == (f"0 prebuilt for gfx1100; compiler: {hipcc}", "")


@pytest.mark.slow
def test_names_of_variants_are_safe_and_tell_the_variant() -> None:
    for variant in {*case_variants(), *model_variants(Path(MODEL), ARCH)}:
        assert re.fullmatch(r"[a-z]\w*(-[A-Z_]+=\w+)*", variant.name)
        assert len(variant.name) < 200  # of the 255 that a file has
        assert sources.Variant.parse(variant.name) == variant
    for name in ("", "include/prelude", "gone", "norm-", "norm-BLOCK=064", "norm-BLOCK=٣", "../norm", "norm/x", ".x"):
        assert sources.Variant.parse(name) is None


def test_checks_do_not_need_cupy() -> None:
    code = "import sys, forge.backend.kernel_cache; print('cupy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_code_for_nvidia_is_compiled_once_and_never_used_where_it_is_spoilt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []

    def make() -> bytes:
        made.append(f"code {len(made)}".encode())
        return made[-1]

    group = sources.Variant("matmul_wgmma", (("BLOCK", 128),))
    assert [kernel_cache.kept(group, "sm_90a", make) for _ in range(2)] == [b"code 0"] * 2
    path = tmp_path / "cache" / "kernels" / "sm_90a" / "matmul_wgmma-BLOCK=128.cubin"
    assert path.read_bytes() == b"code 0"
    path.write_bytes(b"code X")
    assert kernel_cache.kept(group, "sm_90a", make) == b"code 1"
    about = path.with_suffix(".json")
    about.write_text(about.read_text().replace('"source": "', '"source": "0'))  # of another version of the kernel
    assert kernel_cache.kept(group, "sm_90a", make) == b"code 2"
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("no directory")  # then it is compiled by each process
    assert [kernel_cache.kept(group, "sm_90a", make) for _ in range(2)] == [b"code 3", b"code 4"]


def test_the_target_of_a_kernel_file() -> None:
    assert sources.target("matmul_wgmma") == "sm_90a"
    assert sources.target("matmul") is None
