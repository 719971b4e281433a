"""The device side of an engine: what a step computes, and where."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import Backend
from forge.config import Progress, SamplingParams
from forge.engine import batch, processors
from forge.engine.batch import Ints
from forge.engine.hooked import LOGITS, StepHook, Watch
from forge.engine.hooked_pipelines import HookedPipelines
from forge.engine.pipeline import StepPipeline
from forge.engine.request_table import RequestTable
from forge.engine.sampler import read_sampled
from forge.engine.scheduler import Scheduled
from forge.engine.sequence import Sampled, Sequence
from forge.models import Decoder
from forge.models.batch import Batch
from forge.ops.embed import take_rows
from forge.ops.logprobs import logprobs
from forge.ops.matmul import ROW_COUNTS
from forge.state.model_state import ModelState

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


class ModelRunner:
    """A model, its layers' state and their device. The engine knows the numbers and the verbs; arrays stay behind them.

    A device that computes asynchronously has a `pipeline`, in which steps are queued while others are under way. On any
    other a step waits for its ids: `forward`, then `sample`.
    """

    def __init__(
        self,
        model: Decoder,
        state: ModelState,
        backend: Backend,
        *,
        context: int,
        max_sequences: int,
        graphs: bool | int = True,
    ) -> None:
        self.model, self.state, self.backend = model, state, backend
        self.context, self.max_sequences = context, max_sequences
        self.config, self.device = model.config, backend.device
        self.vocab_size, self.hook_points = model.config.vocab_size, model.points()
        self.kinds, self.num_pages, self.page_size = state.kinds, state.num_pages, state.page_size
        self.is_asynchronous = backend.is_asynchronous
        self.pipeline: StepPipeline | None = None
        self.hooked: HookedPipelines | None = None
        if self.is_asynchronous:
            make = partial(StepPipeline, model, state, backend, max_sequences, context, graphs)
            self.pipeline, self.hooked = make(), HookedPipelines(make)

    def forward(self, step: list[Scheduled], *, rows: list[int] | None = None) -> Any:
        """float32 logits (R, V) of these tokens of the step, ascending. None = those of each entry's last id.

        Here and below the sequences' hooks read and change what is computed. What they raise is `Sequence.error`.
        """
        asked = batch.last_tokens(step) if rows is None else np.array(rows, np.int32)
        with self.backend.active(), self._hooked(step) as hook:
            wanted = asked if hook is None else hook.logit_rows(asked)
            if not len(wanted):
                self._run_blocks(step, hook)
                return self.backend.empty((0, self.vocab_size), np.float32)
            logits = self.model(self._batch(step, wanted), self.state, hook)
            if len(wanted) == len(asked):
                return logits
            return take_rows(self.backend.asarray(np.searchsorted(wanted, asked), np.int32), logits)

    def run_blocks(self, step: list[Scheduled]) -> int:
        """Run the blocks alone. No logits are computed. Returns the number of tokens."""
        with self.backend.active(), self._hooked(step) as hook:
            if hook and LOGITS in hook.names:
                self.model(self._batch(step, hook.logit_rows(np.zeros(0, np.int32))), self.state, hook)
            else:
                self._run_blocks(step, hook)
            return sum(entry.count for entry in step)

    def _run_blocks(self, step: list[Scheduled], hook: StepHook | None) -> None:
        run = self.model.states if hook and "final_norm" in hook.names else self.model.hidden
        run(self._batch(step, np.arange(sum(entry.count for entry in step), dtype=np.int32)), self.state, hook)

    def states(self, step: list[Scheduled], rows: list[int]) -> Any:
        """float32 (R, E) of these tokens of the step, ascending: what logits would be computed from."""
        with self.backend.active(), self._hooked(step) as hook:
            return self.model.states(self._batch(step, np.array(rows, np.int32)), self.state, hook)

    def unembed(self, rows: npt.NDArray[np.float32]) -> Any:
        """float32 logits (R, V) of rows (R, E) of the residual stream. No sequence is needed."""
        with self.backend.active():
            return self.model.unembed(self.backend.asarray(rows, np.float32))

    @contextmanager
    def _hooked(self, step: list[Scheduled]) -> Iterator[StepHook | None]:
        """The hooks of a step; None where they want nothing of it."""
        hook = StepHook(step, self.backend) if any(entry.sequence.hooks for entry in step) else None
        yield hook if hook and hook.names else None
        if hook:
            hook.end()

    def _batch(self, step: list[Scheduled], wanted: Ints | None = None) -> Batch:
        """wanted: Tokens whose logits are. None = those of each entry's last id."""
        wanted = batch.last_tokens(step) if wanted is None else wanted
        self.model.reserve(max(entry.start + entry.count for entry in step))
        built = batch.build(step, self.state.page_size)
        is_all = len(wanted) == len(built.ids)  # then none need be taken
        return built.place(
            lambda arrays: [self.backend.asarray(array) for array in arrays], None if is_all else wanted
        )[0]

    def sample(self, logits: Any, rows: list[int], sequences: list[Sequence]) -> list[Sampled]:
        """The next id of each sequence, drawn from its row of the logits (R, V), or given by its sampler."""
        with self.backend.active():
            if rows != list(range(len(logits))):
                logits = take_rows(self.backend.asarray(rows, np.int32), logits)  # (B, V)
            table = RequestTable(self.backend, len(sequences), self.vocab_size)
            table.fill(sequences)
            samples = any(sequence.params.sampler is not None for sequence in sequences)
            choose = partial(processors.choose, self.backend, sequences) if samples else None
            given = processors.processed(self.backend, logits, sequences)
            _, drawn = table.sampler.draw(given, table.fields, logits, choose)
            sampled = read_sampled(sequences, self.backend.to_numpy(drawn))
            for row, (sequence, token, _) in enumerate(sampled):
                if token < 0:
                    processors.blame(self.backend, sequence, logits[row])
            return sampled

    def log_likelihoods(self, logits: Any, rows: list[int], ids: list[int]) -> tuple[Floats, Flags]:
        """The log probability float64 (N,) of each id at its row of the logits (R, V), and whether it is the most
        probable id there, bool (N,). NaN where the row's greatest logit is not finite."""
        with self.backend.active():
            if rows != list(range(len(logits))):
                logits = take_rows(self.backend.asarray(rows, np.int32), logits)  # (N, V)
            top_ids, values = self.most_probable(logits, ids, 1)
            return values[:, 0].astype(np.float64), top_ids[:, 1] == np.array(ids)

    def most_probable(
        self, logits: Any, ids: npt.ArrayLike, count: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Ids (N, 1 + count) of rows of logits (N, V), a given one and the most probable ones, and their log
        probabilities. On the host."""
        with self.backend.active():
            top_ids, values = logprobs(logits, self.backend.asarray(ids, np.int32), count)
            return self.backend.to_numpy(top_ids), self.backend.to_numpy(values)

    def copy_page(self, kind: int, source: int, target: int) -> None:
        self.state.caches[kind].copy_page(source, target)

    def warm_up(self, max_step_tokens: int, progress: Progress | None, lap: Callable[[str], None]) -> None:
        """Compile the kernels of the steps to come, so that no request waits. `lap` is called behind each part."""

        def run() -> None:
            self.run_typical_steps(max_step_tokens)
            lap("warm-up")

        self.backend.prepare(run, progress)
        lap("kernels")

    def run_typical_steps(self, max_step_tokens: int) -> None:
        """One step of each number of rows that has kernels of its own."""
        longest = min(self.context, max_step_tokens)
        most = self.max_sequences  # a short prompt has as many rows as a batch that is not allowed
        shapes = [(rows, 1) if rows <= most else (1, min(rows, longest)) for rows in ROW_COUNTS]
        shapes += [(2, min(8, longest))] * (most > 1)  # attention of several prompts may have a kernel of its own
        everything = SamplingParams(repetition_penalty=2.0, logprobs=1)
        every = dict.fromkeys([(1, longest), *shapes, (most, 1)])  # the last product has a row for each
        slots = (-1, 0) if self.model.num_adapters else (-1,)
        watch = (Watch(frozenset(p.name for p in self.hook_points if ".resid" in p.name or p.name.endswith(".k"))),)
        for (rows, length), adapter in product(every, slots):
            # A short prompt's logits are computed at all positions: products of as many rows as `LLM.logits` has. A
            # hook looks at its activations, because that launches ops which nothing else may need.
            is_short = 1 < length < longest
            pages = [[0] * kind.num_entries(length) for kind in self.kinds]
            how: dict[str, Any] = {"adapter": adapter, "pages": pages, "hooks": watch if is_short else ()}
            sequences = [Sequence(choice, [0] * length, length, everything, 0, length, **how) for choice in range(rows)]
            step = [Scheduled(sequence, 0, length) for sequence in sequences]
            logits = self.forward(step, rows=list(range(rows * length)) if is_short else None)
            if self.pipeline:
                self.pipeline.warm_up(logits[:rows], sequences)
        for kind in range(len(self.kinds)):
            self.copy_page(kind, 0, 0)

    def close(self) -> None:
        """Let go of the model, the KV cache and the memory that they take. No step can run any more."""
        try:
            if self.pipeline:
                self.pipeline.discard()
            if self.hooked:
                self.hooked.discard()
        finally:
            self.pipeline = self.hooked = None
            del self.model, self.state
            self.backend.release_memory()
