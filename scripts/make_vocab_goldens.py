"""Build tests/data/tokenizer/lines.json: llama.cpp's ids of `tests/vocab_lines.py` for each split rule, as digests.

The file holds two small vocabularies, of byte pairs and of characters, that no split rule has shaped. Their tokens
reach over the borders of words, so a border in another place changes ids. It also holds which tokens end a text, for
vocabularies of the control tokens of families.
Needs llama-cpp-python (or its sources with LLAMA_CPP_LIB_PATH set to a built libllama); downloads nothing.
    python scripts/make_vocab_goldens.py [--check DIRECTORY]
--check compares forge with llama.cpp on the whole vocabularies `ggml-vocab-*.gguf` of a directory instead.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import json
import random
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from vocab_lines import LINES, digests, end_metadata  # noqa: E402

from forge.errors import ForgeError  # noqa: E402
from forge.formats import gguf as forge_gguf  # noqa: E402
from forge.tokenizer import Tokenizer as ForgeTokenizer  # noqa: E402
from forge.tokenizer.pretokenizers import RULES  # noqa: E402

llama: Any = importlib.import_module("llama_cpp")  # no dependency of forge, so without types
OUT = ROOT / "tests/data/tokenizer/lines.json"
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1
END_CASES = 120
# llama.cpp takes any one of several names of a role. A user-defined one, and </s>, end a text for it and not for forge.
ROLES = (["<fim_pad>", "<|fim_pad|>", "[PAD]"], ["<reponame>", "<REPO>"], ["<|file_sep|>"], ["</s>"])
# Control tokens of the families, ends or not.
FAMILIES = (
    "<|startoftext|> <|return|> <|call|> <|end|> <|channel|> <|message|> <|start|> <|constrain|> <|endoftext|>",
    "<|flush|> <|calls|> <|end|> <|begin|> <|content|>",
    "<bos> <eos> <|turn> <turn|> <|tool_response> <tool_response|> <|channel> </s> <|tool_call>",
    "]~b] [e~[ ]~!b[ <fim_prefix> <fim_pad> <reponame>",
    "[BOS] [EOS] [EOT] [PAD] <|im_end|> <|im_user|> <|tool_calls_section_begin|>",
    "[gMASK] <sop> <|user|> <|observation|> <|endoftext|> <|code_prefix|> <|code_suffix|> <eop>",
    "<|begin_of_text|> <|eot|> <|eom|> <|header_start|> <|python_start|> <|fim_prefix|> <|fim_pad|> <|file_sep|>",
    "[|endofturn|] <|END_OF_TURN_TOKEN|> <|end_of_text|> <seed:eos> <｜hy_EOT｜> <|assistant_end|> <|end_of_sentence|>",
    "<s> </s> <|eot_id|> <|eom_id|> <end_of_turn> <EOT> <PRE> <SUF> <MID> <REPO> <｜end▁of▁sentence｜>",
)


class LlamaVocabulary:
    """A vocabulary as llama.cpp reads it."""

    def __init__(self, path: Path) -> None:
        settings = llama.llama_model_default_params()
        settings.vocab_only = True
        self._model = llama.llama_model_load_from_file(str(path).encode(), settings)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot load {path}")
        self._vocabulary = llama.llama_model_get_vocab(self._model)

    def close(self) -> None:
        llama.llama_model_free(self._model)

    def encode(self, text: str, parse_special: bool = False) -> list[int]:
        data = text.encode()
        ids = (llama.llama_token * (len(data) + 8))()
        count = llama.llama_tokenize(self._vocabulary, data, len(data), ids, len(ids), True, parse_special)
        return list(ids[:count])

    def end_ids(self) -> list[int]:
        size = llama.llama_vocab_n_tokens(self._vocabulary)
        return [i for i in range(size) if llama.llama_vocab_is_eog(self._vocabulary, i)]


def of_llama(metadata: Mapping[str, Any], folder: Path) -> LlamaVocabulary:
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        kind = gguf.GGUFValueType.UINT32 if isinstance(value, int) else gguf.GGUFValueType.get_type(value)
        writer.add_key_value(key, value, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return LlamaVocabulary(path)


def trained(is_bytes: bool) -> dict[str, Any]:
    """A vocabulary of the lines, merged over all borders but those of lines."""
    model = Tokenizer(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet() if is_bytes else []
    if is_bytes:
        model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    else:
        model.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=2500 if is_bytes else 1500,
        initial_alphabet=sorted(alphabet),
        limit_alphabet=400,
        max_token_length=6,
        show_progress=False,
    )
    # Tokens end at NUL for llama.cpp.
    texts = (line if is_bytes else line.replace("\0", "").replace(" ", "▁") for line in LINES)
    model.train_from_iterator(texts, trainer)
    learned = json.loads(model.to_str())["model"]
    pieces = ["<|bos|>", "<|mark|>"] if is_bytes else ["<bos>", "<eos>", "<turn|>", "<|tool_response>", "</s>"]
    types = [CONTROL] * len(pieces)
    if not is_bytes:
        pieces += [f"<0x{i:02X}>" for i in range(256) if i != 0xE9]
        types += [6] * 255
        pieces += ["\n" * count for count in (5, 9)]  # no merges lead to these
    pieces += [piece for piece in learned["vocab"] if piece not in pieces]
    types += [NORMAL] * (len(pieces) - len(types))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": types,
        # Every seventh token has no merge: words that are tokens are taken whole by some rules.
        "tokenizer.ggml.merges": [" ".join(pair) for i, pair in enumerate(learned["merges"]) if i % 7],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
    }


def end_cases() -> list[dict[str, Any]]:
    """Vocabularies of control tokens, as a family has them or mixed, with types that converters give them."""
    source, cases = random.Random(4), []
    names = sorted({name for family in FAMILIES for name in family.split()})
    for i in range(END_CASES):
        pieces = FAMILIES[i].split() if i < len(FAMILIES) else source.sample(names, source.randint(2, 14))
        again = {piece for role in ROLES for piece in [name for name in pieces if name in role][1:]}
        pieces = [piece for piece in pieces if piece not in again]
        types = [source.choice((CONTROL, CONTROL, USER_DEFINED, NORMAL)) for _ in pieces]
        types = [
            CONTROL if any(piece in role for role in ROLES) else kind for piece, kind in zip(pieces, types, strict=True)
        ]
        cases.append({"tokens": pieces, "types": types})
    return cases


def build(folder: Path) -> dict[str, Any]:
    vocabularies = {"bytes": trained(True), "lines": trained(False)}
    families: dict[str, list[str]] = {}
    for name, rule in RULES.items():
        metadata = vocabularies["bytes" if rule.stages else "lines"] | {"tokenizer.ggml.pre": name}
        model = of_llama(metadata, folder)
        families.setdefault(digests([model.encode(line, parse_special=True) for line in LINES]), []).append(name)
        model.close()
    ends = end_cases()
    for case in ends:
        model = of_llama(end_metadata(case), folder)
        case["ends"] = model.end_ids()
        model.close()
    origin = f"llama.cpp in llama-cpp-python {llama.__version__}, by scripts/make_vocab_goldens.py"
    names = {" ".join(names): digest for digest, names in families.items()}
    return {"origin": origin, "vocabularies": vocabularies, "digests": names, "ends": ends}


def check(directory: Path) -> None:
    for path in sorted(directory.glob("ggml-vocab-*.gguf")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ours = ForgeTokenizer.from_metadata(forge_gguf.read(path).metadata, source=path.name)
            except ForgeError as error:
                print(f"{path.name}: {error}")
                continue
        theirs = LlamaVocabulary(path)
        pairs = [(line, special) for line in LINES for special in (False, True)]
        wrong = [pair for pair in pairs if ours.encode(pair[0], parse_special=pair[1]) != theirs.encode(*pair)]
        ends = sorted(ours.eog_ids ^ set(theirs.end_ids()))
        print(f"{path.name}: {len(wrong)} of {len(pairs)} differ {wrong[:2]}, ends that differ: {ends}")
        theirs.close()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--check", type=Path)
    options = arguments.parse_args()
    quiet = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(quiet, ctypes.c_void_p(0))
    if options.check:
        check(options.check)
        return
    with tempfile.TemporaryDirectory() as folder:
        OUT.write_text(json.dumps(build(Path(folder)), ensure_ascii=False, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
