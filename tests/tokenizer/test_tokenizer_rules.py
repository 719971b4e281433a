"""Split rules against llama.cpp.

`data/tokenizer/lines.json` holds two vocabularies that reach over the borders of words, and digests of the ids of 2,048
lines for each rule (scripts/make_vocab_goldens.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from table_rows import row
from vocab_lines import BLOCK, DIGEST, LINES, digests, end_metadata

from forge.errors import UnsupportedError
from forge.tokenizer import Tokenizer
from forge.tokenizer.pretokenizers import DEFAULT, RULES

PATH = Path(__file__).parents[1] / "data/tokenizer/lines.json"
GOLDEN: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))
FAMILIES: dict[str, str] = GOLDEN["digests"]
STEP = 32
"""Of so many blocks of lines, the quick test reads one."""


def load(pre: str | None) -> Tokenizer:
    named = {} if pre is None else {"tokenizer.ggml.pre": pre}
    kind = "bytes" if not pre or pre not in RULES or RULES[pre].stages else "lines"
    return Tokenizer.from_metadata(GOLDEN["vocabularies"][kind] | named, source="test")


def found(tokenizer: Tokenizer, step: int) -> str:
    blocks = (LINES[i : i + BLOCK] for i in range(0, len(LINES), step * BLOCK))
    return "".join(digests([tokenizer.encode(line, parse_special=True) for line in block]) for block in blocks)


def expected(digest: str, step: int) -> str:
    return "".join(digest[i : i + DIGEST] for i in range(0, len(digest), step * DIGEST))


@pytest.mark.parametrize("step", [STEP, pytest.param(1, marks=pytest.mark.slow)])
def test_ids_are_those_of_llama_cpp(step: int) -> None:
    for names, digest in FAMILIES.items():
        name = names.split()[0]
        with row(name):
            assert found(load(name), step) == expected(digest, step)


def test_the_lines_tell_all_rules_apart() -> None:
    families = [{RULES[name] for name in names.split()} for names in FAMILIES]
    assert all(len(rules) == 1 for rules in families)
    assert len(FAMILIES) == len(set().union(*families)) == len(set(RULES.values()))
    assert {name for names in FAMILIES for name in names.split()} == set(RULES)


def test_tokens_that_end_a_text_are_those_of_llama_cpp() -> None:
    for case in GOLDEN["ends"]:
        tokenizer = Tokenizer.from_metadata(end_metadata(case), source="test")
        with row(" ".join(case["tokens"])):
            assert sorted(tokenizer.eog_ids) == case["ends"]


@pytest.mark.parametrize("pre", [None, ""])
def test_a_missing_rule_is_the_default_and_said_in_one_line(pre: str | None) -> None:
    with pytest.warns(UserWarning, match=r"^test: tokenizer\.ggml\.pre is missing[^\n]*$"):
        tokenizer = load(pre)
    assert found(tokenizer, STEP) == expected(FAMILIES["default"], STEP)
    assert RULES["default"] is DEFAULT


@pytest.mark.parametrize("pre", ["no-such-rule", "whitespace", "SMOLLM", "x" * 10_000, "two\nlines"])
def test_an_unknown_rule_is_named(pre: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load(pre)
    assert repr(pre)[:50] in str(caught.value)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("हिन्दी", ["ह", "िन", "्द", "ी"]),
        ("ที่นี่", ["ท", "ี่", "น", "ี่"]),
        ("e\u0301te\u0301", ["e", "\u0301te", "\u0301"]),
    ],
)
def test_tekken_cuts_words_at_combining_marks_as_llama_cpp_does(text: str, words: list[str]) -> None:
    """A known limit (docs/tokenizers.md): Mistral's own tokenizer counts marks as letters: one word each."""
    cut = [text[slice(*span)] for _, span in RULES["tekken"].splitter().pre_tokenize_str(text)]
    assert cut == words


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("names", FAMILIES)
def test_long_repetitions_take_linear_time(names: str) -> None:
    """A second or two of processor time; a quadratic rule would need many minutes."""
    tokenizer = load(names.split()[-1])
    for unit in ("a", "A", " ", "1", "!", "\n ", "中"):
        text = unit * (60_000 // len(unit))
        assert tokenizer.decode(tokenizer.encode(text)) == text
