"""Edge rules on vocabularies made by hand. Every expectation was checked with llama.cpp (llama-cpp-python 0.3.36)."""

from typing import Any

import numpy as np
import pytest

from forge.tokenizer import Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTES = [chr(b) for b in PRINTABLE] + [chr(256 + i) for i in range(256 - len(PRINTABLE))]


def spm(scores: dict[str, float], other: dict[str, int] | None = None, **keys: Any) -> dict[str, Any]:
    """Metadata of an SPM vocabulary: <unk> <s> </s>, the bytes, scored pieces, then pieces of other types."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *scores, *(other or {})]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(scores), *(other or {}).values()]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": [0.0] * 259
        + [float(score) for score in scores.values()]
        + [-1000.0] * len(other or {}),
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.add_bos_token": False,
    } | {key.replace("__", "."): value for key, value in keys.items()}


def bpe(
    merges: list[str], other: dict[str, int] | None = None, lacks: str = "", pre: str = "gpt-2", **keys: Any
) -> dict[str, Any]:
    """Metadata of a byte-level vocabulary: <e>, the bytes, what the merges make, then pieces of other types."""
    letters = [b for b in BYTES if b not in lacks]
    made = [piece for piece in dict.fromkeys(m.replace(" ", "") for m in merges) if piece not in (other or {})]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": ["<e>", *letters, *made, *(other or {})],
        "tokenizer.ggml.token_type": [CONTROL, *[NORMAL] * (len(letters) + len(made)), *(other or {}).values()],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 0,
    } | {key.replace("__", "."): value for key, value in keys.items()}


ABC = {"a": -1.0, "b": -2.0, "c": -3.0, "▁": -4.0}
ADD_PREFIX = {"tokenizer__ggml__add_space_prefix": True}
ADD_BOS = {"tokenizer__ggml__add_bos_token": True}

# name: metadata, text, parse_special, pieces
CASES: dict[str, tuple[dict[str, Any], str, bool, list[str]]] = {
    "spm: the best score goes first, wherever it is": (spm(ABC | {"ab": -9, "bc": -8}), "abc", False, ["a", "bc"]),
    "spm: of equal scores the leftmost goes first": (spm(ABC | {"ab": -9, "bc": -9}), "abc", False, ["ab", "c"]),
    "spm: the leftmost of equals, also where the pieces are one": (
        spm(ABC | {"aa": -5, "aaa": -6}),
        "aaaaa",
        False,
        ["aa", "aaa"],
    ),
    "spm: a piece that no pair of pieces makes is not found": (spm(ABC | {"abc": -5}), "abc", False, ["a", "b", "c"]),
    "spm: positive and zero scores": (spm(ABC | {"ab": 0.0, "bc": 7.0}), "abc", False, ["a", "bc"]),
    "spm: unknown characters are spelled in bytes": (spm(ABC), "aé", False, ["a", "<0xC3>", "<0xA9>"]),
    "spm: control tokens can be made by merging": (
        spm(ABC | {"<": -5, "s": -6, ">": -7, "s>": -8}),
        "<s>",
        False,
        ["<s>"],
    ),
    "spm: spaces are escaped": (spm(ABC | {"▁a": -5}), "a a b", False, ["a", "▁a", "▁", "b"]),
    "spm: a literal ▁ is a space": (spm(ABC | {"▁a": -5}), "b▁a", False, ["b", "▁a"]),
    "spm: space prefix": (spm(ABC | {"▁a": -5}, **ADD_PREFIX), "a b", False, ["▁a", "▁", "b"]),
    "spm: the prefix comes before a space, too": (spm(ABC | {"▁▁": -5}, **ADD_PREFIX), " a", False, ["▁▁", "a"]),
    "spm: no prefix for empty text": (spm(ABC, **ADD_PREFIX, **ADD_BOS), "", False, ["<s>"]),
    "spm: the prefix comes again after a special token": (
        spm(ABC | {"▁a": -5}, **ADD_PREFIX),
        "a<s>a</s>a",
        True,
        ["▁a", "<s>", "▁a", "</s>", "▁a"],
    ),
    "spm: the prefix comes after user-defined tokens": (
        spm(ABC | {"▁a": -5}, {"<x>": USER_DEFINED}, **ADD_PREFIX),
        "<x>a<x> a",
        False,
        ["<x>", "▁a", "<x>", "▁", "▁a"],
    ),
    "spm: BOS is added, and added again": (spm(ABC, **ADD_BOS), "<s>a", True, ["<s>", "<s>", "a"]),
    "spm: EOS is added": (spm(ABC, tokenizer__ggml__add_eos_token=True), "a", False, ["a", "</s>"]),
    "spm: user-defined tokens match raw text": (
        spm(ABC, {"a b": USER_DEFINED, "\n\n": USER_DEFINED}),
        "a b\n\n\n",
        False,
        ["a b", "\n\n", "<0x0A>"],
    ),
    "spm: user-defined tokens with ▁ do not match spaces": (
        spm(ABC, {"▁▁▁": USER_DEFINED}),
        "   ▁▁▁",
        False,
        ["▁", "▁", "▁", "▁▁▁"],
    ),
    "spm: the longest literal takes its text first, wherever it is": (
        spm(ABC, {"abc": USER_DEFINED, "bcab": USER_DEFINED}),
        "abcab",
        False,
        ["a", "bcab"],
    ),
    "spm: length is counted in bytes": (
        spm(ABC | {"é": -5}, {"abc": USER_DEFINED, "cé€": USER_DEFINED}),
        "abcé€",
        False,
        ["a", "b", "cé€"],
    ),
    "spm: unknown tokens are parsed where special ones are": (spm(ABC), "a<unk>b", True, ["a", "<unk>", "b"]),
    "spm: unused tokens are no literals": (spm(ABC, {"ab<": UNUSED}), "ab<", True, ["a", "b", "<0x3C>"]),
    "spm: a known end name is a control token, however declared": (
        spm(ABC, {"<|im_end|>": USER_DEFINED, "<x>": USER_DEFINED}),
        "<x><|im_end|>",
        True,
        ["<x>", "<|im_end|>"],
    ),
    "spm: a control token by name is text where special text is not parsed": (
        spm(ABC | {"[": -5}, {"[EOT]": USER_DEFINED}),
        "a[EOT]",
        False,
        ["a", "[", "<0x45>", "<0x4F>", "<0x54>", "<0x5D>"],
    ),
    "spm: harmony's markers are always matched": (
        spm(ABC, {"<|message|>": CONTROL}),
        "a<|message|>b",
        False,
        ["a", "<|message|>", "b"],
    ),
    "phi-3: special tokens swallow the blanks behind them": (
        spm(ABC, general__name="Phi-3", other={"<|endoftext|>": CONTROL, "<|user|>": CONTROL}),
        "<|user|> \n a <|endoftext|> b",
        True,
        ["<|user|>", "a", "▁", "<|endoftext|>", "▁", "b"],
    ),
    "phi-3: a swallowed blank begins no other match": (
        spm(ABC, general__name="Phi-3", other={"<|endoftext|>": CONTROL, " b": USER_DEFINED}),
        "a b  b bb",
        False,
        ["a", " b", "b", " b", "b"],
    ),
    "bpe: the first merge goes first": (bpe(["b c", "a b"]), "abc", False, ["a", "bc"]),
    "bpe: a merge given twice has its first rank": (
        bpe(["b c", "a b", "b c", "a a"]),
        "abc aab",
        False,
        ["a", "bc", "Ġ", "a", "ab"],
    ),
    "bpe: one piece from several pairs": (
        bpe(["a a", "a aa", "aa a"]),
        "aaaaa",
        False,
        ["aa", "aaa"],
    ),
    "bpe: merges do not cross words": (bpe(["b Ġ", "Ġ a"]), "b a", False, ["b", "Ġa"]),
    "bpe: bytes beyond ASCII": (bpe(["Ã ©"]), "é€", False, ["Ã©", "â", "Ĥ", "¬"]),
    "bpe: bytes that the vocabulary lacks are dropped": (bpe(["a b"], lacks="xĠ"), "axb ab", False, ["a", "b", "ab"]),
    "bpe: a whole word may pass by the merges": (
        bpe(["a b"], {"abc": NORMAL}, pre="llama-bpe"),
        "abc abcb",
        False,
        ["<e>", "abc", "Ġ", "ab", "c", "b"],
    ),
    "bpe: or may not": (bpe(["a b"], {"abc": NORMAL}), "abc", False, ["ab", "c"]),
    "bpe: special text": (bpe(["a b"]), "ab<e>ab", True, ["ab", "<e>", "ab"]),
    "bpe: special text as text": (bpe(["a b"]), "<e>", False, ["<", "e", ">"]),
    "bpe: user-defined tokens cut words": (
        bpe(["a b", "Ġ a"], {" a": USER_DEFINED}),
        "b ab",
        False,
        ["b", " a", "b"],
    ),
    "bpe: BOS and EOS": (
        bpe(["a b"], tokenizer__ggml__add_bos_token=True, tokenizer__ggml__add_eos_token=True),
        "a",
        False,
        ["<e>", "a", "<e>"],
    ),
    "bpe: an empty piece has a name": (bpe(["a b"], {"": USER_DEFINED}), "a[EMPTY_258]", False, ["a", "[EMPTY_258]"]),
}


@pytest.mark.parametrize("name", CASES)
def test_edge_cases_of_vocabularies_give_the_expected_ids(name: str) -> None:
    metadata, text, parse_special, expected = CASES[name]
    pieces = [piece or f"[EMPTY_{i}]" for i, piece in enumerate(metadata["tokenizer.ggml.tokens"])]
    ids = Tokenizer.from_metadata(metadata, source="test").encode(text, parse_special=parse_special)
    assert [pieces[i] for i in ids] == expected


def test_a_character_without_piece_and_byte_tokens_is_unknown() -> None:
    """Without byte tokens llama.cpp stops; here a character without a piece is unknown, as in SentencePiece."""
    metadata = spm(ABC)
    for key in ("tokens", "scores", "token_type"):
        values = metadata[f"tokenizer.ggml.{key}"]
        metadata[f"tokenizer.ggml.{key}"] = [*values[:3], *values[259:]]
    assert Tokenizer.from_metadata(metadata, source="test").encode("aéb") == [3, 0, 4]


@pytest.mark.parametrize("dtype", ["float32", "float64", "int32", "uint8"])
def test_scores_of_any_number_type(dtype: str) -> None:
    metadata = spm({"a": 1, "b": 1, "c": 1, "ab": 2, "bc": 3})
    scores = np.array(metadata["tokenizer.ggml.scores"], dtype)
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.scores": scores}, source="test")
    assert tokenizer.encode("abc") == [259, 263]


@pytest.mark.parametrize(
    ("other", "keys", "ends"),
    [
        ({}, {}, {"</s>"}),
        (
            {"<|im_end|>": CONTROL, "<|eot_id|>": NORMAL, "<end_of_turn>": USER_DEFINED},
            {},
            {"</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"},
        ),
        (
            {"<|endoftext|>": USER_DEFINED, "<|end|>": UNUSED, "[EOT]": NORMAL},
            {},
            {"</s>", "<|endoftext|>", "<|end|>", "[EOT]"},
        ),
        (
            {"x": NORMAL, "y": USER_DEFINED},
            {"eot_token_id": 259, "eom_token_id": 260, "eos_token_id": 1},
            {"<s>", "</s>", "x", "y"},
        ),
        (
            {"<PAD>": CONTROL, "<|repo_name|>": CONTROL, "<REPO>": CONTROL, "<|file_sep|>": USER_DEFINED},
            {},
            {"</s>", "<PAD>", "<|repo_name|>"},
        ),
        ({"x": NORMAL, "<PAD>": CONTROL}, {"fim_pad_token_id": 259}, {"</s>", "x"}),
        ({"<|end|>": CONTROL, "<|return|>": CONTROL, "<|call|>": CONTROL}, {}, {"</s>", "<|return|>", "<|call|>"}),
        ({"<|end|>": CONTROL, "<|return|>": CONTROL}, {}, {"</s>", "<|return|>", "<|end|>"}),
    ],
)
def test_ends_of_a_text(other: dict[str, int], keys: dict[str, int], ends: set[str]) -> None:
    """llama.cpp's lists, without user-defined tokens for infilling that no key names."""
    metadata = spm({}, other) | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}
    tokenizer = Tokenizer.from_metadata(metadata, source="test")
    assert {metadata["tokenizer.ggml.tokens"][i] for i in tokenizer.eog_ids} == ends


@pytest.mark.parametrize("ids", [[3, 1, 3, -1, 9999], np.array([1, 3, 9999], np.int32)])
def test_suppressed_ids_are_those_that_the_vocabulary_has(ids: Any) -> None:
    tokenizer = Tokenizer.from_metadata(spm({}, tokenizer__ggml__suppress_tokens=ids), source="test")
    assert tokenizer.suppressed_ids == {1, 3}
    assert Tokenizer.from_metadata(spm({}), source="test").suppressed_ids == frozenset()


def test_a_user_defined_strikethrough_ends_nothing() -> None:
    """Gemma's `</s>` is HTML; its end is another token, named by the file."""
    metadata = spm({}, {"<eos>": CONTROL}, tokenizer__ggml__eos_token_id=259)
    types = [*metadata["tokenizer.ggml.token_type"]]
    types[2] = USER_DEFINED
    tokenizer = Tokenizer.from_metadata(metadata | {"tokenizer.ggml.token_type": types}, source="test")
    assert tokenizer.eog_ids == {259}


BOTH = {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__add_eos_token": True}


@pytest.mark.parametrize(
    ("metadata", "text", "pieces"),
    [
        (spm(ABC, **BOTH), "ab", ["<s>", "a", "b"]),
        (spm(ABC, **BOTH), "<s>ab", ["<s>", "a", "b"]),
        (spm(ABC, **BOTH), "<s><s>a", ["<s>", "<s>", "a"]),
        (spm(ABC, **BOTH), "a<s></s>", ["<s>", "a", "<s>", "</s>"]),
        (spm(ABC, **BOTH), "", ["<s>"]),
        (spm(ABC, **BOTH), " <s>", ["<s>", "▁", "<s>"]),
        (spm(ABC | {"▁a": -5}, **BOTH, **ADD_PREFIX), "<s>a", ["<s>", "▁a"]),
        (spm(ABC, tokenizer__ggml__add_eos_token=True), "a", ["a"]),
        (spm(ABC), "<s>a", ["<s>", "a"]),
        (bpe(["a b"], **BOTH), "<e>ab", ["<e>", "ab"]),
        (bpe(["a b"], **BOTH), "ab", ["<e>", "ab"]),
    ],
)
def test_a_prompt_has_one_bos_and_no_eos(metadata: dict[str, Any], text: str, pieces: list[str]) -> None:
    tokenizer = Tokenizer.from_metadata(metadata, source="test")
    assert [metadata["tokenizer.ggml.tokens"][i] for i in tokenizer.encode_prompt(text)] == pieces
    bos = pieces[0] if tokenizer.add_bos else "no BOS"
    assert tokenizer.begins_with_bos(text) == text.startswith(bos)
