"""Requests that have a quarter of the pages that they need: how many are lost, doubled, or other than one by one.

    python benchmarks/preemption.py MODEL [--device cuda] [--requests 1000]

Their lengths are mixed, half of the prompts begin with one of a few heads, half of the answers are streamed, a quarter
is sampled with a seed, and some are aborted in the queue or at work. They run with EngineConfig.deterministic and
without. Ends with status 1 where an answer is lost or doubled, where one differs in the deterministic mode, or where
sequences gave their pages up fewer than 100 times for each 1,000 requests.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import forge

_PAGE_SIZE = 16
"""Small, so that short requests have several pages."""


@dataclass(frozen=True)
class Kind:
    """A prompt and how it is answered. Several requests are of one kind."""

    prompt: list[int]
    params: forge.SamplingParams


@dataclass(frozen=True)
class Found:
    """What came of requests.

    Attributes:
        ended: Answers that were not aborted.
        tokens: Their ids, all together.
        lost: Those of them that are missing, too short, or another request's.
        doubled: Those of them with more ids than were asked for.
        different: Those of them with other ids or another text than the request has alone.
        preemptions: How often a sequence gave its pages up.
        seconds: For all of them.
    """

    ended: int
    tokens: int
    lost: int
    doubled: int
    different: int
    preemptions: int
    seconds: float


def make_kinds(rng: random.Random, count: int, *, head: int, prompt: int, new: int) -> list[Kind]:
    """Kinds of requests with prompts of 1 to head + prompt tokens, and new // 3 to new new tokens."""
    heads = [rng.choices(range(5, 250), k=head) for _ in range(4)]
    kinds = []
    for number in range(count):
        own = rng.choices(range(5, 250), k=rng.randint(1, prompt))
        params = forge.SamplingParams(
            max_tokens=rng.randint(new // 3, new),
            ignore_eos=True,
            temperature=1.5 if number % 4 == 3 else 0.0,
            seed=number,
        )
        kinds.append(Kind(heads[number % 8] + own if number % 8 < 4 else own, params))
    return kinds


def one_by_one(llm: forge.LLM, kinds: list[Kind]) -> list[forge.Completion]:
    """Each kind's answer, when it has the model for itself."""
    return [llm.generate(kind.prompt, kind.params) for kind in kinds]


@contextmanager
def scarce_pages(llm: forge.LLM, kinds: list[Kind]) -> Iterator[None]:
    """Leave a quarter of the pages that as many requests as run together need, and somebody else has the rest."""
    lengths = [len(kind.prompt) + kind.params.max_tokens for kind in kinds if kind.params.max_tokens]
    together = llm.engine.runner.max_sequences
    held: list[list[int]] = []

    def hold() -> Generator[None, None, None]:
        yield
        for pool in llm.engine.pools:
            each = [pool.kind.num_pages(length) for length in lengths]
            left = max(together * sum(each) // len(each) // 4, *each)
            if left > pool.num_free:
                raise forge.ForgeError(f"{pool.kind.name}: {pool.num_free} pages are free and {left} are to be left")
            held.append(pool.allocate(pool.num_free - left))

    def release() -> Generator[None, None, None]:
        yield
        for pool, pages in zip(llm.engine.pools, held, strict=True):
            pool.release(pages)

    llm._loop.run(hold())
    try:
        yield
    finally:
        llm._loop.run(release())


async def run_together(llm: forge.LLM, kinds: list[Kind], alone: list[forge.Completion], count: int) -> Found:
    """Send requests at once, and compare what comes with what each kind has alone."""
    rng = random.Random(0)
    numbers = [rng.randrange(len(kinds)) for _ in range(count)]
    leaves: dict[int, list[asyncio.Task[forge.Completion]]] = {}
    """Requests that are aborted when so many have ended. They start in order: around their own number they run."""
    num_ended = 0

    async def answer(place: int, kind: Kind) -> forge.Completion:
        nonlocal num_ended
        try:
            return await (_streamed if place % 2 else _whole)(llm, kind)
        finally:
            num_ended += 1
            for task in leaves.pop(num_ended, ()):
                task.cancel()

    before, started = llm.engine.stats().preemptions, time.perf_counter()
    tasks = [asyncio.create_task(answer(place, kinds[number])) for place, number in enumerate(numbers)]
    for place in rng.sample(range(count), count // 10):
        leaves.setdefault(max(place + rng.randint(-50, 30), 1), []).append(tasks[place])
    results = await asyncio.gather(*tasks, return_exceptions=True)
    seconds = time.perf_counter() - started
    ended = tokens = lost = doubled = different = 0
    for number, found in zip(numbers, results, strict=True):
        if isinstance(found, asyncio.CancelledError):
            continue
        kind, wanted = kinds[number], alone[number]
        ended += 1
        if isinstance(found, BaseException):
            print(f"lost: {found!r}", file=sys.stderr)
            lost += 1
            continue
        tokens += len(found.ids)
        is_own = found.prompt_ids == kind.prompt and found.finish_reason == "length"
        lost += not is_own or len(found.ids) < len(wanted.ids)
        doubled += len(found.ids) > len(wanted.ids)
        different += (found.ids, found.text) != (wanted.ids, wanted.text)
    preemptions = llm.engine.stats().preemptions - before
    return Found(ended, tokens, lost, doubled, different, preemptions, seconds)


async def _whole(llm: forge.LLM, kind: Kind) -> forge.Completion:
    found = await llm.agenerate(kind.prompt, kind.params)
    assert isinstance(found, forge.Completion)
    return found


async def _streamed(llm: forge.LLM, kind: Kind) -> forge.Completion:
    chunks = [chunk async for chunk in llm.astream(kind.prompt, kind.params)]
    text, ids = "".join(chunk.text for chunk in chunks), [id for chunk in chunks for id in chunk.ids]
    [last] = [chunk for chunk in chunks if chunk.finish_reason]
    assert last.finish_reason
    assert last.timings
    return forge.Completion(text, ids, kind.prompt, last.finish_reason, last.timings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a name or a path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--requests", type=int, default=1000)
    args = parser.parse_args()
    kinds = make_kinds(random.Random(0), max(args.requests // 20, 4), head=64, prompt=120, new=60)
    is_good = True
    for deterministic in (False, True):
        settings = forge.EngineConfig(context=256, page_size=_PAGE_SIZE, deterministic=deterministic)
        with forge.load(args.model, device=args.device, engine=settings, progress=False) as llm:
            started = time.perf_counter()
            alone = one_by_one(llm, kinds)
            alone_seconds = time.perf_counter() - started
            with scarce_pages(llm, kinds):
                found = asyncio.run(run_together(llm, kinds, alone, args.requests))
        print(
            f"{'deterministic' if deterministic else 'default'}: {args.requests} requests, {found.ended} not aborted, "
            f"{found.preemptions} preemptions, {found.lost} lost, {found.doubled} doubled, "
            f"{found.different} different from one by one, {found.seconds:.1f} s "
            f"({len(kinds)} kinds one by one: {alone_seconds:.1f} s)",
            flush=True,
        )
        is_good &= not found.lost and not found.doubled and not (deterministic and found.different)
        is_good &= found.preemptions >= args.requests // 10
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
