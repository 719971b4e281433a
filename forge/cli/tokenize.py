"""`forge tokenize`: the token ids of a text."""

from __future__ import annotations

import json
from itertools import islice
from typing import Annotated

import typer

from forge.cli import options, output
from forge.cli.about import about


def command(
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The text; - reads it from stdin.")],
    model: options.Model = options.DEFAULT_MODEL,
    parse_special: Annotated[
        bool, typer.Option("--parse-special", help="Read the names of control tokens in TEXT as these tokens.")
    ] = False,
    no_add_special: Annotated[
        bool, typer.Option("--no-add-special", help="Do not add the tokens that begin or end a text.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Show the token ids of TEXT. The model's file may lack weights: its vocabulary is enough."""
    import forge

    text = options.text_or_stdin(text, "TEXT")
    path = options.resolve(model)
    tokenizer = forge.load_tokenizer(path)
    ids = tokenizer.encode(text, add_special=not no_add_special, parse_special=parse_special)
    if parse_special and not no_add_special and tokenizer.begins_with_bos(text):
        output.note(
            "the text begins with the BOS token and one more is added, as llama.cpp does; --no-add-special adds none, "
            "and prompts of forge generate get one in all"
        )
    # In blocks: a long text has millions of ids, and one table or string of all ids takes gigabytes.
    if as_json:
        head, _, tail = json.dumps({**about(model=path), "ids": []}).rpartition("]")
        output.write(head)
        for start in range(0, len(ids), _BLOCK):
            output.write((", " if start else "") + ", ".join(map(str, ids[start : start + _BLOCK])))
        output.write(f"]{tail}\n")
        return
    width = max(2, len(str(max(ids, default=0))))
    rows = ((f"{id:>{width}}", output.quoted(tokenizer.token_text(id))) for id in ids)
    output.write_table(output.count(len(ids), "token"), ("id", "text"), islice(rows, _BLOCK), right=("id",))
    while lines := "".join(f"{id}  {text}\n" for id, text in islice(rows, _BLOCK)):
        output.write(lines)


_BLOCK = 1 << 12
