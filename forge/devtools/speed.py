"""The speed of an engine that is stepped by hand, beside the speed at which this machine reads the model's matrices.

Requests of an `LLM` cannot say when the last prompt of a batch is computed, which is when decode steps alone begin.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from forge.backend.gpu import GPU
from forge.config import ModelConfig, SamplingParams
from forge.engine import Engine, FinishReason
from forge.engine.model_runner import ModelRunner


def temperature_of(config: ModelConfig) -> float:
    """With which random ids are answered: greedy answers to them soon repeat one id, whose experts would be all that a
    step of a mixture of experts reads."""
    return 1.0 if config.experts else 0.0


def run(
    engine: Engine,
    prompts: list[list[int]],
    gen_tokens: int,
    check: Callable[[FinishReason | None], None],
    temperature: float = 0.0,
) -> tuple[float, float]:
    """Seconds to the first id of the first prompt, and ids per second once every sequence has its first one.

    Nothing else may use the engine meanwhile. check: Raises for the reason with which the first prompt should not end.
    """
    params = SamplingParams(max_tokens=None, ignore_eos=True, temperature=temperature)
    sequences = [engine.add(prompt, params)[0] for prompt in prompts]
    try:
        start = time.perf_counter()
        while not sequences[0].completion:
            engine.step()
            check(sequences[0].finish_reason)
        first = time.perf_counter() - start
        while not all(sequence.completion for sequence in sequences):
            engine.step()
        start = time.perf_counter()
        tokens = sum(len(engine.step()) for _ in range(gen_tokens - 1))
        return first, tokens / (time.perf_counter() - start)
    finally:
        for sequence in sequences:
            engine.finish(sequence, "abort")


def bound_sweep(runner: ModelRunner) -> Callable[[], float]:
    """A function that returns the least seconds in which this machine can read the model's matrices.

    On a CPU it multiplies each matrix by a vector. On a GPU it uses the speed of a large copy, and for experts in the
    host's memory the speed at which they are fetched.
    """
    shares, backend, on_host = list(runner.model.matrices()), runner.backend, runner.model.host_experts()
    if isinstance(backend, GPU):
        size = round(sum(matrix.nbytes * share for matrix, share in shares))
        return lambda: backend.read_seconds(size) + sum(layer.token_seconds() for layer in on_host)
    matrices = [matrix[: round(len(matrix) * share)] for matrix, share in shares]
    vectors = [np.ones(matrix.shape[1], np.float32) for matrix in matrices]

    def sweep() -> float:
        start = time.perf_counter()
        for matrix, vector in zip(matrices, vectors, strict=True):
            np.dot(matrix, vector)
        return time.perf_counter() - start

    return sweep
