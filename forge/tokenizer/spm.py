"""BPE of characters with ▁ for spaces: SentencePiece's ("SPM" in llama.cpp), merged by score, and Gemma 4's, by rank.

`tokenizers` wants SPM as a list of merges, which for gemma's 262,144 pieces takes 1.2 s to derive and build (0.8 s to
load from a cache), and a list has no order for pieces of equal scores. Merging by score needs no list: the whole
tokenizer is ready in 0.2 s, and merged words are cached. The same loop merges Gemma 4's 514,906 pairs by rank.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from heapq import heapify, heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.tokenizer.pieces import CHUNK_CHARS, LONG_WORD, chunks, merge_long

SPACE = "▁"
_MAX_REMEMBERED_CHARS = 48
_REMEMBERED_WORDS = 1 << 15


class SPMEncoder:
    """Encodes text without literal tokens.

    `ids` maps pieces to ids, `scores` is (V,). Characters that no piece spells become their `<0xFF>` bytes, or
    `unknown_id` where the vocabulary lacks one of these (None: they are dropped).
    """

    def __init__(self, ids: Mapping[str, int], scores: NDArray[Any], unknown_id: int | None) -> None:
        # Only the order of the scores matters: rank 0 is the highest score, equal scores have equal ranks.
        ranks = np.unique(-scores.astype(np.float64), return_inverse=True)[1].tolist()
        self._set(ids, dict(zip(ids, ranks, strict=True)), "")
        self._unknown = [] if unknown_id is None else [unknown_id]

    def _set(self, ids: Mapping[str, int], ranks: Mapping[str, int], separator: str, line_ends: str = "") -> None:
        """ranks: Of what a pair forms, by its two pieces with the separator between. line_ends: More borders."""
        self._ids, self._ranks, self._separator = ids, ranks, separator
        self._bytes = [ids.get(f"<0x{i:02X}>", ids.get(chr(i)) if i < 128 else None) for i in range(256)]
        # If no piece holds a character followed by a space, no merge crosses this border: the words on both sides
        # are independent. Nearly all vocabularies have pieces with a space at the start only (gemma: and one ">▁</").
        between = "\ud800"  # no piece holds a surrogate
        inner = {match[1] for match in re.finditer(f"([^ {SPACE}]) ?{SPACE}", between.join(ranks))} - {between}
        before = re.escape("".join(sorted(inner)))
        self._border = re.compile(f"(?<=[^ {SPACE}{before}])(?=[ {SPACE}]){line_ends}")
        self._remembered = lru_cache(_REMEMBERED_WORDS)(self._encode)

    def encode(self, text: str, prefix: str = "") -> Iterator[list[int]]:
        """Ids of the text behind a prefix, some at a time."""
        for chunk in chunks(text, lambda: self._border):
            ids: list[int] = []
            for word in self._border.split((prefix + chunk).replace(" ", SPACE)):
                if len(word) <= LONG_WORD:
                    ids += self._remembered(word) if len(word) <= _MAX_REMEMBERED_CHARS else self._encode(word)
                else:
                    for piece in merge_long(word, self._merge):
                        ids += self._id(piece)
                        if len(ids) > CHUNK_CHARS:
                            yield ids
                            ids = []
            yield ids
            prefix = ""

    def _encode(self, word: str) -> list[int]:
        return [i for piece in self._merge(word) for i in self._id(piece)]

    def _id(self, piece: str) -> Sequence[int]:
        found = self._ids.get(piece)
        return self._spell(piece) if found is None else (found,)

    def _merge(self, word: str) -> list[str]:
        """Join the neighbours that form the piece of the lowest rank, leftmost first, until no two form a piece."""
        ranks, separator, size = self._ranks, self._separator, len(word)
        symbols = list(word)
        before = list(range(-1, size - 1))
        after = list(range(1, size + 1))
        # pair[i]: rank of the piece that symbol i and its successor form, -1 if none. Queue entries hold rank and
        # place in one integer. They are out of date if pair[i] has changed.
        pair = [-1] * size
        queue: list[int] = []
        for i in range(size - 1):
            rank = ranks.get(f"{word[i]}{separator}{word[i + 1]}")
            if rank is not None:
                pair[i] = rank
                queue.append(rank << 40 | i)
        heapify(queue)
        while queue:
            entry = heappop(queue)
            i = entry & 0xFF_FFFF_FFFF
            if pair[i] != entry >> 40:
                continue
            gone = after[i]
            symbols[i] += symbols[gone]
            symbols[gone] = ""
            pair[gone] = -1
            after[i] = following = after[gone]
            if following < size:
                before[following] = i
            for left, right in ((before[i], i), (i, following)):
                if left < 0:
                    continue
                rank = ranks.get(f"{symbols[left]}{separator}{symbols[right]}") if right < size else None
                if rank is None:
                    pair[left] = -1
                else:
                    pair[left] = rank
                    heappush(queue, rank << 40 | left)

        return [symbol for symbol in symbols if symbol]

    def _spell(self, character: str) -> Sequence[int]:
        spelled = [self._bytes[byte] for byte in character.encode()]
        return self._unknown if None in spelled else [i for i in spelled if i is not None]


class LineBPEEncoder(SPMEncoder):
    """Encodes text without literal tokens, a line at a time, by merges of the pairs "left right", in order of rank.

    Of a character that no piece spells, the `<0xFF>` bytes that the vocabulary lacks are dropped. `keeps_line_ends`: a
    run of line feeds that is a token is taken whole, even if no merges lead to it.
    """

    def __init__(self, ids: Mapping[str, int], merges: Sequence[str], keeps_line_ends: bool) -> None:
        ranks = dict(zip(reversed(merges), range(len(merges) - 1, -1, -1), strict=True))  # the first of equals counts
        self._keeps_line_ends = keeps_line_ends
        self._set(ids, ranks, " ", r"|(?<=\n)(?=[^\n])|(?<=[^\n])(?=\n)")

    def _encode(self, word: str) -> list[int]:
        is_kept = self._keeps_line_ends and word in self._ids and not word.strip("\n")
        return [self._ids[word]] if is_kept else super()._encode(word)

    def _spell(self, character: str) -> Sequence[int]:
        return [i for byte in character.encode() if (i := self._bytes[byte]) is not None]
