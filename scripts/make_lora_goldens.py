"""Build tests/data/lora: adapters of the tiny models of tests/data/arch, as PEFT saves them, and its logits with them.

Each case becomes a folder with adapter_config.json and adapter_model.safetensors, random numbers in float32, and
logits.npz: ids, and float32 logits (T, V) of the model with the adapter merged into its weights, which are those with
the adapter beside them, too. The model's own logits must be those of tests/data/arch. With --llama-cpp, adapter.gguf of
some is what llama.cpp's convert_lora_to_gguf.py makes of it: not of GPT-2, of whose matrices it turns the pairs.
Needs torch, transformers and peft; downloads nothing.
    python scripts/make_lora_goldens.py [--llama-cpp ~/llama.cpp] [NAME ...]
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
DATA = ROOT / "tests" / "data"
sys.path += [str(ROOT), str(ROOT / "tests")]

# No dependencies of forge, so without types in its development environment.
torch: Any = importlib.import_module("torch")
transformers: Any = importlib.import_module("transformers")
peft: Any = importlib.import_module("peft")
hf_models: Any = importlib.import_module("hf_models")

MLP = ["gate_proj", "up_proj", "down_proj"]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@dataclass(frozen=True)
class Case:
    """base: A model of tests/data/arch. settings: Of LoraConfig. size: Of B, so that logits change and stay sane."""

    base: str
    settings: Mapping[str, Any]
    size: float = 1.0


CASES = {
    "llama_attention": Case("llama", {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION}),
    "llama_all": Case(
        "llama",
        {
            "r": 8,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": [*ATTENTION, *MLP],
            "alpha_pattern": {"layers.1.self_attn.v_proj": 4, "down_proj": 24},
            "rank_pattern": {"mlp.up_proj": 5, "^model.layers.0.self_attn.k_proj": 3},
        },
        0.4,
    ),
    "qwen2_some": Case(
        "qwen2", {"r": 6, "lora_alpha": 3, "target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]}
    ),
    "mistral_qv": Case("mistral", {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}),
    "phi3": Case(
        "phi3_window", {"r": 4, "lora_alpha": 8, "target_modules": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]}
    ),
    "gemma2": Case("gemma2", {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}),
    "gpt2": Case(
        "gpt2", {"r": 4, "lora_alpha": 8, "target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    ),
    "falcon": Case(
        "falcon_40b",
        {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]},
    ),
    "gptneox": Case("gptneox", {"r": 4, "lora_alpha": 8, "target_modules": ["query_key_value", "dense"]}),
}
CONVERTED = ("mistral_qv", "phi3", "falcon", "gptneox")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama-cpp", type=Path)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    for name in arguments.names or CASES:
        make(name, CASES[name])
        if arguments.llama_cpp and name in CONVERTED:
            convert(name, CASES[name], arguments.llama_cpp)


def make(name: str, case: Case) -> None:
    golden = np.load(DATA / "arch" / case.base / "logits.npz")
    ids, own = golden["ids_24"], golden["logits_24"]
    model = base_of(case.base)
    off = np.abs(logits_of(model, ids) - own).max()
    assert off < 2e-4, f"{name}: the base model's logits are off by {off}"
    torch.manual_seed(len(name))
    config = peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **case.settings)
    adapted = peft.get_peft_model(model, config).eval()
    for parameter, numbers in adapted.named_parameters():
        if "lora_B" in parameter:
            numbers.data *= case.size
    out = DATA / "lora" / name
    adapted.save_pretrained(out, safe_serialization=True)
    (out / "README.md").unlink(missing_ok=True)
    saved = json.loads((out / "adapter_config.json").read_text())
    saved["base_model_name_or_path"] = case.base
    (out / "adapter_config.json").write_text(json.dumps(saved, indent=1, sort_keys=True) + "\n")
    beside = logits_of(adapted, ids)
    merged = logits_of(adapted.merge_and_unload(), ids)
    change, differ = np.abs(merged - own).max(), np.abs(merged - beside).max()
    assert differ < 1e-4 < 0.3 < change, (name, differ, change)
    np.savez_compressed(out / "logits.npz", ids=ids, logits=merged)
    size = sum(path.stat().st_size for path in out.iterdir())
    print(
        f"{name}: base off by {off:.1e}, changes logits by {change:.2f}, merged differs by {differ:.1e}, {size} bytes"
    )


def convert(name: str, case: Case, llama_cpp: Path) -> None:
    out = DATA / "lora" / name
    with tempfile.TemporaryDirectory() as folder:
        model = hf_models.unpacked(case.base, Path(folder))
        script, to = llama_cpp / "convert_lora_to_gguf.py", out / "adapter.gguf"
        subprocess.run([sys.executable, script, "--base", model, "--outfile", to, out], check=True)


def base_of(name: str) -> Any:
    """The model in float32, from its directory, or where there is none from its GGUF file."""
    loaded = transformers.AutoModelForCausalLM
    if name not in hf_models.NAMES:
        return loaded.from_pretrained(DATA / "arch" / name, gguf_file="model.gguf", dtype=torch.float32).eval()
    with tempfile.TemporaryDirectory() as folder:
        directory = hf_models.unpacked(name, Path(folder))
        config = json.loads((directory / "config.json").read_text())
        rope = config.pop("rope_parameters", None) or {}  # transformers 5's; 4 has the numbers outside of it
        config |= {key: value for key, value in rope.items() if key in ("rope_theta", "partial_rotary_factor")}
        if "partial_rotary_factor" in rope:
            config["rotary_pct"] = rope["partial_rotary_factor"]
        (directory / "config.json").write_text(json.dumps(config))
        return loaded.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model: Any, ids: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(torch.tensor(ids)[None]).logits[0].numpy()
    return found


if __name__ == "__main__":
    main()
