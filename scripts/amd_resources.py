"""What the kernels take of each AMD target: compiled by clang for every variant, without a GPU.

    python scripts/amd_resources.py [--check]     # writes benchmarks/results/amd_resources.md

Fails where a kernel spills registers, uses scratch memory or more LDS than a workgroup has, or switches the denormal
mode, as a plain division of floats does; with --check also where the committed table is not what came out.

The table is clang 19's, and says of each file of kernels what its rows were made from: texts, variants and flags. Where
these are the same, the rows are kept, and nothing is compiled.
Targets that are newer than clang 19 are compiled where the newest compiler on PATH knows them.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from forge.backend import compilers, sources
from forge.devtools.variants import case_variants, model_variants
from forge.errors import DeviceError

TARGETS = compilers.TESTED
NEWER_TARGETS = ("gfx950",)
MAX_LDS_BYTES = 64 << 10
ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "amd_resources.md"
CACHE = ROOT / ".harness" / "amd"
_REMARK = re.compile(r"remark: [^\n]*?(?P<key>Function Name|[\w ]+?)(?: \[[^\]]*\])?: (?P<value>\S+) \[-Rpass")
_INSTRUCTIONS = {
    "dot4": r"v_dot4",
    "matrix": r"v_mfma|v_wmma|v_smfmac",
    "16 bytes": r"(global|flat|buffer)_load_(dwordx4|b128)",
}
_SWITCH = r"s_setreg|s_denorm_mode"
_SHOWN = "|".join([*_INSTRUCTIONS.values(), _SWITCH])


class Usage(NamedTuple):
    """One kernel of one variant on one target."""

    kernel: str
    variant: str
    target: str
    vgprs: int
    sgprs: int
    spills: int
    scratch_bytes: int
    lds_bytes: int
    occupancy: int
    """Waves per SIMD."""
    instructions: str
    """Which of the telling ones are there."""
    switches: int
    """Instructions that change the mode of floating point."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    jobs = [(variant, target) for target in TARGETS for variant in variants(target)]
    old, made_from = rows_of(TABLE.read_text() if TABLE.exists() else ""), inputs(jobs)
    stale = {file for file, made in made_from.items() if f"| {file} | {seal(made, old.get(file, []))} |" not in old[""]}
    usages = measure([job for job in jobs if job[0].file in stale], clang_19())
    faults = list(wrong(usages))
    newest = compilers.find_compiler()
    for target in NEWER_TARGETS:
        if newest and knows(newest, target):
            newer = measure([(variant, target) for variant in variants(target)], newest)
            faults += wrong(newer)
            print(f"{target}: {len({u.variant for u in newer})} variants, by {newest.version}; not in the table")
        else:
            print(f"{target}: not compiled: {newest.version if newest else 'no compiler'} does not know it")
    new = {file: old[file] for file in made_from.keys() - stale} | rows(usages)
    if not arguments.check:
        TABLE.parent.mkdir(exist_ok=True)
        faulty = {usage.variant.partition("-")[0] for usage in usages if any(wrong([usage]))}
        sound = {file: made for file, made in made_from.items() if file not in faulty}
        TABLE.write_text(table(new, sound, len({variant for variant, _ in jobs})))
    elif new != {file: lines for file, lines in old.items() if file}:
        faults.append(f"{TABLE.relative_to(ROOT)} is not up to date: run scripts/amd_resources.py")
    elif stale:
        print(f"run scripts/amd_resources.py, and CI need not compile these again: {', '.join(sorted(stale))}")
    print(f"{len(usages)} kernels compiled, of {len(stale)} of {len(made_from)} files, for {len(TARGETS)} targets")
    if faults:
        sys.exit("\n".join(faults))


def inputs(jobs: Iterable[tuple[sources.Variant, str]]) -> dict[str, str]:
    """For each file of kernels a hash of all that its rows are made from."""
    hashes = {file: hashlib.sha256(sources.source(file).encode()) for file in {variant.file for variant, _ in jobs}}
    for variant, target in sorted(jobs, key=lambda job: (job[0].name, job[1])):
        hashes[variant.file].update("\0".join(["", target, *compilers.FLAGS, *variant.options, _SHOWN]).encode())
    return {file: found.hexdigest() for file, found in hashes.items()}


def seal(made_from: str, lines: list[str]) -> str:
    """What the table says of a file of kernels: whoever edits a row or a kernel alone breaks it."""
    return hashlib.sha256("\n".join([made_from, *lines]).encode()).hexdigest()[:16]


def rows_of(text: str) -> dict[str, list[str]]:
    """A table's rows by file of kernels; the others by ""."""
    found: dict[str, list[str]] = {"": []}
    for line in text.splitlines():
        match = re.match(r"\| (\w+): ", line)
        found.setdefault(match[1] if match else "", []).append(line)
    return found


def variants(target: str) -> list[sources.Variant]:
    """Variants of all ops' cases and of usual models, with the choices of an architecture."""
    found = {*case_variants(target), *model_variants(None, target)}
    return sorted(found, key=lambda variant: variant.name)


def clang_19() -> compilers.Compiler:
    path = shutil.which("clang++-19")
    if not path or not shutil.which("llvm-objdump-19"):
        sys.exit("no clang++-19 or llvm-objdump-19: run scripts/install-toolchain")
    return compilers.Compiler(path, False, "clang version 19")


def knows(compiler: compilers.Compiler, target: str) -> bool:
    try:
        compilers.compile_variant(sources.Variant("decode_state", ()), target, compiler)
    except DeviceError:
        return False
    return True


def measure(jobs: list[tuple[sources.Variant, str]], compiler: compilers.Compiler) -> list[Usage]:
    """Compile variants for targets, in parallel; what was compiled before is read from the cache."""
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda job: compile_for(job[0], job[1], compiler), jobs)
        return [usage for usages in found for usage in usages]


def compile_for(variant: sources.Variant, target: str, compiler: compilers.Compiler) -> list[Usage]:
    """What each kernel of a variant takes on a target. Raises SystemExit with the compiler's message."""
    text = sources.source(variant.file)
    mode = "--genco" if compiler.is_hipcc else "--cuda-device-only"
    command = [compiler.path, mode, *compilers.FLAGS, f"--offload-arch={target}", *variant.options]
    key = "\0".join([text, *command, compiler.version, _SHOWN])
    report = CACHE / hashlib.sha256(key.encode()).hexdigest()[:32]
    if not report.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source, code = Path(scratch, "kernel.hip"), Path(scratch, "kernel.hsaco")
            source.write_text(text)
            remarks = ["-Rpass-analysis=kernel-resource-usage"]
            done = subprocess.run([*command, *remarks, str(source), "-o", str(code)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{variant.name} does not compile for {target}:\n{done.stderr}")
            listing = subprocess.run([_objdump(compiler), "-d", str(code)], capture_output=True, text=True, check=True)
            shown = [line for line in listing.stdout.splitlines() if line.endswith(">:") or re.search(_SHOWN, line)]
            scratch_report = Path(scratch, "report")
            scratch_report.write_text(done.stderr + "\f" + "\n".join(shown))
            shutil.move(scratch_report, report)
    remarks_text, _, shown_text = report.read_text().partition("\f")
    return [
        Usage(
            values["Function Name"],
            variant.name,
            target,
            int(values["VGPRs"]),
            int(values.get("TotalSGPRs", values.get("SGPRs", 0))),
            int(values["VGPRs Spill"]) + int(values["SGPRs Spill"]),
            int(values["ScratchSize"]),
            int(values["LDS Size"]),
            int(values["Occupancy"]),
            ", ".join(_telling(_body(shown_text, values["Function Name"]))),
            len(re.findall(_SWITCH, _body(shown_text, values["Function Name"]))),
        )
        for values in _remarks(remarks_text)
    ]


def _remarks(text: str) -> Iterator[dict[str, str]]:
    """The compiler's remarks, one dictionary per kernel."""
    values: dict[str, str] = {}
    for match in _REMARK.finditer(text):
        if match["key"].strip() == "Function Name":
            if values:
                yield values
            values = {}
        values[match["key"].strip()] = match["value"]
    if values:
        yield values


def _objdump(compiler: compilers.Compiler) -> str:
    """The disassembler of a compiler: an older one does not know its targets."""
    version = re.search(r"clang version (\d+)", compiler.version)
    names = (
        f"llvm-objdump-{version[1]}" if version else "",
        str(Path(compiler.path).resolve().with_name("llvm-objdump")),
    )
    return next((path for name in names if (path := shutil.which(name))), "llvm-objdump")


def _body(listing: str, kernel: str) -> str:
    """What is shown of a kernel."""
    body = re.search(rf"<{kernel}>:\n(.*?)(?=^\S+ <|\Z)", listing, re.MULTILINE | re.DOTALL)
    return body[1] if body else ""


def _telling(body: str) -> Iterator[str]:
    for name, pattern in _INSTRUCTIONS.items():
        if re.search(pattern, body):
            yield name


def wrong(usages: list[Usage]) -> Iterator[str]:
    """What no kernel may do, one line each."""
    for u in usages:
        for what, bad in (
            (f"{u.spills} spills", u.spills),
            (f"{u.scratch_bytes} bytes of scratch", u.scratch_bytes),
            (f"{u.lds_bytes} bytes of LDS", u.lds_bytes > MAX_LDS_BYTES),
            (f"{u.switches} switches of the mode of floating point", u.switches),
        ):
            if bad:
                yield f"{u.variant}: {u.kernel} on {u.target}: {what}"


def rows(usages: list[Usage]) -> dict[str, list[str]]:
    """By file of kernels: the most demanding variant of each kernel on each target."""
    worst: dict[tuple[str, str, str], Usage] = {}
    for u in usages:
        key = (u.variant.partition("-")[0], u.kernel, u.target)
        if key not in worst or (-u.occupancy, u.vgprs) > (-worst[key].occupancy, worst[key].vgprs):
            worst[key] = u
    found: dict[str, list[str]] = {}
    for (file, kernel, target), u in sorted(worst.items()):
        name = u.variant.partition("-")[2].replace("-", " ")
        found.setdefault(file, []).append(
            f"| {file}: {kernel} | {target} | {name} | {u.vgprs} | {u.sgprs} | {u.spills} | {u.scratch_bytes} "
            f"| {u.lds_bytes} | {u.occupancy} | {u.instructions} |"
        )
    return found


def table(rows: dict[str, list[str]], made_from: dict[str, str], num_variants: int) -> str:
    """Markdown."""
    lines = [
        "# What the kernels take of AMD GPUs",
        "",
        f"Written by `scripts/amd_resources.py` from {num_variants} variants, compiled by clang 19",
        "without a GPU; per kernel and target the variant with the fewest waves per SIMD. CI fails where any of them",
        "spills or uses scratch. It compiles those of files that were changed since.",
        "",
        "| kernel | target | variant | VGPRs | SGPRs | spills | scratch B | LDS B | waves/SIMD | has |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        *(line for file in sorted(rows) for line in rows[file]),
        "",
        "What these rows were made from:",
        "",
        "| kernels | SHA-256 of texts, variants, flags and rows |",
        "| --- | --- |",
        *(f"| {file} | {seal(made, rows[file])} |" for file, made in sorted(made_from.items())),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
