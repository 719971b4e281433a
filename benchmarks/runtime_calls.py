"""Calls of the CUDA runtime and driver, and work on the device, over decode steps of a model; its rests between steps.

    python benchmarks/runtime_calls.py [-m MODEL] [--device cuda] [--batch 1] [--steps 64] [--penalized]

Counted by CUPTI through torch.profiler, which sees every call of the process, CuPy's too. Without a model it is a
synthetic llama-3.2-1b in Q4_K. The steps before are not counted: they compile, record and fill pools.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
from collections import Counter
from pathlib import Path
from statistics import median
from typing import Any

import forge
from forge import SamplingParams

_STEPS_BEFORE = 16
_PROMPT_TOKENS = 140  # so that 64 steps stay between two powers of two, where a step is recorded anew
_RANGE = "decode steps"
_CATEGORIES = {
    "cuda_runtime": "runtime calls",
    "cuda_driver": "driver calls",
    "gpu_memcpy": "copies on the device",
    "gpu_memset": "memsets on the device",
    "kernel": "kernels on the device",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a name or a path")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--penalized", action="store_true", help="with penalties, a logit bias and log probabilities")
    arguments = parser.parse_args()
    try:
        import torch
    except ImportError:
        parser.error("this needs PyTorch with CUDA, for its profiler: pip install torch")
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA GPU")
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or _synthetic(Path(directory))
        with forge.load(model, device=arguments.device, context=2048, max_sequences=arguments.batch) as llm:
            events = _profiled(llm, arguments, Path(directory) / "trace.json")
            print(f"{llm.path.name} on {llm.device}, {arguments.batch} sequences, {arguments.steps} steps")
    _report(events, arguments.steps)


def _synthetic(directory: Path) -> Path:
    from synthetic import write

    path = directory / "llama-3.2-1b-Q4_K.gguf"
    write("llama-3.2-1b", "Q4_K", path)
    return path


def _profiled(llm: forge.LLM, arguments: argparse.Namespace, trace: Path) -> list[dict[str, Any]]:
    """The events of the steps, as in a Chrome trace."""
    from torch.profiler import ProfilerActivity, profile, record_function

    changes: dict[str, Any] = (
        {"repetition_penalty": 1.1, "frequency_penalty": 0.1, "logit_bias": {5: -1.0}, "logprobs": 5}
        if arguments.penalized
        else {}
    )
    params = SamplingParams(max_tokens=1024, temperature=0, ignore_eos=True, **changes)
    for row in range(arguments.batch):
        llm.engine.add([1 + row] * _PROMPT_TOKENS, params)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):  # CUPTI starts, which takes time
        for _ in range(_STEPS_BEFORE):
            llm.engine.step()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        llm.engine.step()
        with record_function(_RANGE):
            for _ in range(arguments.steps):
                if len(llm.engine.step()) != arguments.batch:
                    raise SystemExit("a sequence ended early (its logits were not finite): take another model")
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    (steps,) = (e for e in events if e.get("cat") == "user_annotation" and e.get("name") == _RANGE)
    start, stop = steps["ts"], steps["ts"] + steps["dur"]
    return [e for e in events if e.get("cat") in _CATEGORIES and start <= e["ts"] < stop]


def _report(events: list[dict[str, Any]], steps: int) -> None:
    for category, title in _CATEGORIES.items():
        counts = Counter(event["name"] for event in events if event["cat"] == category)
        if counts:
            print(f"\n{title:<60} {'all':>7} {'a step':>8}")
        for name, count in counts.most_common():
            print(f"  {name[:58]:<58} {count:>7} {count / steps:>8.2f}")
    if rests := _rests(events):
        print(f"\nbetween two steps the device rests {median(rests):.1f} us, {max(rests):.1f} at most")


def _rests(events: list[dict[str, Any]]) -> list[float]:
    """Microseconds from the end of a step's last kernel to the start of the next one's first."""
    kernels = sorted((event for event in events if event["cat"] == "kernel"), key=lambda event: float(event["ts"]))
    return [
        next_one["ts"] - (one["ts"] + one["dur"])
        for one, next_one in itertools.pairwise(kernels)
        if one["name"].startswith("advance") and next_one["name"].startswith("decode_inputs")
    ]


if __name__ == "__main__":
    main()
