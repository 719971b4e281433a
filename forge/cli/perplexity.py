"""`forge perplexity`: the perplexity of a text."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from forge.cli import options, output
from forge.cli.about import about
from forge.errors import ForgeError


@options.takes_groups()
def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A UTF-8 text file; - reads stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    context: Annotated[
        int | None,
        typer.Option("--context", metavar="N", help="Tokens per chunk, each predicted by itself; 512, if they fit."),
    ] = None,
    *,
    loading: dict[str, Any],
    as_json: options.Json = False,
) -> None:
    """Measure the perplexity of the text in FILE."""
    text = output.read_text(file)
    with options.loaded(model, **loading) as llm:
        ids = llm.tokenizer.encode_prompt(text)  # as llm.perplexity(text) does
        if len(ids) < 2:
            raise ForgeError(f"{output.printable(file)}: holds fewer than two tokens: there is nothing to predict")
        result = llm.perplexity(ids, context=context)
    if as_json:
        scores = {"ppl": result.ppl, "tokens": result.tokens, "remainder": result.remainder}
        output.write_json(about(llm.device, llm.path, llm.quantize) | scores)
        return
    output.write(f"perplexity {result.ppl:.4f} over {output.count(result.tokens, 'token')}\n")
    if result.remainder:
        end = output.count(result.remainder, "token")
        output.note(f"not scored: {end} at the end of the text, too few for a chunk (--context)")
