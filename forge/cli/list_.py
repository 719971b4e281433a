"""`forge list`: the models in the caches. A module `list` would hide Python's list within the package."""

from __future__ import annotations

from forge.cli import options, output


def command(as_json: options.Json = False) -> None:
    """Show the models in the caches, with their sizes. The caches are forge's own and Hugging Face's."""
    from forge import hub
    from forge.cli.about import about

    found = hub.stored()
    total = sum({item.path.resolve(): item.bytes for item in found}.values())  # revisions may share a file
    own, shared = map(str, hub.caches())
    if as_json:
        models = [
            {"name": item.name, "path": str(item.path), "bytes": item.bytes, "state": item.state} for item in found
        ]
        caches = {"forge": own, "huggingface": shared}
        output.write_json({**about(), "models": models, "bytes": total, "caches": caches})
    elif found:
        states = {"complete": ""}
        rows = [(item.name, output.num_bytes(item.bytes), states.get(item.state, item.state)) for item in found]
        title = f"{output.count(len({item.name for item in found}), 'model')}, {output.num_bytes(total)}"
        output.write_table(title, ("model", "size", ""), rows, right=("size",))
    else:
        output.note(f"no model in {own} or {shared}: forge pull {hub.DEFAULT_MODEL} fetches one")
