"""Several GPUs of one machine, and ROCm where pip puts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from virtual_rocm import tiny
from virtual_rocm.command import forge
from virtual_rocm.libraries import libraries

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

ON = ("gfx1100",)
MODEL = tiny.ARCH / "llama" / "model.gguf"
GENERATE = ("generate", "--model", str(MODEL), "--max-tokens", "6", "--ignore-eos", "--json", "abc")
BOTH = f"""
import forge
found = []
for device in ("hip:0", "hip:1", "hip:0"):
    with forge.load({str(MODEL)!r}, device=device, context=64, max_sequences=2) as llm:
        found.append((llm.device, llm.generate([[4, 5, 6], [7]], max_tokens=6, ignore_eos=True)))
print([device.partition(" ")[0] + device[-9:-1] for device, _ in found])
print(all([c.ids for c in completions] == [c.ids for c in found[0][1]] for _, completions in found))
"""


def test_two_gpus_of_one_compute_capability_in_one_process(tmp_path: Path) -> None:
    """HIP calls both 11.0, and CuPy keeps what it compiles by that (cupy#9830)."""
    done = subprocess.run(
        [sys.executable, "-c", BOTH],
        env={**os.environ, "VIRTUAL_ROCM_GFX": "gfx1100,gfx1101", "FORGE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["['hip:0 gfx1100', 'hip:1 gfx1101', 'hip:0 gfx1100']", "True"]
    counts = {arch: len(list((tmp_path / "kernels" / arch).glob("*.hsaco"))) for arch in ("gfx1100", "gfx1101")}
    assert counts["gfx1100"] == counts["gfx1101"] > 5


def test_auto_takes_the_discrete_gpu_with_the_most_compute_units() -> None:
    machine = {"VIRTUAL_ROCM_GFX": "gfx1036,gfx1102,gfx1100,gfx1100", "VIRTUAL_ROCM_UNITS": "200i,32,96,96"}
    done = forge(*GENERATE, **machine)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["device"] == "hip:2 (Virtual AMD GPU, gfx1100)"
    (line,) = [line for line in done.stderr.splitlines() if "auto: " in line]
    assert line == (
        "forge: device: hip:2 (Virtual AMD GPU, gfx1100); auto: hip:2 (Virtual AMD GPU, gfx1100) is the discrete GPU "
        "with the most compute units; also there: hip:0 (Virtual AMD GPU, gfx1036, integrated), "
        "hip:1 (Virtual AMD GPU, gfx1102), hip:3 (Virtual AMD GPU, gfx1100); the device hip:N is another"
    )
    asked = forge("doctor", "--device", "hip:1", "--json", **machine)
    assert json.loads(asked.stdout)["device"] == "hip:1 (Virtual AMD GPU, gfx1102)"


def test_an_integrated_gpu_serves_where_there_is_no_other() -> None:
    done = forge("doctor", "--json", VIRTUAL_ROCM_GFX="gfx1103", VIRTUAL_ROCM_UNITS="12i")
    assert json.loads(done.stdout)["device"] == "hip:0 (Virtual AMD GPU, gfx1103, integrated)"


def test_a_gpu_that_a_variable_may_hide() -> None:
    done = forge("verify", "--device", "hip:1", HIP_VISIBLE_DEVICES="0")
    assert done.stderr == (
        "forge: hip:1 does not exist: 1 GPU is there (HIP_VISIBLE_DEVICES=0 chooses which are seen)\n"
    )


def test_rocm_that_pip_has_installed(tmp_path: Path) -> None:
    """Libraries with the names that CuPy's own want, in the directories of rocm-sdk, and nowhere else."""
    whole = libraries()
    place = tmp_path / "whole"
    place.mkdir()
    for name in ("names", "libvirtual_rocm.so"):
        (place / name).symlink_to(whole / name)
    nodes = "".join(f"{line.split()[0]} {{ }};\n" for line in (whole / "versions").read_text().splitlines())
    (tmp_path / "versions").write_text(nodes)
    core, others = (tmp_path / f"_rocm_sdk_{part}" / "lib" for part in ("core", "libraries_gfx110X_all"))
    for name in sorted(path.name for path in whole.iterdir() if ".so." in path.name):
        folder = core if name.startswith(("libamdhip64", "libhiprtc", "libroctx", "libroctracer")) else others
        folder.mkdir(parents=True, exist_ok=True)
        command = ["clang++-19", "-shared", "-nostdlib", "-fuse-ld=lld", f"-Wl,-soname,{name}", "-x", "c", "/dev/null"]
        version = f"-Wl,--version-script={tmp_path}/versions"
        subprocess.run([*command, version, "-o", str(folder / name)], check=True)
    there = f"{os.environ['PYTHONPATH']}{os.pathsep}{tmp_path}"
    done = forge("doctor", "--device", "hip", LD_LIBRARY_PATH=str(place), PYTHONPATH=there)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "hip:0 (Virtual AMD GPU, gfx1100)" in done.stdout
    bare = forge("doctor", "--device", "hip", LD_LIBRARY_PATH=str(place))
    assert bare.returncode == 1
    assert "14.2.0, cannot be imported: libamdhip64.so.7: cannot open shared object file" in " ".join(
        bare.stdout.split()
    )
