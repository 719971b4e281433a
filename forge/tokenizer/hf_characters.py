"""A BPE of characters, ▁ for spaces: from a `tokenizer.json`, whose order of merges gives SentencePiece's scores."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from forge.errors import FormatError, UnsupportedError
from forge.tokenizer.split_names import describe, steps
from forge.tokenizer.spm import SPACE

_LONG = 256
_SAMPLE = 10_000  # pieces that are looked at: of a vocabulary that was trained by ranks, one of the first fails


def character_fields(
    tokenizer: Mapping[str, Any], vocab: Mapping[str, int], merges: Sequence[str], size: int, where: str
) -> dict[str, Any]:
    """The fields model, pre, scores or merges, and add_space_prefix, for `size` tokens.

    A `tokenizer.json` has no scores. Where every way to put a piece together is a merge, the vocabulary was made by
    SentencePiece, and the place of a piece's first merge gives its score: a piece that is merged earlier has a higher
    one. Other vocabularies are merged by the rank of pairs, a line at a time.

    Raises:
        FormatError: A merge forms no piece.
        UnsupportedError: Text is changed or split in a way that forge does not know.
    """
    has_prefix = puts_space_before(tokenizer, where)
    counts = Counter(merge.replace(" ", "", 1) for merge in merges)  # in the order of the first merge of each
    if missing := next((piece for piece in counts if piece not in vocab), None):
        raise FormatError(f"{where}: a merge forms {missing!r:.60}, which is no token: the file is damaged")
    if all(_num_splits(piece, vocab) == count for piece, count in islice(counts.items(), _SAMPLE)):
        scores = np.full(size, -len(counts), np.float32)
        scores[[vocab[piece] for piece in counts]] = -np.arange(len(counts), dtype=np.float32)
        prefix = {} if has_prefix else {"add_space_prefix": False}
        return {"model": "llama", "pre": "default", "scores": scores} | prefix
    other = "pairs of characters are merged by rank, and not by the piece that they form"
    if has_prefix:
        raise UnsupportedError(f"{where}: {other}, and a space is put before a text; forge has no such tokenizer")
    if mixed := next((piece for piece in counts if "\n" in piece and piece.strip("\n")), None):
        raise UnsupportedError(
            f"{where}: {other}, and {mixed!r:.60} goes over a line's end; forge has no such tokenizer"
        )
    return {"model": "gpt2", "pre": "sarvam-moe", "merges": merges}


def puts_space_before(tokenizer: Mapping[str, Any], where: str) -> bool:
    """Whether a space is put before a text. Raises UnsupportedError for steps that do more than spell spaces as ▁."""
    spells = has_prefix = False
    for step in (*steps(tokenizer, "normalizer", where), *steps(tokenizer, "pre_tokenizer", where)):
        kind, pattern = step.get("type"), step.get("pattern")
        is_space = pattern == {"String": " "}
        if kind == "Prepend" and step.get("prepend") == SPACE:
            has_prefix = True
        elif kind == "Replace" and is_space and step.get("content") == SPACE:
            spells = True
        elif kind == "Metaspace" and step.get("replacement") == SPACE and step.get("split") is False:
            spells = True
            default = "always" if step.get("add_prefix_space", True) else "never"
            has_prefix = step.get("prepend_scheme", default) != "never"
        elif not (kind == "NFC" or (kind == "Split" and is_space and spells)):  # no space is left to split at
            raise UnsupportedError(f"{where}: text goes through {describe(step)}, which forge does not know")
    if not spells:
        raise UnsupportedError(
            f"{where}: spaces are not spelled as {SPACE}; forge knows no such vocabulary of characters"
        )
    return has_prefix


def _num_splits(piece: str, vocab: Collection[str]) -> int:
    """In how many ways two tokens form a piece. 0 for a piece that is too long to be one of SentencePiece's."""
    return sum(piece[:i] in vocab and piece[i:] in vocab for i in range(1, len(piece))) if len(piece) <= _LONG else 0
