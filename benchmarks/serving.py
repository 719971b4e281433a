"""Serving beside the engine alone: requests through `forge serve` by many clients, and through LLM in one call.

    python benchmarks/serving.py MODEL [--device cuda] [--clients 64] [--prompt-tokens 512] [--new-tokens 128]

Both are loaded, and their rounds alternate. Prints tokens per second of many requests and of one, by both ways; the
time per token of one and what the server adds to it; the time to first token; the time between events (median and 99th
percentile over all streams, while prompts arrive; an event may hold several tokens); and what a system prompt that all
requests share saves. Clients are processes of their own: they read raw server-sent events.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import numpy as np
import psutil

import forge

_ADDRESS = re.compile(r"at http://127\.0\.0\.1:(\d+) ")
_CLIENT_PROCESSES = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or a path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--shared-tokens", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rng = np.random.default_rng(0)

    def prompts(count: int, length: int, head: list[int]) -> list[list[int]]:
        return [head + rng.integers(100, 300, length).tolist() for _ in range(count)]

    process, port = _serve(args.model, args.device)
    try:
        with (
            _Clients(port, args.new_tokens) as run,  # before the model is loaded: they are forks of this process
            forge.load(args.model, device=args.device, progress=False) as llm,
        ):
            many, one = _Rates(), _Rates()
            for place in range(args.rounds + 1):
                for rates, count in ((many, args.clients), (one, 1)):
                    alone = _in_engine(llm, prompts(count, args.prompt_tokens, []), args.new_tokens)
                    before = psutil.Process(process.pid).cpu_times()
                    served = run(prompts(count, args.prompt_tokens, []))
                    after = psutil.Process(process.pid).cpu_times()
                    served["cpu"] = (after.user + after.system - before.user - before.system) / served["tokens"]
                    if place:  # the first round pays for memory and kernels
                        rates.alone.append(alone)
                        rates.served.append(served)
            _report(args.clients, many, one)
            _report_shared(args.shared_tokens, run, prompts)
    finally:
        process.terminate()
        process.wait()


@dataclass
class _Rates:
    """What each round gave: numbers by their names."""

    alone: list[dict[str, Any]] = field(default_factory=list)
    served: list[dict[str, Any]] = field(default_factory=list)


def _report(clients: int, many: _Rates, one: _Rates) -> None:
    def rate(rounds: list[dict[str, Any]]) -> float:
        return median(float(one["tokens_per_s"]) for one in rounds)

    for name, all_at_once, single in (
        ("engine alone", many.alone, one.alone),
        ("through HTTP", many.served, one.served),
    ):
        each = [round(one["tokens_per_s"]) for one in all_at_once]
        print(
            f"{name}: {clients} at once {rate(all_at_once):.1f} tokens/s {each}, one {rate(single):.1f}: "
            f"{rate(all_at_once) / rate(single):.2f} times as many"
        )
    print(f"{clients} at once, through HTTP to the engine alone: {rate(many.served) / rate(many.alone):.3f}")
    pairs = [(a["per_token"], b["per_token"]) for a, b in zip(one.alone, one.served, strict=True)]
    print(
        f"time per token of one: {1e3 * median(a for a, _ in pairs):.2f} ms in the engine, "
        f"{1e3 * median(b for _, b in pairs):.2f} ms through HTTP; the server adds "
        f"{1e3 * median(b - a for a, b in pairs):+.2f} ms {[round(1e3 * (b - a), 2) for a, b in pairs]}, and its "
        f"process computes for {1e3 * median(served['cpu'] for served in one.served):.2f} ms"
    )
    gaps = [gap for served in many.served for gap in served["gaps"]]
    firsts = [first for served in many.served for first in served["firsts"]]
    print(f"time between events: median {1e3 * median(gaps):.2f} ms, p99 {1e3 * quantiles(gaps, n=100)[98]:.2f} ms")
    print(f"time to first token: median {1e3 * median(firsts):.1f} ms, longest {1e3 * max(firsts):.1f} ms", flush=True)


def _report_shared(length: int, run: _Clients, prompts: Callable[[int, int, list[int]], list[list[int]]]) -> None:
    """What a beginning that was seen before saves of the time to first token."""
    fresh = [median(run(prompts(1, 50, prompts(1, length, [])[0]))["firsts"]) for _ in range(5)]
    head = prompts(1, length, [])[0]
    run(prompts(1, 50, head))
    shared = [median(run(prompts(1, 50, head))["firsts"]) for _ in range(5)]
    print(
        f"{length} tokens before 50: first token {1e3 * median(fresh):.1f} ms where they are new, "
        f"{1e3 * median(shared):.1f} ms where they were seen: {median(shared) / median(fresh):.2f}"
    )


def _in_engine(llm: forge.LLM, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """Speed of requests in this process."""
    started = time.perf_counter()
    found = llm.generate(prompts, max_tokens=new_tokens, ignore_eos=True, temperature=0.0)
    seconds = time.perf_counter() - started
    timings = [one.timings for one in found]
    return {
        "tokens_per_s": sum(each.completion_tokens for each in timings) / seconds,
        "per_token": median(each.decode_ms / 1e3 / (each.completion_tokens - 1) for each in timings),
    }


def _serve(model: str, device: str) -> tuple[subprocess.Popen[str], int]:
    """A server, when it is ready, and its port."""
    command = [sys.executable, "-m", "forge", "serve", "-m", model, "--device", device, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if match := _ADDRESS.search(line):
            subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)  # else a full pipe would stop it
            return process, int(match[1])
    raise SystemExit("the server has ended")


class _Clients:
    """Sends prompts at once, one by each client."""

    def __init__(self, port: int, new_tokens: int) -> None:
        self._port, self._new_tokens = port, new_tokens
        self._pool = ProcessPoolExecutor(_CLIENT_PROCESSES)
        list(self._pool.map(abs, range(_CLIENT_PROCESSES)))  # start the processes

    def __enter__(self) -> _Clients:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()

    def __call__(self, prompts: list[list[int]]) -> dict[str, Any]:
        groups = [prompts[start::_CLIENT_PROCESSES] for start in range(_CLIENT_PROCESSES)]
        start_at = time.time() + 0.2
        futures = [self._pool.submit(_run_group, self._port, g, self._new_tokens, start_at) for g in groups if g]
        streams = [stream for future in futures for stream in future.result()]
        ends, tokens = max(stream["times"][-1] for stream in streams), sum(stream["tokens"] for stream in streams)
        return {
            "tokens": tokens,
            "tokens_per_s": tokens / (ends - start_at),
            "per_token": median((one["times"][-1] - one["times"][0]) / (one["tokens"] - 1) for one in streams),
            "firsts": [stream["times"][0] - start_at for stream in streams],
            "gaps": [b - a for stream in streams for a, b in zip(stream["times"], stream["times"][1:], strict=False)],
        }


def _run_group(port: int, prompts: list[list[int]], new_tokens: int, start_at: float) -> list[dict[str, Any]]:
    async def run() -> list[dict[str, Any]]:
        return await asyncio.gather(*(_stream(port, ids, new_tokens, start_at) for ids in prompts))

    return asyncio.run(run())


async def _stream(port: int, ids: list[int], new_tokens: int, start_at: float) -> dict[str, Any]:
    """Times of the events with text, and the number of tokens, of one request."""
    wanted = {"prompt": ids, "max_tokens": new_tokens, "ignore_eos": True, "temperature": 0, "stream": True}
    body = json.dumps(wanted | {"stream_options": {"include_usage": True}}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Type: application/json\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    await asyncio.sleep(max(start_at - time.time(), 0))
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    pieces: list[tuple[float, bytes]] = []
    while piece := await reader.read(1 << 16):
        pieces.append((time.time(), piece))  # and no more: clients take processor time from the server
    times: list[float] = []
    tokens, rest = 0, b""
    for now, piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("choices"):
                times.append(now)
            elif usage := event.get("usage"):
                tokens = usage["completion_tokens"]
            else:
                raise RuntimeError(line.decode())
    writer.close()
    return {"times": times, "tokens": tokens}


if __name__ == "__main__":
    main()
