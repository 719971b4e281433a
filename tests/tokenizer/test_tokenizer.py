"""Real vocabularies against llama.cpp's ids, and the way back: decoding, at once and streamed."""

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from forge.errors import TokenizerError
from forge.formats import gguf
from forge.tokenizer import Tokenizer

VOCAB = Path(__file__).parents[1] / "data/vocab"
NAMES = ["gpt-2", "llama-spm", "phi-3"]


@cache
def load(name: str) -> Tokenizer:
    path = VOCAB / f"ggml-vocab-{name}.gguf"
    return Tokenizer.from_metadata(gguf.read(path).metadata, source=path.name)


def lines(name: str) -> list[tuple[str, list[int]]]:
    """llama.cpp's own test texts and ids; nothing added, special text not parsed."""
    path = VOCAB / f"ggml-vocab-{name}.gguf"
    texts = path.with_suffix(".gguf.inp").read_bytes().decode().split("\n__ggml_vocab_test__\n")
    ids = [list(map(int, line.split())) for line in path.with_suffix(".gguf.out").read_text().split("\n")]
    assert len(texts) == len(ids) == 47
    return list(zip(texts, ids, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_of_llama_cpp(name: str) -> None:
    for text, ids in lines(name):
        assert load(name).encode(text, add_special=False) == ids


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("add_special", [True, False])
def test_decode_gives_back_the_encoded_text(name: str, add_special: bool) -> None:
    for text, _ in lines(name):
        assert load(name).decode(load(name).encode(text, add_special=add_special)) == text


@given(st.text(), st.sampled_from(NAMES), st.booleans())
@example("▁", "phi-3", False)
def test_decode_undoes_encode_of_any_text(text: str, name: str, add_special: bool) -> None:
    tokenizer = load(name)
    if name == "phi-3":
        text = text.replace("</s>", "")  # it swallows the blanks behind
    expected = text.replace("▁", " ") if name != "gpt-2" else text  # SPM's spelling of a space
    assert tokenizer.decode(tokenizer.encode(text, add_special=add_special)) == expected


def test_what_a_file_says_of_its_tokens() -> None:
    gpt2, llama, phi3 = map(load, NAMES)
    assert (gpt2.vocab_size, llama.vocab_size, phi3.vocab_size) == (50257, 32000, 32064)
    assert (gpt2.bos_id, gpt2.eos_id, gpt2.add_bos, gpt2.add_eos) == (50256, 50256, False, False)
    assert (llama.bos_id, llama.eos_id, llama.add_bos, llama.add_eos) == (1, 2, True, False)
    assert (phi3.bos_id, phi3.eos_id, phi3.add_bos, phi3.add_eos) == (1, 32000, True, False)
    assert (gpt2.eog_ids, llama.eog_ids, phi3.eog_ids) == ({50256}, {2}, {32000, 32007})
    assert gpt2.chat_template is None
    assert phi3.chat_template is not None
    assert phi3.chat_template.startswith("{{ bos_token }}")


# Checked with llama.cpp.
@pytest.mark.parametrize(
    ("name", "text", "plain", "special"),
    [
        ("gpt-2", "a<|endoftext|>", [64, 27, 91, 437, 1659, 5239, 91, 29], [64, 50256]),
        ("llama-spm", "<s> a", [1, 529, 29879, 29958, 263], [1, 1, 29871, 263]),
        (
            "phi-3",
            "<|user|>\nHi<|end|>\n",
            [1, 529, 29989, 1792, 29989, 29958, 13, 18567, 29966, 29989, 355, 29989, 29958, 13],
            [1, 32010, 6324, 32007],
        ),
    ],
)
def test_special_text(name: str, text: str, plain: list[int], special: list[int]) -> None:
    assert load(name).encode(text) == plain
    assert load(name).encode(text, parse_special=True) == special


def test_decode_shows_control_tokens_and_a_second_bos() -> None:
    llama = load("llama-spm")
    assert llama.decode([1, 1, 263]) == "<s> a"
    assert llama.decode([263, 1, 263, 2]) == "a<s> a</s>"
    assert llama.decode([1]) == llama.decode([]) == ""
    assert load("gpt-2").decode([50256, 64]) == "<|endoftext|>a"


def test_bytes_and_text_of_a_token() -> None:
    gpt2, llama = load("gpt-2"), load("llama-spm")
    assert gpt2.token_bytes(220) == b" "
    assert (llama.token_bytes(3 + 0xE2), llama.token_text(3 + 0xE2)) == (b"\xe2", r"\xe2")
    assert (llama.token_bytes(263), llama.token_text(263)) == (b" a", " a")
    assert (llama.token_bytes(1), llama.token_text(1)) == (b"<s>", "<s>")


@given(st.data(), st.sampled_from(range(3)))
def test_streaming_equals_decoding_at_once(data: Any, which: int) -> None:
    """Each piece is a prefix of the whole, ids of single bytes included."""
    tokenizer = load(NAMES[which])
    some_byte = st.integers(3, 258) if which else st.integers(94, 220)
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    ids = data.draw(st.lists(any_id | some_byte | st.just(tokenizer.bos_id)))
    stream = tokenizer.streamer()
    shown = ""
    for i in ids:
        shown += stream.push(i)
    shown += stream.flush()
    raw = b"".join(tokenizer.token_bytes(i) for i in (ids[1:] if which and ids[:1] == [1] else ids))
    assert shown == tokenizer.decode(ids) == (raw.removeprefix(b" ") if which else raw).decode(errors="replace")


def test_a_stream_holds_incomplete_characters() -> None:
    stream = load("llama-spm").streamer()
    euro = [3 + byte for byte in "€".encode()]
    assert [stream.push(i) for i in (*euro, 263, euro[0])] == ["", "", "€", " a", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("ids", [[-1], [32000], [2**70], ["a"], [1.0], [None], [[1]]])
def test_ids_out_of_range(ids: list[Any]) -> None:
    for use in (load("llama-spm").decode, lambda ids: load("llama-spm").token_text(ids[0])):
        with pytest.raises(TokenizerError, match=r"^[^\n]+$"):
            use(ids)


def test_numpy_integers_are_decoded() -> None:
    assert load("llama-spm").decode(np.array([1, 263], dtype=np.int32)) == "a"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", b"bytes", None, 3, ["a"]])
def test_text_that_is_no_text(text: Any) -> None:
    with pytest.raises(TokenizerError, match=r"^[^\n]+$"):
        load("gpt-2").encode(text)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unit", ["a", " ", "ab", "\n", "中"])
@pytest.mark.timeout(60)
def test_a_megabyte_of_text_is_encoded_in_bounded_time(name: str, unit: str) -> None:
    text = unit * (1_000_000 // len(unit.encode()))
    assert load(name).decode(load(name).encode(text)) == text


def test_forking_after_encoding_does_not_warn() -> None:
    """`tokenizers` complains on stderr where its thread pool was used before a fork."""
    program = (
        "import os; from forge.tokenizer import Tokenizer; from forge.formats import gguf;"
        f"t = Tokenizer.from_metadata(gguf.read({str(VOCAB / 'ggml-vocab-gpt-2.gguf')!r}).metadata, source='');"
        "t.encode('some text ' * 1000); pid = os.fork(); t.encode('more text'); pid and os.waitpid(pid, 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == ""


def test_a_continuation_keeps_its_leading_space() -> None:
    """A vocabulary with a space prefix: decode drops the first space, which a completion of a text must not."""
    tokenizer = load("llama-spm")
    ids = tokenizer.encode("Paris", add_special=False)
    assert tokenizer.decode(ids) == "Paris"
    stream = tokenizer.streamer(continues=True)
    assert "".join([stream.push(token) for token in ids]) + stream.flush() == " Paris"
