"""The numbers of a model that onnxruntime-genai's builder wrote, in the words of a Hugging Face config.json.

genai_config.json has sizes alone. What else a plain family computes with is in the graph: the epsilon of its norms, the
scale and the window of its attention, and, as tables of cosines and sines, the base of the rotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.checkpoints.extras import llama3_divisors
from forge.checkpoints.onnx_parameters import Constants, shown
from forge.checkpoints.views import TYPES
from forge.errors import FormatError, UnsupportedError
from forge.formats.ggml import dequantize
from forge.formats.onnx import Node
from forge.formats.source import show
from forge.formats.strict_json import Json, show_json

FILE = "genai_config.json"
_FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
"""Types whose graphs say all that genai_config.json does not; config.json calls them the same."""
_HINT = "put the config.json of the model that it was made from beside it"
_SIZES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "head_size": "head_dim",
}
_NORMS = ("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RMSNormalization")
_LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_LLAMA3_NUMBERS = ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_LLAMA3_FACTORS = (8.0, 32.0)
"""The scalings of the rotation that are recognized, those of Llama 3.1 to 3.3."""
_MAX_POSITIONS = 4096
"""Rows of the tables that are looked at."""
_TOLERANCE = 3e-3


def config_of(genai: Mapping[str, Json], path: Path, constants: Constants, feed_forward: int) -> dict[str, Any]:
    """A config.json for a genai_config.json at `path`. feed_forward: The width of the feed-forwards.

    Raises FormatError for numbers that are missing, UnsupportedError for a family, an attention or a rotation that only
    config.json would describe.
    """
    model = _object(genai.get("model"), "model", path)
    decoder = _object(model.get("decoder"), "model.decoder", path)
    kind = model.get("type")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise UnsupportedError(f"{path}: a model of type {show_json(kind)} needs more than this file says: {_HINT}")
    config: dict[str, Any] = {new: decoder.get(key) for key, new in _SIZES.items()}
    config |= {key: model.get(key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    context = model.get("context_length")
    config |= {"max_position_embeddings": context, "original_max_position_embeddings": context}
    config |= {"intermediate_size": feed_forward}
    config |= {"model_type": kind, "tie_word_embeddings": False}
    if type(config["head_dim"]) is not int or not 2 <= config["head_dim"] <= 1024:
        raise FormatError(
            f"{path}: model.decoder.head_size should be a whole number to 1024, not {show_json(config['head_dim'])}"
        )
    config["rms_norm_eps"] = _one(_attributes(constants, _NORMS, "epsilon", 1e-5), "epsilon of the norms", constants)
    config |= _attention(constants, config["head_dim"])
    return config | _rotation(constants, config["head_dim"])


def check_attention(constants: Constants, heads: int, kv_heads: int) -> None:
    """Raises FormatError if the graph's attention has other heads than its configuration."""
    for node in _nodes(constants, ("GroupQueryAttention",)):
        found = node.attributes.get("num_heads"), node.attributes.get("kv_num_heads")
        if found != (heads, kv_heads):
            of_queries, of_keys = map(shown, found)
            raise FormatError(
                f"{constants.path}: {show(node.name)} has {of_queries} heads and {of_keys} of keys, the configuration "
                f"says {heads} and {kv_heads}: the files do not belong together"
            )


def _attention(constants: Constants, head_dim: int) -> dict[str, Any]:
    """The window, after a check that the attention has nothing else of its own."""
    names = ("GroupQueryAttention",)
    if not any(_nodes(constants, names)):
        raise UnsupportedError(f"{constants.path}: has no GroupQueryAttention: {_HINT}")
    scale = _one(_attributes(constants, names, "scale", 0.0), "scale of the attention", constants)
    if scale and abs(scale * head_dim**0.5 - 1) > 1e-4:
        raise UnsupportedError(f"{constants.path}: the scale of its attention is {scale:.6g}: {_HINT}")
    if _one(_attributes(constants, names, "softcap", 0.0), "softcap of the attention", constants):
        raise UnsupportedError(f"{constants.path}: its attention has a softcap: {_HINT}")
    window = _one(_attributes(constants, names, "local_window_size", -1), "window of the attention", constants)
    if window >= 1 << 31:
        raise UnsupportedError(f"{constants.path}: the window of its attention, {window:.3g}, is no number of tokens")
    return {"sliding_window": int(window) if window > 0 else None, "use_sliding_window": window > 0}


def _nodes(constants: Constants, types: tuple[str, ...]) -> Iterator[Node]:
    return (node for node in constants.model.graph.walk() if node.op_type in types)


def _attributes(constants: Constants, types: tuple[str, ...], name: str, default: float) -> set[float]:
    found = (node.attributes.get(name, default) for node in _nodes(constants, types))
    return {float(value) for value in found if isinstance(value, int | float)}


def _one(values: set[float], what: str, constants: Constants) -> float:
    if len(values) != 1:
        raise UnsupportedError(f"{constants.path}: layers differ in the {what}, or have none: {_HINT}")
    return values.pop()


def _rotation(constants: Constants, head_dim: int) -> dict[str, Any]:
    """Base and scaling of the rotation whose tables the graph has."""
    pairs = head_dim // 2
    cosines, sines = (_table(constants, name, pairs) for name in ("cos_cache", "sin_cache"))
    frequencies = frequencies_of(cosines, sines) if cosines.shape == sines.shape and len(cosines) >= 64 else None
    if frequencies is None or pairs < 2 or not 1e-6 < frequencies[1] < 1:
        raise UnsupportedError(f"{constants.path}: its tables of the rotation are not plain ones: {_HINT}")
    exact = min(frequencies[1] ** (-head_dim / 2), 1e12)
    for digits in range(1, 7):  # a base is a round number
        base = float(f"{exact:.{digits - 1}e}")
        if abs(base / exact - 1) > 0.02:
            continue
        plain = base ** (-np.arange(pairs) / pairs)
        if _fits(plain, cosines, sines):
            return {"rope_theta": base}
        for factor in _LLAMA3_FACTORS:
            rope: dict[str, Any] = _LLAMA3 | {"factor": factor}
            low, high, context = (_LLAMA3[key] for key in _LLAMA3_NUMBERS)
            divisors = llama3_divisors(plain.astype(np.float32), factor, low, high, context)
            if _fits(plain / divisors, cosines, sines):
                return {"rope_theta": base, "rope_scaling": rope}
    raise UnsupportedError(f"{constants.path}: its rotation is scaled in a way that is not known: {_HINT}")


def frequencies_of(cosines: NDArray[np.float64], sines: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """Angles per position of tables (positions, pairs), each refined by positions twice as far; None for others."""
    angles: NDArray[np.float64] = np.arctan2(sines, cosines)
    found = angles[1]
    position = 2
    while position < len(angles):
        turns = np.round((found * position - angles[position]) / (2 * np.pi))
        found = (angles[position] + 2 * np.pi * turns) / position
        position *= 2
    is_plain = np.abs(cosines**2 + sines**2 - 1).max() < _TOLERANCE and (found > 0).all()
    return found if is_plain else None


def _fits(frequencies: NDArray[np.float64], cosines: NDArray[np.float64], sines: NDArray[np.float64]) -> bool:
    angles = np.arange(len(cosines))[:, None] * frequencies
    worst = max(np.abs(np.cos(angles) - cosines).max(), np.abs(np.sin(angles) - sines).max())
    return bool(worst < _TOLERANCE)


def _table(constants: Constants, name: str, pairs: int) -> NDArray[np.float64]:
    """The first rows of a table (positions, pairs) of the rotation."""
    tensor = constants.found.get(name)
    dtype = constants.tensors[name].dtype if tensor else ""
    if tensor is None or dtype not in TYPES or len(tensor.shape) != 2 or tensor.shape[1] != pairs or not tensor.nbytes:
        raise UnsupportedError(f"{constants.path}: has no table {name} of its rotation, for {pairs} pairs: {_HINT}")
    rows = min(tensor.shape[0], _MAX_POSITIONS)
    out = np.empty((rows, tensor.nbytes // tensor.shape[0]), np.uint8)
    constants.read(name, 0, out)
    found: NDArray[np.float64] = dequantize(out, TYPES[dtype]).astype(np.float64)
    return found


def _object(value: Json, name: str, path: Path) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise FormatError(f"{path}: {name} should be an object, not {show_json(value)}")
    return value
