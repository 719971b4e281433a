"""How probable given ids are: scores of continuations, and perplexity. The sums are on the device."""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import closing
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.engine import Engine
from forge.engine.passes import Job, job_of
from forge.errors import NumericsError
from forge.hooks.scope import Hooks, Scope, bound, check, entered, hooks_of
from forge.hooks.selection import Prompt
from forge.outputs import Perplexity, Score
from forge.runtime.loop import EngineLoop

_SCORED = 1 << 22
"""Logits whose likelihoods are computed between two steps of requests."""
_TOGETHER = 64
"""Prompts of one pass. Those of other callers come in between."""

Ids = list[int]
Likelihoods = npt.NDArray[np.float64]


def score(
    loop: EngineLoop, engine: Engine, pairs: list[tuple[Ids, Ids]], counts: list[int], name: str, adapter: int
) -> list[Score]:
    """The score of each pair of prompt and continuation. A prompt that several have is computed once.

    counts: Pairs of each of the caller's prompts. name: The model's, for messages.
    """
    for prompt, continuation in pairs:
        engine.check_ids([*prompt, *continuation][:-1])
        engine.check_ids(continuation[-1:])
    hooks, lengths = _hooks(entered(loop), pairs, counts), [len(prompt) for prompt, _ in pairs]
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, _) in enumerate(pairs):
        key = (place,) if hooks[place] else (-1, *prompt)  # what hooks change is nobody else's
        places.setdefault(key, []).append(place)
    groups = list(places.values())
    found: dict[int, tuple[Likelihoods, bool]] = {}
    for start in range(0, len(groups), _TOGETHER):
        own = groups[start : start + _TOGETHER]
        some = [[(place, *pairs[place]) for place in group] for group in own]
        found |= loop.run(_likelihoods(engine, some, adapter, hooks, lengths))
    scores = []
    for place, (prompt, continuation) in enumerate(pairs):
        values, is_greedy = found[place]
        if np.isnan(values).any():
            raise NumericsError(f"{name}: the logits are not finite: the file is damaged; check or replace it")
        scores.append(Score(math.fsum(values), is_greedy, list(continuation), values.tolist(), list(prompt)))
    return scores


def perplexity(
    loop: EngineLoop, engine: Engine, chunks: list[Ids], remainder: int, name: str, adapter: int
) -> Perplexity:
    """How well each chunk's ids are predicted, from its second one on.

    remainder: tokens that are in no chunk. name: the model's, for messages.
    """
    nll, count = 0.0, 0
    for chunk in chunks:
        engine.check_ids(chunk)
    hooks = [own for (own,) in bound(entered(loop), [chunk[:-1] for chunk in chunks])]
    lengths = [len(chunk) - 1 for chunk in chunks]
    for place, chunk in enumerate(chunks):
        group = [(place, chunk[:1], chunk[1:])]
        for values, _ in loop.run(_likelihoods(engine, [group], adapter, hooks, lengths)).values():
            nll -= math.fsum(values)
        count += len(chunk) - 1
    if not math.isfinite(nll):
        raise NumericsError(f"{name}: the logits are not finite: the file is damaged; check or replace it")
    return Perplexity(ppl=math.exp(min(nll / count, 700.0)), nll=nll / count, tokens=count, remainder=remainder)


def _hooks(scopes: list[Scope[Any]], pairs: list[tuple[Ids, Ids]], counts: list[int]) -> list[Hooks]:
    """The hooks of each pair: to them its continuation is what is generated behind its prompt."""
    numbers = [number for number, count in enumerate(counts) for _ in range(count)]
    prompts = [
        Prompt(number, len(counts), list(ids), len(ids) + len(behind) - 1)
        for number, (ids, behind) in zip(numbers, pairs, strict=True)
    ]
    check(scopes, prompts)
    return [hooks_of(scopes, prompt) for prompt in prompts]


# Run in the engine's thread


def _likelihoods(
    engine: Engine,
    groups: list[list[tuple[int, Ids, Ids]]],
    adapter: int,
    hooks: list[Hooks],
    lengths: list[int],
) -> Generator[None, None, dict[int, tuple[Likelihoods, bool]]]:
    """The log probability of each id of continuations, and whether all are the most probable ones, by their places.

    groups: (place, prompt, continuation); those of one group have the same prompt. hooks: By place. Who has some
    is alone in a group. lengths: By place, the ids that are the prompt to hooks.
    """
    found: dict[int, tuple[Likelihoods, list[bool]]] = {}
    targets: dict[Job, list[tuple[int, int, Ids]]] = {}  # (place, position of the first target's row, targets)
    jobs = []
    for group in groups:
        found |= {place: (np.zeros(len(ids)), [True] * len(ids)) for place, _, ids in group}
        jobs.append(_jobs(group, targets, adapter, hooks[group[0][0]], lengths[group[0][0]]))
    rows_at_once = max(_SCORED // engine.runner.vocab_size, 1)
    with closing(engine.run_jobs(jobs)) as steps:
        for part, of_jobs in steps:
            wanted = [  # (row of the part, target, place, index of the target)
                (row, ids[position - first], place, position - first)
                for job, positions, rows in of_jobs
                for row, position in zip(range(rows.start, rows.stop), positions, strict=True)
                for place, first, ids in targets[job]
                if 0 <= position - first < len(ids)
            ]
            for start in range(0, len(wanted), rows_at_once):  # requests wait meanwhile, and a step on a GPU is shorter
                some = wanted[start : start + rows_at_once]
                values, are_best = engine.runner.log_likelihoods(part, [w[0] for w in some], [w[1] for w in some])
                for (_, _, place, index), value, is_best in zip(some, values, are_best, strict=True):
                    found[place][0][index], found[place][1][index] = value, bool(is_best)
                yield
            if not wanted:
                yield
    return {place: (values, all(are_best)) for place, (values, are_best) in found.items()}


def _jobs(
    group: list[tuple[int, Ids, Ids]],
    targets: dict[Job, list[tuple[int, int, Ids]]],
    adapter: int,
    hooks: Hooks,
    num_prompt: int,
) -> Job:
    """A job over a prompt and what goes on from it. What each row is to predict is added to the targets.

    num_prompt: As of `job_of`.
    """
    prompt = group[0][1]
    last = len(prompt) - 1
    if len(group) == 1:
        ((place, _, ids),) = group
        wanted = range(last, last + len(ids))
        job = job_of([*prompt, *ids[:-1]], wanted, adapter, hooks=hooks, num_prompt=num_prompt)
        targets[job] = [(place, last, ids)]
        return job
    parent = job_of(prompt, [last], adapter)
    targets[parent] = [(place, last, ids[:1]) for place, _, ids in group]
    for place, _, ids in group:
        if len(ids) > 1:
            job = job_of([*prompt, *ids[:-1]], range(last + 1, last + len(ids)), adapter)
            targets[job] = [(place, last, ids)]
            parent.behind.append(job)
    return parent
