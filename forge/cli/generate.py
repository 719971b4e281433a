"""`forge generate`: text that continues a prompt."""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli import options, output, parts
from forge.cli.about import about

if TYPE_CHECKING:
    from forge.config import SamplingParams
    from forge.engine import TokenLogprobs
    from forge.llm import LLM
    from forge.outputs import Timings


@options.takes_groups()
def command(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue; - reads it from stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer PROMPT through the model's chat template, as forge chat does.")
    ] = False,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system message; implies --chat.")
    ] = None,
    *,
    sampling: dict[str, Any],
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Run through the model's end tokens.")] = False,
    loading: dict[str, Any],
    adapter: options.Adapter = None,
    timings: options.Timings = False,
    as_json: options.Json = False,
) -> None:
    """Continue PROMPT. Text streams to stdout, statistics go to stderr."""
    from forge.config import SamplingParams

    params = SamplingParams(ignore_eos=ignore_eos, **sampling)
    text = options.text_or_stdin(prompt, "PROMPT")
    adapters = options.adapters_of([adapter] if adapter else [])
    with options.loaded(model, adapters=adapters, **loading) as llm:
        request: str | list[int] = text
        if chat or system is not None:
            head = [{"role": "system", "content": system}] if system else []
            request = llm.encode_chat([*head, {"role": "user", "content": text}], parse_special=False)
        elif llm.tokenizer.begins_with_bos(text):
            output.note("the text begins with the BOS token: no other is added")
        if as_json:
            output.write_json(answer_json(llm, request, params))
        else:
            found = stream(llm, request, params)
            if timings:
                parts.write(llm, found.prefill_ms if found else None)


def stream(llm: LLM, prompt: str | list[int], params: SamplingParams) -> Timings | None:
    """Write the completion to stdout as it is generated, then remarks on it to stderr. Returns where its time went."""
    timings = reason = None
    logprobs: list[TokenLogprobs] = []
    try:
        with closing(llm.stream(prompt, params, adapter=options.chosen_adapter(llm))) as chunks:
            for chunk in chunks:
                output.write(chunk.text)
                logprobs += chunk.logprobs or ()
                timings, reason = chunk.timings, chunk.finish_reason
    finally:
        if output.is_terminal(sys.stdout):  # so that the next output starts on a line of its own
            output.write("\n")
    options.check_finish(reason, llm)
    show_logprobs(llm, logprobs)
    if timings:
        if reason == "length":
            output.note(cut(timings, params, llm))
        output.status(statistics(timings, llm.load_ms))
    return timings


def answer_json(llm: LLM, prompt: str | list[int], params: SamplingParams) -> dict[str, Any]:
    """A completion as the object that --json prints."""
    completion = llm.generate(prompt, params, adapter=options.chosen_adapter(llm))
    options.check_finish(completion.finish_reason, llm)
    timings = completion.timings
    found: dict[str, Any] = {
        **about(llm.device, llm.path, llm.quantize),
        "prompt_ids": completion.prompt_ids,
        "ids": completion.ids,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "timings": {
            "load_ms": llm.load_ms,
            "load_parts_ms": llm.load_parts,
            **asdict(timings),
            "total_ms": timings.total_ms,
            "prefill_tokens_per_s": timings.prefill_tokens_per_s,
            "decode_tokens_per_s": timings.decode_tokens_per_s,
        },
    }
    if completion.logprobs is not None:
        found["logprobs"] = [
            {
                **_token(llm, entry.id, entry.logprob),
                "top_logprobs": [_token(llm, id, logprob) for id, logprob in entry.top],
            }
            for entry in completion.logprobs
        ]
    return found


def _token(llm: LLM, id: int, logprob: float) -> dict[str, Any]:
    return {"id": id, "token": llm.tokenizer.token_text(id), "logprob": logprob}


def show_logprobs(llm: LLM, logprobs: list[TokenLogprobs]) -> None:
    """Write a table to stderr: each token, its log probability, and the most probable tokens at its position."""
    if not logprobs:
        return

    def shown(id: int, logprob: float) -> str:
        return f"{output.quoted(llm.tokenizer.token_text(id))} {logprob:.3f}"

    rows = [
        (
            entry.id,
            output.quoted(llm.tokenizer.token_text(entry.id)),
            f"{entry.logprob:.3f}",
            "  ".join(shown(id, logprob) for id, logprob in entry.top),
        )
        for entry in logprobs
    ]
    columns = ("id", "text", "logprob", "most probable")
    output.write_table("log probabilities", columns, rows, right=("id", "logprob"), to_stderr=True)


def cut(timings: Timings, params: SamplingParams, llm: LLM) -> str:
    """The remark on an answer that a limit ended, not the model."""
    if params.max_tokens is not None and timings.completion_tokens >= params.max_tokens:
        return f"the answer was cut after {output.count(params.max_tokens, 'token')} (--max-tokens)"
    return f"the answer was cut: the context of {output.count(llm.context, 'token')} is full (--context)"


def statistics(timings: Timings, load_ms: float | None = None) -> str:
    """Counts and speeds of one completion, in one line."""
    parts = [
        f"prompt {output.count(timings.prompt_tokens, 'token')}, {timings.prefill_tokens_per_s:.1f} tokens/s",
        f"generated {output.count(timings.completion_tokens, 'token')}",
    ]
    if timings.completion_tokens > 1:  # the first belongs to the prompt
        parts[1] += f", {timings.decode_tokens_per_s:.1f} tokens/s"
    if load_ms is not None:
        parts.append(f"loaded in {load_ms / 1e3:.2f} s")
    return " | ".join(parts)
