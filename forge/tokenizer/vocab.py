"""The vocabulary of a GGUF file, validated: pieces, their types, the ids with a role, and which ids end a text.

Keys and type numbers: docs/gguf.md of ggml. The file is hostile: the result is a `Vocabulary` or one `FormatError`
whatever the file holds.
"""

import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sized
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError

_PREFIX = "tokenizer.ggml."
MAX_TOKENS = 1 << 20  # far more than any vocabulary; a file of empty tokens would cost memory
_MAX_ENDS = 64


class TokenType(IntEnum):
    """`tokenizer.ggml.token_type`."""

    UNDEFINED = 0
    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


SPECIAL = (TokenType.UNKNOWN, TokenType.CONTROL)
"""Types that plain text never becomes. They are matched only if special text is parsed."""

# Names of tokens with a role, for files without the key of the role. The lists are llama.cpp's.
END_NAMES = (
    *("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>"),
    *("<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>"),
    *("<end_of_utterance>", "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~["),
)
_HTML_NAMES = ("</s>",)
"""As user-defined tokens these are HTML (gemma's strikethrough), and end no text."""
_INFILL_PREFIXES = ("<|fim_prefix|>", "<fim-prefix>", "<fim_prefix>", "<｜fim▁begin｜>", "<PRE>", "▁<PRE>")
_INFILL_SUFFIXES = ("<|fim_suffix|>", "<fim-suffix>", "<fim_suffix>", "<｜fim▁hole｜>", "<SUF>", "▁<SUF>")
_INFILL_MIDDLES = ("<|fim_middle|>", "<fim-middle>", "<fim_middle>", "<｜fim▁end｜>", "<MID>", "▁<MID>")
_INFILL_ROLES = (  # keys of the id; names, of which the first in the vocabulary counts; whether the token ends a text
    (("fim_pre_token_id", "prefix_token_id"), (*_INFILL_PREFIXES, "<|code_prefix|>", "<|prefix|>"), False),
    (("fim_suf_token_id", "suffix_token_id"), (*_INFILL_SUFFIXES, "<|code_suffix|>", "<|suffix|>"), False),
    (("fim_mid_token_id", "middle_token_id"), (*_INFILL_MIDDLES, "<|code_middle|>", "<|middle|>"), False),
    (("fim_pad_token_id",), ("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"), True),
    (("fim_rep_token_id",), ("<|fim_repo|>", "<|repo_name|>", "<fim-repo>", "<REPO>", "<reponame>"), True),
    (("fim_sep_token_id",), ("<|file_sep|>",), True),
)
_ALWAYS_TEXT = ("<|channel|>", "<|message|>", "<|start|>", "<|constrain|>")
# If a vocabulary has both of a pair, its <|end|> ends a message and not the text.
_MESSAGE_PAIRS = (
    *({"<|return|>", "<|call|>"}, {"<|return|>", "<|calls|>"}),
    *({"<|flush|>", "<|call|>"}, {"<|flush|>", "<|calls|>"}),
)
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Pieces by id, their types, and the tokens with a role."""

    pieces: list[str]
    ids: dict[str, int]
    types: NDArray[np.uint8]
    """(V,) `TokenType`, corrected as llama.cpp does for control tokens that files declare as text."""
    end_ids: frozenset[int]


class Fields:
    """Typed access to the `tokenizer.*` keys of one file. Every error is a FormatError that names file and key."""

    def __init__(self, metadata: Mapping[str, Any], source: str) -> None:
        self._metadata = metadata
        self._source = source
        self._warned = set[str]()

    def error(self, problem: str) -> FormatError:
        return FormatError(f"{self._source}: {problem}; the file is damaged or was converted wrongly")

    def text(self, key: str) -> str | None:
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(f"{key} is not a string")
        return value

    def texts(self, prefix: str) -> dict[str, str]:
        """Strings whose keys begin with a prefix, by the rest of the key."""
        return {key[len(prefix) :]: self.text(key) or "" for key in self._metadata if key.startswith(prefix)}

    def flag(self, name: str, default: bool) -> bool:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            return default
        if not isinstance(value, bool | np.bool_):
            raise self.error(f"{_PREFIX}{name} is not a boolean")
        return bool(value)

    def has(self, name: str) -> bool:
        return self._metadata.get(_PREFIX + name) is not None

    def token_id(self, name: str, vocab_size: int) -> int | None:
        """The id under a key. None if the key is missing or, with a warning, if the vocabulary lacks the id."""
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            return None
        if isinstance(value, bool | np.bool_) or not isinstance(value, int | np.integer):
            raise self.error(f"{_PREFIX}{name} is not an integer")
        if not 0 <= value < vocab_size:
            if name not in self._warned:  # converters write -1 for "none"
                self._warned.add(name)
                warnings.warn(
                    f"{self._source}: {_PREFIX}{name} is {value}, outside the {vocab_size} tokens, and is ignored: "
                    "the model has no such token",
                    stacklevel=5,
                )
            return None
        return int(value)

    def strings(self, name: str, most: int | None = None) -> list[str]:
        """The strings of an array. Raises FormatError for more than `most`, before they are read."""
        array = self._array(name)
        if most is not None and len(array) > most:
            raise self.error(f"{_PREFIX}{name} holds more than {most} {name}")
        values = list(array)
        if not set(map(type, values)) <= {str}:
            raise self.error(f"{_PREFIX}{name} is not an array of strings")
        try:
            "".join(values).encode()
        except UnicodeEncodeError:
            raise self.error(f"{_PREFIX}{name} holds text that is not UTF-8") from None
        return values

    def numbers(self, name: str, kinds: str, size: int) -> NDArray[Any] | None:
        """A one-dimensional array of `size` numbers of the given NumPy kinds, or None if the key is missing."""
        if _PREFIX + name not in self._metadata:
            return None
        try:
            values = np.asarray(self._array(name))
        except (ValueError, TypeError, OverflowError):
            values = np.empty(0, dtype=object)
        if values.ndim != 1 or values.dtype.kind not in kinds:
            raise self.error(f"{_PREFIX}{name} is not an array of numbers")
        if len(values) != size:
            raise self.error(f"{_PREFIX}{name} has {len(values)} entries for {size} tokens")
        return values

    def ids(self, name: str, vocab_size: int, most: int) -> frozenset[int]:
        """The ids of an array, but for those that the vocabulary lacks. Empty if the key is missing. Raises FormatError
        for more than `most`."""
        array = self._array(name) if self.has(name) else ()
        if len(array) > most:
            raise self.error(f"{_PREFIX}{name} holds {len(array)} ids, more than {most}")
        values = list(array)
        if not all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values):
            raise self.error(f"{_PREFIX}{name} is not an array of integers")
        return frozenset(int(value) for value in values if 0 <= value < vocab_size)

    def _array(self, name: str) -> Collection[Any]:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            raise self.error(f"{_PREFIX}{name} is missing")
        if isinstance(value, str | bytes | Mapping) or not (isinstance(value, Iterable) and isinstance(value, Sized)):
            raise self.error(f"{_PREFIX}{name} is not an array")
        return cast(Collection[Any], value)


def read_vocabulary(fields: Fields) -> Vocabulary:
    """Pieces, types and ends. Raises FormatError.

    An id given by an eos, eot or eom key, or by the list `eos_token_ids`, ends a text. So does a token with the name of
    an end, whatever its type, but not gemma's user-defined `</s>`, which is HTML.
    """
    pieces = fields.strings("tokens", MAX_TOKENS)
    if not pieces:
        raise fields.error(f"{_PREFIX}tokens is empty")
    pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(pieces)]
    ids = dict(zip(pieces, range(len(pieces)), strict=True))
    if len(ids) != len(pieces):
        twice = next(piece for i, piece in enumerate(pieces) if ids[piece] != i)
        raise fields.error(f"{_PREFIX}tokens holds {twice!r:.60} twice")

    types = fields.numbers("token_type", "iu", len(pieces))
    if types is None:
        types = np.full(len(pieces), TokenType.NORMAL)
    if types.min() < TokenType.UNDEFINED or types.max() > TokenType.BYTE:
        raise fields.error(f"{_PREFIX}token_type holds numbers other than 0 to 6")
    types = types.astype(np.uint8)
    for i in np.flatnonzero(types == TokenType.BYTE):
        if not _BYTE_PIECE.fullmatch(pieces[i]):
            raise fields.error(f"byte token {i} is {pieces[i]!r:.60}, not of the form <0xFF>")

    ends = {fields.token_id(f"{role}_token_id", len(pieces)) for role in ("eos", "eot", "eom")} - {None}
    ends |= fields.ids("eos_token_ids", len(pieces), _MAX_ENDS)
    ends |= _mark_controls(fields, ids, types)
    for name in _ALWAYS_TEXT:
        if name in ids:
            types[ids[name]] = TokenType.USER_DEFINED
    if "<|tool_response>" in ids and "</s>" in ids:  # Gemma 4: it is HTML, as in earlier gemmas, and plain text
        ends.discard(ids["</s>"])
        types[ids["</s>"]] = TokenType.NORMAL
    end_names = {pieces[i] for i in ends if i is not None}
    if "<|end|>" in end_names and any(pair <= end_names for pair in _MESSAGE_PAIRS):
        ends.discard(ids["<|end|>"])
        types[ids["<|end|>"]] = TokenType.USER_DEFINED
    return Vocabulary(pieces, ids, types, frozenset(i for i in ends if i is not None))


def _mark_controls(fields: Fields, ids: Mapping[str, int], types: NDArray[np.uint8]) -> set[int]:
    """Change tokens with a control token's name to control tokens, in place. Returns the ids that end a text."""
    ends = set[int]()

    def mark(i: int, is_end: bool) -> None:
        if is_end:
            ends.add(i)
        types[i] = TokenType.CONTROL

    for name in END_NAMES:
        if name in ids:
            # Converters up to 2024 stored ends of turns as user-defined tokens.
            mark(ids[name], name not in _HTML_NAMES or types[ids[name]] != TokenType.USER_DEFINED)
    for keys, names, is_end in _INFILL_ROLES:
        given = _first(fields.token_id(key, len(ids)) for key in keys)
        named = _first(ids.get(name) for name in names)
        if given is not None and is_end:
            ends.add(given)
        elif given is None and named is not None:
            mark(named, is_end and types[named] != TokenType.USER_DEFINED)
    return ends


def _first(values: Iterable[int | None]) -> int | None:
    return next((value for value in values if value is not None), None)
