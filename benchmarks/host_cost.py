"""What a step costs the host: microseconds for each launch, of prompts and of decoding, on a GPU or on none.

    python benchmarks/host_cost.py [-m MODEL] [--device auto] [--virtual] [--profile] [--json FILE]

--virtual: The GPU is virtual (tests/virtual_rocm, with CuPy for ROCm), and what launches and copies returns at once.
Then the time is Python's, CuPy's and forge's. Without a model it is a llama of 16 layers with small matrices: no
launch's host cost depends on their size.
"""

from __future__ import annotations

import argparse
import cProfile
import ctypes
import itertools
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any, cast

ROOT = Path(__file__).parents[1]
_STEPS = 40
_PROMPTS = 24
_TOKENS = (1, 16, 64, 512, 2048)
_SHAPE = (16, 512, 32, 8, 64, 1024, 20_480)
_NULL = """
long launches, copies, products;
int hipModuleLaunchKernel(void) { launches++; return 0; }
int hipLaunchKernel(void) { launches++; return 0; }
int hipblasGemmEx(void) { products++; return 0; }
int hipMemcpyAsync(void) { copies++; return 0; }
int hipMemsetAsync(void) { copies++; return 0; }
int hipGetDevice(int *index) { *index = 0; return 0; }
int hipSetDevice(int index) { return 0; }
int hipblasSetStream(void) { return 0; }
int hipEventRecord(void) { return 0; }
int hipEventQuery(void) { return 0; }
int hipEventSynchronize(void) { return 0; }
int hipStreamSynchronize(void) { return 0; }
int hipGraphLaunch(void) { copies++; return 0; }
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a name or a path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--virtual", action="store_true")
    parser.add_argument("--profile", action="store_true", help="of the second workload")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        if arguments.virtual and "VIRTUAL_ROCM_GFX" not in os.environ:
            sys.path[:0] = [str(ROOT / "tests"), str(ROOT)]
            from virtual_rocm.libraries import environment

            found = environment("gfx942", Path(directory)) | {"HOST_COST_DIRECTORY": directory}
            raise SystemExit(subprocess.run([sys.executable, *sys.argv], env=found).returncode)
        counts = _return_at_once() if arguments.virtual else {}
        _measure(arguments, Path(directory), counts)


def _return_at_once() -> dict[str, ctypes.c_long]:
    """Calls of the virtual ROCm that a step makes do nothing from now on; counters of them."""
    from virtual_rocm import attach, execution, runtime

    directory = Path(os.environ["HOST_COST_DIRECTORY"])
    (directory / "null.c").write_text(_NULL)
    library = directory / "null.so"
    subprocess.run(["clang-19", "-O2", "-shared", "-fPIC", "-o", library, directory / "null.c"], check=True)
    null = ctypes.CDLL(str(library))
    names: Any = attach.loaded._names
    for name in names:
        if f" {name}(" in _NULL:
            attach.loaded._slots[names.index(name)] = ctypes.cast(getattr(null, name), ctypes.c_void_p).value
    runtime.MEMORY_BYTES = 64 << 30
    patched: Any = execution

    class Kernels(dict[str, Any]):
        def get(self, name: str, default: Any = None) -> Any:
            return name

    patched.image = lambda _: b""
    patched.load = lambda *_: Kernels()
    from forge.backend import kernel_cache

    kernel_cache.obtain = lambda *_: b"\x7fELF"
    return {name: ctypes.c_long.in_dll(null, name) for name in ("launches", "products", "copies")}


def _measure(arguments: argparse.Namespace, directory: Path, counts: dict[str, ctypes.c_long]) -> None:
    import forge
    from forge.engine.scheduler import Scheduled
    from forge.engine.sequence import Sequence

    model = arguments.model
    if model is None:
        import synthetic

        synthetic.SHAPES["tiny"] = synthetic.Shape("llama", *_SHAPE)
        synthetic.write("tiny", "F16", directory / "tiny.gguf")
        model = directory / "tiny.gguf"
    results: dict[str, Any] = {}
    with forge.load(model, device=arguments.device, context=4096, max_sequences=8, graphs=not arguments.virtual) as llm:
        runner, device = llm.engine.runner, cast(Any, llm.engine.runner.backend)

        recorded = device.recorder()

        def step_of(tokens: int, *, is_recorded: bool = False) -> Callable[[], Any]:
            pages = [list(range(kind.num_entries(tokens))) for kind in runner.kinds]
            params = forge.SamplingParams(temperature=0)
            sequence = Sequence(0, [5] * tokens, tokens, params, 0, tokens, pages=pages)
            scheduled = [Scheduled(sequence, 0, tokens)]
            if not is_recorded:
                return lambda: runner.forward(scheduled)
            batch = runner._batch(scheduled)
            return lambda: recorded(batch.arrays(), lambda: runner.model(batch, runner.state))

        for tokens, is_recorded in itertools.product(_TOKENS, (False, True)):
            step = step_of(tokens, is_recorded=is_recorded)
            for _ in range(3):
                step()
            before = {name: count.value for name, count in counts.items()}
            step()
            found = {name: count.value - before[name] for name, count in counts.items()}
            seconds = []
            for _ in range(_STEPS):
                device._stream.synchronize()
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
            row = {"ms": 1000 * median(seconds), **found}
            if launches := found.get("launches", 0) + found.get("products", 0):
                row["us a launch"] = 1e6 * median(seconds) / launches
            how = "recorded" if is_recorded else "op by op"
            results[f"{tokens} tokens, {how}"] = row
            print(
                f"{tokens:>6} tokens, {how}: " + ", ".join(f"{value:.4g} {name}" for name, value in row.items()),
                flush=True,
            )
        profile = cProfile.Profile()
        results |= _workload(llm, counts, profile if arguments.profile else None)
        if arguments.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(40)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


def _workload(llm: Any, counts: dict[str, ctypes.c_long], profile: cProfile.Profile | None) -> dict[str, Any]:
    """Host time of a step through the engine, where prompts come in beside decoding sequences."""
    import forge

    engine, results = llm.engine, {}
    for turn in ("first", "second"):
        for number in range(_PROMPTS):
            params = forge.SamplingParams(temperature=0, max_tokens=8 + number % 5, ignore_eos=True)
            engine.add([5 + number] * 500, params)
        before, start, steps = sum(count.value for count in counts.values()), time.perf_counter(), 0
        with profile if profile and turn == "second" else nullcontext():
            while engine.has_work:
                engine.step()
                steps += 1
        seconds = time.perf_counter() - start
        results[f"workload, {turn}"] = row = {"ms a step": 1000 * seconds / steps, "steps": steps}
        calls = sum(count.value for count in counts.values()) - before
        row |= {"us a call": 1e6 * seconds / calls} if calls else {}
        print(f"{turn} workload: " + ", ".join(f"{value:.4g} {name}" for name, value in row.items()), flush=True)
    return results


if __name__ == "__main__":
    main()
