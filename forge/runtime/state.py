"""`State`: a prompt that is computed, as a value that a caller holds."""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from threading import RLock
from types import TracebackType
from typing import Any, Literal, NoReturn, Self, TypeVar, overload

from forge.config import SamplingParams
from forge.display import html_table, num_bytes
from forge.errors import ForgeError, ParameterError
from forge.hooks.scope import bound, entered
from forge.keywords import check_integer, keywords, path_of
from forge.outputs import Chunk, Completion
from forge.runtime import state_files, states
from forge.runtime.encoder import Prompt
from forge.runtime.front import Front
from forge.runtime.prompts import is_single, prompts_of, sampling_params
from forge.runtime.states import Computed, Logits

T = TypeVar("T")


class State:
    """A computed prompt, whose keys and values stay in the model's KV cache: from `LLM.prefill` or `LLM.load_state`.

    It takes part of the memory that requests share, until it is closed or forgotten. What goes on from it shares its
    full pages. Its methods may be called from several threads; one that another has changed meanwhile raises a
    ForgeError, and leaves it as the other has made it.

    Attributes:
        adapter: The name of the adapter that it was computed with, or None.
    """

    def __init__(self, llm: Front, computed: Computed, adapter: str | None) -> None:
        self._llm, self.adapter = llm, adapter
        computed.hold.use()
        self._computed: Computed | None = computed
        self._swapping = RLock()
        """Held for moments, not while anything is computed."""

    @property
    def ids(self) -> list[int]:
        """Its token ids, BOS included."""
        return list(self._now.ids)

    def __len__(self) -> int:
        """Its tokens."""
        return len(self._now.ids)

    @property
    def nbytes(self) -> int:
        """Bytes of the KV cache that its pages take. States and requests that begin alike share pages."""
        pools, pages = self._llm.engine.scheduler.pools, self._now.hold.sequence.pages
        return sum(len(pool.held(own)) * pool.kind.page_bytes for pool, own in zip(pools, pages, strict=True))

    @property
    def logits(self) -> Logits:
        """(V,) float32 on the host: the logits behind its last token."""
        now = self._now
        if now.logits is None:
            after = self._run(now, self._compute(now.ids, now, is_kept=False))
            self._swap(now, after)
            now = after
        assert now.logits is not None
        return now.logits.copy()  # forks have the same

    def fork(self) -> State:
        """Another state with the same tokens. It shares all pages, and takes memory of its own from the next change."""
        return State(self._llm, self._now, self.adapter)

    @keywords()
    def rollback(self, length: int) -> None:
        """Go back to the first tokens.

        Args:
            length: How many there are to be, at least one. Negative = how many of the last ones go.

        Raises:
            ParameterError: There are not so many, or a sliding window has not kept what the last of them reads.
            OutOfMemoryError: There is no page for the copy of one that others share.
        """
        now = self._now
        check_integer("length", length, 1 - len(now.ids), len(now.ids))
        wanted = int(length) if length > 0 else len(now.ids) + int(length)
        if length == 0 or wanted == len(now.ids):
            if length:
                return
            raise ParameterError("length must be at least 1, or negative, not 0", parameter="length")
        engine, sequence = self._llm.engine, now.hold.sequence
        if wanted < (fewest := engine.scheduler.fewest_ids(sequence)):
            windows = [
                pool.kind.name for pool, own in zip(engine.pools, sequence.pages, strict=True) if pool.spare_page in own
            ]
            raise ParameterError(
                f"length: the state cannot go back to {wanted} tokens: layers with a {' or a '.join(windows)} have "
                f"kept what {fewest} tokens need, and nothing before",
                parameter="length",
                hint="prefill the shorter prompt, or fork the state before it grows",
            )
        self._replace(now, states.rolled_back(self._llm._loop, engine, now.hold, wanted))

    @keywords()
    def extend(self, prompt: Prompt) -> None:
        """Compute more tokens behind its own. Where that fails, the state is as it was.

        Args:
            prompt: A string or a list of token ids. A string gets no BOS, and names of special tokens are these tokens.

        Raises:
            ParameterError: It is empty, or holds ids outside the vocabulary.
            ContextLengthError: There is no room for it in the context.
            OutOfMemoryError: Others hold the pages that it needs; the message says which.
        """
        now = self._now
        more = self._llm.encode_continuation(prompt)
        self._llm.engine.check_ids(more)
        ids = [*now.ids, *more]
        self._llm.engine.check_ids(ids)
        self._replace(now, self._compute(ids, now))

    @overload
    def generate(
        self, prompt: Prompt = "", params: SamplingParams | None = None, *, n: Literal[1] = 1, **overrides: Any
    ) -> Completion: ...
    @overload
    def generate(
        self, prompt: Prompt = "", params: SamplingParams | None = None, *, n: int, **overrides: Any
    ) -> list[Completion]: ...
    @overload
    def generate(
        self, prompt: Sequence[Prompt], params: SamplingParams | None = None, **overrides: Any
    ) -> list[Completion]: ...
    @keywords(SamplingParams)
    def generate(
        self, prompt: Prompt | Sequence[Prompt] = "", params: SamplingParams | None = None, **overrides: Any
    ) -> Completion | list[Completion]:
        """Complete its tokens and what comes behind them. The state stays as it is.

        Args:
            prompt: As in `extend`, but it may be empty. A list of prompts is a batch, of which each goes on from here.
            params: How to sample, as in `LLM.generate`.
            **overrides: Fields of `SamplingParams` that differ from `params`.

        Returns:
            What `LLM.generate` does; `Completion.prompt_ids` begin with the state's.

        Raises:
            ForgeError: As in `LLM.generate`.
        """
        params = sampling_params(params, overrides)
        prompts, single = prompts_of(prompt)
        now = self._now
        ids = [[*now.ids, *self._llm.encode_continuation(one)] for one in prompts]
        completions = self._llm._complete(ids, params, self.adapter, now.hold)
        return completions[0] if single and params.n == 1 else completions

    @keywords(SamplingParams)
    def stream(
        self, prompt: Prompt = "", params: SamplingParams | None = None, **overrides: Any
    ) -> Generator[Chunk, None, None]:
        """As `generate`, piece by piece. The state may change or be closed meanwhile: it goes on from what it was.

        Args:
            prompt: As in `generate`, but no batch.
            params: As in `generate`.
            **overrides: As in `generate`.

        Returns:
            An iterator of chunks, as that of `LLM.stream`.

        Raises:
            ForgeError: As in `LLM.stream`.
        """
        if not is_single(prompt):
            raise ParameterError("stream takes one prompt; generate takes a list of them", parameter="prompt")
        now = self._now
        ids = [*now.ids, *self._llm.encode_continuation(prompt)]
        return self._llm._stream(ids, sampling_params(params, overrides), self.adapter, now.hold)

    @keywords()
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file, which appears whole or not at all: safetensors with ids, logits, keys and values.

        Args:
            path: Where. `LLM.load_state` reads it, of the same model.

        Raises:
            ForgeError: The file cannot be written.
        """
        target = path_of("path", path)
        logits, now = self.logits, self._now
        arrays = self._run(now, states.read(self._llm.engine, now.hold))
        fingerprint = self._llm._fingerprints.get(self.adapter, "")
        state_files.write(target, state_files.Stored(now.ids, logits, arrays), fingerprint, self.adapter)

    def close(self) -> None:
        """Give its memory back, but for pages that others share. Later calls raise a ForgeError."""
        with self._swapping:
            before, self._computed = self._computed, None
            if before:
                before.hold.leave()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<forge.State: {self._about}>"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        return html_table("state", [("holds", self._about)])

    def __reduce__(self) -> NoReturn:
        raise ForgeError("a state cannot be copied, or sent to another process: fork it, or save it to a file")

    @property
    def _about(self) -> str:
        if self._computed is None:
            return "closed"
        behind = f", adapter {self.adapter}" if self.adapter is not None else ""
        return f"{len(self):,} tokens, {num_bytes(self.nbytes)} of the KV cache{behind}"

    @property
    def _now(self) -> Computed:
        if (now := self._computed) is None:
            raise ForgeError("the state is closed: prefill the prompt again")
        return now

    def _compute(self, ids: list[int], start: Computed, *, is_kept: bool = True) -> Generator[None, None, Computed]:
        llm = self._llm
        ((hooks,),) = bound(entered(llm._loop), [ids])
        slot = llm._slot_of(self.adapter)
        return states.computed(llm._loop, llm.engine, ids, slot, hooks, start.hold, is_kept=is_kept)

    def _run(self, now: Computed, parts: Generator[None, None, T]) -> T:
        """What a generator gives that the engine's thread runs, and that needs what is there now."""
        now.hold.use()
        try:
            return self._llm._loop.run(parts)
        finally:
            now.hold.leave()

    def _replace(self, now: Computed, parts: Generator[None, None, Computed]) -> None:
        """Become what a generator gives that the engine's thread runs."""
        if not self._swap(now, self._run(now, parts)):
            raise ForgeError("the state was changed or closed by another thread meanwhile: fork it for each thread")

    def _swap(self, before: Computed, after: Computed) -> bool:
        """Become another one, unless somebody else has changed it since. Whether that was done."""
        after.hold.use()
        with self._swapping:
            is_same = self._computed is before
            if is_same:
                self._computed = after
        (before if is_same else after).hold.leave()
        return is_same
