"""`forge bench`: the speed of a model, beside the speed that the machine allows."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge import _files
from forge.cli import options, output, parts
from forge.cli.about import about
from forge.errors import ParameterError

if TYPE_CHECKING:
    from forge.llm import LLM

_SWEEPS = 5


@options.takes_groups()
def command(
    model: options.Model = options.DEFAULT_MODEL,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, metavar="N", help="Length of the prompt.")
    ] = 128,
    gen_tokens: Annotated[int, typer.Option("--gen-tokens", min=2, metavar="N", help="Tokens per sequence.")] = 64,
    batch: Annotated[str, typer.Option("--batch", metavar="N,N...", help="Sequences that run together.")] = "1,4,8",
    repetitions: Annotated[
        int, typer.Option("--repetitions", min=1, metavar="N", help="Runs of each; their median counts.")
    ] = 3,
    *,
    loading: dict[str, Any],
    timings: options.Timings = False,
    as_json: options.Json = False,
) -> None:
    """Measure how fast prompts are read and answers generated. The speed of reading this model is beside it.

    Prefill is one prompt. Decode starts when every sequence of the batch has its prompt computed and its first token.
    """
    from forge.config import EngineConfig

    batches = _sizes(batch)
    prompts_first = EngineConfig(max_prefill_tokens=1 << 30)  # steps that decode alone are what is timed
    with options.loaded(model, max_sequences=max(batches), engine=prompts_first, **loading) as llm:
        _check_room(llm, prompt_tokens, gen_tokens, max(batches))
        report = measure(llm, prompt_tokens, gen_tokens, batches, repetitions)
    if as_json:
        output.write_json(about(llm.device, llm.path, llm.quantize) | report)
    else:
        _print(llm, report)
    if timings:
        parts.write(llm, 1000 * prompt_tokens / report["prefill_tokens_per_s"])


def measure(llm: LLM, prompt_tokens: int, gen_tokens: int, batches: Sequence[int], repetitions: int) -> dict[str, Any]:
    """All speeds, as medians. Bound and decode are measured in turns, so that a busy machine slows both."""
    import numpy as np

    from forge.devtools import speed

    rng = np.random.default_rng(0)
    temperature = speed.temperature_of(llm.config)

    def run(count: int) -> tuple[float, float]:
        """Seconds to the first prompt's first token, and tokens per second of decode steps."""
        prompts = rng.integers(0, llm.config.vocab_size, (count, prompt_tokens)).tolist()
        return speed.run(llm.engine, prompts, gen_tokens, lambda reason: options.check_finish(reason, llm), temperature)

    sweep = speed.bound_sweep(llm.engine.runner)
    run(1)  # the first run pays for memory and threads
    sweep()
    prefill: list[float] = []
    bound: list[float] = []
    decoded: dict[int, list[float]] = {size: [] for size in batches}
    for _ in range(repetitions):
        bound += [1 / sweep() for _ in range(_SWEEPS)]
        first, alone = run(1)
        prefill.append(prompt_tokens / first)
        for size in batches:
            bound += [1 / sweep() for _ in range(_SWEEPS)]
            decoded[size].append(alone if size == 1 else run(size)[1])
    rate = median(bound)
    speeds = {size: median(runs) for size, runs in decoded.items()}
    single = speeds.get(1)
    return {
        "prompt_tokens": prompt_tokens,
        "gen_tokens": gen_tokens,
        "repetitions": repetitions,
        "load_ms": llm.load_ms,
        "load_parts_ms": llm.load_parts,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "prefill_tokens_per_s": median(prefill),
        "bound_tokens_per_s": rate,
        "decode": [
            {
                "batch": size,
                "tokens_per_s": speed,
                "ratio_to_bound": speed / rate,
                "speedup": speed / single if single else None,
            }
            for size, speed in speeds.items()
        ],
    }


def _check_room(llm: LLM, prompt_tokens: int, gen_tokens: int, most: int) -> None:
    """Raises ParameterError unless the largest batch fits. Its first sequences decode during the last prompts."""
    scheduler = llm.engine.scheduler
    longest = prompt_tokens + gen_tokens + -(-most * prompt_tokens // scheduler.max_step_tokens) + most
    if longest > llm.context:
        raise ParameterError(
            f"--prompt-tokens {prompt_tokens}, --gen-tokens {gen_tokens} and --batch {most} need {longest} positions; "
            f"the context is {llm.context}",
            parameter="prompt_tokens",
        )
    if not scheduler.fits(most, longest):
        message = f"{most} sequences of {longest} positions do not fit the KV cache"
        raise ParameterError(message, parameter="batch")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        message = f"--batch must be numbers from 1 with commas between them, such as 1,4,8, not {text!r}"
        raise ParameterError(message, parameter="batch")
    return sizes


def _print(llm: LLM, report: dict[str, Any]) -> None:
    rows = [
        ("load", f"{report['load_ms'] / 1e3:.2f} s", ""),
        ("peak resident memory", output.num_bytes(report["peak_rss_bytes"]), ""),
        (
            f"prefill of {output.count(report['prompt_tokens'], 'token')}",
            f"{report['prefill_tokens_per_s']:.1f} tokens/s",
            "",
        ),
        ("all matrices read once", f"{report['bound_tokens_per_s']:.1f} tokens/s", ""),
    ]
    for run in report["decode"]:
        ratio = f"{run['ratio_to_bound']:.2f} x the reading rate"
        if run["speedup"] and run["batch"] > 1:
            ratio += f", {run['speedup']:.2f} x batch 1"
        rows.append((f"decode, batch {run['batch']}", f"{run['tokens_per_s']:.1f} tokens/s", ratio))
    title = f"{_files.model_name(llm.path)} on {llm.device}"
    output.write_table(title, ("", "measured", "compared"), rows, right=("measured",))
