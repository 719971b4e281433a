"""Write tests/data/samplers/llama_cpp.json: what llama.cpp's DRY and XTC samplers leave of logits.

Needs llama-cpp-python: /path/to/venv/bin/python scripts/make_sampler_goldens.py
"""

from __future__ import annotations

import ctypes
import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np

llama_cpp: Any = importlib.import_module("llama_cpp")
DATA = Path(__file__).parents[1] / "tests" / "data"
MODEL = DATA / "arch" / "llama" / "model.gguf"
BREAKERS = ("\n", ":", '"', "*")


def left(sampler: Any, logits: list[float], ids: list[int]) -> dict[int, float]:
    """The logit of each token that a sampler leaves, behind some ids."""
    for token in ids:
        llama_cpp.llama_sampler_accept(sampler, token)
    array = (llama_cpp.llama_token_data * len(logits))(
        *(llama_cpp.llama_token_data(id=token, logit=logit, p=0.0) for token, logit in enumerate(logits))
    )
    candidates = llama_cpp.llama_token_data_array(data=array, size=len(logits), selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(sampler, ctypes.byref(candidates))
    llama_cpp.llama_sampler_free(sampler)
    return {candidates.data[i].id: candidates.data[i].logit for i in range(candidates.size)}


def repeating(rng: np.random.Generator, vocabulary: list[int], length: int) -> list[int]:
    """Ids in which pieces of earlier ones come again, also at the end."""
    ids = rng.choice(vocabulary, 6).tolist()
    while len(ids) < length:
        start = int(rng.integers(0, len(ids)))
        ids += ids[start : start + int(rng.integers(1, 12))] + rng.choice(vocabulary, int(rng.integers(0, 2))).tolist()
    start = int(rng.integers(0, len(ids) - 6))
    return [*ids, *ids[start : start + int(rng.integers(1, 7))]]


def piece(vocab: Any, token: int) -> str:
    buffer = ctypes.create_string_buffer(64)
    length = llama_cpp.llama_token_to_piece(vocab, token, buffer, 64, 0, True)
    return buffer.raw[: max(length, 0)].decode(errors="replace")


def main() -> None:
    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(MODEL).encode(), params)
    vocab = llama_cpp.llama_model_get_vocab(model)
    size = llama_cpp.llama_vocab_n_tokens(vocab)
    rng = np.random.default_rng(5)
    dry, xtc = [], []
    for number in range(12):
        settings: dict[str, Any] = {
            "multiplier": [0.8, 1.5][number % 2],
            "base": [1.75, 1.0, 3.0][number % 3],
            "allowed_length": 1 + number % 4,
            "last_n": None if number % 3 else 40,
            "breakers": [] if number % 4 == 0 else list(BREAKERS),
        }
        few = rng.choice(size, 8 if number % 2 else 3, replace=False).tolist()
        few += [token for token in range(size) if piece(vocab, token) in BREAKERS][: number % 3]
        ids = repeating(rng, few, 60) if number < 11 else [7] * 250  # a penalty as large as floats are
        texts = (ctypes.c_char_p * len(settings["breakers"]))(*(text.encode() for text in settings["breakers"]))
        last_n = settings["last_n"] or 512  # of which there are fewer
        numbers = settings["multiplier"], settings["base"], settings["allowed_length"], last_n
        sampler = llama_cpp.llama_sampler_init_dry(vocab, *numbers, texts, len(texts))
        found = left(sampler, [0.0] * size, ids)
        changed = {str(token): -logit for token, logit in sorted(found.items()) if logit}
        dry.append({**settings, "ids": ids, "penalties": changed})
    for number in range(10):
        logits = np.round(rng.normal(0, [1.0, 2.5][number % 2], 40), 3).astype(np.float32)
        threshold = [0.1, 0.05, 0.2, 0.02, 0.5][number % 5]
        sampler = llama_cpp.llama_sampler_init_xtc(1.0, threshold, 1, 0)
        kept = left(sampler, logits.tolist(), [])
        xtc.append({"threshold": threshold, "logits": logits.tolist(), "kept": sorted(kept)})
    target = DATA / "samplers" / "llama_cpp.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps({"version": llama_cpp.__version__, "dry": dry, "xtc": xtc}, indent=None) + "\n")


main()
