#!/usr/bin/env python3
"""Writes tests/data/tokenizer/huggingface: tiny tokenizers as `save_pretrained` writes them, what llama.cpp's converter
makes of them, and their ids.

    python scripts/make_hf_tokenizers.py LLAMA_CPP

LLAMA_CPP is a folder with the sources of llama.cpp b7500 or later. Needs torch, transformers 4.57, sentencepiece.
"""

import io
import json
import logging
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OUT = ROOT / "tests/data/tokenizer/huggingface"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIALS = ["<|begin|>", "<|end_of_turn|>", "<|stop|>", "<|more|>", "<|pad|>"]


def main() -> None:
    sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]) / "gguf-py"), str(ROOT / "tests")]
    logging.disable()
    text = import_module("vocab_lines").LINES
    shutil.rmtree(OUT, ignore_errors=True)
    byte_level(OUT / "bytes", text)
    characters(OUT / "characters", text, prefix=True)
    characters(OUT / "gemma4", text, prefix=False)


def byte_level(folder: Path, text: list[str]) -> None:
    """A BPE of bytes as Llama 3 has it, with several ends, BOS by the post-processor, and two chat templates."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE(ignore_merges=True))
    parts = [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(text, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.add_tokens(["<tool>", "  "])
    bos = tokenizer.token_to_id(SPECIALS[0])
    template = processors.TemplateProcessing("<|begin|> $A", "<|begin|> $A <|begin|> $B:1", [("<|begin|>", bos)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    ends = [tokenizer.token_to_id(name) for name in SPECIALS[1:4]]
    write(
        folder,
        tokenizer,
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|begin|>",
            "eos_token": {"__type": "AddedToken", "content": "<|end_of_turn|>"},
        },
        {"vocab_size": 416, "pad_token_id": bos + 4, "eos_token_id": ends[0]},
        {"eos_token_id": ends, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "repetition_penalty": 1.05},
    )
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}", "utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/tool_use.jinja").write_text("{{ tools }}", "utf-8")
    finish(folder, tokenizer, "_set_vocab_gpt2", text)


def characters(folder: Path, text: list[str], *, prefix: bool) -> None:
    """SentencePiece's BPE, translated by transformers; without a prefix as Gemma 4 has it."""
    from tokenizers import processors

    llama: Any = import_module("transformers.models.llama.tokenization_llama")
    converters: Any = import_module("transformers.convert_slow_tokenizer")

    sentencepiece: Any = import_module("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for line in text if line.isascii() and line.isprintable()]),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=prefix,
        minloglevel=2,
    )
    folder.mkdir(parents=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    slow = llama.LlamaTokenizer(str(folder / "tokenizer.model"), legacy=True, add_prefix_space=prefix)
    tokenizer = converters.LlamaConverter(slow).converted()
    extra = ["<|tool_call>", "<tool_call|>"] if not prefix else ["<|user|>"]
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>", *extra])
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B:1", [("<s>", 1)])
    config: dict[str, Any] = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    if not prefix:
        config["additional_special_tokens"] = extra
    write(folder, tokenizer, config, {"vocab_size": 700 + len(extra), "bos_token_id": 1, "eos_token_id": 2}, {})
    if prefix:
        tokens = {
            str(i): {"content": token.content, "special": token.special}
            for i, token in tokenizer.get_added_tokens_decoder().items()
        }
        added = {**config, "added_tokens_decoder": tokens}
        (folder / "tokenizer_config.json").write_text(json.dumps(added), "utf-8")
        finish(folder, tokenizer, "_set_vocab_sentencepiece", text)
    else:
        finish(folder, tokenizer, "set_vocab", text)
        (folder / "tokenizer.model").unlink()


def write(
    folder: Path, tokenizer: Any, config: dict[str, Any], model: dict[str, Any], generation: dict[str, Any]
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (
        ("tokenizer", json.loads(tokenizer.to_str())),
        ("tokenizer_config", config),
        ("config", model),
        ("generation_config", generation),
    ):
        (folder / f"{name}.json").write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")), "utf-8")


def finish(folder: Path, tokenizer: Any, method: str, text: list[str]) -> None:
    """Write expected.json: the converter's keys, and the ids that `tokenizers` gives."""
    gguf = import_module("gguf")
    base = (
        import_module("conversion.gemma").Gemma4Model
        if method == "set_vocab"
        else import_module("conversion.base").TextModel
    )
    model = base.__new__(base)
    model.dir_model = folder
    model.hparams = json.loads((folder / "config.json").read_text("utf-8"))
    model.gguf_writer = gguf.GGUFWriter(None, "llama")
    base.get_vocab_base_pre = lambda self, tokenizer: "llama-bpe"  # the converter knows hashes of published ones alone
    getattr(model, method)()
    sampling = gguf.Metadata.load(model_path=folder)
    sampling.set_gguf_meta_model(model.gguf_writer)
    keys = {
        key: [item.decode() if isinstance(item, bytes) else item for item in field.value]
        if isinstance(field.value, list | tuple)
        else field.value
        for key, field in model.gguf_writer.kv_data[0].items()
        if key.startswith(("tokenizer.", "general.sampling."))
    }
    lines = text[:: len(text) // 60]
    ids = [tokenizer.encode(line, add_special_tokens=True).ids for line in lines]
    expected = {"keys": keys, "lines": lines, "ids": ids}
    (folder / "expected.json").write_text(json.dumps(expected, ensure_ascii=False, separators=(",", ":")), "utf-8")


if __name__ == "__main__":
    main()
