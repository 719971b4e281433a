"""From the files of a Hugging Face tokenizer to the `tokenizer.*` metadata that llama.cpp's converter writes.

Kinds: byte-level BPE, BPE of characters with ▁ for spaces (SentencePiece's, by scores; Gemma 4's, by ranks). A model of
another kind is refused by name.
"""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.errors import FormatError, UnsupportedError
from forge.tokenizer.hf_characters import character_fields, puts_space_before
from forge.tokenizer.hf_roles import config_value, role_fields
from forge.tokenizer.pretokenizers import RULES
from forge.tokenizer.split_names import describe, ignores_merges, split_name, steps
from forge.tokenizer.spm import SPACE
from forge.tokenizer.vocab import END_NAMES, MAX_TOKENS, TokenType

_ID = re.compile("[0-9]{1,9}")
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_CONTROLS = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
"""Added tokens that models declare as text, and that are none. llama.cpp's list."""
_GEMMA4_VISIBLE = (
    *("<|channel>", "<channel|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
)
"""Control tokens of Gemma 4 that a parser of answers must see."""
_ADDED_SCORE, _NO_SCORE = -1000, -10_000
"""What the converter writes beside SentencePiece's scores: for added tokens, and for rows without a token."""
_CHARACTER_DECODERS: tuple[Mapping[str, Any], ...] = (
    {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    {"type": "Metaspace", "replacement": SPACE},
)
"""Steps that make ▁ spaces and bytes text, and leave out the space before a text."""
_SAMPLING = {
    "temperature": ("temp", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
    "repetition_penalty": ("penalty_repeat", float),
}
"""Defaults of generation_config.json, and the ends of their keys behind "general.sampling."."""


@dataclass(frozen=True, slots=True)
class ScoredPieces:
    """Scores and types of SentencePiece's pieces, by id, and whether a space is put before a text."""

    scores: NDArray[np.float32]
    types: NDArray[np.int32]
    has_prefix: bool


@dataclass(frozen=True, slots=True)
class HuggingFaceFiles:
    """The files of a directory that say how text becomes ids, parsed. An empty one = there is no such file."""

    source: str
    """The directory, for messages."""
    tokenizer: Mapping[str, Any]
    """tokenizer.json"""
    config: Mapping[str, Any]
    """config.json"""
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: Mapping[str, Any] = field(default_factory=dict)
    """special_tokens_map.json"""
    generation: Mapping[str, Any] = field(default_factory=dict)
    """generation_config.json"""
    templates: Mapping[str, str] = field(default_factory=dict)
    """Chat templates that lie in files of their own, by name."""
    scored: ScoredPieces | None = None
    """What a tokenizer.model has beside the vocabulary. `tokenizer` is then made of that and added_tokens.json."""

    @property
    def vocabulary(self) -> str:
        """The file of the vocabulary."""
        return "tokenizer.json" if self.scored is None else "tokenizer.model"

    def error(self, problem: str, name: str = "") -> FormatError:
        where = f"{self.source}/{name or self.vocabulary}"
        return FormatError(f"{where}: {problem}: the file is damaged; fetch it again")


def tokenizer_metadata(files: HuggingFaceFiles, *, architecture: str, vocab_size: int) -> dict[str, Any]:
    """The keys `tokenizer.*` and `general.sampling.*` of a model, which `Tokenizer.from_metadata` takes.

    An added token without a row in the embedding is left out, as the model cannot see it; rows without a token get
    unused ones. All ids at which generation_config.json or config.json ends a text become ends.

    Args:
        files: What the directory holds.
        architecture: `general.architecture`, as llama.cpp names the family.
        vocab_size: Rows of the embedding.

    Raises:
        FormatError: A file is damaged.
        UnsupportedError: The tokenizer is of a kind, or has a rule, that forge does not know.
    """
    if not 0 < vocab_size <= MAX_TOKENS:
        raise files.error(f"vocab_size is {vocab_size}, not from 1 to {MAX_TOKENS}", "config.json")
    model = _object(files, files.tokenizer.get("model"), "model")
    vocab = _vocabulary(files, model, vocab_size)
    found = _kind(files, model, vocab, architecture, vocab_size)

    pieces = [""] * vocab_size
    types = np.full(vocab_size, TokenType.UNUSED, np.int32)
    spells_bytes = found["model"] != "gpt2" or not RULES[found["pre"]].stages
    for piece, i in vocab.items():
        pieces[i] = piece
        types[i] = TokenType.BYTE if spells_bytes and _BYTE_PIECE.fullmatch(piece) else TokenType.NORMAL
    if files.scored is not None:  # the converter takes SentencePiece's user-defined pieces for normal ones
        given = files.scored.types
        types[: len(given)] = np.where(given == TokenType.USER_DEFINED, TokenType.NORMAL, given)
    ids = dict(vocab)
    strips: dict[str, list[int]] = {"lstrip": [], "rstrip": []}
    for text, i, token in _added_tokens(files, vocab, vocab_size):
        ids[text] = i
        is_control = bool(token.get("special")) or _is_marker(text)
        if architecture == "gemma4" and text in _GEMMA4_VISIBLE:
            is_control = False
        if files.scored is not None:
            found["scores"][i] = _ADDED_SCORE
        pieces[i] = text if is_control else text.replace(SPACE, " ")
        types[i] = TokenType.CONTROL if is_control else TokenType.USER_DEFINED
        for side, swallowing in strips.items():
            if token.get(side):
                swallowing.append(i)

    found |= {f"{side}_token_ids": np.array(swallowing, np.int32) for side, swallowing in strips.items() if swallowing}
    found |= {"tokens": [piece or f"[PAD{i}]" for i, piece in enumerate(pieces)], "token_type": types}
    configs = files.tokenizer_config, files.special_tokens
    where = f"{files.source}/tokenizer.json"
    found = role_fields(files.tokenizer, configs, files.config, ids, architecture, where) | found
    if found["model"] == "gpt2" and RULES[found["pre"]].add_bos:
        found.setdefault("add_bos_token", False)  # the rule's default is for files that do not say
    _add_ends(files, found, pieces)
    if suppressed := _ids(files.generation, "suppress_tokens", vocab_size):
        found["suppress_tokens"] = np.array(suppressed, np.int32)
    keys = {f"tokenizer.ggml.{name}": value for name, value in found.items()}
    return keys | _template_keys(files) | _sampling_keys(files)


def _kind(
    files: HuggingFaceFiles, model: Mapping[str, Any], vocab: Mapping[str, int], architecture: str, size: int
) -> dict[str, Any]:
    """What depends on the kind of vocabulary: the fields model, pre, merges or scores, and how a text begins."""
    if files.scored is not None:
        scores = np.full(size, _NO_SCORE, np.float32)
        scores[: len(vocab)] = files.scored.scores
        prefix = {} if files.scored.has_prefix else {"add_space_prefix": False}
        return {"model": "llama", "pre": "default", "scores": scores} | prefix
    where = f"{files.source}/tokenizer.json"
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UnsupportedError(f"{where}: the tokenizer is a {kind!r:.40}; forge knows BPE alone")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise UnsupportedError(f"{where}: its tokens have a {key}, {model[key]!r:.40}; forge knows no such BPE")
    merges, ignores = _merges(files, model), ignores_merges(files.tokenizer, where)
    decoders = list(steps(files.tokenizer, "decoder", where))
    if any(step["type"] == "ByteLevel" for step in (*steps(files.tokenizer, "pre_tokenizer", where), *decoders)):
        _check_decoders(decoders, ({"type": "ByteLevel"}, {"type": "Fuse"}), where)
        pre = split_name(files.tokenizer, where)
        # The rule has llama.cpp's default, and GGUF has no key for another.
        differs = {} if ignores == RULES[pre].ignore_merges else {"ignore_merges": ignores}
        return {"model": "gpt2", "pre": pre, "merges": merges} | differs
    if not model.get("byte_fallback"):
        raise UnsupportedError(
            f"{where}: the tokenizer is a BPE of characters without tokens for bytes; forge has none"
        )
    if ignores:
        raise UnsupportedError(f"{where}: ignore_merges of a BPE of characters is not supported")
    _check_decoders(decoders, _CHARACTER_DECODERS, where)
    if architecture == "gemma4":
        if puts_space_before(files.tokenizer, where):
            raise UnsupportedError(f"{where}: a space is put before a text, which Gemma 4 does not do")
        scores = np.full(size, -1000, np.float32)  # as the converter writes them; nothing reads them
        starts = {"add_space_prefix": False, "add_bos_token": True}
        return {"model": "gemma4", "scores": scores, "merges": merges, **starts}
    return character_fields(files.tokenizer, vocab, merges, size, where)


def _check_decoders(found: Sequence[Mapping[str, Any]], known: Sequence[Mapping[str, Any]], where: str) -> None:
    """Raises UnsupportedError for a step that is none of the known ones, which have at least these values."""
    for step in found:
        if not any(step.items() >= each.items() for each in known):
            raise UnsupportedError(f"{where}: its decoder is {describe(step)}, which forge does not know")


def _object(files: HuggingFaceFiles, value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise files.error(f"{name} is not an object")
    return value


def _vocabulary(files: HuggingFaceFiles, model: Mapping[str, Any], size: int) -> Mapping[str, int]:
    """The ids of the tokens that are not added."""
    if model.get("type", "BPE") != "BPE":  # another kind may have a list; `_kind` refuses it
        return {}
    vocab = _object(files, model.get("vocab"), "model.vocab")
    if not set(map(type, vocab.values())) <= {int}:
        raise files.error("model.vocab holds ids that are not integers")
    if len(set(vocab.values())) != len(vocab):
        raise files.error("model.vocab gives two tokens the same id")
    if vocab and not 0 <= min(vocab.values()) <= max(vocab.values()) < size:
        raise files.error(
            f"model.vocab has ids from {min(vocab.values())} to {max(vocab.values())}, and the embedding {size} rows"
        )
    return vocab


def _merges(files: HuggingFaceFiles, model: Mapping[str, Any]) -> list[str]:
    """Merges as "left right". A space within a part is written as Ġ, as the converter does."""
    merges = model.get("merges")
    if not isinstance(merges, list):
        raise files.error("model.merges is not a list")
    if set(map(type, merges)) <= {str}:
        found = merges
    elif all(isinstance(pair, list) and list(map(type, pair)) == [str, str] for pair in merges):
        found = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in merges]
    else:
        raise files.error("model.merges is not a list of pairs")
    if not all(merge.count(" ") == 1 for merge in found):
        raise files.error("model.merges holds what is no pair of tokens")
    return found


def _added_tokens(
    files: HuggingFaceFiles, vocab: Mapping[str, int], size: int
) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Added tokens that the embedding has: text, id, and what the file says of it."""
    name = "tokenizer.json" if files.scored is None else "added_tokens.json"
    tokens = files.tokenizer.get("added_tokens") or []
    more = files.tokenizer_config.get("added_tokens_decoder") or {}
    if not isinstance(tokens, list) or not all(isinstance(token, Mapping) for token in tokens):
        raise files.error("added_tokens is not a list of objects", name)
    if not isinstance(more, Mapping) or not all(_ID.fullmatch(key) and isinstance(more[key], Mapping) for key in more):
        raise files.error("added_tokens_decoder is not an object of tokens", "tokenizer_config.json")
    rest = [{**more[key], "id": int(key)} for key in more]
    ids, texts = dict(vocab), {i: text for text, i in vocab.items()}
    known = set[str]()
    for file, token in (*((name, token) for token in tokens), *(("tokenizer_config.json", token) for token in rest)):
        text, i = _content(token), token.get("id")
        if not text or isinstance(i, bool) or not isinstance(i, int) or i < 0:
            raise files.error("added_tokens holds a token without a text or an id", file)
        if file != name and (ids.get(text, i), texts.get(i, text)) != (i, text):
            _warn_of_other(files, text, i, ids.get(text), texts.get(i))
            continue
        if (other := ids.setdefault(text, i)) != i:
            raise files.error(f"the token {text!r:.60} has the id {i}, and the id {other}, too", file)
        if (taken := texts.setdefault(i, text)) != text:
            raise files.error(f"the id {i} is that of the token {text!r:.60}, and of {taken!r:.60}, too", file)
        if i < size and text not in known:
            known.add(text)
            yield text, i, token


def _warn_of_other(files: HuggingFaceFiles, text: str, i: int, known: int | None, taken: str | None) -> None:
    """Of a token of tokenizer_config.json that the vocabulary has otherwise, which counts, as in transformers."""
    kept = f"which has it as {known}" if known is not None else f"where {i} is {taken!r:.60}, so that it is no token"
    warnings.warn(
        f"{files.source}/tokenizer_config.json: says that {text!r:.60} has the id {i}, and is not followed, but "
        f"{files.vocabulary}, {kept}",
        stacklevel=2,
    )


def _content(token: Mapping[str, Any]) -> str:
    """The text of an added token, "" for one that has none."""
    text = token.get("content")
    return text if isinstance(text, str) else ""


def _is_marker(text: str) -> bool:
    """Whether a token is no text, though its file does not say so. The rule is llama.cpp's."""
    ends = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in _CONTROLS or any(text.startswith(start) and text.endswith(end) for start, end in ends)


def _add_ends(files: HuggingFaceFiles, found: dict[str, Any], pieces: Sequence[str]) -> None:
    """Make ids at which the configurations end a text ends: as EOS, EOT and EOM, and where more are needed as a list.

    Those with the name of an end are ends anyway.
    """
    ids = [*_ids(files.generation, "eos_token_id", len(pieces)), *_ids(files.config, "eos_token_id", len(pieces))]
    ends = list(dict.fromkeys(ids))
    if ends:
        found.setdefault("eos_token_id", ends[0])
    roles = [f"{role}_token_id" for role in ("eos", "eot", "eom")]
    named = {found[role] for role in roles if role in found}
    rest = [i for i in ends if i not in named and pieces[i] not in END_NAMES]
    free = [role for role in roles if role not in found]
    found |= dict(zip(free, rest, strict=False))
    if len(rest) > len(free):
        found["eos_token_ids"] = np.array(ends, np.int32)


def _ids(config: Mapping[str, Any], key: str, size: int) -> list[int]:
    """Token ids under a key, which holds one or a list. What is no id of the vocabulary is left out."""
    value = config_value(config, key)
    values = value if isinstance(value, list) else [value]
    return [i for i in values if isinstance(i, int) and not isinstance(i, bool) and 0 <= i < size]


def _template_keys(files: HuggingFaceFiles) -> dict[str, Any]:
    """Chat templates. One in a file of its own goes before one of the same name in tokenizer_config.json."""
    given = files.tokenizer_config.get("chat_template")
    listed = given if isinstance(given, list) else [{"name": "default", "template": given}]
    templates: dict[str, str] = {}
    for entry in listed:
        name, text = (entry.get("name"), entry.get("template")) if isinstance(entry, Mapping) else (None, None)
        if isinstance(name, str) and isinstance(text, str):
            templates[name] = text
    templates |= files.templates
    keys: dict[str, Any] = {}
    for name, text in templates.items():
        if name == "default":
            keys["tokenizer.chat_template"] = text
        else:
            keys["tokenizer.chat_template." + re.sub("[^0-9A-Za-z]", "_", name)] = text
    if names := [key.rpartition(".")[2] for key in keys if key != "tokenizer.chat_template"]:
        keys["tokenizer.chat_templates"] = names
    return keys


def _sampling_keys(files: HuggingFaceFiles) -> dict[str, Any]:
    """Defaults of sampling that the model's authors suggest. Nothing applies them; `forge inspect` shows them."""
    keys: dict[str, Any] = {}
    for name, (key, kind) in _SAMPLING.items():
        value = files.generation.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31:
            keys[f"general.sampling.{key}"] = kind(value)
    return keys
