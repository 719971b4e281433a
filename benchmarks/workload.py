"""Whole workloads: requests that arrive, with lengths and arrivals as data, through one engine.

    python benchmarks/workload.py [-m MODEL | --shape llama-3.2-1b --type F16] [--workload burst | FILE.json]
        [--device cpu] [--max-sequences N] [--max-step-tokens N] [--max-prefill-tokens N] [--scale 0.1] [--json OUT]

Prints output tokens and requests per second, the time to the first token and between tokens (median, 99th percentile),
the steps by kind, and the seconds of host code in a step. A workload is groups of requests, in WORKLOADS or a JSON file
of the same form: {"count": 256, "prompt": 512, "output": [64, 192], "start": 0, "rate": 8, "shared": 1500}. Lengths are
a number or [least, most]; `rate` is requests a second with Poisson arrivals (none: all at `start`); `shared` tokens in
front of each prompt are the group's own, the same for all. Ids are random, and no request ends before its length.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np

import forge
from forge import EngineConfig, SamplingParams
from forge.devtools.speed import temperature_of
from forge.engine import Engine, Sequence

WORKLOADS: dict[str, list[dict[str, Any]]] = {
    "burst": [{"count": 256, "prompt": 512, "output": 128}],
    "poisson": [{"count": 256, "prompt": [64, 1024], "output": [32, 256], "rate": 16}],
    "long": [
        {"count": 32, "prompt": [32, 256], "output": [128, 512], "rate": 8},
        {"count": 2, "prompt": 16_000, "output": 64, "start": 1, "rate": 1},
    ],
    "shared": [{"count": 128, "prompt": [20, 200], "output": [32, 128], "rate": 32, "shared": 1500}],
    "chats": [{"count": 16, "prompt": [20, 200], "output": [64, 256]}],
}


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: seconds from the start, its ids, and how many it wants."""

    at: float
    ids: list[int]
    output: int


@dataclass(slots=True)
class Run:
    """What was seen of one run. Times are seconds."""

    seconds: float = 0.0
    arrived: dict[Sequence, float] = field(default_factory=dict)
    times: dict[Sequence, list[float]] = field(default_factory=lambda: defaultdict(list))
    """Of each id."""
    steps: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Tokens of each step, by kind."""
    engine_seconds: float = 0.0
    waited_seconds: float = 0.0

    def summary(self) -> dict[str, Any]:
        firsts = [times[0] - self.arrived[sequence] for sequence, times in self.times.items()]
        gaps = [b - a for times in self.times.values() for a, b in pairwise(times)]
        count = sum(map(len, self.steps.values()))
        return {
            "seconds": self.seconds,
            "output_tokens_per_s": sum(map(len, self.times.values())) / self.seconds,
            "requests_per_s": len(self.arrived) / self.seconds,
            "first_token_ms": _spread(firsts),
            "between_tokens_ms": _spread(gaps),
            "steps": {kind: {"count": len(own), "tokens": median(own)} for kind, own in self.steps.items()},
            "host_ms_per_step": 1e3 * (self.engine_seconds - self.waited_seconds) / max(count, 1),
            "waited_ms_per_step": 1e3 * self.waited_seconds / max(count, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a name or a path")
    parser.add_argument("--shape", default="llama-3.2-1b", help="without a model: a synthetic one of this shape")
    parser.add_argument("--type", default="F16", help="type of a synthetic model's matrices")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workload", default="burst", help=f"{', '.join(WORKLOADS)}, or a JSON file")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the numbers of requests")
    parser.add_argument("--context", type=int)
    parser.add_argument("--max-sequences", type=int)
    parser.add_argument("--max-step-tokens", type=int)
    parser.add_argument("--max-prefill-tokens", type=int)
    parser.add_argument("--rounds", type=int, default=2, help="the first one pays for memory and kernels")
    parser.add_argument("--json", type=Path, help="where results are appended, a line for each round")
    arguments = parser.parse_args()
    named = ("context", "max_sequences", "max_step_tokens", "max_prefill_tokens")
    given = {name: getattr(arguments, name) for name in named if getattr(arguments, name) is not None}
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or synthetic(arguments.shape, arguments.type, Path(directory))
        groups = groups_of(arguments.workload, arguments.scale)
        with forge.load(model, device=arguments.device, engine=EngineConfig(**given), progress=False) as llm:
            print(f"{llm.path.name} on {llm.device}: {arguments.workload} {given}", flush=True)
            for number in range(arguments.rounds):
                arrivals = requests(groups, llm.engine.runner.vocab_size, seed=number)
                found = run(llm.engine, arrivals, temperature_of(llm.config)).summary()
                report(found)
                if arguments.json:
                    line = {"model": llm.path.name, "workload": arguments.workload, "round": number, **given, **found}
                    with arguments.json.open("a") as out:
                        print(json.dumps(line), file=out)


def synthetic(shape: str, kind: str, directory: Path) -> Path:
    """A model with random weights."""
    from synthetic import write

    path = directory / f"{shape}-{kind}.gguf"
    write(shape, kind, path)
    return path


def groups_of(name: str, scale: float) -> list[dict[str, Any]]:
    """A workload by its name or its file, with so many times the requests."""
    groups = WORKLOADS[name] if name in WORKLOADS else json.loads(Path(name).read_text())
    return [{**group, "count": max(round(group["count"] * scale), 1)} for group in groups]


def requests(groups: list[dict[str, Any]], vocabulary: int, seed: int) -> list[Arrival]:
    """The requests of groups, in the order of their arrival."""
    rng = np.random.default_rng(seed)

    def drawn(length: Any) -> int:
        return int(length if isinstance(length, int) else rng.integers(length[0], length[1] + 1))

    def ids(count: int) -> list[int]:
        found: list[int] = rng.integers(0, vocabulary - 1, count).tolist()  # not the end token
        return found

    arrivals = []
    for group in groups:
        at, head = float(group.get("start", 0)), ids(group.get("shared", 0))
        for _ in range(group["count"]):
            arrivals.append(Arrival(at, head + ids(drawn(group["prompt"])), drawn(group["output"])))
            if rate := group.get("rate"):
                at += float(rng.exponential(1 / rate))
    return sorted(arrivals, key=lambda arrival: arrival.at)


def run(engine: Engine, arrivals: list[Arrival], temperature: float = 0.0) -> Run:
    """Add each request when its time has come, and run steps until all have ended."""
    found, waiting = Run(), deque(arrivals)
    with _watched(engine, found):
        started = time.perf_counter()
        while waiting or engine.has_work:
            now = time.perf_counter() - started
            while waiting and waiting[0].at <= now:
                arrival = waiting.popleft()
                params = SamplingParams(max_tokens=arrival.output, ignore_eos=True, temperature=temperature)
                found.arrived[engine.add(arrival.ids, params)[0]] = arrival.at
            if not engine.has_work:
                time.sleep(waiting[0].at - now)
                continue
            before = time.perf_counter()
            sampled = engine.step()
            after = time.perf_counter()
            found.engine_seconds += after - before
            for token in sampled:
                found.times[token.sequence].append(after - started)
        found.seconds = time.perf_counter() - started
    return found


@contextmanager
def _watched(engine: Engine, found: Run) -> Iterator[None]:
    """Note the steps that an engine runs, and the seconds in which it waits for the device."""
    runner, backend = engine.runner, engine.runner.backend

    def waiting(call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            before = time.perf_counter()
            try:
                return call(*args)
            finally:
                found.waited_seconds += time.perf_counter() - before

        return timed

    def noted(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(step: list[Any], *args: Any, **options: Any) -> Any:
            counts = [getattr(entry, "count", 1) for entry in step]  # a decode step may be its sequences alone
            prompts = sum(count > 1 for count in counts)
            kind = "decode" if not prompts else "prompts" if prompts == len(counts) else "mixed"
            found.steps[kind].append(sum(counts))
            return call(step, *args, **options)

        return counted

    record_event = backend.record_event
    changes: list[tuple[Any, str, Any]] = [
        (runner, "forward", noted(runner.forward)),
        (backend, "record_event", lambda: waiting(record_event())),
    ]
    if backend.is_asynchronous:
        changes.append((backend, "to_numpy", waiting(backend.to_numpy)))
    if runner.pipeline:
        changes.append((runner.pipeline, "launch", noted(runner.pipeline.launch)))
    before = [vars(owner).get(name) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for (owner, name, _), own in zip(changes, before, strict=True):
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def _spread(seconds: list[float]) -> dict[str, float]:
    """Median and 99th percentile, in ms."""
    if len(seconds) < 2:
        return {"median": 1e3 * sum(seconds), "p99": 1e3 * sum(seconds)}
    return {"median": 1e3 * median(seconds), "p99": 1e3 * quantiles(seconds, n=100, method="inclusive")[98]}


def report(found: dict[str, Any]) -> None:
    """Print what a run gave."""
    first, between = found["first_token_ms"], found["between_tokens_ms"]
    steps = ", ".join(f"{own['count']} {kind} of {own['tokens']:.0f}" for kind, own in found["steps"].items())
    print(
        f"{found['output_tokens_per_s']:9.1f} output tokens/s, {found['requests_per_s']:.2f} requests/s in "
        f"{found['seconds']:.2f} s; first token {first['median']:.1f} ms (p99 {first['p99']:.1f}); between tokens "
        f"{between['median']:.2f} ms (p99 {between['p99']:.2f})\n          steps: {steps} tokens; in a step "
        f"{found['host_ms_per_step']:.2f} ms of host code, {found['waited_ms_per_step']:.2f} ms of waiting",
        flush=True,
    )


if __name__ == "__main__":
    main()
