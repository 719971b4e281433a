"""The tokenizer of a Hugging Face directory, read from its files."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.errors import FormatError
from forge.formats.model_directory import member, read_json, read_text
from forge.formats.sentencepiece import read_sentencepiece
from forge.formats.source import names_in, show, status
from forge.tokenizer.huggingface import HuggingFaceFiles, ScoredPieces, tokenizer_metadata

_SENTENCEPIECE = "tokenizer.model"
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
    settings = read_json(folder, "tokenizer_config.json") or {}
    tokenizer, scored = read_json(folder, "tokenizer.json"), None
    if tokenizer is None:
        tokenizer, scored = _sentencepiece(folder, settings)
    files = HuggingFaceFiles(
        str(folder),
        tokenizer,
        config,
        settings,
        read_json(folder, "special_tokens_map.json") or {},
        read_json(folder, "generation_config.json") or {},
        _templates(folder),
        scored,
    )
    return tokenizer_metadata(files, architecture=architecture, vocab_size=vocab_size)


def _sentencepiece(folder: Path, settings: Mapping[str, Any]) -> tuple[dict[str, Any], ScoredPieces]:
    """A tokenizer.model, and tokens of added_tokens.json, in the words of a tokenizer.json, which is missing.

    settings: tokenizer_config.json, whose `added_tokens_decoder` says more of the tokens that it holds.
    """
    path = member(folder, _SENTENCEPIECE)
    if status(path, follows=False) is None:
        raise FormatError(f"{folder}: has no tokenizer.json{_others(folder)}")
    found = read_sentencepiece(path)
    if found.changes:
        warnings.warn(
            f"{path}: its texts are changed by {', '.join(map(show, found.changes))}, which forge and llama.cpp leave "
            "out: some characters or spaces get other ids",
            stacklevel=2,
        )
    added = read_json(folder, "added_tokens.json") or {}
    more = settings.get("added_tokens_decoder")
    described = more if isinstance(more, Mapping) else {}
    tokens = [{"content": text, "id": i} for text, i in added.items() if not _is_of(text, described.get(str(i)))]
    tokenizer = {"model": {"type": "BPE", "vocab": found.ids}, "added_tokens": tokens}
    prefix = settings.get("add_prefix_space")
    has_prefix = prefix if isinstance(prefix, bool) else found.has_prefix
    return tokenizer, ScoredPieces(found.scores, found.types, has_prefix)


def _is_of(text: str, described: Any) -> bool:
    """Whether an entry of `added_tokens_decoder` is that of a text."""
    return isinstance(described, Mapping) and described.get("content") == text


def _others(folder: Path) -> str:
    """What to do without a tokenizer.json, by the files that are there instead."""
    known = ("tekken.json", "vocab.json", "vocab.txt")
    there = next((name for name in known if status(folder / name, follows=False)), None)
    if there is None:
        return ": fetch the file of the model that this one was made from"
    return f", only {there}: save the tokenizer anew by transformers' AutoTokenizer(...).save_pretrained"


def _templates(folder: Path) -> dict[str, str]:
    """Chat templates in files of their own, by name."""
    found: dict[str, str] = {}
    older = (read_json(folder, "chat_template.json") or {}).get("chat_template")
    if isinstance(older, str):
        found["default"] = older
    names = [name for name in names_in(folder / _MORE_TEMPLATES) if name.endswith(".jinja")]
    if len(names) > _MAX_TEMPLATES:
        raise FormatError(f"{folder / _MORE_TEMPLATES}: holds {len(names)} templates, more than {_MAX_TEMPLATES}")
    files = {"default": "chat_template.jinja"} | {name[:-6]: f"{_MORE_TEMPLATES}/{name}" for name in names}
    return found | {name: text for name, file in files.items() if (text := read_text(folder, file)) is not None}
