"""What transformers' modules compute within the golden checkpoints of tests/data/arch, for the tests of hooks.

Each family's folder gets activations.npz: by the names of forge's points, float32 values at POSITIONS of the prompt
ids_24, (2, ...), and (H, 2, T) of attention weights. The models are those of make_goldens.py, made again from their
seeds; that they are the same is checked by their logits. Modules are found by their names, so that not every point of
every family is there.
Needs torch and transformers; downloads nothing.
    python scripts/make_activation_goldens.py [NAME ...]
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from make_goldens import FAMILIES, LENGTHS, VOCAB, final_norm, logits_of, model_of, randomize, torch

ARCH = Path(__file__).parent.parent / "tests" / "data" / "arch"
POSITIONS = [11, 23]
OUTPUT_PRODUCTS = ("o_proj", "dense", "out_proj", "c_proj")
DOWN_PRODUCTS = ("down_proj", "fc2", "dense_4h_to_h", "c_proj")
UP_PRODUCTS = ("gate_proj", "fc1", "dense_h_to_4h", "c_fc")


def main() -> None:
    torch.set_num_threads(2)
    for name in sys.argv[1:] or FAMILIES:
        folder = ARCH / name
        golden = np.load(folder / "logits.npz")
        family = FAMILIES[name]
        model = model_of(family, {})
        prompts = [np.random.default_rng(length).integers(0, VOCAB, length, np.int32) for length in LENGTHS]
        randomize(model, zlib.crc32(name.encode()), prompts[1])
        off = float(np.abs(logits_of(model, prompts[0]) - golden["logits_24"]).max())
        if off > 1e-4:
            print(f"{name}: NOT the model of the golden: its logits are off by {off:.1e}")
            continue
        found = recorded(model, prompts[0])
        np.savez_compressed(folder / "activations.npz", **found)
        kinds = sorted({key.split(".", 2)[-1] for key in found})
        print(f"{name}: {len(found)} values, {(folder / 'activations.npz').stat().st_size} bytes: {' '.join(kinds)}")


def recorded(model: Any, ids: Any) -> dict[str, Any]:
    """Values of one pass, by the points that they belong to."""
    found: dict[str, Any] = {}

    def keep(name: str, value: Any) -> None:
        value = value.detach().float().numpy()
        value = value[0] if value.ndim > 2 and len(value) == 1 else value  # the batch
        if len(value) == len(ids):
            found[name] = value[POSITIONS]

    def before(name: str) -> Callable[..., None]:
        return lambda module, args, kwargs: keep(name, args[0] if args else kwargs["hidden_states"])

    def behind(name: str) -> Callable[..., None]:
        return lambda module, args, output: keep(name, output[0] if isinstance(output, tuple) else output)

    layers = next(
        module
        for key, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList)
        and len(module) == model.config.get_text_config().num_hidden_layers
        and "vision" not in key
        and any("attn" in child or "attention" in child for child, _ in module[0].named_children())
    )
    for number, layer in enumerate(layers):
        prefix = f"blk.{number}"
        layer.register_forward_pre_hook(before(f"{prefix}.resid_pre"), with_kwargs=True)
        layer.register_forward_hook(behind(f"{prefix}.resid_post"))
        for child, module in layer.named_children():
            if "norm" in child or "dropout" in child:
                continue
            if "attn" in child or "attention" in child:
                module.register_forward_pre_hook(before(f"{prefix}.attn.in"), with_kwargs=True)
                own = dict(module.named_children())
                for product in OUTPUT_PRODUCTS:
                    if product in own:
                        own[product].register_forward_pre_hook(before(f"{prefix}.attn.heads"), with_kwargs=True)
            elif child in ("mlp", "feed_forward", "block_sparse_moe"):
                module.register_forward_pre_hook(before(f"{prefix}.ffn.in"), with_kwargs=True)
                own = dict(module.named_children())
                for product in DOWN_PRODUCTS:
                    if product in own:
                        own[product].register_forward_pre_hook(before(f"{prefix}.ffn.act"), with_kwargs=True)
                for product in UP_PRODUCTS:
                    if product in own:
                        own[product].register_forward_hook(behind(f"{prefix}.ffn.gate"))
                if "gate_proj" in own and "up_proj" in own:
                    own["up_proj"].register_forward_hook(behind(f"{prefix}.ffn.up"))
                elif "up_proj" in own and "gate_proj" not in own:
                    own["up_proj"].register_forward_hook(behind(f"{prefix}.ffn.gate"))
    final_norm(model).register_forward_hook(behind("final_norm"))
    modeling: Any = sys.modules[type(model).__module__]
    eager: Any = getattr(modeling, "eager_attention_forward", None)

    def attending(module: Any, query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, query, key, value, *args, **kwargs)
        prefix = f"blk.{module.layer_idx}.attn"
        for name, heads in (("q", query), ("k", key), ("v", value)):
            found[f"{prefix}.{name}"] = heads[0].transpose(0, 1).numpy()[POSITIONS]
        found[f"{prefix}.pattern"] = weights[0].numpy()[:, POSITIONS, : len(ids)]
        return output, weights

    if eager:
        modeling.eager_attention_forward = attending
    try:
        with torch.no_grad():
            model(torch.tensor(ids[None].astype(np.int64)), use_cache=False)
    finally:
        if eager:
            modeling.eager_attention_forward = eager
    return {name: np.asarray(value, np.float32) for name, value in found.items()}


if __name__ == "__main__":
    main()
