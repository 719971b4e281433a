"""What AMD GPUs should reach with the kernels that use matrix cores, and what binds it, from their disassembly.

    python scripts/amd_bounds.py [FILE ...]     # writes benchmarks/results/amd_bounds.md

Of each kernel the loop with the most matrix instructions is taken, as clang 19 compiles it: the cycles that the matrix
cores of a SIMD take for it, the cycles of its other vector instructions, and the cycles in which LDS moves its bytes.
The largest, at the rates below, is what a compute unit is bound by. Beside it stands what all of them then read each
second: more than the memory gives must come from the L2. Nothing is measured: latencies that too few waves hide and
what lies outside of the loop only add to it.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from forge.backend import compilers, sources
from forge.devtools.variants import model_variants

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "benchmarks" / "results" / "amd_bounds.md"
FILES = ("matmul", "attention_prefill")


class Rates(NamedTuple):
    """Of a GPU, by its datasheet."""

    card: str
    cus: int
    ghz: float
    """Boost clock."""
    tb_per_s: float
    simds: int
    """SIMDs of a compute unit."""
    lanes: int
    """Lanes of a SIMD that issue in a cycle."""
    wave: int
    flops: int
    """Of float16 products with float32 sums, in a cycle of a compute unit."""
    overlaps: bool
    """Whether matrix and vector instructions of different waves run at once on a SIMD."""


# LDS of all: 128 bytes a cycle of a compute unit. Sources: the datasheets' peak of float16 matrix products divided by
# clock and compute units; "AMD CDNA 3 Architecture" and "AMD CDNA 2 Architecture" white papers; "RDNA3" and "RDNA4"
# instruction set architecture guides (WMMA occupies the vector unit of its SIMD).
RATES = {
    "gfx90a": Rates("MI210", 104, 1.7, 1.638, 4, 16, 64, 1024, True),  # 181 TFLOP/s
    "gfx942": Rates("MI300X", 304, 2.1, 5.3, 4, 16, 64, 2048, True),  # 1,307 TFLOP/s
    "gfx1100": Rates("RX 7900 XTX", 96, 2.5, 0.96, 2, 32, 32, 512, False),  # 123 TFLOP/s
    "gfx1151": Rates("Strix Halo", 40, 2.9, 0.256, 2, 32, 32, 512, False),  # 59 TFLOP/s
    "gfx1201": Rates("RX 9070 XT", 64, 2.97, 0.64, 2, 32, 32, 1024, False),  # 195 TFLOP/s
}
_LDS_BYTES = 128
_MATRIX = re.compile(r"v_(?:mfma|wmma)_f32_(\d+)x(\d+)x(\d+)_?(?:16)?(f16|bf16)?")
_WIDTHS = {"b128": 16, "dwordx4": 16, "b96": 12, "dwordx3": 12, "b64": 8, "dwordx2": 8, "b32": 4, "dword": 4}
_LINE = re.compile(r"^\s+(?P<text>\S.*?)\s*//\s*(?P<address>[0-9A-F]{8,}):.*?(?P<target><\w+(?:\+0x[0-9a-f]+)?>)?$")


class Loop(NamedTuple):
    """What a wave does in a turn of a kernel's main loop."""

    matrix: int
    """Matrix instructions."""
    flops: int
    vector: int
    """Other vector instructions."""
    lds_bytes: int
    global_bytes: int


def main() -> None:
    wanted = sys.argv[1:] or FILES
    compiler = compilers.Compiler("clang++-19", False, "clang version 19")
    jobs = [
        (variant, target)
        for target in RATES
        for variant in model_variants(None, target)
        if variant.file.startswith(tuple(wanted)) and sources.target(variant.file) is None
    ]
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda job: loops_of(job[0], job[1], compiler), jobs))
    TABLE.write_text(table([(*job, loops) for job, loops in zip(jobs, found, strict=True)]))
    print(f"{len(jobs)} variants, {TABLE.relative_to(ROOT)}")


def loops_of(variant: sources.Variant, target: str, compiler: compilers.Compiler) -> dict[str, Loop]:
    """The main loop of each kernel of a variant that has matrix instructions in one."""
    code = compilers.compile_variant(variant, target, compiler)
    with tempfile.NamedTemporaryFile(suffix=".hsaco") as file:
        file.write(code)
        file.flush()
        listing = subprocess.run(
            ["llvm-objdump-19", "-d", file.name], capture_output=True, text=True, check=True
        ).stdout
    kernels = re.split(r"^[0-9a-f]+ <(\w+)>:$", listing, flags=re.MULTILINE)[1:]
    found = {}
    for name, body in zip(kernels[::2], kernels[1::2], strict=True):
        if (loop := main_loop(body, RATES[target].wave)) is not None:
            found[name] = loop
    return found


def main_loop(body: str, wave: int) -> Loop | None:
    """The innermost loop with the most matrix instructions: what lies between a jump back and its target."""
    lines = [match for match in map(_LINE.match, body.splitlines()) if match]
    if not lines:
        return None
    addresses = [int(line["address"], 16) for line in lines]
    place = {address: i for i, address in enumerate(addresses)}
    loops: list[tuple[int, int, Loop]] = []
    for i, line in enumerate(lines):
        if line["text"].startswith(("s_branch", "s_cbranch")) and line["target"]:
            offset = re.search(r"\+0x([0-9a-f]+)", line["target"])
            start = place.get(addresses[0] + (int(offset[1], 16) if offset else 0))
            if start is not None and start <= i:
                loop = counted([one["text"] for one in lines[start : i + 1]], wave)
                if loop.matrix:
                    loops.append((start, i, loop))
    inner = [one for one in loops if not any(one[0] <= o[0] and o[1] <= one[1] and o is not one for o in loops)]
    return max((loop for *_, loop in inner), key=lambda loop: loop.flops, default=None)


def counted(lines: list[str], wave: int) -> Loop:
    """What the instructions of a loop do for one wave."""
    matrix = flops = vector = lds = read = 0
    for line in lines:
        name = line.split()[0]
        width = next((size for text, size in _WIDTHS.items() if name.endswith(text)), 0)
        if match := _MATRIX.match(name):
            matrix += 1
            flops += 2 * int(match[1]) * int(match[2]) * int(match[3])
        elif name.startswith(("ds_read", "ds_load", "ds_write", "ds_store")):
            lds += wave * width * (2 if "2" in name.split("_")[1] or "_2addr" in name else 1)  # two places
        elif name.startswith(("global_load", "buffer_load", "flat_load")):
            read += wave * width
        elif name.startswith("v_"):
            vector += 1
    return Loop(matrix, flops, vector, lds, read)


def table(found: list[tuple[sources.Variant, str, dict[str, Loop]]]) -> str:
    """Markdown: a row for each kernel, variant and GPU."""
    cards = [
        f"- {arch}: {r.card}, {r.cus} compute units at {r.ghz} GHz, {r.tb_per_s} TB/s, {_peak(r):,.0f} TFLOP/s"
        for arch, r in RATES.items()
    ]
    columns = ["kernel", "variant", "GPU", "matrix", "its cycles", "vector cycles", "LDS cycles", "bound by"]
    columns += ["TFLOP/s", "of the peak", "TB/s read"]
    lines = [
        "# What AMD GPUs should reach, and what binds it",
        "",
        "Written by `scripts/amd_bounds.py`, which says how, from each kernel's main loop as clang 19 compiles it, for",
        "the variants that usual models launch. A bound, not a measurement. Cycles are a SIMD's for one wave and turn.",
        "Reads beyond what the memory gives must come from the L2: blocks share the rows of x, keys and values.",
        "",
        *cards,
        "",
        f"| {' | '.join(columns)} |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for variant, target, loops in sorted(found, key=lambda one: (one[0].name, one[1])):
        name = variant.name.partition("-")[2].replace("-", " ")
        for kernel, loop in loops.items():
            lines.append(f"| {kernel} | {name} | {target} | {row(loop, RATES[target])} |")
    return "\n".join(lines) + "\n"


def row(loop: Loop, rates: Rates) -> str:
    matrix = loop.flops * rates.simds / rates.flops
    vector = loop.vector * rates.wave / rates.lanes
    lds = rates.simds * loop.lds_bytes / _LDS_BYTES
    work = {"matrix cores": matrix, "vector instructions": vector}
    if not rates.overlaps:
        work = {"matrix and vector instructions": matrix + vector}
    parts = work | {"LDS": lds}
    binding = max(parts, key=lambda name: parts[name])
    per_s = rates.cus * rates.simds * rates.ghz / parts[binding] / 1000  # turns of waves, in 10**12
    cells = f"{loop.matrix} | {matrix:.0f} | {vector:.0f} | {lds:.0f} | {binding} | {per_s * loop.flops:,.0f}"
    return f"{cells} | {matrix / parts[binding]:.0%} | {per_s * loop.global_bytes:.2f}"


def _peak(rates: Rates) -> float:
    return rates.cus * rates.ghz * rates.flops / 1000


if __name__ == "__main__":
    main()
