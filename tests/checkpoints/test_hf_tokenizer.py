"""Tokenizers of Hugging Face directories against llama.cpp's converter (its keys) and `tokenizers` (its ids)."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer

from forge.checkpoints.hf_tokenizer import read_tokenizer
from forge.errors import ForgeError, FormatError, UnsupportedError
from forge.formats.sentencepiece import read_sentencepiece
from forge.tokenizer import Tokenizer

DATA = Path(__file__).parents[1] / "data/tokenizer/huggingface"


def read(folder: Path, architecture: str = "llama") -> dict[str, Any]:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return read_tokenizer(folder, config, architecture=architecture, vocab_size=config["vocab_size"])


def plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize("kind", ["bytes", "characters", "gemma4"])
def test_ids_are_those_of_tokenizers(kind: str) -> None:
    keys = read(DATA / kind, kind)
    tokenizer = Tokenizer.from_metadata(keys, source=kind)
    expected = json.loads((DATA / kind / "expected.json").read_text("utf-8"))
    for line, ids in zip(expected["lines"], expected["ids"], strict=True):
        assert tokenizer.encode(line, parse_special=True) == ids, line


@pytest.mark.parametrize("kind", ["bytes", "characters", "gemma4"])
def test_keys_are_those_of_llama_cpps_converter(kind: str) -> None:
    keys = {key: plain(value) for key, value in read(DATA / kind, kind).items()}
    expected = json.loads((DATA / kind / "expected.json").read_text("utf-8"))["keys"]
    if kind == "characters":  # a tokenizer.json has no scores; their order is tested by the ids
        assert keys.pop("tokenizer.ggml.scores") != expected.pop("tokenizer.ggml.scores")
    if kind == "bytes":  # ends of generation_config.json, which the converter leaves to the names of tokens
        tokens = keys["tokenizer.ggml.tokens"]
        assert keys.pop("tokenizer.ggml.eot_token_id") == tokens.index("<|stop|>")
        assert keys.pop("tokenizer.ggml.eom_token_id") == tokens.index("<|more|>")
    assert keys == expected


def test_a_tokenizer_model_has_the_scores_of_the_converter(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "characters", folder)
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    settings |= {"add_bos_token": True}  # of the post-processor, which is in the tokenizer.json
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), "utf-8")
    expected = json.loads((DATA / "characters/expected.json").read_text("utf-8"))
    keys = {key: plain(value) for key, value in read(folder).items()}
    theirs = expected["keys"] | {
        "tokenizer.ggml.scores": np.float32(expected["keys"]["tokenizer.ggml.scores"]).tolist()
    }
    assert {key: value for key, value in keys.items() if key in theirs} == {
        key: value for key, value in theirs.items() if not key.endswith(("add_eos_token", "add_sep_token"))
    }
    tokenizer = Tokenizer.from_metadata(read(folder), source="t")
    for line, ids in zip(expected["lines"], expected["ids"], strict=True):
        assert tokenizer.encode(line, parse_special=True) == ids, line
    (folder / "tokenizer_config.json").unlink()
    (folder / "added_tokens.json").write_text('{"<tool>": 700}', "utf-8")
    assert plain(read(folder)["tokenizer.ggml.token_type"])[700] == 4  # user-defined


@pytest.mark.parametrize(
    ("edit", "error", "message"),
    [
        (lambda data: data[:-5], FormatError, "is truncated or forged"),
        (lambda data: b"\x0a\xff\xff\xff\xff\x0f", FormatError, "is truncated or forged"),
        (lambda data: data + b"\x0a\x05\x0a\x03<s>", FormatError, "has the piece '<s>' twice"),
        (lambda data: data + b"\x0a\x00", FormatError, "has the piece '' twice or without a text"),
        (lambda data: data + b"\x0a\x05\x0a\x01~\x18\x09", FormatError, "a piece of an unknown type"),
        (lambda data: b"\x0a\x03\x0a\x01a", UnsupportedError, "kind Unigram; forge knows BPE"),
        (lambda data: b"\x0a\x03\x0a\x01a\x12\x02\x18\x04", UnsupportedError, "kind character; forge knows BPE"),
        (lambda data: b"\x12\x05\x18\x02\xc0\x01\x01", UnsupportedError, "treat_whitespace_as_suffix"),
        (lambda data: b"\x12\x02\x18\x02\x1a\x02\x28\x00", UnsupportedError, "(escape_whitespaces), which is not"),
        (lambda data: b"{}", FormatError, ""),
    ],
)
def test_other_files_than_a_bpe_of_sentencepiece_are_one_line(
    edit: Callable[[bytes], bytes], error: type[ForgeError], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(edit((DATA / "characters/tokenizer.model").read_bytes()))
    with pytest.raises(error) as raised:
        read_sentencepiece(path)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def edited(tmp_path: Path, kind: str, file: str, edit: Any) -> Path:
    """A copy of a directory in which a file has other values: keys with dots for levels, None = the key is gone."""
    folder = tmp_path / kind
    shutil.copytree(DATA / kind, folder)
    path = folder / file
    content = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for key, value in edit.items():
        *parents, last = key.split(".")
        place = content
        for parent in parents:
            place = place[parent]
        place[last] = value
        if value is None:
            del place[last]
    path.write_text(json.dumps(content), "utf-8")
    return folder


def test_templates_have_names_and_files_go_first(tmp_path: Path) -> None:
    listed = [{"name": "default", "template": "old"}, {"name": "tool use!", "template": "{{ b }}"}]
    keys = read(edited(tmp_path, "bytes", "tokenizer_config.json", {"chat_template": listed}))
    found = {key: value for key, value in keys.items() if "template" in key}
    assert found == {
        "tokenizer.chat_template": "{{ messages[0].content }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_template.tool_use_": "{{ b }}",
        "tokenizer.chat_templates": ["tool_use_", "tool_use"],
    }


def test_all_ends_of_a_configuration_end_a_text(tmp_path: Path) -> None:
    folder = edited(tmp_path, "bytes", "generation_config.json", {"eos_token_id": [65, 66, 67, 68, 999]})
    ends = Tokenizer.from_metadata(read(folder), source="t").eog_ids
    assert ends == {65, 66, 67, 68, 401}  # 401 is its own, <|end_of_turn|>


def test_suggestions_are_offered_and_no_more() -> None:
    keys = read(DATA / "bytes")
    assert keys["general.sampling.temp"] == 0.6
    assert keys["general.sampling.top_k"] == 20


def test_rows_without_tokens_and_tokens_without_rows(tmp_path: Path) -> None:
    folder = edited(tmp_path, "bytes", "config.json", {"vocab_size": 402})
    tokenizer = Tokenizer.from_metadata(read(folder), source="t")
    assert tokenizer.vocab_size == 402
    assert tokenizer.encode("<|begin|>", False, True) == [400]
    assert len(tokenizer.encode("<|stop|>", False, True)) > 1  # 402: the model has no row for it
    padded = Tokenizer.from_metadata(read(DATA / "bytes"), source="t")
    assert padded.token_text(415) == "[PAD415]"
    assert padded.vocab_size == 416


def test_tokens_swallow_the_blanks_beside_them_as_their_file_says(tmp_path: Path) -> None:
    added = json.loads((DATA / "bytes/tokenizer.json").read_text("utf-8"))["added_tokens"]
    flags = {"<tool>": {"lstrip": True}, "<|stop|>": {"rstrip": True}, "<|more|>": {"lstrip": True, "rstrip": True}}
    added = [token | flags.get(token["content"], {}) for token in added]
    folder = edited(tmp_path, "bytes", "tokenizer.json", {"added_tokens": added})
    theirs = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    ours = Tokenizer.from_metadata(read(folder), source="t")
    for text in ("a <tool> b", "a\n <|stop|> \n b", "a  <|more|>\t b<tool><|more|>", "<|stop|>", " <|pad|> "):
        assert ours.encode(text, True, True) == theirs.encode(text).ids, text


MALFORMED: list[tuple[str, str, dict[str, Any], type[ForgeError], str]] = [
    ("bytes", "tokenizer.json", {"model": []}, FormatError, "model is not an object"),
    ("bytes", "tokenizer.json", {"model.vocab": []}, FormatError, "model.vocab is not an object"),
    ("bytes", "tokenizer.json", {"model.vocab": {"a": "0"}}, FormatError, "ids that are not integers"),
    ("bytes", "tokenizer.json", {"model.vocab": {"a": True}}, FormatError, "ids that are not integers"),
    ("bytes", "tokenizer.json", {"model.vocab": {"a": 1, "b": 1}}, FormatError, "two tokens the same id"),
    ("bytes", "tokenizer.json", {"model.vocab": {"a": -1}}, FormatError, "ids from -1 to -1, and the embedding 416"),
    ("bytes", "tokenizer.json", {"model.vocab": {"a": 2**63}}, FormatError, "and the embedding 416 rows"),
    ("bytes", "tokenizer.json", {"model.merges": "a b"}, FormatError, "model.merges is not a list:"),
    ("bytes", "tokenizer.json", {"model.merges": ["a b", ["a", "b"]]}, FormatError, "not a list of pairs"),
    ("bytes", "tokenizer.json", {"model.merges": [["a", "b", "c"]]}, FormatError, "not a list of pairs"),
    ("bytes", "tokenizer.json", {"model.merges": ["a  b"]}, FormatError, "holds what is no pair of tokens"),
    ("bytes", "tokenizer.json", {"added_tokens": {"a": 1}}, FormatError, "added_tokens is not a list"),
    ("bytes", "tokenizer.json", {"added_tokens": [1]}, FormatError, "added_tokens is not a list of objects"),
    ("bytes", "tokenizer.json", {"added_tokens": [{"id": -5, "content": "x"}]}, FormatError, "without a text or an id"),
    ("bytes", "tokenizer.json", {"added_tokens": [{"id": 9}]}, FormatError, "without a text or an id"),
    ("bytes", "tokenizer.json", {"added_tokens": [{"id": 9, "content": {}}]}, FormatError, "without a text or an id"),
    ("bytes", "tokenizer.json", {"model.type": "Unigram"}, UnsupportedError, "'Unigram'; forge knows BPE alone"),
    ("bytes", "tokenizer.json", {"model.type": ["BPE"]}, UnsupportedError, "forge knows BPE alone"),
    ("bytes", "tokenizer.json", {"model.end_of_word_suffix": "</w>"}, UnsupportedError, "end_of_word_suffix, '</w>'"),
    ("bytes", "tokenizer.json", {"pre_tokenizer": None, "decoder": None}, UnsupportedError, "without tokens for bytes"),
    (
        "bytes",
        "tokenizer.json",
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": 3}},
        FormatError,
        "the Sequence of its pre_tokenizer should have a list of pretokenizers",
    ),
    ("bytes", "tokenizer.json", {"model.ignore_merges": "no"}, FormatError, "should be true or false, not 'no'"),
    ("characters", "tokenizer.json", {"model.ignore_merges": True}, UnsupportedError, "ignore_merges of a BPE of char"),
    ("bytes", "tokenizer.json", {"post_processor": {"type": "Zzz"}}, UnsupportedError, "its post-processor is 'Zzz'"),
    ("bytes", "tokenizer.json", {"post_processor": {"type": "BertProcessing"}}, UnsupportedError, "'BertProcessing'"),
    (
        "bytes",
        "tokenizer.json",
        {"post_processor": {"type": "TemplateProcessing", "single": [1, 2]}},
        FormatError,
        "'single' of its post-processor should be a list of tokens and texts",
    ),
    (
        "bytes",
        "tokenizer.json",
        {"post_processor": {"type": "TemplateProcessing", "pair": [{"SpecialToken": {"id": 1}}]}},
        FormatError,
        "'pair' of its post-processor should be a list",
    ),
    ("bytes", "tokenizer.json", {"decoder": {"type": "WordPiece"}}, UnsupportedError, "its decoder is 'WordPiece'"),
    (
        "characters",
        "tokenizer.json",
        {"decoder": {"type": "Strip", "content": " ", "start": 2, "stop": 0}},
        UnsupportedError,
        "its decoder is 'Strip', content ' ', start 2, stop 0, which forge does not know",
    ),
    ("gemma4", "tokenizer.json", {"normalizer": {"type": "Lowercase"}}, UnsupportedError, "goes through 'Lowercase'"),
    ("gemma4", "tokenizer.json", {"pre_tokenizer": {"type": "Digits"}}, UnsupportedError, "goes through 'Digits'"),
    (
        "gemma4",
        "tokenizer.json",
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "split": False}},
        UnsupportedError,
        "a space is put before a text, which Gemma 4 does not do",
    ),
    *(
        (kind, "tokenizer.json", {component: value}, FormatError, f"its {component} should ")
        for kind, component, value in (
            ("bytes", "normalizer", "NFKC"),
            ("characters", "normalizer", [{"type": "NFKC"}]),
            ("gemma4", "pre_tokenizer", 7),
            ("bytes", "post_processor", {}),
            ("characters", "decoder", {"type": "Sequence", "decoders": [None]}),
            ("bytes", "normalizer", {"type": "Sequence"}),
            ("bytes", "pre_tokenizer", {"type": "Sequence", "pretokenizers": {"a": 1}}),
            ("bytes", "post_processor", {"type": ["ByteLevel"]}),
        )
    ),
    (
        "bytes",
        "tokenizer.json",
        {"added_tokens": [{"id": 5, "content": "<x>"}]},
        FormatError,
        "the id 5 is that of the token '<x>', and of '&', too",
    ),
    (
        "bytes",
        "tokenizer.json",
        {"added_tokens": [{"id": 400, "content": "<x>"}, {"id": 400, "content": "<y>"}]},
        FormatError,
        "the id 400 is that of the token '<y>', and of '<x>', too",
    ),
    (
        "bytes",
        "tokenizer.json",
        {"added_tokens": [{"id": 400, "content": "<x>"}, {"id": 9999, "content": "<x>"}]},
        FormatError,
        "tokenizer.json: the token '<x>' has the id 9999, and the id 400, too",
    ),
    (
        "bytes",
        "tokenizer.json",
        {"added_tokens": [{"id": 400, "content": "&"}]},
        FormatError,
        "the token '&' has the id 400, and the id 5, too",
    ),
    ("bytes", "tokenizer_config.json", {"added_tokens_decoder": [1]}, FormatError, "is not an object of tokens"),
    ("bytes", "tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, FormatError, "is not an object of tokens"),
    (
        "bytes",
        "tokenizer_config.json",
        {"added_tokens_decoder": {"9" * 5000: {}}},
        FormatError,
        "not an object of tokens",
    ),
    (
        "bytes",
        "tokenizer_config.json",
        {"added_tokens_decoder": {"9": {"content": {}}}},
        FormatError,
        "without a text or an id",
    ),
    ("bytes", "config.json", {"vocab_size": 2**40}, FormatError, "config.json: vocab_size is 1099511627776"),
    (
        "characters",
        "tokenizer.json",
        {"model.merges": [["a", "zz"]]},
        FormatError,
        "a merge forms 'azz', which is no token",
    ),
    ("characters", "tokenizer.json", {"normalizer": None}, UnsupportedError, "spaces are not spelled as"),
    ("characters", "tokenizer.json", {"normalizer": {"type": "Precompiled"}}, UnsupportedError, "'Precompiled'"),
    ("characters", "tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, UnsupportedError, "'Whitespace'"),
    (
        "characters",
        "tokenizer.json",
        {"model.merges": [["▁", "▁"]] * 2},
        UnsupportedError,
        "merged by rank, and not by",
    ),
]


@pytest.mark.parametrize(("kind", "file", "edit", "error", "message"), MALFORMED)
def test_malformed_files_are_one_line(
    kind: str, file: str, edit: dict[str, Any], error: type[ForgeError], message: str, tmp_path: Path
) -> None:
    folder = edited(tmp_path, kind, file, edit)
    with pytest.raises(error) as raised:
        Tokenizer.from_metadata(read(folder, kind), source="t")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("ignores", [False, True])
@pytest.mark.parametrize("digits", [r"\p{N}{1,3}", r"\p{N}"])
def test_merges_are_ignored_where_the_file_says_so_whatever_the_rule(
    digits: str, ignores: bool, tmp_path: Path
) -> None:
    """Llama 3's rule has names with and without; that with single digits, Qwen 2's, has names without alone."""
    component = json.loads((DATA / "bytes/tokenizer.json").read_text("utf-8"))["pre_tokenizer"]
    pattern = component["pretokenizers"][0]["pattern"]
    pattern["Regex"] = pattern["Regex"].replace(r"\p{N}{1,3}", digits)
    edit = {"pre_tokenizer": component, "model.ignore_merges": ignores, "model.merges": []}
    folder = edited(tmp_path, "bytes", "tokenizer.json", edit)
    theirs = HFTokenizer.from_file(str(folder / "tokenizer.json"))
    keys = read(folder)
    ours = Tokenizer.from_metadata(keys, source="t")
    whole = False
    for text in ("the", " the", "in on and\n12 345"):
        ids = ours.encode(text, False)
        assert ids == theirs.encode(text, add_special_tokens=False).ids
        whole |= len(ids) < len(text)
    assert whole == ignores
    assert keys.get("tokenizer.ggml.ignore_merges") == (True if ignores and digits == r"\p{N}" else None)


def test_messages_quote_a_bounded_part_of_a_file_on_one_line(tmp_path: Path) -> None:
    step = {"type": "Split", "pattern": {"Regex": "\x1b[31m\n" * 999}, "behavior": "Isolated"}
    odd: dict[str, Any] = {"type": "Zzz\x1b", "\x1b\n" * 9999: 1} | {f"k{i}": i for i in range(999)}
    edits = (
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [step] * 20}},
        *({component: odd} for component in ("normalizer", "pre_tokenizer", "post_processor", "decoder")),
        {"normalizer": "\x1b" * 9999},
        {"added_tokens": [{"id": 5, "content": "\x1b\n" * 9999}]},
    )
    for number, edit in enumerate(edits):
        folder = edited(tmp_path / str(number), "bytes", "tokenizer.json", edit)
        with pytest.raises(ForgeError) as raised:
            read(folder)
        assert len(str(raised.value)) < 2000 + len(str(folder))
        assert str(raised.value).isprintable()


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ({"401": {"content": "<|begin|>"}}, r"'<\|begin\|>' has the id 401, and is not followed, .* has it as 400"),
        ({"5": {"content": "<new>"}}, r"'<new>' has the id 5, .*where 5 is '&', so that it is no token"),
    ],
)
def test_the_vocabulary_goes_before_what_a_configuration_says_of_its_ids(
    token: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """As in transformers, whose tokenizers.json counts: what is not in it keeps no id that is taken."""
    expected = read(DATA / "bytes")
    folder = edited(tmp_path, "bytes", "tokenizer_config.json", {"added_tokens_decoder": token})
    with pytest.warns(UserWarning, match=message):
        found = read(folder)
    assert found["tokenizer.ggml.tokens"] == expected["tokenizer.ggml.tokens"]


def test_a_second_token_before_a_text_is_left_out_with_a_warning(tmp_path: Path) -> None:
    parts = [{"SpecialToken": {"id": text, "type_id": 0}} for text in ("<|begin|>", "<|stop|>")]
    template = {"type": "TemplateProcessing", "single": [*parts, {"Sequence": {"id": "A", "type_id": 0}}]}
    folder = edited(tmp_path, "bytes", "tokenizer.json", {"post_processor": template})
    with pytest.warns(UserWarning, match=r"adds '<\|stop\|>', too, which forge and llama\.cpp leave out"):
        assert read(folder)["tokenizer.ggml.bos_token_id"] == 400


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ('{"<x>": 1}', r"added_tokens\.json: the id 1 is that of the token '<x>', and of '<s>', too"),
        ('{"<s>": 700}', r"added_tokens\.json: the token '<s>' has the id 700, and the id 1, too"),
        ('{"<x>": 2}', r"added_tokens\.json: the id 2 is that of the token '<x>', and of '</s>', too"),
        ('{"<x>": "2"}', r"added_tokens\.json: added_tokens holds a token without a text or an id"),
    ],
)
def test_tokens_beside_a_tokenizer_model_have_one_id_and_one_text(added: str, message: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "characters", folder)
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(added, "utf-8")
    with pytest.raises(FormatError, match=message):
        read(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "config.json").write_text('{"vocab_size": 100}', "utf-8")
    with pytest.raises(FormatError, match=r"tokenizer\.model: model\.vocab has ids from 0 to"):
        read(folder)


def test_what_a_tokenizer_model_removes_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "characters", folder)
    (folder / "tokenizer.json").unlink()
    data = (folder / "tokenizer.model").read_bytes()
    (folder / "tokenizer.model").write_bytes(data[:-1] + b"\x01")  # the flag is the file's last field
    with pytest.warns(UserWarning, match="changed by 'remove_extra_whitespaces', which forge and llama.cpp leave out"):
        read(folder)


def test_a_directory_without_a_tokenizer_json_says_what_it_has(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DATA / "bytes", folder)
    (folder / "tokenizer.json").rename(folder / "vocab.json")
    with pytest.raises(FormatError, match=r"has no tokenizer\.json, only vocab\.json: save the tokenizer anew"):
        read(folder)
    (folder / "vocab.json").unlink()
    with pytest.raises(FormatError, match=r"has no tokenizer\.json: fetch"):
        read(folder)
