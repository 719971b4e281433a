"""Decode speed beside PyTorch's: torch.compile, a CUDA graph, a static cache and SDPA, at the same shapes in one run.

    python benchmarks/peers.py llama-3.2-1b [--type F16] [--batch 1,8,64] [--context 1024] [--json]

Needs PyTorch. The model has random weights. PyTorch decodes at `--context` positions, forge 128 tokens, half
of which lie before it. PyTorch's is float16 whatever the type is, and its step is everything but sampling: embedding,
layers, logits, greatest logit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from synthetic import SHAPES, write

_STEPS = 64
_FORGE_STEPS = 128
_REPETITIONS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=[name for name, shape in SHAPES.items() if not shape.experts])
    parser.add_argument("--type", default="F16")
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    batches = [int(part) for part in arguments.batch.split(",")]
    shape, context = arguments.shape, arguments.context
    ours = forge_speeds(shape, arguments.type, batches, context)
    rows = [
        {
            "batch": batch,
            "forge": ours["speeds"][batch],
            "pytorch": pytorch_speed(arguments.shape, batch, arguments.context),
        }
        for batch in batches
    ]
    if arguments.json:
        print(json.dumps({"shape": shape, "type": arguments.type, "device": ours["device"], "runs": rows}))
        return
    print(f"{shape} {arguments.type}, {context} positions, {ours['device']}; PyTorch {torch.__version__}")
    print(f"{'batch':>6} {'forge':>10} {'PyTorch F16':>12} {'ratio':>6}  tokens/s")
    for row in rows:
        print(f"{row['batch']:6} {row['forge']:10.0f} {row['pytorch']:12.0f} {row['forge'] / row['pytorch']:6.2f}")


def forge_speeds(shape: str, type_name: str, batches: list[int], context: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / f"{shape}-{type_name}.gguf"
        write(shape, type_name, path)
        command = [sys.executable, "-m", "forge", "bench", "-m", str(path), "--json", "--context", str(2 * context)]
        command += ["--prompt-tokens", str(max(context - _FORGE_STEPS // 2, 1)), "--gen-tokens", str(_FORGE_STEPS)]
        command += ["--batch", ",".join(map(str, batches))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr.strip())
    report = json.loads(done.stdout)
    return {"device": report["device"], "speeds": {run["batch"]: run["tokens_per_s"] for run in report["decode"]}}


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def pytorch_speed(shape: str, batch: int, context: int) -> float:
    """Tokens per second of compiled steps, replayed as a graph, at the last position of a cache of `context`."""
    _, layers, width, heads, kv_heads, dim, ffn, vocabulary, *_ = astuple(SHAPES[shape])

    def matrix(rows: int, cols: int) -> torch.Tensor:
        return torch.randn(rows, cols, device="cuda", dtype=torch.float16) * cols**-0.5

    qkv_rows = (heads + 2 * kv_heads) * dim
    sizes = ((qkv_rows, width), (width, heads * dim), (2 * ffn, width), (width, ffn))
    blocks = [tuple(matrix(*size) for size in sizes) for _ in range(layers)]
    table = matrix(vocabulary, width)
    norm = torch.ones(width, device="cuda", dtype=torch.float16)
    # A tensor each: of views of one the compiler would copy all.
    cache = [
        [torch.randn(batch, kv_heads, context, dim, device="cuda", dtype=torch.float16) for _ in range(2)]
        for _ in range(layers)
    ]
    angles = torch.arange(context, device="cuda")[:, None] * 500_000.0 ** (
        -torch.arange(0, dim, 2, device="cuda") / dim
    )
    cosine, sine = (f(torch.cat([angles, angles], 1)).half() for f in (torch.cos, torch.sin))
    ids = torch.zeros(batch, dtype=torch.int64, device="cuda")
    position = torch.tensor([context - 1], device="cuda")

    def rotate(x: torch.Tensor) -> torch.Tensor:  # (B, heads, 1, D)
        low, high = x.chunk(2, dim=-1)
        return x * cosine[position] + torch.cat([-high, low], -1) * sine[position]

    def step(ids: torch.Tensor) -> torch.Tensor:
        x = table[ids]  # (B, E)
        for (qkv, out, gate_up, down), (keys, values) in zip(blocks, cache, strict=True):
            h = F.rms_norm(x, (width,), norm, 1e-5)
            parts = (h @ qkv.T).view(batch, -1, 1, dim).split([heads, kv_heads, kv_heads], 1)
            keys.index_copy_(2, position, rotate(parts[1]))
            values.index_copy_(2, position, parts[2])
            # The queries of a KV head as so many positions: SDPA's own handling of groups repeats keys and values.
            asked = rotate(parts[0]).view(batch, kv_heads, heads // kv_heads, dim)
            attended = F.scaled_dot_product_attention(asked, keys, values)
            x = x + attended.reshape(batch, -1) @ out.T
            gate, up = (F.rms_norm(x, (width,), norm, 1e-5) @ gate_up.T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ down.T
        return (F.rms_norm(x, (width,), norm, 1e-5) @ table.T).argmax(-1)

    compiled = torch.compile(step, fullgraph=True)
    seconds = _replayed(lambda: ids.copy_(compiled(ids)))
    torch.cuda.empty_cache()
    return batch / seconds


def _replayed(step: Callable[[], Any]) -> float:
    """Median seconds of a step that is captured and replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    times = []
    for _ in range(_REPETITIONS + 1):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(_STEPS):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / _STEPS)
    return float(median(times[1:]))


if __name__ == "__main__":
    main()
