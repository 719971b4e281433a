"""Long texts: encoded a part at a time, with the ids of the whole, in linear time and little memory."""

import json
import random
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers.models import BPE

from forge.tokenizer import pieces
from forge.tokenizer.partition import Partition
from forge.tokenizer.pretokenizers import RULES, Rule
from forge.tokenizer.spm import LineBPEEncoder, SPMEncoder

ROOT = Path(__file__).parents[2]
VOCAB = ROOT / "tests/data/vocab"
UNITS = [
    *("a", "b", "Q", "é", "中", "ナ", "я", " ", "  ", "\n", "\r\n", "\t", " \n", "1", "12", "1234", "٣", "'", "'s"),
    *("'ll", " 'T", ",", ".", "/", "<|", "|>", "-", "_", "`", "“", "。", "，", "́", "ि", "🙂", "\u200d", "\x1c", "½"),
    *("\x85", "\u3000", "²", "ⅷ", "IMGIMG", "AZ", "<sentinel:1>", "a" * 30, "ab" * 20, "aB" * 20, "中文" * 20),
    *(" " * 30, "\n" * 25, "!" * 30, "'" + "lla" * 12, "é" * 30, "1" * 50, "٣7" * 70, " \t" * 50, "\t \n" * 40),
    *("'s't're" * 20, "é́ö" * 20, "?🙂" * 60, "1a" * 60, "\n!" * 60, " " * 30 + "\n" + " \t" * 30),
    *("ナ中" * 20, "aé" * 20, "Éé" * 20, "!。" * 20, "🙂́🙃" * 20, "_" * 30, "$ " * 40, "½" * 30),
]


@cache
def splitter(rule: Rule) -> pieces.Splitter:
    return pieces.Splitter(rule.splitter())


@pytest.fixture
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a few characters are cut wherever they may be, and their runs shortened."""
    monkeypatch.setattr(pieces, "CHUNK_CHARS", 1)
    monkeypatch.setattr(pieces, "WINDOW_CHARS", 64)
    run = pieces._LONG_RUN.pattern.replace(str(pieces._RUN), "20")
    monkeypatch.setattr(pieces, "_LONG_RUN", re.compile(run))
    monkeypatch.setattr(pieces, "_KEPT", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("name", {rule: name for name, rule in RULES.items() if rule.stages}.values())
def test_words_of_parts_are_those_of_the_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule, split, rng = RULES[name].splitter(), splitter(RULES[name]), random.Random(name)
    borders = [split._border, re.compile("(?!)")]
    for _ in range(300):
        text = "".join(rng.choices(UNITS, k=rng.randint(1, 14)))
        for border in borders:
            monkeypatch.setitem(split.__dict__, "_border", border)
            assert list(split.words(text)) == [word for word, _ in rule.pre_tokenize_str(text)], text


WORDS = st.text("abc", min_size=1, max_size=40)
PIECES = st.lists(st.text("abc", min_size=2, max_size=5), max_size=8)


@given(WORDS, PIECES, st.data(), st.integers(2, 12))
def test_a_long_word_is_merged_as_in_one_go(word: str, made: list[str], data: st.DataObject, window: int) -> None:
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(["a", "b", "c", *made]))}
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=len(vocabulary), max_size=len(vocabulary))))
    spm = SPMEncoder(dict(vocabulary), scores, None)
    merges = [(piece[:i], piece[i:]) for piece in made for i in [data.draw(st.integers(1, len(piece) - 1))]]
    for pair in merges:
        for piece in (*pair, "".join(pair)):
            vocabulary.setdefault(piece, len(vocabulary))
    bpe = BPE(vocabulary, list(dict.fromkeys(merges)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "LONG_WORD", window)
        assert list(pieces.merge_long(word, spm._merge)) == spm._merge(word)
        whole = [token.value for token in bpe.tokenize(word)]
        assert list(pieces.merge_long(word, lambda part: [token.value for token in bpe.tokenize(part)])) == whole
        line = LineBPEEncoder(vocabulary, [" ".join(pair) for pair in merges], keeps_line_ends=False)
        assert line._merge(word) == list(pieces.merge_long(word, line._merge)) == whole


def naive(text: str, literals: dict[str, int], left: set[str], right: set[str]) -> list[str | int]:
    """llama.cpp's rule, word for word: token after token, each out of what is left of the text."""
    fragments: list[str | int] = [text]
    for token in sorted(literals, key=lambda token: -len(token.encode())):
        cut: list[str | int] = []
        for fragment in fragments:
            while isinstance(fragment, str) and token in fragment:
                before, _, fragment = fragment.partition(token)
                cut += [before.rstrip() if token in left else before, literals[token]]
                fragment = fragment.lstrip() if token in right else fragment
            cut.append(fragment)
        fragments = cut
    return [fragment for fragment in fragments if fragment != ""]


TOKENS = st.lists(st.text("ab é\n", min_size=1, max_size=4), min_size=1, max_size=6, unique=True)


@given(st.text("aab é\nc", max_size=25), TOKENS, st.data(), st.sampled_from([0, 64]))
def test_a_text_is_cut_as_token_after_token_would(text: str, tokens: list[str], data: st.DataObject, few: int) -> None:
    literals = {token: i for i, token in enumerate(tokens)}
    left, right = (data.draw(st.sets(st.sampled_from(tokens))) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forge.tokenizer.partition._FEW", few)
        assert list(Partition(literals, left, right)(text)) == naive(text, literals, left, right)


MEASURE = """
import re, sys, psutil
from pathlib import Path
from forge import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
tokenizer.encode((sys.argv[2] * 200_000)[:200_000])  # what is remembered whatever the length
text = sys.argv[2] * (2_000_000 // len(sys.argv[2].encode()))
before = psutil.Process().memory_info().rss
ids = tokenizer.encode(text, parse_special=True)
peak = 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])  # since exec
print(peak - before - sys.getsizeof(ids), len(ids))
"""
PROSE = "The quick brown fox jumps over the lazy dog, and 12 more.\n"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("name", "unit"),
    [
        *(("gpt-2", unit) for unit in (PROSE, "a", "<s>ab", "中", "7", "\t \n", "😀👍🏽", "'s't")),
        *(("llama-spm", unit) for unit in (PROSE, "a", "<s>ab", "中")),
    ],
)
def test_two_megabytes_take_little_memory_beside_the_ids(name: str, unit: str) -> None:
    command = [sys.executable, "-c", MEASURE, str(VOCAB / f"ggml-vocab-{name}.gguf"), unit]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    size, count = map(int, done.stdout.split())
    assert size < 10 * 2_000_000
    assert count > 10_000


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_line_writes_the_ids_of_a_long_text(tmp_path: Path) -> None:
    """rich's table of two million rows took gigabytes."""
    text = PROSE * (2_000_000 // len(PROSE))
    (tmp_path / "text").write_text(text)
    measured = "import sys; from forge.cli import run; code = run(sys.argv[1:]); sys.stdout.flush(); "
    measured += "open('status', 'w').write(open('/proc/self/status').read()); exit(code)"
    command = [sys.executable, "-c", measured, "tokenize", "-", "-m", str(VOCAB / "ggml-vocab-gpt-2.gguf")]
    for flags in ([], ["--json"]):
        with (tmp_path / "text").open() as stdin, (tmp_path / "out").open("w") as stdout:
            subprocess.run([*command, *flags], stdin=stdin, stdout=stdout, check=True, cwd=tmp_path)
        peak = re.search(r"VmHWM:\s+(\d+) kB", (tmp_path / "status").read_text())
        assert peak
        assert 1000 * int(peak[1]) < 250e6
    ids = json.loads((tmp_path / "out").read_text())["ids"]
    assert len(ids) % (len(text) // len(PROSE)) == 0
