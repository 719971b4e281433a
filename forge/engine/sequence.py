"""One sequence of token ids on its way through the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from forge.config import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(slots=True, eq=False)
class CachedPage:
    """The page of each kind of layer state that holds the same ids, behind the ids of its parent."""

    key: bytes
    """Its ids."""
    pages: list[int | None]
    """The page of each kind; None where it was used for something else, or no longer held."""
    parent: CachedPage | None = None
    """What lies before it. None where it cannot be found: its ids are not known to give finite logits yet."""
    children: dict[bytes, CachedPage] = field(default_factory=dict)
    """What lies behind it, by ids."""


@dataclass(slots=True, eq=False)
class Sequence:
    """One choice of a request: its ids, and how many of them the layers' state holds."""

    choice: int
    """0 to n - 1 within the request."""
    ids: list[int]
    """Prompt, then completion."""
    num_prompt: int
    params: SamplingParams
    seed: int
    max_length: int
    """Ids at which it is finished: prompt + max_tokens, or the context."""
    end_ids: frozenset[int] = frozenset()
    """Ids that end it: its request's, and the model's unless it runs through them."""
    adapter: int = -1
    """The slot of its adapter; -1 = it has none."""
    hooks: tuple[Any, ...] = ()
    """What reads or changes what is computed of it, as `models.hooks` says."""
    functions: tuple[Any, ...] = ()
    """Its logits processors and its sampler, or None, as they were begun for it; none before its first id."""
    may_be_recorded: bool = True
    """Whether it is not known that its hooks keep its decode steps from being captured."""
    recorded: Any = None
    """What its hooks do in decode steps, `RecordedEdits`, where that is data and known."""
    origin: Sequence | None = None
    """A computed sequence that begins with the same ids, and keeps its pages meanwhile: it starts from them."""
    num_computed: int = 0
    """Leading ids that the layers' state holds."""
    num_pending: int = 0
    """Ids behind `ids` that steps under way are sampling."""
    row: int | None = None
    """Its row in the request table, which holds its last id. None: the id is known here, or on its way."""
    pages: list[list[int]] = field(default_factory=list)
    """Its pages of each kind of layer state, in order; released ones are the kind's spare page. Empty without any."""
    prefix: list[CachedPage] = field(default_factory=list)
    """What the prefix cache knows of its leading full pages."""
    page_keys: list[bytes] = field(default_factory=list)
    """Ids of its leading full pages, as the prefix cache looks for them."""
    num_cached: int | None = None
    """Leading ids that the prefix cache held when it started for the first time."""
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    """What user code has raised that it runs, or what has failed its step where others went on: it ends with it."""
    started_at: float | None = None
    """When it first had pages, by `time.perf_counter`."""

    @property
    def is_separate(self) -> bool:
        """Whether it runs in a forward of its own, with others of its kind: user code may have a part in its steps. Its
        ids are known before its next step is scheduled, unless its decode steps are recorded."""
        return bool(self.hooks) or self.has_functions

    @property
    def has_functions(self) -> bool:
        """Whether user code draws its ids, or changes what they are drawn from."""
        return bool(self.params.logits_processors) or self.params.sampler is not None

    @property
    def num_tokens(self) -> int:
        """Ids known and under way."""
        return len(self.ids) + self.num_pending

    @property
    def num_remaining(self) -> int:
        """Ids not yet computed: the rest of the prompt, or the one sampled last."""
        return self.num_tokens - self.num_computed

    @property
    def is_cached(self) -> bool:
        """Whether its pages may be found by others that begin with its ids, and it looks for theirs."""
        return self.origin is None and not self.hooks

    @property
    def is_decoding(self) -> bool:
        """Its prompt is computed, and of its other ids the last one alone is not."""
        return self.num_remaining == 1 and self.num_computed >= self.num_prompt

    @property
    def goes_on(self) -> bool:
        """Whether its next tokens can be computed: there are some, it is not full with the ids under way, and the last
        of these is where a step finds it."""
        is_reachable = not self.num_pending or self.row is not None
        return self.num_remaining > 0 and self.num_tokens < self.max_length and is_reachable

    @property
    def completion(self) -> list[int]:
        return self.ids[self.num_prompt :]


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, under the model's own distribution (no penalties, no temperature).

    Attributes:
        id: The token that was generated.
        logprob: Its natural log probability.
        top: (id, log probability) of the most probable tokens, as many as were asked for, the most probable first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampled(NamedTuple):
    """One new id of a sequence; -1 where the logits were not finite."""

    sequence: Sequence
    id: int
    logprobs: TokenLogprobs | None
