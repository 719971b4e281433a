"""Scheduler, block manager and the engine's bookkeeping, with a fake model that checks every page it touches."""

from __future__ import annotations

import random
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forge.config import SamplingParams
from forge.engine import Engine, Sampled, Sequence
from forge.engine.hooked_pipelines import HookedPipelines
from forge.engine.page_pool import PagePool
from forge.engine.passes import job_of
from forge.engine.prefix_cache import PrefixCache, can_share
from forge.engine.scheduler import Scheduled, Scheduler
from forge.engine.sequence import CachedPage
from forge.errors import OutOfMemoryError
from forge.state.kind import Kind
from forge.state.paged_kv import PagedKV
from forge.state.window_kv import WindowKV

VOCABULARY = 40
END_ID = 7
UNWRITTEN = None


def next_token(ids: tuple[int, ...], seed: int, choice: int) -> int:
    """The fake model: what follows depends on every id before, the seed and the choice. -1 stands for a NaN, in the row
    that all choices of a prompt draw from."""
    is_nan = hash((ids, seed, len(ids))) % (VOCABULARY + 1) == VOCABULARY
    return -1 if is_nan else hash((ids, seed, choice, len(ids))) % VOCABULARY


@dataclass(frozen=True)
class Recurrent:
    """A kind of layer state that does not grow, such as that of a recurrence: no page can be shared or go back."""

    name = "recurrent"
    layers = ()
    page_bytes = 1
    token_bytes = 0

    def num_entries(self, length: int) -> int:
        return 1

    def num_pages(self, length: int) -> int:
        return 1

    def num_released(self, position: int) -> int:
        return 0

    def num_shared(self, length: int) -> int:
        return 0


class FakePipeline:
    """Steps run when they are queued, as on a device that works in order. Their ids are known when they are read."""

    def __init__(self, runner: FakeRunner) -> None:
        self.runner, self.queue = runner, deque[list[tuple[Sequence, int]]]()
        self.rows: dict[int, tuple[Sequence, list[int]]] = {}
        """What the device knows of each row: its sequence, and all ids with the one drawn last."""

    @property
    def num_queued(self) -> int:
        return len(self.queue)

    @property
    def is_full(self) -> bool:
        return len(self.queue) >= 2

    def may_wait(self, step: list[Scheduled]) -> bool:
        return self.runner.rng.random() < 0.1

    def launch(self, step: list[Scheduled], forks: dict[Sequence, list[Sequence]]) -> bool:
        runner, drawn = self.runner, []
        for entry in step:
            sequence = entry.sequence
            if sequence.row is None:
                assert not sequence.num_pending, "its ids are all known"
            else:
                assert self.rows[sequence.row][0] is sequence
                assert entry.count == 1
        runner.num_owners = Counter({sequence: 1 + len(own) for sequence, own in forks.items()})
        try:
            logits = runner.forward(step)
            runner.fail("sample")
        except BaseException:
            self.forget()
            raise
        for ids, first in zip(logits, [entry.sequence for entry in step if entry.samples], strict=True):
            drawn += [(s, ids, next_token(ids, s.seed, s.choice)) for s in (first, *forks.get(first, ()))]
        runner.counts["step with rows and others"] += len({s.row is None for s, *_ in drawn}) == 2
        self.forget()
        for row, (sequence, ids, token) in enumerate(drawn):
            sequence.row, sequence.num_pending = row, sequence.num_pending + 1
            self.rows[row] = sequence, [*ids, max(token, 0)]
        self.queue.append([(sequence, token) for sequence, _, token in drawn])
        return True

    def collect(self) -> list[Sampled]:
        self.runner.fail("collect")
        found = [(s, token) for s, token in self.queue.popleft() if s.finish_reason is None]
        for sequence, _ in found:
            sequence.num_pending -= 1
        return [Sampled(sequence, token, None) for sequence, token in found]

    def discard(self) -> None:
        self.queue.clear()
        self.forget()

    def forget(self) -> None:
        for row, (sequence, _) in self.rows.items():
            if sequence.row == row:
                sequence.row = None
        self.rows.clear()


class FakeRunner:
    """Pages hold the ids themselves, so that what a step reads can be compared with what it should.

    The page of a recurrent kind holds all ids that were put in, so that one which comes twice is found.
    """

    def __init__(
        self,
        kinds: list[Kind],
        num_pages: list[int],
        page_size: int,
        context: int,
        max_sequences: int,
        *,
        runs_ahead: bool = False,
    ) -> None:
        self.kinds, self.num_pages, self.vocab_size = kinds, num_pages, VOCABULARY
        self.page_size = page_size
        self.context, self.max_sequences = context, max_sequences
        self.pipeline = FakePipeline(self) if runs_ahead else None
        self.hooked = HookedPipelines(lambda edits: self.pipeline) if runs_ahead else None  # no sequence has hooks
        self.own_faults = ["collect"] * runs_ahead
        self.rng = random.Random(0)
        self.pages: list[list[list[int | None]]] = [
            [[] if isinstance(kind, Recurrent) else [UNWRITTEN] * kind.page_size for _ in range(count)]
            for kind, count in zip(kinds, num_pages, strict=True)
        ]
        self.running_before: list[Sequence] = []
        """Sequences that ran before the step: one that starts again may have one id to compute alone."""
        self.num_owners = Counter[Sequence]()
        """Of the pages of a prompt whose choices fork from the step under way, where they share them."""
        self.writers: dict[tuple[int, int], Sequence] = {}
        """Who wrote to a page last, by kind and page."""
        self.engine: Engine
        self.fault: tuple[str, type[BaseException]] | None = None
        self.counts: Counter[str] = Counter()
        self.step: list[tuple[list[int], list[list[int]], int]] = []
        """Ids, pages and computed ids of each sequence of the latest step, before it ran."""

    def fail(self, where: str) -> None:
        if self.fault and self.fault[0] == where:
            error, self.fault = self.fault[1], None
            self.counts["fault"] += 1
            raise error

    def copy_page(self, kind: int, source: int, target: int) -> None:
        self.fail("copy_page")
        self.pages[kind][target] = list(self.pages[kind][source])
        self.counts["copied page"] += 1

    def forward(
        self, step: list[Scheduled], *, rows: list[int] | None = None, hook: object = None
    ) -> list[tuple[int, ...]]:
        scheduler = self.engine.scheduler
        if rows is None:
            assert len({entry.sequence for entry in step}) == len(step)
            assert sum(entry.count for entry in step) <= scheduler.max_step_tokens
            for entry in step:
                assert entry.sequence in scheduler.running
                assert entry.sequence.num_computed == entry.start + (entry.count if self.pipeline else 0)
            prefill = [e for e in step if self._is_prompt(e)]
            if len(prefill) < len(step):
                assert sum(entry.count for entry in prefill) <= scheduler.max_prefill_tokens
                self.counts["mixed step"] += bool(prefill)
            self.step = [(list(self.ids_of(e.sequence)), [list(p) for p in e.sequence.pages], e.start) for e in step]
        self.fail("forward")
        for number, entry in enumerate(step):
            assert entry.count >= 1
            assert entry.start + entry.count <= len(self.ids_of(entry.sequence))
            for kind in range(len(self.kinds)):
                self._write(kind, entry)
            if number == len(step) // 2:
                self.fail("half of forward")
            self.counts["chunk"] += entry.start + entry.count < len(self.ids_of(entry.sequence))
        for entry in step:
            for kind in range(len(self.kinds)):
                self._read(kind, entry)
        return [tuple(self.ids_of(entry.sequence)) for entry in step if entry.samples]

    def run_blocks(self, step: list[Scheduled]) -> None:
        self.forward(step, rows=[])

    def ids_of(self, sequence: Sequence) -> list[int]:
        """The ids that a step computes from: the device's, where the sequence has a row there."""
        return sequence.ids if sequence.row is None else self.pipeline.rows[sequence.row][1]

    def _is_prompt(self, entry: Scheduled) -> bool:
        if entry.sequence.row is not None:
            return False
        return entry.count > 1 or entry.start < entry.sequence.num_prompt or entry.sequence not in self.running_before

    def _write(self, kind: int, entry: Scheduled) -> None:
        rule, pages, pool = self.kinds[kind], entry.sequence.pages[kind], self.engine.pools[kind]
        ids, end = self.ids_of(entry.sequence), entry.start + entry.count
        if isinstance(rule, Recurrent):
            assert pool.references(pages[0]) == 1
            state = self.pages[kind][pages[0]]
            if entry.start == 0:
                state.clear()
            assert state == ids[: entry.start], "each id is put in once"
            state += ids[entry.start : end]
            return
        size = rule.page_size  # type: ignore[attr-defined]
        assert len(pages) * size >= end
        for position in range(entry.start, end):
            page = pages[position // size]
            assert pool.references(page) in (1, self.num_owners[entry.sequence]), "a page that is written has one owner"
            assert not self._can_be_found(kind, page), "a page that can be found is not written"
            self.writers[kind, page] = entry.sequence
            self.pages[kind][page][position % size] = ids[position]

    def _can_be_found(self, kind: int, page: int) -> bool:
        """A page of a step that is queued may be held already; nobody finds it before an id is drawn behind it."""
        is_findable = self.engine.pools[kind].is_findable(page)
        if self.pipeline and is_findable and self.engine.prefix_cache:
            return self.engine.prefix_cache._of_page[kind][page].parent is not None
        return is_findable

    def _read(self, kind: int, entry: Scheduled) -> None:
        rule, pages = self.kinds[kind], entry.sequence.pages[kind]
        end = entry.start + entry.count
        if isinstance(rule, Recurrent):
            assert self.pages[kind][pages[0]] == self.ids_of(entry.sequence)[:end]
            return
        size, window = rule.page_size, getattr(rule, "window", end)  # type: ignore[attr-defined]
        first = max(entry.start + 1 - window, 0)
        seen = [self.pages[kind][pages[position // size]][position % size] for position in range(first, end)]
        assert seen == self.ids_of(entry.sequence)[first:end], "the pages hold the sequence's own ids"

    def check_shareable(self) -> None:
        """What a fork would share of the latest step's sequences is as it was, however far the step came."""
        for ids, lists, computed in self.step:
            for kind, (rule, pages) in enumerate(zip(self.kinds, lists, strict=True)):
                for index, page in enumerate(pages[: rule.num_shared(computed)]):
                    if page != self.engine.pools[kind].spare_page:
                        size = rule.page_size  # type: ignore[attr-defined]
                        assert self.pages[kind][page] == ids[index * size : (index + 1) * size]
                        self.counts["page that a failed step left"] += 1

    def sample(self, logits: list[tuple[int, ...]], rows: list[int], sequences: list[Sequence]) -> list[Sampled]:
        self.fail("sample")
        return [
            Sampled(s, next_token(logits[row], s.seed, s.choice), None) for row, s in zip(rows, sequences, strict=True)
        ]


def random_kinds(rng: random.Random, context: int, page_size: int, step_tokens: int) -> list[tuple[Kind, int]]:
    """Kinds of layer state with numbers of pages that hold at least one sequence."""
    shape = (0,), page_size, 1, 1, 4
    paged, recurrent = PagedKV(*shape), Recurrent()
    windows = [WindowKV(*shape, rng.randint(1, max(1, context // 3)), step_tokens) for _ in range(2)]
    mixed: list[list[Kind]] = [
        [paged],
        [paged, windows[0]],
        [paged, *windows],
        [windows[0]],
        [paged, windows[0], recurrent],
        [recurrent],
    ]
    return [(kind, kind.num_pages(context) + rng.randint(0, 5)) for kind in rng.choice(mixed)]


class Simulation:
    """An engine under random requests; `check` holds after every operation."""

    def __init__(self, rng: random.Random, *, runs_ahead: bool) -> None:
        page_size, max_sequences, max_step_tokens = rng.randint(1, 5), rng.randint(1, 6), rng.randint(1, 16)
        context = rng.randint(2, 12 * page_size)
        kinds = random_kinds(rng, context, page_size, max(max_step_tokens, max_sequences))
        counts = [count for _, count in kinds]
        sizes = page_size, context, max_sequences
        self.runner = FakeRunner([kind for kind, _ in kinds], counts, *sizes, runs_ahead=runs_ahead)
        self.engine = Engine(
            self.runner,  # type: ignore[arg-type]
            end_ids=frozenset([END_ID]),
            max_step_tokens=max_step_tokens,
            max_prefill_tokens=rng.choice([None, rng.randint(1, max_step_tokens)]),
            prefix_caching=rng.random() < 0.8,
        )
        self.runner.engine = self.engine
        self.sequences: list[Sequence] = []
        self.counts = self.runner.counts
        self.hit_tokens = self.num_evictions = 0
        self.samples: dict[Sequence, list[int]] = {}
        self.failed: set[Sequence] = set()
        self.states: list[Sequence] = []

    @property
    def unfinished(self) -> list[Sequence]:
        return [s for s in self.sequences if s.finish_reason is None]

    def add(self, rng: random.Random, origin: Sequence | None = None) -> None:
        if self.engine.context < 2 or len(self.unfinished) > 30:
            return
        params = SamplingParams(
            max_tokens=rng.choice([1, 2, 5, 20, None]),
            n=rng.choice([1, 1, 2, 3, 5]),
            seed=rng.randrange(2**64),
            ignore_eos=rng.random() < 0.5,
            stop_token_ids=[3] if rng.random() < 0.3 else [],
        )
        prompt = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, self.engine.context - 1))]
        if self.sequences and rng.random() < 0.7:  # it begins as an earlier prompt, or with its answer too
            earlier = rng.choice(self.sequences).ids[: self.engine.context - 1]
            count = len(earlier) if rng.random() < 0.3 else rng.randint(1, len(earlier))
            prompt = (earlier[:count] + prompt)[: max(count, rng.randint(1, self.engine.context - 1))]
        if origin:
            prompt = (origin.ids + prompt[: rng.randint(0, len(prompt))])[: self.engine.context - 1]
        added = self.engine.add(prompt, params, origin=origin)
        self.sequences += added
        self.samples.update((s, []) for s in added)
        self.counts["fork"] += params.n > 1

    def state(self, rng: random.Random) -> None:
        """A state begins, grows, goes back, is forked or closed, or a request goes on from it."""
        engine = self.engine
        if not can_share(self.runner.kinds, self.runner.page_size):
            return
        what = rng.choice(["prefill", "prefill", "extend", "fork", "close", "continue", "continue"])
        one = rng.choice(self.states) if self.states else None
        try:
            if what == "prefill" or one is None:
                self._compute([rng.randrange(VOCABULARY) for _ in range(rng.randint(1, engine.context))], None, rng)
            elif what == "extend" and len(one.ids) < engine.context:
                more = rng.randint(1, engine.context - len(one.ids))
                self._compute([*one.ids, *(rng.randrange(VOCABULARY) for _ in range(more))], one, rng)
            elif what == "fork":
                length = rng.randint(engine.scheduler.fewest_ids(one), len(one.ids))
                self.states.append(engine.fork_state(one, length))
                self.counts["state that went back"] += length < len(one.ids)
            elif what == "close":
                self._close(one)
            elif len(one.ids) < engine.context:
                self.add(rng, one)
                self.counts["request from a state"] += 1
        except OutOfMemoryError:
            self.counts["no room for a state"] += 1
            if self.states:
                self._close(rng.choice(self.states))

    def _compute(self, ids: list[int], origin: Sequence | None, rng: random.Random) -> None:
        job = job_of(ids, [len(ids) - 1], origin=origin)
        job.is_kept = True
        for _ in self.engine.run_jobs([job]):
            if rng.random() < 0.1:
                return
            if rng.random() < 0.3:
                self.step(rng)
        self.states.append(job.sequence)

    def _close(self, state: Sequence) -> None:
        """As the caller's last reference goes: not while requests go on from it."""
        if not any(sequence.origin is state for sequence in self.unfinished):
            self.states.remove(state)
            self.engine.scheduler.release(state)

    def step(self, rng: random.Random) -> None:
        if self.engine.is_held_up and not self.engine.scheduler.passes:  # its caller gets an error
            self.counts["request held up by states"] += 1
            self.engine.finish(next(iter(self.engine.scheduler.waiting)), "abort")
        before, unfinished = list(self.engine.scheduler.running), set(self.unfinished)
        self.runner.running_before = before
        starting = [s for s in self.engine.scheduler.waiting if self.samples[s]]
        for token in self.engine.step():
            assert token.sequence in unfinished
            self.samples[token.sequence].append(token.id)
        self.counts["preemption"] += sum(s in self.engine.scheduler.waiting for s in before)
        self.counts["preempted one that finds pages"] += sum(bool(s.prefix) for s in starting)
        if cache := self.engine.prefix_cache:
            self.counts["found token"] += cache.hit_tokens - self.hit_tokens
            self.counts["eviction"] += cache.num_evictions - self.num_evictions
            self.hit_tokens, self.num_evictions = cache.hit_tokens, cache.num_evictions
        self.counts["step"] += 1

    def faulty_step(self, rng: random.Random) -> None:
        self.runner.fault = (
            rng.choice(
                ["forward", "half of forward", "sample", "copy_page", *["collect"] * bool(self.runner.pipeline)]
            ),
            rng.choice([MemoryError, RuntimeError, KeyboardInterrupt]),
        )
        unfinished, running = self.unfinished, bool(self.engine.scheduler.running)
        self.runner.step = []  # passes have written to pages of the step before
        try:
            self.step(rng)
        except (MemoryError, RuntimeError, KeyboardInterrupt) as error:
            ended = {s for s in unfinished if s.finish_reason == "error"}
            assert ended or not running
            if isinstance(error, MemoryError) and ended:
                assert len({s.seed for s in ended}) == 1, "one prompt's choices end"
                assert not self.engine.scheduler.running
                self.counts["out of memory"] += 1
            self.failed |= ended
            self.runner.check_shareable()
        finally:
            self.runner.fault = None

    def abort(self, rng: random.Random) -> None:
        if self.unfinished:
            self.engine.finish(rng.choice(self.unfinished), rng.choice(["abort", "stop"]))
            self.counts["abort"] += 1

    def logits(self, rng: random.Random) -> None:
        """It borrows pages, and leaves its own ids in them."""
        if self.engine.context < 1:
            return
        ids = [VOCABULARY - 1] * rng.randint(1, self.engine.context)
        try:
            for _ in self.engine.logits(ids):
                self.counts["pass beside preempted ones"] += bool(self.engine.scheduler.waiting)
                if rng.random() < 0.3:
                    break
                if rng.random() < 0.3:
                    self.step(rng)
        except OutOfMemoryError:
            assert self.states, "requests give way"

    def drain(self) -> None:
        """Without new requests everything ends: the oldest sequence computes at least one id in every step."""
        for sequence in self.unfinished:
            if sequence.origin:
                self.engine.finish(sequence, "abort")
        for state in list(self.states):
            self._close(state)
        assert not self.engine.scheduler.states
        bound = sum(s.max_length + 1 for s in self.unfinished) + 2  # as many may be under way
        rng = random.Random(0)
        while self.engine.has_work:
            assert bound, "no progress"
            bound -= 1
            self.step(rng)
            self.check()
        assert not self.unfinished
        assert all(pool.num_free == pool.num_pages for pool in self.engine.pools)

    def check(self) -> None:
        engine, scheduler = self.engine, self.engine.scheduler
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        starting = [s for s, siblings in engine._siblings.items() if s is not siblings[0]]
        assert Counter([*running, *waiting, *starting]) == Counter(self.unfinished), "each in one place"
        assert len(running) <= scheduler.max_sequences

        assert list(scheduler.states) == self.states
        assert not scheduler.copies or self.runner.pipeline, "copies are made before the step"
        for kind in range(len(engine.pools)):
            self.check_pages(kind)
            for state in self.states:
                self.check_state(kind, state)

        for sequence in self.sequences:
            if sequence in running:
                assert 0 <= sequence.num_computed < sequence.num_tokens
                assert sequence.num_tokens <= sequence.max_length
                assert len(sequence.pages) == len(engine.pools)
            else:
                assert (sequence.pages, sequence.num_computed, sequence.prefix) == ([], 0, [])
            self.check_ids(sequence)
        if engine.prefix_cache:
            self.check_prefix_cache(engine.prefix_cache)

    def check_prefix_cache(self, cache: PrefixCache) -> None:
        """What can be found holds the ids by which it is found, and no failed sequence wrote it. Nothing is lost."""
        held = {node for sequence in self.unfinished for node in sequence.prefix}
        found = 0
        stack: list[tuple[CachedPage, list[int]]] = [(cache._root, [])]
        while stack:
            node, before = stack.pop()
            ids = before + array("i", node.key).tolist()
            for kind, page in enumerate(node.pages):
                if page is not None:
                    found += 1
                    assert cache._of_page[kind][page] is node
                    assert self.runner.pages[kind][page] == ids[len(before) :]
                    writer = self.runner.writers[kind, page]
                    assert writer.finish_reason != "error"
                    assert writer.ids[: len(ids)] == ids, "what lies before it decides what a page holds"
            for key, child in node.children.items():
                assert (child.parent, child.key) == (node, key)
                stack.append((child, ids))
            assert node.children or node in held or node is cache._root or any(p is not None for p in node.pages)
        waiting_for_logits = sum(page is not None for node in held if node.parent is None for page in node.pages)
        assert sum(map(len, cache._of_page)) == found + waiting_for_logits
        for pool, pages in zip(self.engine.pools, cache._of_page, strict=True):
            owned = {page for page in range(pool.num_pages) if pool.references(page)}
            assert pool._findable == pages.keys()
            assert pool._unowned.keys() == pages.keys() - owned
            free = {page for page in range(pool.num_pages) if pool._is_free[page]}
            assert free == set(range(pool.num_pages)) - owned - pages.keys()
            assert pool._num_free == len(free)

    def check_pages(self, kind: int) -> None:
        """No page is owned twice, none is lost, and what was released is never needed again."""
        pool, rule = self.engine.pools[kind], self.runner.kinds[kind]
        owners: dict[int, list[tuple[int, Sequence]]] = {}
        for sequence in (*self.sequences, *self.states):
            if not sequence.pages:
                continue
            pages = sequence.pages[kind]
            assert rule.num_entries(sequence.num_computed) <= len(pages)
            released = pages.count(pool.spare_page)
            assert pages[:released] == [pool.spare_page] * released
            assert released <= rule.num_released(min(sequence.num_computed, sequence.num_tokens - 1))
            assert len(pages) - released <= rule.num_pages(sequence.max_length)
            self.counts["released page"] += released
            for index, page in enumerate(pages[released:], released):
                owners.setdefault(page, []).append((index, sequence))
        assert [pool.references(page) for page in range(pool.num_pages)] == [
            len(owners.get(page, ())) for page in range(pool.num_pages)
        ]
        assert pool.num_free + len(owners) == pool.num_pages
        for page, held in owners.items():
            if len(held) > 1:
                self.counts["shared page"] += 1
                first_index, first = held[0]
                assert not isinstance(rule, Recurrent), f"page {page} changes in every step and is shared"
                end = (first_index + 1) * rule.page_size  # type: ignore[attr-defined]
                for index, sequence in held:
                    assert index == first_index
                    assert end <= sequence.num_computed, f"page {page} is shared before it is full"
                    assert sequence.ids[:end] == first.ids[:end]

    def check_state(self, kind: int, state: Sequence) -> None:
        """Its pages hold what is read behind its last id but one."""
        size, pages = self.runner.page_size, state.pages[kind]
        first = self.runner.kinds[kind].num_released(len(state.ids) - 1) * size
        held = [self.runner.pages[kind][pages[p // size]][p % size] for p in range(first, len(state.ids))]
        assert held == state.ids[first:]
        assert state.num_computed == len(state.ids)

    def check_ids(self, sequence: Sequence) -> None:
        """Ids and end are the model's, whatever else ran."""
        params, reason = sequence.params, sequence.finish_reason
        assert len(sequence.ids) <= sequence.max_length <= self.engine.context
        samples = self.samples[sequence]
        ends = {*params.stop_token_ids, *(() if params.ignore_eos else self.engine.end_ids), -1}
        ended = samples[-1:] and samples[-1] in ends
        assert sequence.completion == (samples[:-1] if ended else samples)
        assert not ends.intersection(sequence.completion)
        if len(samples) > 0:  # the earlier ones were checked in the steps before
            before = tuple(sequence.ids[: sequence.num_prompt + len(samples) - 1])
            assert samples[-1] == next_token(before, sequence.seed, sequence.choice)
        if ended:
            assert reason == ("error" if samples[-1] < 0 else "stop")
        elif len(sequence.ids) == sequence.max_length:
            assert reason == "length"
        else:
            assert reason in (None, "abort", "stop") or (reason == "error" and sequence in self.failed)


STEP = [("step", 0)]
OPERATIONS = ["step"] * 12 + ["add"] * 3 + ["abort", "faulty_step", "logits", "state"]


def simulate(
    operations: list[tuple[str, int]],
    seed: int,
    sabotage: Callable[[Simulation], None] = lambda _: None,
    *,
    runs_ahead: bool = False,
) -> Counter[str]:
    simulation = Simulation(random.Random(seed), runs_ahead=runs_ahead)
    sabotage(simulation)
    for name, number in operations:
        getattr(simulation, name)(random.Random(number))
        simulation.check()
    simulation.drain()
    return simulation.counts


def random_operations(seed: int, count: int) -> Iterator[tuple[str, int]]:
    rng = random.Random(seed)
    for _ in range(count):
        yield rng.choice(OPERATIONS), rng.randrange(2**32)


@pytest.mark.slow
@pytest.mark.parametrize("runs_ahead", [False, True], ids=["waits for ids", "runs ahead"])
def test_ten_thousand_random_operations_keep_the_invariants(runs_ahead: bool) -> None:
    counts: Counter[str] = Counter()
    for seed in range(80):
        counts += simulate(list(random_operations(seed, 180)), seed, runs_ahead=runs_ahead)
    assert counts["step"] >= 7000
    events = "preemption", "fork", "shared page", "copied page", "released page", "abort", "fault", "chunk"
    found = "found token", "eviction", "preempted one that finds pages"
    for event in (
        *events,
        *found,
        "mixed step",
        "out of memory",
        "pass beside preempted ones",
        "page that a failed step left",
        *["step with rows and others"] * runs_ahead,
    ):
        assert counts[event] >= 100, f"the simulation must meet this often: {event} {counts}"
    for event in ("state that went back", "request from a state", "request held up by states", "no room for a state"):
        assert counts[event] >= 10, f"the simulation must meet this: {event} {counts}"


FORK_OF_FAILED = [
    ("add", 162),
    *STEP * 2,
    ("add", 174),
    *STEP * 2,
    ("add", 362),
    *STEP * 2,
    ("abort", 0),
    *STEP,
    ("add", 79268),
]
"""A prompt finds pages of another that then fails, and is forked."""


@example(FORK_OF_FAILED, 2616935, False)
@example(FORK_OF_FAILED, 2616935, True)
@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**32)), min_size=20, max_size=120),
    st.integers(0, 2**32),
    st.booleans(),
)
def test_invariants_hold_for_any_operations(operations: list[tuple[str, int]], seed: int, runs_ahead: bool) -> None:
    simulate(operations, seed, runs_ahead=runs_ahead)


def _leak(simulation: Simulation) -> None:
    """A release forgets the last page."""
    for pool in simulation.engine.pools:
        release = pool.release
        pool.release = lambda pages, release=release: release(list(pages)[:-1])  # type: ignore[method-assign, misc]


def _allocate_twice(simulation: Simulation) -> None:
    """An allocated page stays on the free list."""
    pool = simulation.engine.pools[-1]
    allocate = pool.allocate

    def faulty(count: int, after: int | None = None) -> list[int] | None:
        pages = allocate(count, after)
        for page in (pages or [])[:1]:
            pool._free(page)
        return pages

    pool.allocate = faulty  # type: ignore[method-assign]


def _share_without_counting(simulation: Simulation) -> None:
    for pool in simulation.engine.pools:
        pool.share = lambda pages: None  # type: ignore[method-assign]


def _no_copy(simulation: Simulation) -> None:
    """A forked sequence's last page is left as it was."""
    simulation.runner.copy_page = lambda kind, source, target: None  # type: ignore[method-assign]


def _share_unfinished_page(simulation: Simulation) -> None:
    scheduler = simulation.engine.scheduler

    def fork(parent: Sequence, child: Sequence) -> list[tuple[int, int, int]]:
        if len(scheduler.running) >= scheduler.max_sequences:
            scheduler.waiting[child] = None
            return []
        for pool, pages in zip(scheduler.pools, parent.pages, strict=True):
            pool.share(pool.held(pages))
        child.pages, child.num_computed = [list(pages) for pages in parent.pages], parent.num_computed
        scheduler.running.append(child)
        return []

    scheduler.fork = fork  # type: ignore[method-assign]


def _commit_too_much(simulation: Simulation) -> None:
    scheduler = simulation.engine.scheduler
    commit = scheduler.commit

    def faulty(step: list[Scheduled]) -> None:
        commit(step)
        step[0].sequence.num_computed += 1

    scheduler.commit = faulty  # type: ignore[method-assign]


def _lose_the_preempted(simulation: Simulation) -> None:
    scheduler = simulation.engine.scheduler
    make_room = scheduler._make_room

    def faulty(sequence: Sequence, length: int) -> bool:
        waiting = list(scheduler.waiting)
        fits = make_room(sequence, length)
        scheduler.waiting.clear()
        scheduler.waiting.update(dict.fromkeys(waiting))
        return fits

    scheduler._make_room = faulty  # type: ignore[method-assign]


def _keep_what_was_computed(simulation: Simulation) -> None:
    """A preempted sequence believes that its ids are still in the cache."""
    scheduler = simulation.engine.scheduler
    drop = scheduler._drop_pages

    def faulty(sequence: Sequence, *, failed: bool = False) -> None:
        computed = sequence.num_computed
        drop(sequence, failed=failed)
        sequence.num_computed = computed

    scheduler._drop_pages = faulty  # type: ignore[method-assign]


def _exceed_the_budget(simulation: Simulation) -> None:
    schedule = simulation.engine.scheduler.schedule

    def faulty(**options: bool) -> list[Scheduled]:
        scheduler = simulation.engine.scheduler
        scheduler.max_step_tokens += 5
        try:
            return schedule(**options)
        finally:
            scheduler.max_step_tokens -= 5

    simulation.engine.scheduler.schedule = faulty  # type: ignore[method-assign]


def _exceed_the_prompt_tokens(simulation: Simulation) -> None:
    schedule = simulation.engine.scheduler.schedule

    def faulty(**options: bool) -> list[Scheduled]:
        scheduler = simulation.engine.scheduler
        most, scheduler.max_prefill_tokens = scheduler.max_prefill_tokens, 1000
        try:
            return schedule(**options)
        finally:
            scheduler.max_prefill_tokens = most

    simulation.engine.scheduler.schedule = faulty  # type: ignore[method-assign]


def _never_admit(simulation: Simulation) -> None:
    """Nothing starts: the checks of progress must see it."""
    simulation.engine.scheduler._start = lambda sequence: False  # type: ignore[method-assign]


def _release_a_page_too_early(simulation: Simulation) -> None:
    """The oldest position of a window is gone."""
    for pool in simulation.engine.pools:
        release_before = pool.release_before
        pool.release_before = lambda pages, position, release=release_before, pool=pool: release(  # type: ignore
            pages, position + pool.kind.num_pages(1)
        )


def _do_not_tell_of_reuse(simulation: Simulation) -> None:
    for pool in simulation.engine.pools:
        pool.on_reuse = lambda page: None


def _find_what_failed(simulation: Simulation) -> None:
    if cache := simulation.engine.prefix_cache:
        leave = cache.leave
        cache.leave = lambda sequence, *, failed=False: leave(sequence)  # type: ignore[method-assign]


def _find_before_logits_are_known(simulation: Simulation) -> None:
    if cache := simulation.engine.prefix_cache:
        hold = cache.hold

        def enter_too(sequence: Sequence, length: int) -> None:
            hold(sequence, length)
            for parent, node in zip([cache._root, *sequence.prefix], sequence.prefix, strict=False):
                node.parent = node.parent or parent
                parent.children.setdefault(node.key, node)

        cache.hold = enter_too  # type: ignore[method-assign]


def _find_windows_with_gaps(simulation: Simulation) -> None:
    if cache := simulation.engine.prefix_cache:
        pools = simulation.engine.pools
        cache._num_released = lambda count: [count if pool.kind.num_released(99) else 0 for pool in pools]  # type: ignore


def _find_all_ids(simulation: Simulation) -> None:
    """None is left to compute."""
    if cache := simulation.engine.prefix_cache:
        walk = cache._walk
        cache._walk = lambda sequence, most: walk(sequence, most + 1)  # type: ignore[method-assign]


def _find_by_a_page_alone(simulation: Simulation) -> None:
    """Whatever lies before it."""
    if cache := simulation.engine.prefix_cache:
        keys = cache._keys
        cache._keys = lambda sequence, count: [keys(sequence, count)[-1]] * count if count else []  # type: ignore


def _keep_pages_out_of_reach(simulation: Simulation) -> None:
    for pool in simulation.engine.pools:
        pool.release_before = lambda pages, position: None  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "sabotage",
    [
        _do_not_tell_of_reuse,
        _find_what_failed,
        _find_before_logits_are_known,
        _find_windows_with_gaps,
        _find_all_ids,
        _find_by_a_page_alone,
        _release_a_page_too_early,
        _keep_pages_out_of_reach,
        _leak,
        _allocate_twice,
        _share_without_counting,
        _no_copy,
        _share_unfinished_page,
        _commit_too_much,
        _lose_the_preempted,
        _keep_what_was_computed,
        _exceed_the_budget,
        _exceed_the_prompt_tokens,
        _never_admit,
    ],
)
def test_the_checks_catch_a_fault(sabotage: Callable[[Simulation], None]) -> None:
    caught = 0
    for seed in range(24):
        try:
            simulate(list(random_operations(seed, 120)), seed, sabotage)
        except (AssertionError, ValueError, KeyError, IndexError, OutOfMemoryError):
            caught += 1
        if caught == 3:
            return
    pytest.fail(f"caught {caught} times, at least 3 of 24 are needed")


# The scheduler by hand.


def sequence(length: int, max_length: int = 100) -> Sequence:
    return Sequence(0, list(range(length)), length, SamplingParams(), 0, max_length)


def scheduler(num_pages: int = 100, page_size: int = 4, max_sequences: int = 8, max_step_tokens: int = 16) -> Scheduler:
    return Scheduler([PagePool(paged(page_size), num_pages)], max_sequences, max_step_tokens)


def paged(page_size: int = 4) -> PagedKV:
    return PagedKV((0,), page_size, 1, 1, 4)


def run(scheduler: Scheduler) -> list[tuple[Sequence, int, int]]:
    """One step in which every sequence that reaches its end gets another id."""
    step = scheduler.schedule()
    ending = [entry.sequence for entry in step if entry.samples]
    scheduler.commit(step)
    for one in ending:
        one.ids.append(0)
    return [(entry.sequence, entry.start, entry.count) for entry in step]


def test_a_long_prompt_is_cut_into_chunks_and_decoding_goes_on_beside_it() -> None:
    s = scheduler(max_step_tokens=10)
    short, long = sequence(3), sequence(25)
    s.add(short)
    assert run(s) == [(short, 0, 3)]
    s.add(long)
    assert run(s) == [(short, 3, 1), (long, 0, 9)]
    assert run(s) == [(short, 4, 1), (long, 9, 9)]
    assert run(s) == [(short, 5, 1), (long, 18, 7)]
    assert run(s) == [(short, 6, 1), (long, 25, 1)]


def test_requests_start_in_their_order_and_no_more_than_allowed_run() -> None:
    s = scheduler(max_sequences=2, max_step_tokens=6)
    first, second, third = sequence(4), sequence(8), sequence(1)
    for one in (first, second, third):
        s.add(one)
    assert run(s) == [(first, 0, 4), (second, 0, 2)]
    assert run(s) == [(first, 4, 1), (second, 2, 5)]
    s.finish(first, "stop")
    assert run(s) == [(second, 7, 1), (third, 0, 1)]


def test_a_sequence_that_does_not_fit_is_not_overtaken() -> None:
    s = scheduler(num_pages=4)
    first, large, small = sequence(8, 16), sequence(12, 16), sequence(1, 16)
    for one in (first, large, small):
        s.add(one)
    assert run(s) == [(first, 0, 8)]
    assert list(s.waiting) == [large, small]


def test_the_youngest_gives_way_and_comes_back_first() -> None:
    s = scheduler(num_pages=4)
    first, second, third = sequence(8, 16), sequence(4, 16), sequence(4, 16)
    for one in (first, second, third):
        s.add(one)
    assert [entry[0] for entry in run(s)] == [first, second, third]
    assert s.pools[0].num_free == 0
    # Each needs one more page: the first takes the third's; then the second has nobody to take one from but itself.
    assert run(s) == [(first, 8, 1)]
    assert list(s.waiting) == [second, third]
    s.finish(first, "stop")
    assert run(s) == [(second, 0, 5), (third, 0, 5)]


def test_a_fork_shares_full_pages_and_gets_a_copy_of_the_last() -> None:
    s = scheduler()
    parent, child = sequence(10), sequence(10)
    s.add(parent)
    s.commit(s.schedule())
    [(kind, source, target)] = s.fork(parent, child)
    (pages,), (copies,) = parent.pages, child.pages
    assert (kind, source, target) == (0, pages[2], copies[2])
    assert source != target
    assert pages[:2] == copies[:2]
    assert [s.pools[0].references(page) for page in pages] == [2, 2, 1]
    assert child.num_computed == 10


def test_a_fork_at_a_page_border_copies_nothing() -> None:
    s = scheduler()
    parent, child = sequence(8), sequence(8)
    s.add(parent)
    s.commit(s.schedule())
    assert s.fork(parent, child) == []
    assert child.pages == parent.pages
    assert child in s.running


@pytest.mark.parametrize("limits", [{"num_pages": 3}, {"max_sequences": 1}])
def test_a_fork_without_room_waits_and_holds_nothing(limits: dict[str, int]) -> None:
    s = scheduler(**limits)
    parent, child = sequence(10, 12), sequence(10, 12)
    s.add(parent)
    s.commit(s.schedule())
    free = s.pools[0].num_free
    assert s.fork(parent, child) == []
    assert list(s.waiting) == [child]
    assert (child.pages, child.num_computed, s.pools[0].num_free) == ([], 0, free)


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="never fit"):
        scheduler(num_pages=2).add(sequence(4, 9))


def test_a_step_without_work_is_empty() -> None:
    assert scheduler().schedule() == []


# Steps that are queued before the ids of those ahead are known


def decoding_sequences(s: Scheduler, *lengths: int, max_length: int = 100) -> list[Sequence]:
    """Sequences whose prompts are computed, with one id behind them."""
    found = [sequence(length, max_length) for length in lengths]
    for one in found:
        s.add(one)
    run(s)
    return found


def queued(s: Scheduler) -> list[tuple[Sequence, int, int]]:
    """The next step as (sequence, start, count), queued behind others: its ids are under way."""
    step = s.schedule(may_preempt=False)
    sampling = [entry.sequence for entry in step if entry.samples]
    s.commit(step)
    for row, one in enumerate(sampling):
        one.num_pending, one.row = one.num_pending + 1, row
    return [(entry.sequence, entry.start, entry.count) for entry in step]


def test_a_prompt_joins_the_steps_of_those_whose_ids_are_under_way() -> None:
    s = scheduler(max_sequences=3)
    first, second = decoding_sequences(s, 3, 4)
    assert queued(s) == [(first, 3, 1), (second, 4, 1)]
    s.add(third := sequence(5))
    assert queued(s) == [(first, 4, 1), (second, 5, 1), (third, 0, 5)]
    assert queued(s) == [(first, 5, 1), (second, 6, 1), (third, 5, 1)]


def test_a_sequence_whose_last_id_is_under_way_does_not_go_on_and_holds_its_pages() -> None:
    s = scheduler(max_sequences=2)
    short, long = decoding_sequences(s, 3, 3)
    short.max_length = 5
    assert queued(s) == [(short, 3, 1), (long, 3, 1)]
    assert queued(s) == [(long, 4, 1)]
    assert (len(short.pages[0]), len(long.pages[0])) == (1, 2)


def test_an_id_under_way_that_no_row_holds_is_waited_for() -> None:
    s = scheduler(max_sequences=2)
    first, second = decoding_sequences(s, 3, 3)
    queued(s)
    first.row = None
    assert queued(s) == [(second, 4, 1)]
    first.ids.append(0)
    first.num_pending = 0
    assert queued(s) == [(first, 4, 1), (second, 5, 1)]


def test_a_step_is_not_queued_where_somebody_would_lose_its_pages() -> None:
    s = scheduler(num_pages=2)
    running = decoding_sequences(s, 3, 3, max_length=8)
    assert [one for one, *_ in queued(s)] == running
    assert queued(s) == []
    assert s.running == running
    for one in running:
        one.ids.append(0)
        one.num_pending, one.row = 0, None
    assert [entry.sequence for entry in s.schedule()] == running[:1]
    assert list(s.waiting) == running[1:]


def test_a_preempted_sequence_starts_again_when_its_ids_are_known() -> None:
    s = scheduler(max_sequences=2)
    first, second = decoding_sequences(s, 3, 3)
    queued(s)
    assert s.preempt() is second
    assert (second.row, second.num_pending) == (None, 1)
    assert queued(s) == [(first, 4, 1)]
    second.ids.append(0)
    second.num_pending = 0
    assert queued(s) == [(first, 5, 1), (second, 0, 5)]
