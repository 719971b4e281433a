"""Scheduler, block manager and the engine's bookkeeping, with a fake model that checks every page it touches."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forge.config import SamplingParams
from forge.engine import Engine, Sampled, Sequence
from forge.engine.page_allocator import PageAllocator
from forge.engine.scheduler import Scheduled, Scheduler
from forge.errors import OutOfMemoryError

VOCABULARY = 40
END_ID = 7
UNWRITTEN = None


def next_token(ids: tuple[int, ...], seed: int, choice: int) -> int:
    """The fake model: what follows depends on every id before, the seed and the choice. -1 stands for a NaN."""
    token = hash((ids, seed, choice, len(ids))) % (VOCABULARY + 1)
    return -1 if token == VOCABULARY else token


class FakeRunner:
    """Pages hold the ids themselves, so that what a step reads can be compared with what it should."""

    def __init__(self, num_pages: int, page_size: int, context: int, max_sequences: int) -> None:
        self.num_pages, self.page_size, self.vocab_size = num_pages, page_size, VOCABULARY
        self.context, self.max_sequences = context, max_sequences
        self.can_queue, self.num_queued = False, 0
        self.slots: list[int | None] = [UNWRITTEN] * (num_pages * page_size)
        self.engine: Engine
        self.fault: tuple[str, type[BaseException]] | None = None
        self.counts: Counter[str] = Counter()

    def _fail(self, where: str) -> None:
        if self.fault and self.fault[0] == where:
            error, self.fault = self.fault[1], None
            self.counts["fault"] += 1
            raise error

    def copy_page(self, source: int, target: int) -> None:
        size = self.page_size
        self.slots[target * size : target * size + size] = self.slots[source * size : source * size + size]
        self.counts["copied page"] += 1

    def forward(self, step: list[Scheduled], *, all_logits: bool = False, hook: object = None) -> list[tuple[int, ...]]:
        blocks, scheduler, size = self.engine.blocks, self.engine.scheduler, self.page_size
        if not all_logits:
            assert len({entry.sequence for entry in step}) == len(step)
            assert sum(entry.count for entry in step) <= scheduler.max_step_tokens
            for entry in step:
                assert entry.sequence in scheduler.running
                assert entry.start == entry.sequence.num_computed
        self._fail("forward")
        for number, entry in enumerate(step):
            assert entry.count >= 1
            assert entry.start + entry.count <= len(entry.sequence.ids)
            assert len(entry.sequence.pages) * size >= entry.start + entry.count
            for position in range(entry.start, entry.start + entry.count):
                page = entry.sequence.pages[position // size]
                assert blocks.references(page) == 1, "a page that is written has one owner"
                self.slots[page * size + position % size] = entry.sequence.ids[position]
            if number == len(step) // 2:
                self._fail("half of forward")
            self.counts["chunk"] += entry.start + entry.count < len(entry.sequence.ids)
        rows = []
        for entry in step:
            seen = tuple(
                self.slots[entry.sequence.pages[position // size] * size + position % size]
                for position in range(entry.start + entry.count)
            )
            assert seen == tuple(entry.sequence.ids[: len(seen)]), "the pages hold the sequence's own ids"
            if entry.samples:
                rows.append(seen)
        return rows

    def sample(self, logits: list[tuple[int, ...]], rows: list[int], sequences: list[Sequence]) -> list[Sampled]:
        self._fail("sample")
        return [
            Sampled(s, next_token(logits[row], s.seed, s.choice), None) for row, s in zip(rows, sequences, strict=True)
        ]


class Simulation:
    """An engine under random requests; `check` holds after every operation."""

    def __init__(self, rng: random.Random) -> None:
        num_pages, page_size = rng.randint(2, 12), rng.randint(1, 5)
        context = min(rng.randint(2, max(2, num_pages * page_size)), num_pages * page_size)
        self.runner = FakeRunner(num_pages, page_size, context, max_sequences=rng.randint(1, 6))
        self.engine = Engine(
            self.runner,  # type: ignore[arg-type]
            end_ids=frozenset([END_ID]),
            max_step_tokens=rng.randint(1, 16),
        )
        self.runner.engine = self.engine
        self.sequences: list[Sequence] = []
        self.counts = self.runner.counts
        self.samples: dict[Sequence, list[int]] = {}

    @property
    def unfinished(self) -> list[Sequence]:
        return [s for s in self.sequences if s.finish_reason is None]

    def add(self, rng: random.Random) -> None:
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
        added = self.engine.add(prompt, params)
        self.sequences += added
        self.samples.update((s, []) for s in added)
        self.counts["fork"] += params.n > 1

    def step(self, rng: random.Random) -> None:
        before, unfinished = list(self.engine.scheduler.running), set(self.unfinished)
        for token in self.engine.step():
            assert token.sequence in unfinished
            self.samples[token.sequence].append(token.id)
        self.counts["preemption"] += sum(s in self.engine.scheduler.waiting for s in before)
        self.counts["step"] += 1

    def faulty_step(self, rng: random.Random) -> None:
        self.runner.fault = (
            rng.choice(["forward", "half of forward", "sample"]),
            rng.choice([MemoryError, KeyboardInterrupt]),
        )
        try:
            self.step(rng)
        except (MemoryError, KeyboardInterrupt):
            pass
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
        for _ in self.engine.logits(ids):
            self.counts["pass beside preempted ones"] += self.engine.is_held_up
            if rng.random() < 0.3:
                break
            if rng.random() < 0.3:
                self.step(rng)

    def drain(self) -> None:
        """Without new requests everything ends: the oldest sequence computes at least one id in every step."""
        bound = sum(s.max_length + 1 for s in self.unfinished)
        rng = random.Random(0)
        while self.engine.has_work:
            assert bound, "no progress"
            bound -= 1
            self.step(rng)
            self.check()
        assert not self.unfinished
        assert self.engine.blocks.num_free == self.engine.blocks.num_pages

    def check(self) -> None:
        engine, scheduler, blocks, size = self.engine, self.engine.scheduler, self.engine.blocks, self.runner.page_size
        running, waiting = list(scheduler.running), list(scheduler.waiting)
        starting = [s for siblings in engine._siblings.values() for s in siblings]
        assert Counter([*running, *waiting, *starting]) == Counter(self.unfinished), "each in one place"
        assert len(running) <= scheduler.max_sequences

        owners: dict[int, list[tuple[int, Sequence]]] = {}
        for sequence in self.sequences:
            for index, page in enumerate(sequence.pages):
                owners.setdefault(page, []).append((index, sequence))
        assert [blocks.references(page) for page in range(blocks.num_pages)] == [
            len(owners.get(page, ())) for page in range(blocks.num_pages)
        ]
        assert blocks.num_free + len(owners) == blocks.num_pages
        for page, held in owners.items():
            if len(held) > 1:
                self.counts["shared page"] += 1
                first_index, first = held[0]
                end = (first_index + 1) * size
                for index, sequence in held:
                    assert index == first_index
                    assert end <= sequence.num_computed, f"page {page} is shared before it is full"
                    assert sequence.ids[:end] == first.ids[:end]

        for sequence in self.sequences:
            if sequence in running:
                assert 0 <= sequence.num_computed < len(sequence.ids)
                assert sequence.num_computed <= len(sequence.pages) * size
            else:
                assert (sequence.pages, sequence.num_computed) == ([], 0)
            self.check_ids(sequence)

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
            assert reason in (None, "abort", "stop")


OPERATIONS = ["step"] * 12 + ["add"] * 3 + ["abort", "faulty_step", "logits"]


def simulate(
    operations: list[tuple[str, int]], seed: int, sabotage: Callable[[Simulation], None] = lambda _: None
) -> Counter[str]:
    simulation = Simulation(random.Random(seed))
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


def test_ten_thousand_random_operations_keep_the_invariants() -> None:
    counts: Counter[str] = Counter()
    for seed in range(60):
        counts += simulate(list(random_operations(seed, 180)), seed)
    assert counts["step"] >= 7000
    events = "preemption", "fork", "shared page", "copied page", "abort", "fault", "chunk", "pass beside preempted ones"
    for event in events:
        assert counts[event] >= 100, f"the simulation must meet this often: {event} {counts}"


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(OPERATIONS), st.integers(0, 2**32)), min_size=20, max_size=120),
    st.integers(0, 2**32),
)
def test_invariants_hold_for_any_operations(operations: list[tuple[str, int]], seed: int) -> None:
    simulate(operations, seed)


def _leak(simulation: Simulation) -> None:
    """A release forgets the last page."""
    release = simulation.engine.blocks.release
    simulation.engine.blocks.release = lambda pages: release(list(pages)[:-1])  # type: ignore[method-assign]


def _allocate_twice(simulation: Simulation) -> None:
    """An allocated page stays on the free list."""
    blocks = simulation.engine.blocks
    allocate = blocks.allocate

    def faulty(count: int, after: int | None = None) -> list[int] | None:
        pages = allocate(count, after)
        blocks._free.update((pages or [])[:1])
        return pages

    blocks.allocate = faulty  # type: ignore[method-assign]


def _share_without_counting(simulation: Simulation) -> None:
    simulation.engine.blocks.share = lambda pages: None  # type: ignore[method-assign]


def _no_copy(simulation: Simulation) -> None:
    """A forked sequence's last page is left as it was."""
    simulation.runner.copy_page = lambda source, target: None  # type: ignore[method-assign]


def _share_unfinished_page(simulation: Simulation) -> None:
    scheduler, blocks = simulation.engine.scheduler, simulation.engine.blocks

    def fork(parent: Sequence, child: Sequence) -> None:
        if len(scheduler.running) >= scheduler.max_sequences:
            scheduler.waiting.append(child)
            return
        blocks.share(parent.pages)
        child.pages, child.num_computed = list(parent.pages), parent.num_computed
        scheduler.running.append(child)

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
        scheduler.waiting.extend(waiting)
        return fits

    scheduler._make_room = faulty  # type: ignore[method-assign]


def _keep_what_was_computed(simulation: Simulation) -> None:
    """A preempted sequence believes that its ids are still in the cache."""
    scheduler = simulation.engine.scheduler
    drop = scheduler._drop_pages

    def faulty(sequence: Sequence) -> None:
        computed = sequence.num_computed
        drop(sequence)
        sequence.num_computed = computed

    scheduler._drop_pages = faulty  # type: ignore[method-assign]


def _exceed_the_budget(simulation: Simulation) -> None:
    schedule = simulation.engine.scheduler.schedule

    def faulty() -> list[Scheduled]:
        scheduler = simulation.engine.scheduler
        scheduler.max_step_tokens += 5
        try:
            return schedule()
        finally:
            scheduler.max_step_tokens -= 5

    simulation.engine.scheduler.schedule = faulty  # type: ignore[method-assign]


def _never_admit(simulation: Simulation) -> None:
    """Nothing starts: the checks of progress must see it."""
    grow = simulation.engine.scheduler._grow
    simulation.engine.scheduler._grow = (  # type: ignore[method-assign]
        lambda sequence, length: sequence.num_computed > 0 and grow(sequence, length)
    )


def _commit_before_sampling(simulation: Simulation) -> None:
    """An interrupted draw leaves a sequence with nothing to compute: it would never run again."""
    runner, scheduler = simulation.runner, simulation.engine.scheduler
    forward = runner.forward

    def faulty(step: list[Scheduled], **options: object) -> object:
        rows = forward(step, **options)  # type: ignore[arg-type]
        if not options:
            scheduler.commit(step)
        return rows

    runner.forward = faulty  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "sabotage",
    [
        _leak,
        _allocate_twice,
        _share_without_counting,
        _no_copy,
        _share_unfinished_page,
        _commit_too_much,
        _lose_the_preempted,
        _keep_what_was_computed,
        _exceed_the_budget,
        _never_admit,
        _commit_before_sampling,
    ],
)
def test_the_checks_catch_a_fault(sabotage: Callable[[Simulation], None]) -> None:
    caught = 0
    for seed in range(8):
        try:
            simulate(list(random_operations(seed, 120)), seed, sabotage)
        except (AssertionError, ValueError, KeyError, IndexError, OutOfMemoryError):
            caught += 1
    assert caught >= 3


# The scheduler by hand.


def sequence(length: int, max_length: int = 100) -> Sequence:
    return Sequence(0, list(range(length)), length, SamplingParams(), 0, max_length)


def scheduler(num_pages: int = 100, page_size: int = 4, max_sequences: int = 8, max_step_tokens: int = 16) -> Scheduler:
    return Scheduler(PageAllocator(num_pages), page_size, max_sequences, max_step_tokens)


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
    assert s.blocks.num_free == 0
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
    source, target = s.fork(parent, child)  # type: ignore[misc]
    assert (source, target) == (parent.pages[2], child.pages[2])
    assert source != target
    assert parent.pages[:2] == child.pages[:2]
    assert [s.blocks.references(page) for page in parent.pages] == [2, 2, 1]
    assert child.num_computed == 10


def test_a_fork_at_a_page_border_copies_nothing() -> None:
    s = scheduler()
    parent, child = sequence(8), sequence(8)
    s.add(parent)
    s.commit(s.schedule())
    assert s.fork(parent, child) is None
    assert child.pages == parent.pages
    assert child in s.running


@pytest.mark.parametrize("limits", [{"num_pages": 3}, {"max_sequences": 1}])
def test_a_fork_without_room_waits_and_holds_nothing(limits: dict[str, int]) -> None:
    s = scheduler(**limits)
    parent, child = sequence(10, 12), sequence(10, 12)
    s.add(parent)
    s.commit(s.schedule())
    free = s.blocks.num_free
    assert s.fork(parent, child) is None
    assert list(s.waiting) == [child]
    assert (child.pages, child.num_computed, s.blocks.num_free) == ([], 0, free)


def test_what_never_fits_is_refused() -> None:
    with pytest.raises(ValueError, match="never fit"):
        scheduler(num_pages=2).add(sequence(4, 9))


def test_a_step_without_work_is_empty() -> None:
    assert scheduler().schedule() == []


# Steps of one id each, which may be queued before the ids are known


def decoding_sequences(s: Scheduler, *lengths: int, max_length: int = 100) -> list[Sequence]:
    """Sequences whose prompts are computed, with one id behind them."""
    found = [sequence(length, max_length) for length in lengths]
    for one in found:
        s.add(one)
    run(s)
    return found


def test_one_that_waits_is_let_in_before_steps_are_queued() -> None:
    s = scheduler(max_sequences=3)
    first, second = decoding_sequences(s, 3, 4)
    assert s.decoding() == [first, second]
    s.add(sequence(5))
    assert s.decoding() == []


def test_one_that_waits_for_a_row_or_for_pages_does_not_keep_the_others() -> None:
    full = scheduler(max_sequences=2)
    running = decoding_sequences(full, 3, 4)
    full.add(sequence(1))
    assert full.decoding() == running
    scarce = scheduler(num_pages=5)
    running = decoding_sequences(scarce, 3, 4, max_length=20)  # a page each, and one more for the second one's fifth id
    waiting = sequence(9, 20)
    scarce.add(waiting)
    assert scarce.decoding() == []  # it needs three, and there are three
    scarce.finish(waiting, "abort")
    assert scarce.decoding() == running
    scarce.add(sequence(9, 20))
    assert scarce.decoding() == running
    scarce.finish(running[0], "stop")
    assert scarce.decoding() == []


def test_a_sequence_whose_last_id_is_under_way_does_not_go_on_and_holds_its_pages() -> None:
    s = scheduler(max_sequences=2)
    short, long = decoding_sequences(s, 3, 3)
    short.max_length = 5
    for one in s.decoding():
        one.num_computed += 1
        one.num_pending += 1
    assert s.decoding() == [long]
    assert (len(short.pages), len(long.pages)) == (1, 2)


def test_steps_are_not_queued_where_somebody_would_lose_its_pages() -> None:
    s = scheduler(num_pages=2)
    running = decoding_sequences(s, 3, 3, max_length=8)
    assert s.decoding() == running
    for one in running:
        one.num_computed += 1
        one.num_pending += 1
    assert s.decoding() == []
    assert s.running == running
