"""Hostile metadata: one error of forge's, in one short line that names the file and the key."""

import warnings
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.errors import ForgeError, FormatError, UnsupportedError
from forge.tokenizer import Tokenizer

SPM: dict[str, Any] = {
    "model": "llama",
    "tokens": ["<unk>", "<s>", "</s>", "<0x0A>", "a", "b"],
    "scores": [0.0, 0.0, 0.0, 0.0, -1.0, -2.0],
    "token_type": [2, 3, 3, 6, 1, 1],
}
BPE: dict[str, Any] = {
    "model": "gpt2",
    "pre": "gpt-2",
    "tokens": ["<e>", "a", "b", "ab"],
    "token_type": [3, 1, 1, 1],
    "merges": ["a b"],
    "eos_token_id": 0,
}
LINES = BPE | {"model": "gemma4", "tokens": ["<e>", "a", "▁b", "a▁b", "<0x0A>"], "token_type": [3, 1, 1, 1, 6]}
LINES |= {"merges": ["▁ b", "a ▁b"], "bos_token_id": 0}


def load(keys: dict[str, Any]) -> Tokenizer:
    metadata = {f"tokenizer.{'' if key.startswith('chat_') else 'ggml.'}{key}": value for key, value in keys.items()}
    return Tokenizer.from_metadata(metadata, source="model.gguf")


def without(keys: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in keys.items() if key != name}


def test_the_base_cases_are_well_formed() -> None:
    assert load(SPM).encode("ab\n") == [1, 0, 4, 5, 3]
    assert load(BPE).encode("ab") == [3]
    assert load(LINES).encode("a b\n") == load(LINES | {"add_bos_token": False}).encode("a bx\n") == [0, 3, 4]


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "no model": (without(SPM, "model"), "ggml.model is missing"),
    "model is a number": (SPM | {"model": 3}, "ggml.model is not a string"),
    "pre is a list": (BPE | {"pre": ["gpt-2"]}, "ggml.pre is not a string"),
    "no tokens": (without(SPM, "tokens"), "ggml.tokens is missing"),
    "tokens are empty": (SPM | {"tokens": [], "scores": [], "token_type": []}, "ggml.tokens is empty"),
    "tokens are a number": (SPM | {"tokens": 6}, "ggml.tokens is not an array"),
    "tokens are a string": (SPM | {"tokens": "abcdef"}, "ggml.tokens is not an array"),
    "tokens are bytes": (SPM | {"tokens": b"abcdef"}, "ggml.tokens is not an array"),
    "tokens are numbers": (SPM | {"tokens": [1, 2, 3, 4, 5, 6]}, "ggml.tokens is not an array of strings"),
    "one token is a number": (SPM | {"tokens": ["a", "b", 3, "c", "d", "e"]}, "ggml.tokens is not an array of strings"),
    "tokens are an array of numbers": (BPE | {"tokens": np.arange(4)}, "ggml.tokens is not an array of strings"),
    "tokens are nested": (SPM | {"tokens": [["a"]] * 6}, "ggml.tokens is not an array of strings"),
    "a token is no Unicode": (BPE | {"tokens": ["<e>", "a", "b", "\ud800"]}, "ggml.tokens holds text that is not"),
    "a token twice": (BPE | {"tokens": ["<e>", "a", "a", "ab"]}, "ggml.tokens holds 'a' twice"),
    "a token twice by its name": (BPE | {"tokens": ["[EMPTY_1]", "", "b", "ab"]}, "holds '[EMPTY_1]' twice"),
    "no scores": (without(SPM, "scores"), "ggml.scores is missing"),
    "too few scores": (SPM | {"scores": [0.0] * 5}, "ggml.scores has 5 entries for 6 tokens"),
    "too many scores": (SPM | {"scores": np.zeros(7, np.float32)}, "ggml.scores has 7 entries for 6 tokens"),
    "scores are strings": (SPM | {"scores": ["1"] * 6}, "ggml.scores is not an array of numbers"),
    "scores are booleans": (SPM | {"scores": [True] * 6}, "ggml.scores is not an array of numbers"),
    "scores are ragged": (SPM | {"scores": [[1], [2, 3], 1, 1, 1, 1]}, "ggml.scores is not an array of numbers"),
    "scores are a table": (SPM | {"scores": np.zeros((6, 1))}, "ggml.scores is not an array of numbers"),
    "scores are huge": (SPM | {"scores": [10**400] * 6}, "ggml.scores is not an array of numbers"),
    "scores are one number": (SPM | {"scores": 1.0}, "ggml.scores is not an array"),
    "a score is NaN": (SPM | {"scores": [0, 0, 0, 0, float("nan"), 0]}, "ggml.scores holds NaN"),
    "too few types": (SPM | {"token_type": [1]}, "ggml.token_type has 1 entries for 6 tokens"),
    "types are floats": (SPM | {"token_type": [1.0] * 6}, "ggml.token_type is not an array of numbers"),
    "a type is unknown": (SPM | {"token_type": [2, 3, 3, 6, 1, 7]}, "ggml.token_type holds numbers other than"),
    "a type is negative": (SPM | {"token_type": [2, 3, 3, 6, 1, -1]}, "ggml.token_type holds numbers other than"),
    "a type is huge": (SPM | {"token_type": [2, 3, 3, 6, 1, 2**62]}, "ggml.token_type holds numbers other than"),
    "a byte token is no byte": (SPM | {"token_type": [2, 3, 3, 6, 6, 1]}, "byte token 4 is 'a', not of the form"),
    "no merges": (without(BPE, "merges"), "ggml.merges is missing"),
    "merges are numbers": (BPE | {"merges": [1]}, "ggml.merges is not an array of strings"),
    "merges are pairs": (BPE | {"merges": [["a", "b"]]}, "ggml.merges is not an array of strings"),
    "a merge has no space": (BPE | {"merges": ["ab"]}, "ggml.merges 'ab' is no pair of tokens"),
    "a merge is empty": (BPE | {"merges": [""]}, "ggml.merges '' is no pair of tokens"),
    "a merge has one side": (BPE | {"merges": ["a "]}, "ggml.merges 'a ' is no pair of tokens"),
    "a merge has three parts": (BPE | {"merges": ["a b b"]}, "ggml.merges 'a b b' is no pair of tokens"),
    "a merge of unknown pieces": (BPE | {"merges": ["a q"]}, "ggml.merges 'a q' is no pair of tokens"),
    "a merge to an unknown piece": (BPE | {"merges": ["b a"]}, "ggml.merges 'b a' is no pair of tokens"),
    "a very long merge": (BPE | {"merges": ["a\n" * 10_000]}, "is no pair of tokens"),
    "eom is a float": (BPE | {"eom_token_id": 1.0}, "ggml.eom_token_id is not an integer"),
    "bos is a boolean": (BPE | {"bos_token_id": True}, "ggml.bos_token_id is not an integer"),
    "unknown is a string": (SPM | {"unknown_token_id": "0"}, "ggml.unknown_token_id is not an integer"),
    "add_bos is a number": (SPM | {"add_bos_token": 1}, "ggml.add_bos_token is not a boolean"),
    "add_eos is a string": (SPM | {"add_eos_token": "true"}, "ggml.add_eos_token is not a boolean"),
    "add_space_prefix is a list": (SPM | {"add_space_prefix": [True]}, "ggml.add_space_prefix is not a boolean"),
    "suppress_tokens holds text": (SPM | {"suppress_tokens": ["a"]}, "suppress_tokens is not an array of integers"),
    "a BOS to add, and none": (BPE | {"add_bos_token": True}, "add_bos_token is set without a bos_token_id"),
    "an EOS to add, and none": (
        without(BPE, "eos_token_id") | {"add_eos_token": True},
        "add_eos_token is set without a eos_token_id",
    ),
    "the template is a list": (SPM | {"chat_template": ["x"]}, "tokenizer.chat_template is not a string"),
    "a second template is a number": (SPM | {"chat_template.rag": 3}, "tokenizer.chat_template.rag is not a string"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_tokenizer_metadata_is_a_format_error(name: str) -> None:
    keys, problem = MALFORMED[name]
    with pytest.raises(FormatError) as caught:
        load(keys)
    message = str(caught.value)
    assert message.startswith("model.gguf: ")
    assert problem in message
    assert "\n" not in message
    assert len(message) < 250


@pytest.mark.parametrize(
    ("base", "name", "value"),
    [
        (SPM, "bos", 6),
        (SPM, "eos", -1),
        (SPM, "eos", 2**32 - 1),
        (SPM, "unknown", 2**63),
        (BPE, "bos", 4),
        (BPE, "eos", 2**32 - 1),
        (BPE, "eot", 2**32 - 1),
        (BPE, "eom", np.uint32(2**32 - 1)),
        (BPE, "fim_pad", 9),
        (BPE, "prefix", -1),
    ],
)
def test_an_id_outside_the_vocabulary_is_no_token_and_said_once(base: dict[str, Any], name: str, value: Any) -> None:
    """Converters write -1 for "none". The default of SPM files, 1 and 2, is for files without the key alone."""
    keys = base | {f"{name}_token_id": value, "add_bos_token": name == "bos", "add_eos_token": name == "eos"}
    with pytest.warns(UserWarning, match=f"^model.gguf: tokenizer.ggml.{name}_token_id is {value}, outside.*$") as said:
        tokenizer = load(keys)
    assert len(said) == 1
    assert getattr(tokenizer, f"{name}_id", None) is None
    assert tokenizer.encode("a") == tokenizer.encode_prompt("a") == tokenizer.encode("a", add_special=False)
    by_key = {0} if base is BPE and name != "eos" else set[int]()
    assert tokenizer.eog_ids == by_key or base is SPM  # where </s> ends by its name


@pytest.mark.parametrize("model", ["bert", "t5", "rwkv", "plamo2", "", "x" * 1000, "two\nlines"])
def test_tokenizers_that_forge_does_not_have(model: str) -> None:
    with pytest.raises(UnsupportedError, match=r"^model\.gguf: tokenizer\.ggml\.model is [^\n]{,150}$"):
        load(SPM | {"model": model})


def test_spm_ignores_the_split_rule() -> None:
    assert load(SPM | {"pre": "no-such-rule"}).encode("ab") == load(SPM).encode("ab")


def test_types_and_ids_that_a_file_need_not_have() -> None:
    assert load(without(BPE, "token_type")).encode("ab<e>") == [3]
    assert load(without(BPE, "eos_token_id")).eog_ids == set()
    assert load({"model": "llama", "tokens": ["a"], "scores": [0.0], "add_bos_token": False}).encode("a") == [0, 0]


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 8),
    st.floats(),
    st.text(max_size=3),
    st.sampled_from(["llama", "gpt2", "gpt-2", "gemma4", "sarvam-moe"]),
    st.lists(st.text("ab <>", max_size=3) | st.sampled_from(["a b", "ab", "<s>", "<0x41>"]), max_size=6),
    st.lists(st.integers(-1, 7), max_size=6),
    st.lists(st.floats(), max_size=6),
    st.dictionaries(st.text(max_size=1), st.integers(), max_size=2),
)
KEYS = [*SPM, *BPE, "bos_token_id", "unknown_token_id", "suppress_tokens"]
KEYS += ["add_bos_token", "add_space_prefix", "chat_template"]
BASES = [SPM, BPE, LINES]


@given(st.sampled_from(BASES), st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), st.text("ab <>\n"))
def test_any_metadata_gives_a_tokenizer_or_one_error(base: dict[str, Any], changes: dict[str, Any], text: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        message = ""
        try:
            tokenizer = load(base | changes)
        except ForgeError as error:
            message = str(error)
    assert "\n" not in message
    if message:
        return
    ids = tokenizer.encode(text, parse_special=True)
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    tokenizer.decode(ids)
