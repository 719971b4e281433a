"""Split rules against llama.cpp.

`data/tokenizer/split_rules.json` holds a vocabulary, texts, and ids per name. `data/tokenizer/lines.json` holds digests
of the ids of 2,048 lines for two vocabularies that reach over the borders of words (scripts/make_vocab_goldens.py).
"""

import json
from pathlib import Path
from typing import Any

import pytest
from table_rows import row
from vocab_lines import LINES, digests, end_metadata

from forge.errors import UnsupportedError
from forge.tokenizer import Tokenizer
from forge.tokenizer.pretokenizers import DEFAULT, RULES, Rule

FOLDER = Path(__file__).parents[1] / "data/tokenizer"
DATA: dict[str, Any] = json.loads((FOLDER / "split_rules.json").read_text(encoding="utf-8"))
FAMILIES: dict[str, list[list[int]]] = DATA["ids"]
GOLDEN: dict[str, Any] = json.loads((FOLDER / "lines.json").read_text(encoding="utf-8"))


def load(pre: str | None) -> Tokenizer:
    named = {} if pre is None else {"tokenizer.ggml.pre": pre}
    return Tokenizer.from_metadata(DATA["metadata"] | named, source="test")


def test_ids_are_those_of_llama_cpp() -> None:
    for name in filter(lambda name: RULES[name].stages, RULES):
        expected = next(ids for names, ids in FAMILIES.items() if name in names.split())
        tokenizer = load(name)
        with row(name):
            assert [tokenizer.encode(text) for text in DATA["texts"]] == expected


def test_the_texts_tell_all_rules_apart() -> None:
    families = [{RULES[name] for name in names.split() if name != "(missing)"} for names in FAMILIES]
    assert all(len(rules) == 1 for rules in families)
    assert len(FAMILIES) == len(set().union(*families)) == len({rule for rule in RULES.values() if rule.stages})


@pytest.mark.slow
def test_ids_of_two_thousand_lines_are_those_of_llama_cpp() -> None:
    assert {name for names in GOLDEN["digests"] for name in names.split()} == set(RULES)
    done = set[tuple[Rule, str]]()
    for names, expected in GOLDEN["digests"].items():
        for name in names.split():
            rule = RULES[name]
            if (rule, expected) not in done:
                metadata = GOLDEN["vocabularies"]["bytes" if rule.stages else "lines"] | {"tokenizer.ggml.pre": name}
                tokenizer = Tokenizer.from_metadata(metadata, source="test")
                with row(name):
                    assert digests([tokenizer.encode(line, parse_special=True) for line in LINES]) == expected
                done.add((rule, expected))
    assert len(done) == len(GOLDEN["digests"]) == len(set(RULES.values()))


def test_tokens_that_end_a_text_are_those_of_llama_cpp() -> None:
    for case in GOLDEN["ends"]:
        tokenizer = Tokenizer.from_metadata(end_metadata(case), source="test")
        with row(" ".join(case["tokens"])):
            assert sorted(tokenizer.eog_ids) == case["ends"]


@pytest.mark.parametrize("pre", [None, ""])
def test_a_missing_rule_is_the_default_and_said_in_one_line(pre: str | None) -> None:
    with pytest.warns(UserWarning, match=r"^test: tokenizer\.ggml\.pre is missing[^\n]*$"):
        tokenizer = load(pre)
    assert [tokenizer.encode(text) for text in DATA["texts"]] == FAMILIES["(missing) default"]
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
    found = [text[slice(*span)] for _, span in RULES["tekken"].splitter().pre_tokenize_str(text)]
    assert found == words


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("names", FAMILIES)
def test_long_repetitions_take_linear_time(names: str) -> None:
    """A second or two of processor time; a quadratic rule would need many minutes."""
    tokenizer = load(names.split()[-1])
    for unit in ("a", "A", " ", "1", "!", "\n ", "中"):
        text = unit * (60_000 // len(unit))
        assert tokenizer.decode(tokenizer.encode(text)) == text
