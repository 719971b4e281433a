"""Byte-level BPE (GPT-2's, "gpt2" in GGUF) over `tokenizers`: a split rule, then merges by rank."""

from collections.abc import Mapping, Sequence

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.models import BPE

from forge.tokenizer.pretokenizers import Rule


def _byte_alphabet() -> list[str]:
    """The character that stands for each byte: itself if it prints, else one from U+0100 up. Source: GPT-2."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte if byte in printable else 256 + others.index(byte)) for byte in range(256)]


_BYTE_ALPHABET = _byte_alphabet()
_BYTES = {character: bytes([byte]) for byte, character in enumerate(_BYTE_ALPHABET)}


def piece_bytes(piece: str) -> bytes:
    """The bytes that a piece spells; a character outside the byte alphabet stands for itself."""
    return b"".join(_BYTES.get(character) or character.encode() for character in piece)


class BPEEncoder:
    """Encodes text without literal tokens.

    `ids` maps pieces to ids; `merges` are pairs "left right", in order of rank. Raises ValueError, saying which, for a
    merge that is no pair of pieces that make a piece.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[str], rule: Rule) -> None:
        pairs: list[tuple[str, str]] = []
        for merge in dict.fromkeys(merges):  # of equal merges the first counts; `tokenizers` would take the last
            left, _, right = merge.partition(" ")
            # `tokenizers` panics on some of these, which no caller could catch as an error.
            if left not in ids or right not in ids or left + right not in ids:
                raise ValueError(f"{merge!r:.60} is no pair of tokens that make a token")
            pairs.append((left, right))
        # Bytes that the vocabulary lacks are dropped, as llama.cpp does: they take ids beyond it, left out at the end.
        self._size = len(ids)
        missing = [character for character in _BYTE_ALPHABET if character not in ids]
        self._drops = bool(missing)
        vocab = dict(ids) | {character: self._size + i for i, character in enumerate(missing)}
        self._tokenizer = RustTokenizer(BPE(vocab, pairs, ignore_merges=rule.ignore_merges))
        self._tokenizer.pre_tokenizer = rule.splitter()

    def encode(self, text: str) -> list[int]:
        """Ids of the text; nothing is added."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i < self._size] if self._drops else ids
