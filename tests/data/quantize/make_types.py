"""The types that llama.cpp's quantizer chooses: make_types.py, with llama-cpp-python 0.3.36 and the gguf package.

types.json: by source and mixture, for each part of a model its type; of layers that differ the layers of each type.
Sources are models of tests/data/arch, and those of SHAPES: llama with so many layers, experts and a width.
"""

import ctypes
import json
import re
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

HERE = Path(__file__).parent
FILE_TYPES = {"Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "MXFP4": 38}
SHAPES = {
    "17": (17, 0, 256),
    "80": (80, 0, 256),
    "8 experts": (9, 8, 256),
    "16 experts": (9, 16, 256),
    "96": (9, 0, 96),
}
WANTED = {
    "17": "Q4_K_M Q5_K_M Q4_0 Q6_K Q8_0",
    "80": "Q4_K_M",
    "8 experts": "Q4_K_M Q5_K_M Q4_0",
    "16 experts": "Q4_K_M MXFP4",
    "96": "Q4_K_M Q5_K_M Q6_K",
    "arch/falcon": "Q4_K_M",
    "arch/gemma4_e2b": "Q4_K_M Q8_0",
    "arch/qwen2moe": "Q4_K_M",
    "arch/phi3": "Q5_K_M",
    "arch/gpt_oss": "MXFP4",
    "arch/gpt2": "Q4_K_M",
}


def shapes_of(layers: int, experts: int, width: int) -> dict[str, tuple[int, ...]]:
    """The matrices of a source of SHAPES."""
    found: dict[str, tuple[int, ...]] = {"token_embd": (32, width), "output": (32, width)}
    more, suffix = ((experts,), "_exps") if experts else ((), "")
    for layer in range(layers):
        parts = {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width)}
        parts["attn_output"] = (width, width)
        parts |= {f"ffn_{name}{suffix}": (*more, 256, width) for name in ("gate", "up")}
        parts[f"ffn_down{suffix}"] = (*more, width, 256)
        found |= {f"blk.{layer}.{part}": shape for part, shape in parts.items()}
    return {f"{name}.weight": shape for name, shape in found.items()}


def write(path: Path, layers: int, experts: int, width: int) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(256)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([chr(65 + i) for i in range(32)])
    writer.add_token_types([1] * 32)
    writer.add_token_merges(["A B"])
    for name, shape in shapes_of(layers, experts, width).items():
        writer.add_tensor(name, np.full(shape, 0.5, np.float16))
    writer.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(width, np.float32))
        if experts:
            writer.add_tensor(f"blk.{layer}.ffn_gate_inp.weight", np.ones((experts, width), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def types_of(source: Path, out: Path, mixture: str) -> dict[str, object]:
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = FILE_TYPES[mixture]
    assert llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(settings)) == 0
    found: dict[str, dict[str, list[int]]] = {}
    for tensor in gguf.GGUFReader(out).tensors:
        part = re.sub(r"^blk\.(\d+)\.", "", tensor.name)
        layer = int(tensor.name.split(".")[1]) if part != tensor.name else -1
        found.setdefault(part, {}).setdefault(tensor.tensor_type.name, []).append(layer)
    return {part: next(iter(types)) if len(types) == 1 else types for part, types in found.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        types = {}
        for source, mixtures in WANTED.items():
            path = HERE.parent / source / "model.gguf"
            if source in SHAPES:
                write(path := Path(scratch, "model.gguf"), *SHAPES[source])
            types |= {f"{source}: {each}": types_of(path, Path(scratch, "out.gguf"), each) for each in mixtures.split()}
    (HERE / "types.json").write_text(json.dumps(types, indent=0).replace("\n", "").replace('}, "', '},\n"') + "\n")
