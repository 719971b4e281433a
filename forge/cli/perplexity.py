"""`forge perplexity`: how well a model predicts a text."""

from __future__ import annotations

from typing import Annotated

import typer

from forge.cli import options, output


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A UTF-8 text file; - reads stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    context: Annotated[
        int, typer.Option("--context", metavar="N", help="Tokens per chunk; each chunk is predicted by itself.")
    ] = 512,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of the text in FILE."""
    text = output.read_text(file)
    with options.loaded(model, device) as llm:
        result = llm.perplexity(text, context=context)
    if as_json:
        output.write_json({"ppl": result.ppl, "tokens": result.tokens})
    else:
        output.write(f"perplexity {result.ppl:.4f} over {result.tokens} tokens\n")
