"""Build tests/data/int4: tiny models with matrices of GPTQ, AWQ and compressed-tensors, and transformers' logits.

Matrices of a random model are rounded to 4 bits, and transformers computes with scale * (code - zero). What is packed
follows the loops of AutoGPTQ's `qlinear_cuda.py`, AutoAWQ's `gemm.py` and compressed-tensors' `pack_quantized.py`,
nibble by nibble. Each model becomes a folder with config.json, model.safetensors and logits.npz: ids, and float32
logits (T, V) at every position. The tokenizer is that of tests/data/hf. Needs torch, transformers and safetensors.
    python scripts/make_int4_goldens.py [--out tests/data/int4]
"""

from __future__ import annotations

import argparse
import importlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# No dependencies of forge, so without types in its development environment.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")
save_file: Any = importlib.import_module("safetensors.numpy").save_file

SIZES: dict[str, Any] = {
    "vocab_size": 272, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
TOKENS = 48
GPTQ = {"quant_method": "gptq", "bits": 4, "desc_act": False, "sym": False, "damp_percent": 0.01}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {  # class, quantization_config
    "llama_gptq": ("Llama", {**GPTQ, "group_size": 128}),
    "qwen2_gptq_v2": ("Qwen2", {**GPTQ, "group_size": 32, "checkpoint_format": "gptq_v2", "lm_head": True}),
    "qwen2_awq": (
        "Qwen2",
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    ),
    "llama_compressed": (
        "Llama",
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
            "ignore": ["lm_head"],
        },
    ),
}
"""Groups of 128 with zeros of GPTQ's first version and biases of zeros; of 32, with a quantized output; AWQ's with
biases; one of each row around 8, with scales in BF16."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "tests" / "data" / "int4")
    out = parser.parse_args().out
    for name, (kind, quantization) in MODELS.items():
        make(out / name, kind, quantization)


def make(folder: Path, kind: str, quantization: dict[str, Any]) -> None:
    is_tied = not quantization.get("lm_head")
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "tie_word_embeddings": is_tied})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).float().eval()
    generator = torch.Generator().manual_seed(zlib.crc32(folder.name.encode()))
    tensors: dict[str, NDArray[Any]] = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            base, _, end = name.rpartition(".")
            if weight.ndim == 1:
                weight.copy_((0.3 * noise + (end == "weight")).half().float())
            elif "embed_tokens" in name:
                weight.copy_(noise.half().float())
            else:
                packed, values = quantized((noise * 1.5 * weight.shape[1] ** -0.5).numpy(), quantization)
                weight.copy_(torch.from_numpy(values))
                tensors |= {f"{base}.{part}": array for part, array in packed.items()}
                if quantization["quant_method"] == "gptq" and f"{base}.bias" not in model.state_dict():
                    tensors[f"{base}.bias"] = np.zeros(len(values), np.float16)
                continue
            tensors[name] = weight.half().numpy()
        ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS), generator=generator)
        logits = {"ids": ids[0].numpy().astype(np.int32), "logits": model(ids).logits[0].float().numpy()}
    tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}  # as safetensors takes them
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.to_diff_dict() | {"architectures": [f"{kind}ForCausalLM"], "quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    bits = {name: array for name, array in tensors.items() if array.dtype == np.uint16}
    if bits:  # NumPy has no BF16
        of_torch = importlib.import_module("safetensors.torch").save_file
        floats = {name: torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) for name, array in bits.items()}
        of_torch(
            {name: floats.get(name, torch.from_numpy(array)) for name, array in tensors.items()},
            folder / "model.safetensors",
        )
    else:
        save_file(tensors, folder / "model.safetensors")
    np.savez_compressed(folder / "logits.npz", **logits)
    print(folder.name, sum(path.stat().st_size for path in folder.iterdir()))


def quantized(
    weights: NDArray[np.float32], quantization: dict[str, Any]
) -> tuple[dict[str, NDArray[Any]], NDArray[np.float32]]:
    """The arrays of a matrix (N, K), and scale * (code - zero)."""
    rows, cols = weights.shape
    group = int(quantization.get("group_size") or cols)
    method, parts = quantization["quant_method"], weights.reshape(rows, -1, group)
    if method == "compressed-tensors":
        scales = bf16(np.abs(parts).max(axis=2) / 7.5)
        zeros = np.full(scales.shape, 8)
    else:
        low, high = np.minimum(parts.min(axis=2), 0), np.maximum(parts.max(axis=2), 0)
        scales = ((high - low) / 15).astype(np.float16).astype(np.float32)
        zeros = np.clip(np.round(-low / scales), 1, 15).astype(np.int64)
    codes = np.clip(np.round(parts / scales[..., None]) + zeros[..., None], 0, 15).astype(np.int64)
    values = (scales.astype(np.float64)[..., None] * (codes - zeros[..., None])).reshape(rows, cols)
    codes = codes.reshape(rows, cols)
    exact = values.astype(np.float32)
    assert (exact == values).all()
    if method == "compressed-tensors":
        bits = (scales.view(np.uint32) >> 16).astype(np.uint16)
        shape = np.array([rows, cols], np.int64)
        return {"weight_packed": words(codes.T).T.copy(), "weight_scale": bits, "weight_shape": shape}, exact
    if method == "awq":
        order = [0, 2, 4, 6, 1, 3, 5, 7]
        packed = words(codes, order).T.copy(), words(zeros, order).T.copy()
        return {"qweight": packed[0], "qzeros": packed[1], "scales": scales.T.astype(np.float16)}, exact
    stored = zeros if quantization.get("checkpoint_format") == "gptq_v2" else zeros - 1
    groups = (np.arange(cols) // group).astype(np.int32)
    packed = words(codes.T.copy()), words(stored).T.copy()
    return {"qweight": packed[0], "qzeros": packed[1], "scales": scales.T.astype(np.float16), "g_idx": groups}, exact


def words(codes: NDArray[np.int64], order: list[int] | None = None) -> NDArray[np.int32]:
    """Eight rows become one of words: nibble i of a word is the row order[i]."""
    packed = np.zeros((len(codes) // 8, codes.shape[1]), np.uint32)
    for word in range(len(packed)):
        for nibble in range(8):
            row = 8 * word + (order[nibble] if order else nibble)
            packed[word] |= codes[row].astype(np.uint32) << np.uint32(4 * nibble)
    return packed.view(np.int32)


def bf16(numbers: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest numbers towards zero."""
    return (numbers.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


if __name__ == "__main__":
    main()
