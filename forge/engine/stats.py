"""What an engine counts, for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot. Totals count from the engine's start.

    Attributes:
        running: Sequences that hold pages: one for each choice of a request.
        waiting: Sequences that wait for pages, for a place, or for their prompt to be computed as another choice's.
        pages_used: Pages that have an owner, by the name of the kind of layer state.
        pages_total: All pages, by the same names.
        preemptions: How often a sequence gave its pages up, and had to compute its ids again.
        prompt_tokens: Tokens of prompts that were computed, again after a preemption too.
        generated_tokens: Ids that sequences have got, without those that only end them.
        prefix_asked_tokens: Tokens of prompts that were looked for among those of earlier requests.
        prefix_hit_tokens: Those of them that were found, and not computed.
        prefix_evictions: Pages that could be found, until something else needed them.
    """

    running: int
    waiting: int
    pages_used: dict[str, int]
    pages_total: dict[str, int]
    preemptions: int
    prompt_tokens: int
    generated_tokens: int
    prefix_asked_tokens: int = 0
    prefix_hit_tokens: int = 0
    prefix_evictions: int = 0
