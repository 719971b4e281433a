"""LoRA adapters as PEFT saves them: a directory with adapter_config.json and adapter_model.safetensors.

Names of modules become GGUF's, and rows are put in the order of GGUF's, by the same table that whole models are
translated by. An edit of a matrix (N, K) that orders its rows is the same edit of B (N, C).
Facts: `LoraConfig`, the layers and `get_pattern_key` of PEFT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from forge import models
from forge.checkpoints import edits
from forge.checkpoints.families import FAMILIES
from forge.checkpoints.family import Family
from forge.checkpoints.halves import Half, checked
from forge.checkpoints.huggingface import numbers_of
from forge.checkpoints.settings import Settings
from forge.checkpoints.stored import without_prefix
from forge.checkpoints.views import Stored, View
from forge.config import ModelConfig
from forge.errors import FormatError, UnsupportedError
from forge.formats import safetensors
from forge.formats.checkpoint import Checkpoint
from forge.formats.model_directory import member, read_json
from forge.formats.safetensors import SafeTensors
from forge.formats.source import PICKLE, show, status
from forge.formats.strict_json import Json, show_json
from forge.models.adapters import Adapter

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_HALF = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")
_READ = ("peft_type", "r", "lora_alpha", "use_rslora", "alpha_pattern", "rank_pattern", "init_lora_weights", "bias")
_HARMLESS = (
    *("auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "peft_version"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out"),
    *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
)
"""What the tensors say themselves, or what is for training alone."""
_NAMES = {
    "use_dora": "DoRA",
    "modules_to_save": "whole modules beside the pairs",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "adapters of a mixture's experts",
    "trainable_token_indices": "embeddings of new tokens",
    "lora_bias": "biases of B",
}
"""What keys mean that are refused; others are refused by their key alone."""
_CHANGED_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Ways to begin a training that change the model's own weights: such pairs are not for the published ones."""
_PATTERN = re.compile(r"\^?[\w.]+")


def read_directory(directory: Path, model: Checkpoint) -> Adapter:
    """Read the adapter of a directory. Raises as `adapters.read_adapter` does."""
    config = read_json(directory, CONFIG)
    if config is None:
        raise FormatError(
            f"{directory}: has no {CONFIG}: give a GGUF adapter, or a directory of PEFT's save_pretrained"
        )
    path = directory / CONFIG
    _check_config(config, path)
    if status(member(directory, WEIGHTS), follows=False) is None:
        what = f", but {PICKLED}: {PICKLE}" if status(directory / PICKLED, follows=False) else ": download it again"
        raise FormatError(f"{directory}: has no {WEIGHTS}{what}")
    rows = [family for family in FAMILIES.values() if family.arch == model.get_str("general.architecture")]
    if not rows:
        raise UnsupportedError(
            f"{directory}: names of {model.get_str('general.architecture')} are not known here: convert the adapter by "
            "llama.cpp's convert_lora_to_gguf.py"
        )
    halves: dict[str, dict[str, Half]] = {}
    modules: dict[str, str] = {}
    numbers = models.read_config(model, None)
    with safetensors.read_file(member(directory, WEIGHTS)) as files:
        for name in files.tensors:
            module, half = _module_of(name, files)
            for target, view in _targets(module, half, Stored(files, name), rows, numbers, path):
                if half in halves.setdefault(target, {}):
                    raise FormatError(f"{files.path}: two tensors are {target}.lora_{half}, one of them {show(name)}")
                halves[target][half] = Half(name, view.shape, view.floats)
                modules[target] = module
        return checked(files.path, halves, lambda target, rank: _scale(config, modules[target], rank, path), model)


def _check_config(config: Mapping[str, Json], path: Path) -> None:
    """Raises for what is no plain LoRA."""
    if (kind := config.get("peft_type")) != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {show_json(kind)}, and LORA alone is supported")
    for key, value in config.items():
        if key in _READ or key in _HARMLESS or not value:
            continue
        meaning = f" ({_NAMES[key]})" if key in _NAMES else ""
        raise UnsupportedError(f"{path}: {show(key)} = {show_json(value)}{meaning} is not supported")
    if (bias := config.get("bias") or "none") != "none":
        raise UnsupportedError(f"{path}: 'bias' = {show_json(bias)}: trained biases are not supported")
    way = config.get("init_lora_weights")
    if isinstance(way, str) and way.lower().startswith(_CHANGED_BASES):
        raise UnsupportedError(
            f"{path}: 'init_lora_weights' = {show(way)} changes the model's weights: save it converted to LoRA"
        )


def _module_of(name: str, files: SafeTensors) -> tuple[str, str]:
    """The module that a tensor belongs to, and which half of a pair it is."""
    found = _HALF.fullmatch(name)
    if found:
        return found[1], found[2].lower()
    for part, what in (("lora_embedding_", "adapts an embedding"), ("lora_magnitude_vector", "is of DoRA")):
        if part in name:
            raise UnsupportedError(f"{files.path}: tensor {show(name)} {what}: not supported")
    raise UnsupportedError(f"{files.path}: tensor {show(name)} is no half of a low-rank pair")


def _targets(
    module: str, half: str, view: View, rows: list[Family], numbers: ModelConfig, path: Path
) -> Iterator[tuple[str, View]]:
    """GGUF's tensors that a module is, and for each its half of the pair: a module may be several."""
    pattern, layer, expert = numbers_of(without_prefix(module))
    row = next((row for row in rows if pattern in row.names), None)
    if row is None or (layer and int(layer) >= numbers.num_layers):
        raise FormatError(f"{path.parent}: adapts {show(module)}, which the model has not: it is for another model")
    targets = [name.replace("#", layer) for name in row.names[pattern].split()]
    edit = row.edits.get(pattern)
    if half == "a" or edit is None or edit is edits.transposed or expert is not None or not layer:
        parts: tuple[View, ...] = (view,) * len(targets)  # PEFT stores pairs of a turned matrix like those of others
    else:
        if len(view.shape) != 2:
            raise FormatError(f"{path.parent}: the B of {show(module)} should be a matrix, not of shape {view.shape}")
        parts = edit(view, _settings(numbers, int(layer), path))
    for target, part in zip(targets, parts, strict=True):
        yield target if target.endswith(".weight") else f"{target}.weight", part


def _settings(numbers: ModelConfig, layer: int, path: Path) -> Settings:
    """What edits read of a config.json, of a model in any format."""
    kv_heads = numbers.layer_kv_heads[layer]
    values: dict[str, Json] = {
        "num_hidden_layers": numbers.num_layers,
        "hidden_size": numbers.width,
        "num_attention_heads": numbers.num_heads,
        "num_key_value_heads": kv_heads,
        "head_dim": numbers.layer_head_dims[layer],
        "num_kv_heads": kv_heads,  # Falcon's words
        "new_decoder_architecture": True,
    }
    return Settings(path, values, {})


def _scale(config: Mapping[str, Json], module: str, rank: int, path: Path) -> float:
    """What the product of a pair is multiplied by."""
    stated = _of(config, "rank_pattern", module, "r", path)
    if stated != rank:
        raise FormatError(f"{path}: says that the rank of {show(module)} is {stated:g}, and its tensors have {rank}")
    alpha = _of(config, "alpha_pattern", module, "lora_alpha", path)
    rslora = config.get("use_rslora") or False
    if not isinstance(rslora, bool):
        raise FormatError(f"{path}: 'use_rslora' should be true or false, not {show_json(rslora)}")
    return alpha / (math.sqrt(rank) if rslora else rank)


def _of(config: Mapping[str, Json], patterns: str, module: str, key: str, path: Path) -> float:
    """The number of a module: that of the first pattern that its name ends with, else that of all modules."""
    found = config.get(patterns) or {}
    if not isinstance(found, dict):
        raise FormatError(f"{path}: {patterns!r} should be an object, not {show_json(found)}")
    name, value = key, config.get(key)
    for pattern, of_pattern in found.items():
        if not _PATTERN.fullmatch(pattern):
            raise UnsupportedError(f"{path}: {patterns!r} has the pattern {show(pattern)}, which is no end of a name")
        ends = module.endswith("." + pattern) and not pattern.startswith("^")
        if ends or module == pattern.removeprefix("^"):
            name, value = f"{patterns}.{pattern}", of_pattern
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e9:
        raise FormatError(f"{path}: {show(name)} should be a number, not {show_json(value)}")
    return float(value)
