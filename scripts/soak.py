"""A server under clients of all kinds for a while: does it fail, and does its memory grow?

    python scripts/soak.py MODEL [--seconds 600] [--clients 32]

MODEL needs a chat template; a tiny one will do. 20% of the requests' clients leave at a random point, and 5% of the
requests are invalid. Ends with status 1 where an answer has a status of 500 or more, an answer that should be whole is
not, an invalid request is not refused, something is left running, or memory grows by 2% or more. The memory is what is
resident of the server's process and its engine's: its mean in the last tenth of the time against that in the third.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean
from threading import Thread
from typing import Any

import psutil

_LEAVE, _INVALID = 0.20, 0.05
_MAX_GROWTH = 0.02
_SERVER = ["--port", "0", "--device", "cpu", "--context", "1024", "--max-sequences", "8"]
"""Few pages of the KV cache: all of them have been written to when the memory is first looked at."""
_ADDRESS = re.compile(r"at http://127\.0\.0\.1:(\d+) ")
_SECONDS = 120.0
"""Longest time for an answer."""


@dataclass(frozen=True)
class Request:
    """What is sent. ends: with what a whole answer ends."""

    path: str
    body: dict[str, Any] | None
    ends: bytes = b"}"


def make_request(rng: random.Random) -> Request:
    """A valid request to one of the endpoints."""
    stream = rng.random() < 0.6
    path = rng.choice(list(_BODIES))
    body = _BODIES[path](rng)
    if body is None or ("max_tokens" not in body and "max_output_tokens" not in body):
        return Request(path, body, b"\n" if path == "/metrics" else b"}")
    body |= {"stream": stream, "temperature": rng.choice([0, 1.0])}
    return Request(path, body, _STREAM_ENDS[path] if stream else b"}")


def _text(rng: random.Random) -> str:
    """Some begin alike: the prefix cache finds them."""
    head = "You are a helpful assistant. " * 3 if rng.random() < 0.3 else ""
    return head + " ".join(rng.choices(["a", "river", "of", "words", "é", "日本", "1234", "\n"], k=rng.randint(1, 30)))


def _messages(rng: random.Random) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * rng.randint(0, 2) + ["user"]
    return [{"role": role, "content": _text(rng)} for role in roles]


_BODIES: dict[str, Any] = {
    "/v1/chat/completions": lambda rng: {
        "messages": _messages(rng),
        "max_tokens": rng.randint(1, 60),
        "n": rng.choice([1, 1, 1, 3]),
        "logprobs": rng.random() < 0.2,
        "stop": rng.choice([None, "e", ["x", "yz"]]),
    },
    "/v1/completions": lambda rng: {
        "prompt": rng.choice([_text(rng), [_text(rng), _text(rng)], rng.choices(range(5, 250), k=rng.randint(1, 300))]),
        "max_tokens": rng.randint(1, 60),
        "logit_bias": rng.choice([None, {"7": 1.5}]),
        "frequency_penalty": rng.choice([None, 0.5]),
    },
    "/v1/responses": lambda rng: {"input": _text(rng), "max_output_tokens": rng.randint(1, 60)},
    "/v1/messages": lambda rng: {"messages": _messages(rng), "system": "Be kind.", "max_tokens": rng.randint(1, 60)},
    "/v1/messages/count_tokens": lambda rng: {"messages": _messages(rng)},
    "/v1/embeddings": lambda rng: {"input": [_text(rng) for _ in range(rng.randint(1, 3))]},
    "/tokenize": lambda rng: {"prompt": _text(rng)},
    "/detokenize": lambda rng: {"tokens": rng.choices(range(5, 250), k=rng.randint(0, 100))},
    "/v1/models": lambda rng: None,
    "/health": lambda rng: None,
    "/metrics": lambda rng: None,
}
_LAST_CHUNK = b"\n\n\r\n0\r\n\r\n"
_STREAM_ENDS = {
    "/v1/chat/completions": b"data: [DONE]" + _LAST_CHUNK,
    "/v1/completions": b"data: [DONE]" + _LAST_CHUNK,
    "/v1/responses": b"}}}" + _LAST_CHUNK,
    "/v1/messages": b'data: {"type":"message_stop"}' + _LAST_CHUNK,
}
_BROKEN: list[Any] = [
    lambda body: json.dumps(body).encode()[:-1],
    lambda body: b"[" * 100_000,
    lambda body: json.dumps(body | {"colour": "red"}).encode(),
    lambda body: json.dumps({key: {"a": [None]} for key in body}).encode(),
    lambda body: json.dumps(body | {"model": 3}).encode(),
    lambda body: json.dumps(body | {"model": float("nan")}).encode(),
    lambda body: b"\xff\xfe" + json.dumps(body).encode(),
    lambda body: b"\xef\xbb\xbf" + json.dumps(body | {"model": "\ud800"}).encode(),
    lambda body: json.dumps([body]).encode(),
    lambda body: json.dumps(body | {"model": "x" * 100_000}).encode(),
    lambda body: b"",
]


@dataclass
class Soak:
    """Clients of a server, and what they saw."""

    port: int
    ends: float
    codes: Counter[str] = field(default_factory=Counter)
    """Requests by what came of them: a status, or that the client left."""
    problems: list[str] = field(default_factory=list)

    async def client(self, seed: int) -> None:
        """Send one request behind the other until the end, or until one gets no answer at all."""
        rng = random.Random(seed)
        while time.monotonic() < self.ends:
            fate = rng.random()
            wanted = make_request(rng)
            while fate < _INVALID and wanted.body is None:
                wanted = make_request(rng)
            content = json.dumps(wanted.body).encode() if wanted.body is not None else b""
            is_broken = fate < _INVALID
            if is_broken:
                content = rng.choice(_BROKEN)(wanted.body)
            try:
                async with asyncio.timeout(_SECONDS):
                    found = await self._exchange(wanted, content, rng, leaves=_INVALID <= fate < _INVALID + _LEAVE)
            except OSError as error:  # TimeoutError is one
                self.problems.append(f"{wanted.path} {content[:200]!r}: {error!r}")
                return
            if found is None:
                self.codes["left"] += 1
                continue
            head, _, answer = found.partition(b"\r\n\r\n")
            status = int(head[9:12]) if head.startswith(b"HTTP/1.1 ") else 0
            self.codes[str(status)] += 1
            is_right = 400 <= status < 500 if is_broken else status == 200 and answer.endswith(wanted.ends)
            if not is_right or (b'"error":{' in answer and not is_broken):
                self.problems.append(f"{wanted.path} {content[:200]!r}: {head[:40]!r} ... {answer[-200:]!r}")

    async def _exchange(self, wanted: Request, content: bytes, rng: random.Random, *, leaves: bool) -> bytes | None:
        """Head and body of the answer; None where the client left. Raises OSError where the server is gone."""
        method = "GET" if wanted.body is None else "POST"
        head = f"{method} {wanted.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        sent = head.encode() + content
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            if leaves and rng.random() < 0.2:
                writer.write(sent[: rng.randrange(len(sent))])
                return None
            writer.write(sent)
            if not leaves:
                return await reader.read(-1)
            if rng.random() < 0.5:
                await asyncio.sleep(rng.uniform(0, 0.5))
            else:
                await reader.read(rng.randint(1, 2000))
            if rng.random() < 0.5:
                writer.transport.abort()
            return None
        except ConnectionError:
            if not leaves:
                raise
            return None
        finally:
            writer.close()


def start(model: str) -> tuple[subprocess.Popen[str], int, list[str]]:
    """A server, its port when it is ready, and the lines that it writes."""
    command = [sys.executable, "-m", "forge", "serve", "-m", model, *_SERVER]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    lines: list[str] = []
    faults: list[str] = []
    for line in process.stderr:
        lines.append(line)
        if found := _ADDRESS.search(line):
            Thread(target=_watch, args=(process.stderr, faults), daemon=True).start()
            return process, int(found[1]), faults
    raise SystemExit(f"the server has ended with {process.wait()}:\n{''.join(lines).rstrip()}")


def _watch(lines: Any, faults: list[str]) -> None:
    """Keep what says that something is wrong: a full pipe would lose lines, and a list of all would grow."""
    faults.extend(line for line in lines if re.search(r"Traceback|Error|, \w+_error:", line))


def memory(process: psutil.Process) -> list[float]:
    """Resident MB of a server's process and of its engine's. Those that render templates come and go."""
    found = [process.memory_info().rss]
    for child in process.children():
        with suppress(psutil.Error):
            if any("engine_process" in word for word in child.cmdline()):
                found.append(child.memory_info().rss)
    return [round(size / 1e6, 1) for size in found]


async def run(port: int, process: psutil.Process, seconds: float, num_clients: int) -> tuple[Soak, float | None]:
    """Let clients do what they do; what they saw, and by what share memory has grown. None: it ended too early."""
    started = time.monotonic()
    soak = Soak(port, started + seconds)
    clients = [asyncio.create_task(soak.client(seed)) for seed in range(num_clients)]
    samples: list[tuple[float, list[float]]] = []
    while not all(task.done() for task in clients):
        with suppress(psutil.Error):  # the server has ended: its clients say so
            samples.append(((time.monotonic() - started) / seconds, await asyncio.to_thread(memory, process)))
            if len(samples) % 60 == 0:
                print(f"{samples[-1][0]:.0%}: {samples[-1][1]} MB, {soak.codes.total()} requests", flush=True)
        await asyncio.sleep(min(1.0, seconds / 100))
    ends = await asyncio.gather(*clients, return_exceptions=True)
    soak.problems += [repr(end) for end in ends if end is not None]
    for problem in soak.problems[:10]:
        print(problem)

    def mean(first: float, last: float) -> float:
        return fmean([sum(each) for when, each in samples if first <= when <= last] or [0.0])

    before, after = mean(0.2, 0.3), mean(0.9, 1.0)
    if not before or not after:
        return soak, None
    print(f"memory: {before:.1f} MB, at the end {after:.1f} MB: {after / before - 1:+.2%}")
    return soak, after / before - 1


async def is_idle(port: int) -> bool:
    """Whether nothing runs, nothing waits, and all pages are back."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_pages_used")
    try:
        async with asyncio.timeout(_SECONDS):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
            text = (await reader.read(-1)).decode()
            writer.close()
    except OSError:
        return False
    found = re.findall(rf"^forge_(?:{'|'.join(names)})(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return len(found) >= len(names) and not any(map(float, found))


def end(server: subprocess.Popen[str], seconds: float = 60.0) -> int:
    """End a server, at once where it does not end in time. Gives its exit code."""
    server.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        return server.wait(seconds)
    server.kill()
    return server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or a path")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--clients", type=int, default=32)
    args = parser.parse_args()
    server, port, faults = start(args.model)
    try:
        soak, growth = asyncio.run(run(port, psutil.Process(server.pid), args.seconds, args.clients))
        deadline = time.monotonic() + _SECONDS
        while not (idle := asyncio.run(is_idle(port))) and server.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        code = end(server)
    print(f"{soak.codes.total()} requests: {dict(sorted(soak.codes.items()))}")
    missed = {
        f"{len(soak.problems)} answers are wrong": bool(soak.problems),
        f"the server wrote {faults[:3]}": bool(faults),
        "something is left running": not idle,
        "memory was not measured to the end": growth is None,
        f"memory has grown by {growth or 0:.2%}": (growth or 0) >= _MAX_GROWTH,
        f"the server ended with {code}": code != 0,
    }
    found = [text for text, is_so in missed.items() if is_so]
    print("\n".join(found) or "all is well")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
