"""`forge generate`: text that continues a prompt."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, cast

import typer

from forge.cli import options, output
from forge.cli.about import about

if TYPE_CHECKING:
    from forge.config import SamplingParams
    from forge.llm import LLM
    from forge.outputs import Completion, Timings


def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    max_tokens: options.MaxTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = None,
    stop: options.Stop = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Run through the model's end tokens.")] = False,
    device: options.Device = "auto",
    context: options.Context = None,
    memory_fraction: options.MemoryFraction = options.DEFAULT_MEMORY_FRACTION,
    as_json: options.Json = False,
) -> None:
    """Continue PROMPT. Text streams to stdout, figures go to stderr."""
    from forge.config import SamplingParams

    params = SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        ignore_eos=ignore_eos,
    )
    text = options.text_or_stdin(prompt, "PROMPT")
    with options.loaded(model, device, context, memory_fraction=memory_fraction) as llm:
        (_print_json if as_json else _stream)(llm, text, params)


def _stream(llm: LLM, prompt: str, params: SamplingParams) -> None:
    timings = reason = None
    try:
        for chunk in llm.stream(prompt, params):
            output.write(chunk.text)
            timings, reason = chunk.timings, chunk.finish_reason
    finally:
        if output.is_terminal(sys.stdout):  # so that what follows starts on a line of its own
            output.write("\n")
    options.check_finish(reason, llm)
    if timings:
        output.status(figures(timings, llm.load_ms))


def _print_json(llm: LLM, prompt: str, params: SamplingParams) -> None:
    completion = cast("Completion", llm.generate(prompt, params))
    options.check_finish(completion.finish_reason, llm)
    timings = completion.timings
    output.write_json(
        {
            **about(llm.device, llm.path),
            "prompt_ids": completion.prompt_ids,
            "ids": completion.ids,
            "text": completion.text,
            "finish_reason": completion.finish_reason,
            "timings": {
                "load_ms": llm.load_ms,
                "prompt_tokens": timings.prompt_tokens,
                "completion_tokens": timings.completion_tokens,
                "prefill_ms": timings.prefill_ms,
                "decode_ms": timings.decode_ms,
                "total_ms": timings.total_ms,
                "prefill_tokens_per_s": timings.prefill_tokens_per_s,
                "decode_tokens_per_s": timings.decode_tokens_per_s,
            },
        }
    )


def figures(timings: Timings, load_ms: float | None = None) -> str:
    """Counts and speeds of one completion, in one line."""
    parts = [
        f"prompt {timings.prompt_tokens} tokens, {timings.prefill_tokens_per_s:.1f} tokens/s",
        f"generated {timings.completion_tokens} tokens, {timings.decode_tokens_per_s:.1f} tokens/s",
    ]
    if load_ms is not None:
        parts.append(f"loaded in {load_ms / 1e3:.2f} s")
    return " | ".join(parts)
