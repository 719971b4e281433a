"""ONNX models in GGUF's words: exports by Hugging Face's optimum, and what onnxruntime-genai's builder writes.

Weights get the names that they have in PyTorch (`onnx_parameters`), and then those of GGUF by the tables that Hugging
Face directories are read by. Numbers are those of config.json beside the model or, for a few families, of
genai_config.json and the graph (`onnx_genai`). The graph is not executed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from forge.checkpoints import edits, onnx_genai
from forge.checkpoints.family import UNUSED, Family
from forge.checkpoints.huggingface import (
    HuggingFaceDirectory,
    family_of,
    in_words_of_gguf,
    numbers_of,
    without_suffix,
)
from forge.checkpoints.onnx_blocks import Blocked
from forge.checkpoints.onnx_operations import check_computation, check_known
from forge.checkpoints.onnx_parameters import (
    BLOCKED,
    Constants,
    Parameter,
    find_parameters,
    no_decoder,
    parameters_read,
)
from forge.checkpoints.onnx_wiring import Wiring
from forge.checkpoints.settings import Settings
from forge.checkpoints.stored import without_prefix
from forge.checkpoints.views import Joined, Stored, Transposed, View, Widened
from forge.errors import FormatError
from forge.formats.model_directory import member, read_json
from forge.formats.onnx import ONNX
from forge.formats.source import is_directory, names_in, show, status
from forge.formats.strict_json import Json
from forge.models.hparams import read_config

_CONFIG = "config.json"
_FILES = ("model.onnx", "decoder_model_merged.onnx", "decoder_model.onnx")
_FOLDER = "onnx"
_ATTENTION, _MLP = "layers.#.self_attn", "layers.#.mlp"
_PARTS = {
    f"{_ATTENTION}.qkv_proj": tuple(f"{_ATTENTION}.{part}_proj" for part in "qkv"),
    f"{_MLP}.gate_up_proj": (f"{_MLP}.gate_proj", f"{_MLP}.up_proj"),
}
"""Matrices that are one for some families, and several for others; the builder joins and parts them."""
_BUILDER = {
    r"layers\.(\d+)\.attn\.": r"layers.\1.self_attn.",
    r"layers\.\d+\.final_norm_layernorm\.": "norm.",
}
"""What the builder calls modules."""
_OTHERS = {"norm": "final_layernorm", f"{_ATTENTION}.o_proj": f"{_ATTENTION}.dense"}
"""And what some families do."""


_ROLES = {f"{_ATTENTION}.qkv_proj": ["attn_qkv"], f"{_MLP}.gate_up_proj": ["ffn_gate_up"]}
_ROLES_OF_SEVERAL = {"blk.#.attn_q": "attn_qkv", "blk.#.ffn_gate": "ffn_gate_up"}


class OnnxModel(HuggingFaceDirectory):
    """An open model: `metadata` and `tensors` in GGUF's words."""

    format = "ONNX"


def open_onnx(path: Path) -> OnnxModel:
    """Open an .onnx file, or the directory that it lies in, with config.json or genai_config.json and tokenizer.json.

    Raises FormatError for files that are missing, truncated or forged, UnsupportedError for a graph that is no known
    decoder, and for a family without a row.
    """
    file = _model_file(path) if is_directory(path) else path
    directory = file.parent.parent if _is_folder(file.parent) else file.parent
    model = ONNX(file, directory)
    try:
        constants = Constants(model)
        genai = read_json(directory, onnx_genai.FILE)
        is_built = genai is not None or any(node.op_type == "GroupQueryAttention" for node in model.graph.walk())
        check_known(constants)
        parameters = find_parameters(constants, by_nodes=is_built)
        config, where = _config(directory, genai, constants, parameters)
        family = family_of(config, where)
        settings = Settings(where, config, family.defaults)
        if is_built:
            onnx_genai.check_attention(constants, settings.heads, settings.kv_heads)
        stored = _views(parameters, constants, settings, family, is_built=is_built)
        opened = OnnxModel(file, model, *in_words_of_gguf(directory, config, settings, family, stored))
        numbers = read_config(opened)
        check_computation(constants, parameters, numbers)
        Wiring(constants, _roles(constants, family, is_built=is_built), numbers).check()
        return opened
    except BaseException:
        model.close()
        raise


def has_onnx(directory: Path) -> bool:
    """Whether a directory has .onnx files where `open_onnx` looks for them."""
    return any(name.endswith(".onnx") for folder in (directory, directory / _FOLDER) for name in names_in(folder))


def _model_file(directory: Path) -> Path:
    """The .onnx file of a directory: what genai_config.json says, or by its name, or the only one."""
    genai: Any = read_json(directory, onnx_genai.FILE)
    for key in ("model", "decoder", "filename"):
        genai = genai.get(key) if isinstance(genai, dict) else None
    names = [genai] if isinstance(genai, str) else [*_FILES, *(f"{_FOLDER}/{name}" for name in _FILES)]
    for name in names:
        if status(found := member(directory, name)) is not None:
            return found
    others = [name for name in names_in(directory) if name.endswith(".onnx")]
    if len(others) == 1:
        return member(directory, others[0])
    if not others:
        raise FormatError(f"{directory}: has no {show(names[0])}: download the model again")
    raise FormatError(f"{directory}: has several .onnx files, {show(', '.join(others))}: give the path of one")


def _is_folder(folder: Path) -> bool:
    """Whether a folder holds the .onnx files of the directory above it, as transformers.js has them."""
    return folder.name == _FOLDER and status(folder / _CONFIG) is None and status(folder.parent / _CONFIG) is not None


def _config(
    directory: Path, genai: Mapping[str, Json] | None, constants: Constants, parameters: Mapping[str, Parameter]
) -> tuple[Mapping[str, Any], Path]:
    """The numbers of the model, in the words of config.json, and the file that says them."""
    config = read_json(directory, _CONFIG)
    if config is not None:
        return config, directory / _CONFIG
    if genai is None:
        raise no_decoder(constants, parameters, f"it has neither {_CONFIG} nor {onnx_genai.FILE} beside it")
    first = re.compile(r".*\.0\.mlp\.(gate|up|gate_up)_proj\.weight")
    gate = next((parameter for name, parameter in parameters.items() if first.fullmatch(name)), None)
    if gate is None:
        raise no_decoder(constants, parameters, "it has no feed-forward")
    rows = _view(gate, constants).shape[0] // (2 if ".gate_up_proj." in gate.name else 1)
    path = directory / onnx_genai.FILE
    return onnx_genai.config_of(genai, path, constants, rows), path


def _views(
    parameters: Mapping[str, Parameter], constants: Constants, settings: Settings, family: Family, *, is_built: bool
) -> dict[str, View]:
    """The weights by their names in a Hugging Face directory, without prefixes."""
    found: dict[str, View] = {}
    tied = settings.flag("tie_word_embeddings", family.is_tied)
    embeddings, outputs = (
        [name for name, new in family.names.items() if new == wanted] for wanted in ("token_embd", "output")
    )
    for name, parameter in parameters.items():
        short = without_prefix(name)
        if is_built:
            short = _by_family(short, family)
        pattern = without_suffix(numbers_of(short)[0])[0]
        view = _view(parameter, constants)
        # The output of a tied model may be quantized, and the embedding not.
        if UNUSED.search(short) or (tied and pattern in outputs and not isinstance(view, Blocked)):
            continue
        target = family.names.get(pattern, "").rpartition(".")[2]
        if parameter.is_folded and target and re.fullmatch(family.norms_less_one, target):
            view = Widened(view, -1.0)  # the exporter has added the 1
        if short in found:
            raise FormatError(f"{constants.path}: there are two parameters {show(short)}, one of them {show(name)}")
        found[short] = view
    _part_and_join(found, settings, family)
    if not any(f"{name}.weight" in found for name in embeddings):
        raise no_decoder(constants, parameters, f"it has no {embeddings[0]}.weight")
    if not tied and outputs and not any(f"{name}.weight" in found for name in outputs):
        problem = f"{outputs[0]}.weight is missing, and {settings.path.name} does not say tie_word_embeddings"
        raise FormatError(f"{constants.path}: {problem}")
    return found


def _roles(constants: Constants, family: Family, *, is_built: bool) -> dict[tuple[str, str], str]:
    """What nodes read in constants, as of `Wiring`. Of two names that of the node counts, where the family has it."""
    found: dict[tuple[str, str], str] = {}
    for parameter in parameters_read(constants, by_nodes=is_built):
        short = without_prefix(parameter.name)
        numbered, layer, _ = numbers_of(_by_family(short, family) if is_built else short)
        pattern = without_suffix(numbered)[0]
        targets = family.names.get(pattern, "").split() or _ROLES.get(pattern, [])
        if targets and parameter.node is not None:
            kind = targets[0] if len(targets) == 1 else _ROLES_OF_SEVERAL.get(targets[0], targets[0])
            role = f"{kind.removeprefix('blk.#.')}.{int(layer)}" if layer else kind
            found[next(iter(parameter.node.outputs), ""), parameter.constant] = role
    return found


def _view(parameter: Parameter, constants: Constants) -> View:
    if parameter.node is not None and parameter.node.op_type in BLOCKED and not constants.is_weight(parameter.constant):
        return Blocked(parameter.node, constants)
    stored = Stored(constants, parameter.constant)
    return Transposed(stored) if parameter.is_transposed and len(stored.shape) > 1 else stored


def _by_family(short: str, family: Family) -> str:
    """A name that the builder gave, as the family has it."""
    for pattern, new in _BUILDER.items():
        short = re.sub(f"^{pattern}", new, short)
    numbered, layer, _ = numbers_of(short)
    pattern, suffix = without_suffix(numbered)
    if pattern in family.names or pattern not in _OTHERS:
        return short
    return _OTHERS[pattern].replace("#", layer) + suffix


def _part_and_join(found: dict[str, View], settings: Settings, family: Family) -> None:
    """Make the matrices that the family has of those that the builder joined or parted."""
    for layer in range(settings.layers):
        for whole, parts in _PARTS.items():
            for suffix in (".weight", ".bias"):
                one, *several = (f"{name.replace('#', str(layer))}{suffix}" for name in (whole, *parts))
                if one in found and whole not in family.names:
                    edit = edits.qkv_rows if len(parts) == 3 else edits.halves
                    found |= dict(zip(several, edit(found.pop(one), settings), strict=True))
                elif whole in family.names and parts[0] not in family.names and all(name in found for name in several):
                    found[one] = Joined([found.pop(name) for name in several])
