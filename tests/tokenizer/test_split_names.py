"""Names of split rules against what `tokenizers` does with the published patterns."""

import json
import re
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer
from vocab_lines import LINES

from forge.errors import UnsupportedError
from forge.tokenizer.pretokenizers import RULES
from forge.tokenizer.split_names import split_name

BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
GPT2 = BYTES | {"use_regex": True}
DIGITS = {"type": "Digits", "individual_digits": True}
SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+@|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*@"
GPT4O = CASED.replace("@", f"{SUFFIX}?") + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + END
DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
)


def split(pattern: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": invert}


OPENAI = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
QWEN35 = rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*{END}"
SEED = f"{SUFFIX}|{WORD}|\\p{{N}}{{1}}| ?[^\\s\\p{{L}}\\p{{N}}\r\n]+|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"
EXAONE = (
    rf"{SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]?"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
FALCON: list[dict[str, Any]] = [
    {"type": "Punctuation", "behavior": "Contiguous"},
    GPT2,
    {"type": "Digits", "individual_digits": False},
    split("[0-9][0-9][0-9]"),
]

# Published stages, llama.cpp's name, and whether the two cut any text alike. Otherwise llama.cpp's rule is simpler: it
# cuts at combining marks, counts ª and º as letters without case, or leaves the blank on a number. None: tiny_aya's
# joins words of both cases, too.
PUBLISHED: list[tuple[str, list[dict[str, Any]], bool | None]] = [
    ("gpt-2", [GPT2], True),
    ("starcoder", [DIGITS, GPT2], True),
    ("llama-bpe", [split(f"{SUFFIX}|{WORD}|\\p{{N}}{{1,3}}{MARKS}{END}"), BYTES], True),
    ("qwen2", [split(f"{SUFFIX}|{WORD}|\\p{{N}}{MARKS}{END}"), BYTES], True),
    ("qwen2", [split(OPENAI), BYTES], True),
    ("qwen35", [split(QWEN35), BYTES], True),
    ("gpt-4o", [split(GPT4O, "Removed", True), BYTES], False),
    ("gpt-4o", [split(GPT4O.replace(SUFFIX, "(?:'(?i:[sdmt]|ll|ve|re))")), BYTES], False),
    ("tekken", [split(CASED.replace("@", "") + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + END), BYTES], False),
    ("tiny_aya", [split(r"\d{1,3}(?=(?:\d{3})*\b)"), split(GPT4O), BYTES], None),
    ("deepseek-v3", [split(r"\p{N}{1,3}"), split("[一-龥\u3040-ゟ゠-ヿ]+"), split(DEEPSEEK + END), BYTES], True),
    ("seed-coder", [split(SEED), BYTES], True),
    ("minicpm5", [split(r"\p{N}{1,3}"), split(f"{SUFFIX}|{WORD}|\\p{{N}}+{MARKS}{END}"), BYTES], True),
    ("exaone-moe", [split(EXAONE), BYTES], True),
    ("falcon", FALCON, False),
    (
        "deepseek-coder",
        [*map(split, (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")), DIGITS, BYTES],
        False,
    ),
    ("laguna", [split(r"[^\n]+|[\n]+"), split(f"{SUFFIX}|{WORD}|\\p{{N}}{MARKS}{END}"), BYTES], True),
]


def tokenizer_json(stages: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    model = {"type": "BPE", "ignore_merges": True}
    return {"model": model, "pre_tokenizer": {"type": "Sequence", "pretokenizers": stages}} | more


@pytest.mark.parametrize(("name", "stages", "alike"), PUBLISHED)
def test_published_stages_have_llama_cpps_name(name: str, stages: list[dict[str, Any]], alike: bool | None) -> None:
    assert split_name(tokenizer_json(stages, normalizer={"type": "NFC"}), "t") == name
    published = _load(stages)
    rule = RULES[name].splitter()
    for line in [] if alike is None else LINES[:200]:
        if not alike and (not line.isascii() or re.search(r"[$+<=>^~|`]| \d|\d{4}", line)):
            continue
        assert published.pre_tokenize_str(line) == rule.pre_tokenize_str(line), line


def _load(stages: list[dict[str, Any]]) -> PreTokenizer:
    model = {"type": "BPE", "vocab": {}, "merges": []}
    pre_tokenizer: PreTokenizer | None = Tokenizer.from_str(
        json.dumps(tokenizer_json(stages, model=model))
    ).pre_tokenizer
    assert pre_tokenizer is not None
    return pre_tokenizer


def test_ignore_merges_chooses_among_names_of_one_pattern() -> None:
    stages = [split(f"{SUFFIX}|{WORD}|\\p{{N}}{{1,3}}{MARKS}{END}"), BYTES]
    assert split_name(tokenizer_json(stages, model={"ignore_merges": False}), "t") == "dbrx"


@pytest.mark.parametrize(
    ("stages", "more", "message"),
    [
        ([split(r"\w+"), BYTES], {}, r"t: text is split by a rule that forge does not know: \w+"),
        (
            [{"type": "Split", "pattern": {"String": "\n"}, "behavior": "Isolated"}, GPT2],
            {},
            r"does not know: \\n then 's|",
        ),
        ([BYTES], {}, "t: text is split by a rule that forge does not know: no pattern"),
        (
            [split(r"\p{N}", "Removed"), GPT2],
            {},
            "'Split', pattern {'Regex': '\\\\p{N}'}, behavior 'Removed', invert False",
        ),
        ([GPT2 | {"add_prefix_space": True}], {}, "'ByteLevel', add_prefix_space True"),
        ([{"type": "Whitespace"}, GPT2], {}, "'Whitespace', which forge does not know"),
        ([GPT2], {"normalizer": {"type": "NFKC"}}, "t: its normalizer is 'NFKC'; forge knows NFC alone"),
        ([GPT2], {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}]}}, "'Lowercase'"),
    ],
)
def test_other_stages_are_refused_by_name(stages: list[dict[str, Any]], more: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(message)):
        split_name(tokenizer_json(stages, **more), "t")
