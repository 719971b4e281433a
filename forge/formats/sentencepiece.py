"""A `tokenizer.model` of SentencePiece, read and validated: its pieces with their scores and types.

Format: sentencepiece_model.proto. Numbers of types are those of `tokenizer.ggml.token_type`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError, UnsupportedError
from forge.formats.protobuf import Field, Reader, Span
from forge.formats.source import Source, show

_MAX_BYTES = 32 << 20
_NORMAL, _UNUSED, _BYTE = 1, 5, 6
_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "Unigram", 3: "word", 4: "character"}
_PIECE = {1: Field("piece", "text"), 2: Field("score", "float"), 3: Field("type", "int")}
_TRAINER = {3: Field("model_type", "int"), 24: Field("treat_whitespace_as_suffix", "int")}
_NORMALIZER = {
    1: Field("name", "text"),
    2: Field("charsmap", "span"),
    3: Field("has_prefix", "int"),
    4: Field("remove_extra_whitespaces", "int"),
    5: Field("escape_whitespaces", "int"),
}
_MODEL = {
    1: Field("pieces", "message", is_repeated=True, schema=_PIECE),
    2: Field("trainer", "message", schema=_TRAINER),
    3: Field("normalizer", "message", schema=_NORMALIZER),
}


@dataclass(frozen=True, slots=True)
class SentencePieces:
    """A BPE of SentencePiece."""

    ids: dict[str, int]
    """Of the pieces, in their order."""
    scores: NDArray[np.float32]
    types: NDArray[np.int32]
    has_prefix: bool
    """Whether a space is put before a text."""
    changes: tuple[str, ...]
    """What it does to a text before it is split: the rule that changes characters, such as "nmt_nfkc", and
    "remove_extra_whitespaces"."""


def read_sentencepiece(path: Path) -> SentencePieces:
    """Read a file.

    Raises FormatError for a damaged one, UnsupportedError for another kind than BPE with ▁ before words.
    """
    source = Source(path)
    try:
        if source.size > _MAX_BYTES:
            raise FormatError(f"{path}: has {source.size} bytes, allowed are {_MAX_BYTES}: it is another file")
        message = Reader(source).read(Span(0, source.size), _MODEL)
    finally:
        source.close()
    trainer, normalizer = message.get("trainer", {}), message.get("normalizer", {})
    kind = trainer.get("model_type", _UNIGRAM)
    if kind != _BPE:
        raise UnsupportedError(f"{path}: is a model of SentencePiece's kind {_KINDS.get(kind, kind)}; forge knows BPE")
    if trainer.get("treat_whitespace_as_suffix", 0):
        raise UnsupportedError(f"{path}: puts spaces behind words (treat_whitespace_as_suffix), which is not supported")
    if not normalizer.get("escape_whitespaces", 1):
        raise UnsupportedError(f"{path}: does not spell spaces as ▁ (escape_whitespaces), which is not supported")
    pieces = message["pieces"]
    ids = {piece.get("piece", ""): i for i, piece in enumerate(pieces)}
    if len(ids) != len(pieces) or "" in ids:
        twice = next(
            text for i, text in enumerate(piece.get("piece", "") for piece in pieces) if ids[text] != i or not text
        )
        raise FormatError(f"{path}: has the piece {show(twice)} twice or without a text: it is damaged")
    types = np.array([piece.get("type", _NORMAL) for piece in pieces], np.int64)
    if len(types) and not (types.min() >= _NORMAL and types.max() <= _BYTE):
        raise FormatError(f"{path}: has a piece of an unknown type: it is damaged")
    scores = np.array([piece.get("score", 0.0) for piece in pieces], np.float32)
    if np.isnan(scores).any():
        raise FormatError(f"{path}: has a score that is no number: it is damaged")
    changes = [normalizer.get("name", "")] if "charsmap" in normalizer and normalizer["charsmap"].size else []
    if normalizer.get("remove_extra_whitespaces", 1):  # the format's default
        changes.append("remove_extra_whitespaces")
    return SentencePieces(ids, scores, types.astype(np.int32), bool(normalizer.get("has_prefix", 1)), tuple(changes))
