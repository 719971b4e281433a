"""`forge logits`: the most probable next tokens."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from forge.cli import options, output
from forge.cli.about import about


@options.takes_groups()
def command(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The prompt; - reads it from stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    top: Annotated[int, typer.Option("--top", min=1, metavar="N", help="How many tokens to show.")] = 20,
    *,
    loading: dict[str, Any],
    as_json: options.Json = False,
) -> None:
    """Show the most probable tokens after TEXT. Each with its logit."""
    import numpy as np

    text = options.text_or_stdin(text, "TEXT")
    with options.loaded(model, **loading) as llm:
        ids = llm.tokenizer.encode_prompt(text)  # as llm.logits(text) does
        last = llm.logits(ids, -1)  # (V,)
        options.check_finish(None if np.isfinite(last).any() and not np.isnan(last).any() else "error", llm)
        best = np.argsort(-last, kind="stable")[:top].tolist()
        names = [llm.tokenizer.token_text(id) for id in best]
        has_bos = llm.tokenizer.begins_with_bos(text)
    if has_bos:
        output.note("the text begins with the BOS token: no other is added")
    values = [float(last[id]) for id in best]
    if as_json:
        top_ids = list(zip(best, values, strict=True))
        output.write_json(
            {**about(llm.device, llm.path, llm.quantize), "prompt_ids": ids, "top": top_ids, "pieces": names}
        )
        return
    exact = last.astype(np.float64)
    exact = np.exp(exact - exact.max())
    chances = exact[best] / exact.sum()
    rows = [
        (id, output.quoted(name), f"{value:.4f}", f"{chance:.2%}")
        for id, name, value, chance in zip(best, names, values, chances, strict=True)
    ]
    output.write_table("next token", ("id", "text", "logit", "probability"), rows, right=("id", "logit", "probability"))
