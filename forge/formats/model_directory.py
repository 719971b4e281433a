"""Files of a model's directory, as `save_pretrained` writes it or the Hugging Face cache holds it.

A directory may come from a stranger: a name in one of its files, or a link in it, must not lead out of it.
"""

import os
from pathlib import Path

from forge.errors import FormatError
from forge.formats.source import read_whole, show, status
from forge.formats.strict_json import MAX_VALUES, Json, read_object

# Most bytes of each file that is read whole. The largest known: a tokenizer.json of 33 MB, an index of 20 MB.
MAX_BYTES = {"tokenizer.json": 128 << 20, "model.safetensors.index.json": 64 << 20}
MAX_OTHER_BYTES = 8 << 20
MAX_NAME_CHARS, MAX_PART_BYTES = 512, 255  # the second is Linux's


def member(directory: Path, name: str) -> Path:
    """The path of a file of a directory, which may not exist. `name` is not trusted; a slash in it is a folder's.

    Raises FormatError if the name, or a link, leads out of the directory. The files of a snapshot in the Hugging Face
    cache are links to ../../blobs, which belongs to it.
    """
    parts = name.split("/")
    is_long = len(name) > MAX_NAME_CHARS or any(len(part.encode(errors="replace")) > MAX_PART_BYTES for part in parts)
    if is_long or not name.isprintable() or "\\" in name or {"", ".", ".."}.intersection(parts):
        raise FormatError(f"{directory}: {show(name)} is no name of a file in this directory: the model is forged")
    path = directory / name
    base, real = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    # The blobs are not resolved: a forged cache could have a link in their place.
    blobs = base.parent.parent / "blobs" if base.parent.name == "snapshots" else None
    if not real.is_relative_to(base) and real.parent != blobs:
        raise FormatError(f"{path}: is a link that leads out of its directory: put the file itself there")
    return path


def read_json(directory: Path, name: str, max_values: int = MAX_VALUES) -> dict[str, Json] | None:
    """The object in a JSON file of a directory; None if there is no such file. Raises FormatError as `read_object`."""
    path = member(directory, name)
    if status(path, follows=False) is None:
        return None
    return read_object(path, MAX_BYTES.get(name, MAX_OTHER_BYTES), max_values)


def read_text(directory: Path, name: str) -> str | None:
    """The text of a file of a directory, such as chat_template.jinja; None if there is no such file."""
    path = member(directory, name)
    if status(path, follows=False) is None:
        return None
    try:
        return str(read_whole(path, MAX_OTHER_BYTES), "utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: is not UTF-8 at byte {error.start}") from None
