"""Build tests/data/onnx/directories: the directories of tests/data/hf as optimum exports them, NAME.onnx.xz.

A file is packed as copies out of `hf_models.floats_of`, the directory's own weights in float32 as they lie and
transposed, and other bytes, so that the same weights do not lie here twice. `hf_models.decode` gives back every byte.
Downloads nothing. Needs optimum-onnx 0.1, which needs transformers 4, and exports the families of NAMES alone.
    python scripts/make_onnx_exports.py [NAME ...]
"""

from __future__ import annotations

import importlib
import json
import lzma
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "tests")]
hf_models: Any = importlib.import_module("hf_models")
# No dependencies of forge, so without types in its development environment.
onnx: Any = importlib.import_module("onnx")
exporters: Any = importlib.import_module("optimum.exporters.onnx")

OUT = ROOT / "tests/data/onnx/directories"
NAMES = (
    *("cohere", "falcon", "gemma", "gemma2", "gemma3", "gpt2", "gptneox", "granite", "llama_bias_tied", "mistral"),
    *("olmo", "olmo2", "phi2", "phi3_window", "qwen2_yarn", "qwen3", "qwen3moe", "smollm3", "stablelm"),
)
OLDER = {"partial_rotary_factor": "rotary_pct", "num_local_experts": "num_experts"}
"""Keys of config.json whose numbers some families had under another name."""


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or NAMES:
        with tempfile.TemporaryDirectory() as scratch:
            directory = hf_models.unpacked(name, Path(scratch) / "model")
            path = export(directory, Path(scratch) / "onnx")
            source = hf_models.floats_of(directory)
            packed = encode(path, source)
            assert hf_models.decode(packed, source) == path.read_bytes()
        (OUT / f"{name}.onnx.xz").write_bytes(packed)
        print(f"{name}: {len(packed):,} bytes", flush=True)


def export(directory: Path, out: Path) -> Path:
    """optimum's export of a directory, whose config.json becomes that of transformers 4."""
    config = hf_models.older(json.loads((directory / "config.json").read_text("utf-8")))
    config |= {old: config[key] for key, old in OLDER.items() if key in config}
    (directory / "config.json").write_text(json.dumps(config))
    exporters.main_export(
        str(directory), out, task="text-generation", do_validation=False, no_post_process=False, dtype="fp32"
    )
    return out / "model.onnx"


def encode(path: Path, source: bytes) -> bytes:
    """The file as what `hf_models.decode` reads: its initializers copied where `source` has their bytes."""
    data = path.read_bytes()
    copies, other, at = [], bytearray(), 0
    places = []
    for tensor in onnx.load(str(path)).graph.initializer:
        start = source.find(tensor.raw_data) if len(tensor.raw_data) >= hf_models.RUN else -1
        if start >= 0:
            places.append((data.index(tensor.raw_data), start, len(tensor.raw_data)))
    for place, start, length in sorted(places):
        copies.append((place - at, start, length))
        other += data[at:place]
        at = place + length
    table = np.array(copies, "<u4")
    return lzma.compress(np.uint32(len(table)).tobytes() + table.tobytes() + bytes(other) + data[at:])


if __name__ == "__main__":
    main()
