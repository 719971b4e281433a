"""What the kernels take of each AMD target: compiled by clang for every variant, without a GPU.

    python scripts/amd_resources.py [--check]     # writes benchmarks/results/amd_resources.md

Fails where a kernel spills registers, uses scratch memory or more LDS than a workgroup has; with --check also where the
committed table is not what came out.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from forge.backend import compilers, kernels
from forge.variants import case_variants, model_variants

TARGETS = ("gfx90a", "gfx942", "gfx1030", "gfx1100", "gfx1151", "gfx1201")
MOST_LDS_BYTES = 64 << 10
ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "amd_resources.md"
CACHE = ROOT / ".harness" / "amd"
_REMARK = re.compile(r"remark: [^\n]*?(?P<key>Function Name|[\w ]+?)(?: \[[^\]]*\])?: (?P<value>\S+) \[-Rpass")
_INSTRUCTIONS = {
    "dot4": r"v_dot4",
    "matrix": r"v_mfma|v_wmma|v_smfmac",
    "16 bytes": r"(global|flat|buffer)_load_(dwordx4|b128)",
}


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    usages = measure(variants(), TARGETS)
    faults = list(wrong(usages))
    text = table(usages)
    if arguments.check:
        if TABLE.read_text() != text:
            faults.append(f"{TABLE.relative_to(ROOT)} is not up to date: run scripts/amd_resources.py")
    else:
        TABLE.parent.mkdir(exist_ok=True)
        TABLE.write_text(text)
    print(f"{len(usages)} kernels of {len({u.variant for u in usages})} variants on {len(TARGETS)} targets")
    if faults:
        sys.exit("\n".join(faults))


def variants() -> list[kernels.Variant]:
    """Those of all ops' cases and those that models launch."""
    return sorted({*case_variants(), *model_variants()}, key=lambda variant: variant.name)


def measure(found: list[kernels.Variant], targets: tuple[str, ...]) -> list[Usage]:
    """Compile all variants for all targets, in parallel; what was compiled before is read from the cache."""
    with ThreadPoolExecutor() as pool:
        jobs = [(variant, target) for variant in found for target in targets]
        return [usage for usages in pool.map(lambda job: compile_for(*job), jobs) for usage in usages]


def compile_for(variant: kernels.Variant, target: str) -> list[Usage]:
    """What each kernel of a variant takes on a target. Raises SystemExit with the compiler's message."""
    compiler, objdump = shutil.which("clang++-19"), shutil.which("llvm-objdump-19")
    if not compiler or not objdump:
        sys.exit("no clang++-19 or llvm-objdump-19: run scripts/install-toolchain")
    text = kernels.source(variant.file)
    command = [compiler, "--cuda-device-only", *compilers.FLAGS, f"--offload-arch={target}", *variant.options]
    report = CACHE / hashlib.sha256("\0".join([text, *command]).encode()).hexdigest()[:32]
    if not report.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            source, code = Path(scratch, "kernel.hip"), Path(scratch, "kernel.hsaco")
            source.write_text(text)
            remarks = ["-Rpass-analysis=kernel-resource-usage"]
            done = subprocess.run([*command, *remarks, str(source), "-o", str(code)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{variant.name} does not compile for {target}:\n{done.stderr}")
            listing = subprocess.run([objdump, "-d", str(code)], capture_output=True, text=True, check=True).stdout
            shown = [
                line
                for line in listing.splitlines()
                if line.endswith(">:") or re.search("|".join(_INSTRUCTIONS.values()), line)
            ]
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
            ", ".join(_telling(shown_text, values["Function Name"])),
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


def _telling(listing: str, kernel: str) -> Iterator[str]:
    body = re.search(rf"<{kernel}>:\n(.*?)(?=^\S+ <|\Z)", listing, re.MULTILINE | re.DOTALL)
    for name, pattern in _INSTRUCTIONS.items():
        if body and re.search(pattern, body[1]):
            yield name


def wrong(usages: list[Usage]) -> Iterator[str]:
    """What no kernel may do, one line each."""
    for u in usages:
        for what, bad in (
            (f"{u.spills} spills", u.spills),
            (f"{u.scratch_bytes} bytes of scratch", u.scratch_bytes),
            (f"{u.lds_bytes} bytes of LDS", u.lds_bytes > MOST_LDS_BYTES),
        ):
            if bad:
                yield f"{u.variant}: {u.kernel} on {u.target}: {what}"


def table(usages: list[Usage]) -> str:
    """Markdown: the most demanding variant of each kernel on each target."""
    worst: dict[tuple[str, str], Usage] = {}
    for u in usages:
        key = (f"{u.variant.partition('-')[0]}: {u.kernel}", u.target)
        if key not in worst or (-u.occupancy, u.vgprs) > (-worst[key].occupancy, worst[key].vgprs):
            worst[key] = u
    lines = [
        "# What the kernels take of AMD GPUs",
        "",
        f"Written by `scripts/amd_resources.py` from {len({u.variant for u in usages})} variants, compiled by clang 19",
        "without a GPU; per kernel and target the variant with the fewest waves per SIMD. CI fails where any of them",
        "spills or uses scratch.",
        "",
        "| kernel | target | variant | VGPRs | SGPRs | spills | scratch B | LDS B | waves/SIMD | has |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for (kernel, target), u in sorted(worst.items()):
        name = u.variant.partition("-")[2].replace("-", " ")
        lines.append(
            f"| {kernel} | {target} | {name} | {u.vgprs} | {u.sgprs} | {u.spills} | {u.scratch_bytes} | {u.lds_bytes} "
            f"| {u.occupancy} | {u.instructions} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
