"""Loading a Hugging Face directory in BF16: its rate beside that of reading the files alone, and the memory it takes.

python benchmarks/load_directory.py FOLDER [--layers 32] [--device auto] [--quantize Q8_0]

FOLDER is written if it is not there: shards of the shapes of Llama 3.1 8B, random weights, a tokenizer of bytes.
Each rate is measured with the files out of the page cache ("cold") and in it ("warm"). Peak memory is what the process
takes at most while it loads, less what it took before, device and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, FFN, VOCAB, HEADS, KV_HEADS, HEAD_DIM = 4096, 14_336, 128_256, 32, 8, 128
_PIECE = 16 << 20
_THREADS = 8
_SHARDS = 4
_CHILD = """
import sys, time, forge
from forge import backend
def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
folder, device, quantize = sys.argv[1:]
forge.load(sys.argv[1] + "/one", device=device, context=64, max_sequences=1, progress=False).close()
before, start = memory("VmRSS"), time.perf_counter()
open("/proc/self/clear_refs", "w").write("5")
with forge.load(folder, device=device, context=1024, max_sequences=1, progress=False, quantize=quantize or None) as llm:
    seconds = time.perf_counter() - start
    parts = ", ".join(f"{name} {ms / 1000:.2f}" for name, ms in llm.load_parts.items())
    print(f"{llm.device}: {seconds:.2f} s ({parts})")
    print(f"peak {(memory('VmHWM') - before) / 1e9:.2f} GB, at the end {(memory('VmRSS') - before) / 1e9:.2f} GB")
    print(seconds)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantize", default="")
    arguments = parser.parse_args()
    folder = arguments.folder
    if not folder.exists():
        write(folder / "one", 1, shards=1)  # loaded before: kernels are compiled then
        write(folder, arguments.layers, shards=_SHARDS)
    files = sorted(folder.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    print(f"{size / 1e9:.2f} GB in {len(files)} files")
    for state in ("cold", "warm"):
        drop(files, state == "cold")
        alone = read_all(files)
        drop(files, state == "cold")
        command = [sys.executable, "-c", _CHILD, str(folder), arguments.device, arguments.quantize]
        *lines, seconds = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
        print(f"{state}: files alone {size / alone / 1e9:.2f} GB/s, load {size / float(seconds) / 1e9:.2f} GB/s")
        print(*(f"  {line}" for line in lines), sep="\n")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in range(layers):
        parts = {
            "input_layernorm": (WIDTH,),
            "self_attn.q_proj": (HEADS * HEAD_DIM, WIDTH),
            "self_attn.k_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.v_proj": (KV_HEADS * HEAD_DIM, WIDTH),
            "self_attn.o_proj": (WIDTH, HEADS * HEAD_DIM),
            "post_attention_layernorm": (WIDTH,),
            "mlp.gate_proj": (FFN, WIDTH),
            "mlp.up_proj": (FFN, WIDTH),
            "mlp.down_proj": (WIDTH, FFN),
        }
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return found | {"model.norm.weight": (WIDTH,), "lm_head.weight": (VOCAB, WIDTH)}


def write(folder: Path, layers: int, *, shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": "llama", "hidden_size": WIDTH, "intermediate_size": FFN, "vocab_size": VOCAB}
    config |= {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    config |= {"num_hidden_layers": layers, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 5e5}
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    values = np.random.default_rng(0).normal(0, 0.02, 1 << 24).astype(np.float32)
    data = memoryview((values.view(np.uint32) >> 16).astype("<u2").view(np.uint8))  # type: ignore[arg-type]
    tensors = list(shapes(layers).items())
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        part = tensors[len(tensors) * shard // shards : len(tensors) * (shard + 1) // shards]
        path = folder / (f"model-{shard + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors")
        weight_map |= dict.fromkeys((name for name, _ in part), path.name)
        write_shard(path, part, data)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def byte_tokenizer() -> dict[str, Any]:
    """A tokenizer.json of GPT-2's letters for bytes, without merges."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [256 + place for place in range(256 - len(plain))]
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": {chr(letter): i for i, letter in enumerate(plain + others)}, "merges": []}
    return {"version": "1.0", "pre_tokenizer": split, "decoder": split, "model": model}


def write_shard(path: Path, tensors: list[tuple[str, tuple[int, ...]]], data: memoryview) -> None:
    header, end = {}, 0
    for name, shape in tensors:
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for left in range(end, 0, -len(data)):
            file.write(data[: min(left, len(data))])
        file.flush()
        os.fsync(file.fileno())


def drop(files: list[Path], is_cold: bool) -> None:
    """Let the page cache forget files."""
    for path in files if is_cold else ():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(files: list[Path]) -> float:
    """Seconds to read all bytes of files into memory that is used again."""
    pieces = [(path, start) for path in files for start in range(0, path.stat().st_size, _PIECE)]
    buffers = [bytearray(_PIECE) for _ in range(_THREADS)]

    def read(worker: int) -> None:
        for path, start in pieces[worker::_THREADS]:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                file.readinto(buffers[worker])

    start = time.perf_counter()
    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(read, range(_THREADS)))
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
