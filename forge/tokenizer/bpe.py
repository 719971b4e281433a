"""Byte-level BPE of GPT-2 ("gpt2" in GGUF) over `tokenizers`: a split rule, then merges by rank."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache

from tokenizers.models import BPE

from forge.tokenizer.pieces import CHUNK_CHARS, LONG_WORD, Splitter, merge_long
from forge.tokenizer.pretokenizers import Rule

_MAX_REMEMBERED_CHARS = 48
_REMEMBERED_WORDS = 1 << 15


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself if it prints, else one from U+0100 up. Source: GPT-2."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


_BYTE_ALPHABET = _byte_alphabet()
_BYTES = {character: bytes([byte]) for byte, character in enumerate(_BYTE_ALPHABET)}


def piece_bytes(piece: str) -> bytes:
    """Bytes that a piece spells. A character outside the byte alphabet stands for itself."""
    return b"".join(_BYTES.get(character) or character.encode() for character in piece)


class BPEEncoder:
    """Encodes text without literal tokens.

    `ids` maps pieces to ids; `merges` are pairs "left right", in order of rank. Raises ValueError, saying which, for a
    merge that is no pair of pieces that make a piece.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[str], rule: Rule) -> None:
        pairs: list[tuple[str, str]] = []
        for merge in dict.fromkeys(merges):  # the first of equal merges counts; `tokenizers` would take the last
            left, _, right = merge.partition(" ")
            # `tokenizers` panics on some of these, and a panic cannot be caught as an error.
            if left not in ids or right not in ids or left + right not in ids:
                raise ValueError(f"{merge!r:.60} is no pair of tokens that make a token")
            pairs.append((left, right))
        # Bytes that the vocabulary lacks are dropped, as llama.cpp does: they take ids beyond it, left out at the end.
        self._size = len(ids)
        missing = [character for character in _BYTE_ALPHABET if character not in ids]
        self._drops = bool(missing)
        vocab = dict(ids) | {character: self._size + i for i, character in enumerate(missing)}
        self._ids = vocab
        self._shared = list(vocab.values())  # all results share these integers, which take memory once
        self._model = BPE(vocab, pairs, ignore_merges=rule.ignore_merges)
        self._merges = (vocab, pairs) if rule.ignore_merges else None
        self._splitter = Splitter(rule.splitter())
        self._remembered = lru_cache(_REMEMBERED_WORDS)(self._encode)

    def encode(self, text: str, prefix: str = "") -> Iterator[list[int]]:
        """Ids of the text, some at a time. No special token is added."""
        ids: list[int] = []
        for word in self._splitter.words(prefix + text if prefix else text):
            if len(word) <= LONG_WORD:
                ids += self._remembered(word) if len(word) <= _MAX_REMEMBERED_CHARS else self._encode(word)
            else:
                yield ids
                ids = []
                for piece in merge_long(word, self._merge):
                    ids += [i for i in (self._ids[piece],) if i < self._size]
                    if len(ids) > CHUNK_CHARS:
                        yield ids
                        ids = []
            if len(ids) > CHUNK_CHARS:
                yield ids
                ids = []
        yield ids

    def _encode(self, word: str) -> list[int]:
        ids = [self._shared[token.id] for token in self._model.tokenize(word)]
        return [i for i in ids if i < self._size] if self._drops else ids

    def _merge(self, word: str) -> list[str]:
        return [token.value for token in self._merging.tokenize(word)]

    @cached_property
    def _merging(self) -> BPE:
        """The model without ignore_merges: a part of a long word that is a token is still merged by rank."""
        return self._model if self._merges is None else BPE(*self._merges)
