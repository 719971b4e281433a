"""The tokenizer of a Hugging Face directory, read from its files."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.errors import FormatError
from forge.formats.model_directory import read_json, read_text
from forge.tokenizer.huggingface import HuggingFaceFiles, tokenizer_metadata

_MORE_TEMPLATES = "additional_chat_templates"
_MAX_TEMPLATES = 64


def read_tokenizer(folder: Path, config: Mapping[str, Any], *, architecture: str, vocab_size: int) -> dict[str, Any]:
    """The metadata keys `tokenizer.*` and `general.sampling.*` of a directory.

    Args:
        folder: The directory, as `save_pretrained` writes it.
        config: Its config.json.
        architecture: `general.architecture`, as llama.cpp names the family.
        vocab_size: Rows of the embedding.

    Raises:
        FormatError: A file is damaged or missing.
        UnsupportedError: The tokenizer is of a kind, or has a rule, that forge does not know.
    """
    tokenizer = read_json(folder, "tokenizer.json")
    if tokenizer is None:
        raise FormatError(f"{folder}: has no tokenizer.json{_others(folder)}")
    files = HuggingFaceFiles(
        str(folder),
        tokenizer,
        config,
        read_json(folder, "tokenizer_config.json") or {},
        read_json(folder, "special_tokens_map.json") or {},
        read_json(folder, "generation_config.json") or {},
        _templates(folder),
    )
    return tokenizer_metadata(files, architecture=architecture, vocab_size=vocab_size)


def _others(folder: Path) -> str:
    """What to do without a tokenizer.json, by the files that are there instead."""
    known = ("tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
    there = next((name for name in known if os.path.lexists(folder / name)), None)
    if there is None:
        return ": fetch the file of the model that this one was made from"
    return f", only {there}: save the tokenizer anew by transformers' AutoTokenizer(...).save_pretrained"


def _templates(folder: Path) -> dict[str, str]:
    """Chat templates in files of their own, by name."""
    found: dict[str, str] = {}
    older = (read_json(folder, "chat_template.json") or {}).get("chat_template")
    if isinstance(older, str):
        found["default"] = older
    try:
        names = sorted(os.listdir(folder / _MORE_TEMPLATES))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    names = [name for name in names if name.endswith(".jinja")]
    if len(names) > _MAX_TEMPLATES:
        raise FormatError(f"{folder / _MORE_TEMPLATES}: holds {len(names)} templates, more than {_MAX_TEMPLATES}")
    files = {"default": "chat_template.jinja"} | {name[:-6]: f"{_MORE_TEMPLATES}/{name}" for name in names}
    return found | {name: text for name, file in files.items() if (text := read_text(folder, file)) is not None}
