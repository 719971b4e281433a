"""Build tests/data/hf: the models of tests/data/arch as the Hugging Face directories that they were converted from.

Each family of scripts/make_goldens.py is made again from its seed, saved by transformers, its matrices in float16, and
must give the model.gguf that is there, tensor by tensor. It becomes a folder with
  config.json            as transformers wrote it;
  model.safetensors.xz   the saved file as copies out of model.gguf and other bytes (`encode`), so that the same weights
                         do not lie here twice. `hf_models.decode` of the tests gives back every byte.
tokenizer.json and tokenizer_config.json, the same for all, lie beside the folders, and defaults.json: for each family
a config.json of nothing but sizes, and the one that transformers makes of it; and changes.json: for each model all
changes of one key of its configuration that change transformers' logits.
Needs what make_goldens.py needs, and safetensors.
    python scripts/make_hf_goldens.py --llama-cpp ~/llama.cpp [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import lzma
import shutil
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import make_goldens
import numpy as np
from make_goldens import (
    FAMILIES,
    LENGTHS,
    VOCAB,
    Family,
    convert,
    is_vector,
    merged,
    model_of,
    randomize,
    save_tokenizer,
    torch,
)

DATA = Path(__file__).parent.parent / "tests" / "data"
RUN = 64
"""Bytes that a copy has at least."""

KEPT = {
    "gpt_oss": {"mlp.router.bias": "ffn_gate_inp.bias", "self_attn.sinks": "attn_sinks.weight", "norm.weight": ""},
    "mixtral": {"norm.weight": ""},
    "starcoder2": {
        "mlp.c_fc.weight": "ffn_up.weight",
        "mlp.c_proj.weight": "ffn_down.weight",
        "norm.weight": "",
        "norm.bias": "",
    },
}
"""Parameters that are taken from model.gguf, by the end of their names there: transformers or a former script made them
by other random numbers. "" = under output_."""


def keep(model: Any, name: str, golden: Path) -> None:
    """Put the parameters of KEPT into the model."""
    reader: Any = importlib.import_module("gguf").GGUFReader
    tensors = {tensor.name: tensor.data for tensor in reader(golden).tensors}
    for parameter, weight in model.named_parameters():
        layer, end = parameter.removeprefix("model.").removeprefix("layers.").split(".", 1)
        if layer == "norm":
            layer, end = "", f"norm.{end}"
        if end in KEPT.get(name, {}):
            source = f"blk.{layer}.{KEPT[name][end]}" if layer else f"output_{end}"
            weight.data = torch.from_numpy(np.array(tensors[source])).float()


GEMMA2 = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
}
"""The names of a golden that no script makes any more."""


def gemma2() -> Any:
    """The model of tests/data/arch/gemma2, out of its file. Its logits must be those that transformers had."""
    golden = DATA / "arch" / "gemma2"
    config = json.loads((golden / "meta.json").read_text())["config"]
    settings = make_goldens.transformers.AutoConfig.for_model(**config)
    model = make_goldens.transformers.AutoModelForCausalLM.from_config(settings, attn_implementation="eager").float()
    reader: Any = importlib.import_module("gguf").GGUFReader
    tensors = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader(golden / "model.gguf").tensors}
    for name, weight in model.named_parameters():
        short = name.removeprefix("model.").removesuffix(".weight")
        layer, _, end = short.removeprefix("layers.").partition(".")
        value = tensors[f"blk.{layer}.{GEMMA2[end]}.weight" if end else f"{GEMMA2[short]}.weight"]
        if "norm" in name:  # the number that gives the same one when 1 is added
            value, whole = value - np.float32(1), value
            assert np.array_equal(value + np.float32(1), whole), name
        weight.data = torch.from_numpy(value)
    logits = np.load(golden / "logits.npz")
    for length in LENGTHS:
        found = make_goldens.logits_of(model.eval(), logits[f"ids_{length}"])
        np.testing.assert_allclose(found, logits[f"logits_{length}"], rtol=0, atol=1e-5)
    return model


def save(model: Any, folder: Path) -> None:
    """save_pretrained, with matrices in float16 and vectors in float32, which hold all of these numbers."""
    model.save_pretrained(folder)
    safetensors: Any = importlib.import_module("safetensors.torch")
    path = folder / "model.safetensors"
    tensors = safetensors.load_file(path)
    for name, weight in list(tensors.items()):
        if "vision" in name and weight.numel() > 100:  # of the tower for images; some tensors are enough to be left out
            del tensors[name]
            continue
        half = weight.half()
        if not is_vector(name, weight) and torch.equal(half.float(), weight.float()):
            tensors[name] = half
    safetensors.save_file(tensors, path, metadata={"format": "pt"})


def encode(data: bytes, source: bytes) -> bytes:
    """`data` as pairs of 32-bit numbers, (bytes that follow, bytes to copy), (where from), and the bytes that follow.

    The numbers of the copies come first, behind their count; the other bytes lie behind them. All of it is packed.
    """
    places = {source[at : at + RUN]: at for at in range(0, len(source) - RUN + 1, 4)}
    copies: list[tuple[int, int, int]] = []
    other = bytearray()
    at = before = 0
    while at < len(data):
        start = places.get(data[at : at + RUN])
        if start is None:
            other += data[at : at + 4]
            before += len(data[at : at + 4])
            at += 4
            continue
        length = RUN
        while (
            at + length < len(data)
            and data[at + length : at + length + 4] == source[start + length : start + length + 4]
        ):
            length += min(4, len(data) - at - length)
        copies.append((before, start, length))
        at, before = at + length, 0
    table = np.array(copies, "<u4")
    return lzma.compress(np.uint32(len(table)).tobytes() + table.tobytes() + bytes(other))


def build(name: str, out: Path, whole: Path | None) -> None:
    golden = DATA / "arch" / name / "model.gguf"
    if name == "gemma2":
        family, model = Family("gemma2", {}), gemma2()
    else:
        family = FAMILIES[name]
        prompts = [np.random.default_rng(length).integers(0, VOCAB, length, np.int32) for length in LENGTHS]
        model = model_of(family, {})
        randomize(model, zlib.crc32(name.encode()), prompts[1])
        keep(model, name, golden)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, again = Path(scratch) / "hf", Path(scratch) / "model.gguf"
        save(model, checkpoint)
        save_tokenizer(checkpoint)
        if whole:
            shutil.copytree(checkpoint, whole / name, dirs_exist_ok=True)
        convert(checkpoint, again, "f32" if name == "gemma2" else "f16", family)
        compare(again, golden)
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        config = json.loads((checkpoint / "config.json").read_text("utf-8"))
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        packed = encode((checkpoint / "model.safetensors").read_bytes(), golden.read_bytes())
        (folder / "model.safetensors.xz").write_bytes(packed)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(checkpoint / file, out / file)


def repair_converter() -> None:
    """Its StableLM returns the norms of q and k from a generator, where they are lost."""
    stablelm: Any = importlib.import_module("conversion.stablelm").StableLMModel
    modify = stablelm.modify_tensors

    def whole(self: Any, *given: Any) -> Any:
        yield from (yield from modify(self, *given)) or ()

    stablelm.modify_tensors = whole


def compare(again: Path, golden: Path) -> None:
    reader: Any = importlib.import_module("gguf").GGUFReader
    new, old = ({t.name: t for t in reader(path).tensors} for path in (again, golden))
    wrong = [name for name in old if name not in new or not np.array_equal(old[name].data, new[name].data)]
    if wrong or len(new) != len(old):
        raise SystemExit(f"{golden}: made again it differs in {wrong}, {sorted(new.keys() ^ old.keys())}")


SIZES = (
    "intermediate_size intermediate_size_mlp vocab_size max_position_embeddings num_local_experts num_experts "
    "n_routed_experts num_experts_per_tok moe_num_experts moe_k moe_intermediate_size shared_expert_intermediate_size"
)
"""What every config.json says, as large as transformers' class has it."""
SMALL = {"hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4}
LEFT_OUT = ("id2label", "label2id", "initializer_range", "use_cache", "transformers_version", "problem_type")


def write_defaults(out: Path) -> None:
    """For each family a config.json of nothing but sizes, and what transformers' class makes of it."""
    families: Any = importlib.import_module("forge.checkpoints.families")
    of_kind = make_goldens.transformers.AutoConfig.for_model
    found = {}
    for kind in sorted(families.FAMILIES):
        usual, names = of_kind(kind).to_dict(), of_kind(kind).attribute_map
        sizes = {name: usual[name] for name in SIZES.split() if usual.get(name) is not None}
        sizes |= {name: value for name, value in SMALL.items() if name in usual or name in names}
        whole = {name: value for name, value in of_kind(kind, **sizes).to_dict().items() if name not in LEFT_OUT}
        found[kind] = [{"model_type": kind} | {names.get(name, name): value for name, value in sizes.items()}, whole]
    (out / "defaults.json").write_text(json.dumps(found, separators=(",", ":")) + "\n", "utf-8")


SHAPES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "n_embd n_layer n_head model_type tie_word_embeddings dtype architectures pad_token_id bos_token_id eos_token_id "
    "initializer_range use_cache"
)
"""Keys that say what tensors there are, or nothing of what a model computes."""


def others(value: Any) -> list[Any]:
    """Values that a key could have instead of this one."""
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, max(value - 1, 0)] if value else [1]
        case float():
            return [value * 1.5 + 0.1]
        case str():
            return ["relu" if value == "gelu" else "gelu"]
        case None:
            return [True, 8, 0.5]
    return []


def changes(config: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Each key of a configuration by its path, with other values."""
    found = []
    for name, value in config.items():
        if isinstance(value, dict):
            found += changes(value, (*path, name))
        elif name not in SHAPES.split():
            found += [((*path, name), other) for other in others(value)]
    return found


def write_changes(out: Path) -> None:
    """For each model the changes of its configuration, as path and value, that change transformers' logits."""
    ids = np.random.default_rng(24).integers(0, VOCAB, 40, np.int32)
    found: dict[str, list[Any]] = {}
    for name, family in FAMILIES.items():
        model = model_of(family, {})
        randomize(model, 1, ids)
        state, expected = model.state_dict(), make_goldens.logits_of(model, ids)
        config = model.config.to_dict()
        for path, value in changes(config.get("text_config", config)):
            patch: Any = value
            for key in reversed(path):
                patch = {key: patch}
            try:  # many values are none that transformers takes, or other shapes
                other = model_of(family, patch)
                other.load_state_dict(state)
                difference = np.abs(make_goldens.logits_of(other, ids) - expected).max()
            except Exception:
                continue
            made = other.config.to_dict()
            is_alone = made.get("text_config", made) == merged(config.get("text_config", config), patch)
            if is_alone and not difference < 1e-3:
                found.setdefault(name, []).append([list(path), value])
    (out / "changes.json").write_text(json.dumps(found, separators=(",", ":")) + "\n", "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--llama-cpp", type=Path, required=True, help="llama.cpp's source tree")
    parser.add_argument("--out", type=Path, default=DATA / "hf")
    parser.add_argument("--whole", type=Path, help="a folder for the directories as they are")
    parser.add_argument("names", nargs="*", help=f"families, all by default: {' '.join(FAMILIES)}")
    args = parser.parse_args()
    sys.path.insert(0, str(args.llama_cpp))
    torch.set_num_threads(2)
    logging.disable(logging.WARNING)
    repair_converter()
    make_goldens.transformers.utils.logging.disable_progress_bar()
    for name in args.names or [*FAMILIES, "gemma2"]:
        build(name, args.out, args.whole)
        print(name, (args.out / name / "model.safetensors.xz").stat().st_size)
    write_defaults(args.out)
    write_changes(args.out)


if __name__ == "__main__":
    main()
