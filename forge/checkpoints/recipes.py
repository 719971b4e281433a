"""Which tensors of a model get which type when it is quantized, as llama.cpp's quantizer chooses (llama-quant.cpp)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod

from forge.errors import ParameterError
from forge.formats.checkpoint import Checkpoint, TensorInfo
from forge.formats.ggml import GGMLType
from forge.formats.quantize import QUANTIZERS

_KEPT = re.compile(r".*(_norm\.weight|ffn_gate_inp\.weight|per_layer_model_proj\.weight)|position_embd\.weight")
"""Matrices that stay as they are, beside all that is no weight: norms, routers, and what is small."""
_FLOAT32 = re.compile(r".*_norm\.weight|.*\.ffn_gate_inp(_shexp)?\.weight|position_embd\.weight|.*(?<!\.weight)")
_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_OUTPUT = "output.weight"
_PART = re.compile(r"blk\.(\d{1,6})\.(attn_qkv|attn_kv_b|attn_v|attn_k|attn_output|ffn_down)(?:_exps|_shexp)?\.weight")
_VALUES = ("attn_v", "attn_qkv", "attn_kv_b")
_FALLBACK = {GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q5_K: GGMLType.Q5_1, GGMLType.Q6_K: GGMLType.Q8_0}
"""Where rows are no multiple of 256 weights."""
_MANY_LAYERS = 80
"""A model of so many layers, whose heads share values, has small matrices of values: they may have more bits."""
_FEW_EXPERTS = 8
"""In a mixture of so many, attention is a small part of the model, and has more bits."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """Types by the part that a matrix has in a model. None = that of all others."""

    type: GGMLType
    output: GGMLType
    """Of the output matrix, which may be the embedding too."""
    precise: GGMLType | None = None
    """Of values and down projections in the layers of `has_more_bits`: what makes a mixture."""


RECIPES = {
    type.name: Recipe(type, GGMLType.Q8_0 if type in (GGMLType.Q8_0, GGMLType.MXFP4) else GGMLType.Q6_K)
    for type in QUANTIZERS
    if type.block_size > 1
}
RECIPES |= {
    "Q4_K_M": Recipe(GGMLType.Q4_K, GGMLType.Q6_K, GGMLType.Q6_K),
    "Q5_K_M": Recipe(GGMLType.Q5_K, GGMLType.Q6_K, GGMLType.Q6_K),
}


def check_recipe(name: object, parameter: str = "quantize", more: Collection[str] = ()) -> str:
    """The name of a recipe, or of one of `more`, in its own case. Raises ParameterError for another."""
    if not isinstance(name, str) or name.upper() not in {*RECIPES, *more}:
        message = f"{parameter} must be one of {', '.join([*more, *sorted(RECIPES)])}, not {name!r:.60}"
        raise ParameterError(message, parameter=parameter)
    return name.upper()


def is_float32(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama.cpp's converter writes it as float32: vectors, norms, routers, positions, what is no weight."""
    return len(shape) < 2 or _FLOAT32.fullmatch(name) is not None


def has_more_bits(layer: int, layers: int) -> bool:
    """Whether a mixture gives a layer more bits: the first and the last eighth, and of the others every third."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def new_types(model: Checkpoint, name: str, parameter: str = "quantize") -> dict[str, GGMLType]:
    """The types of the tensors that a recipe changes, by name.

    Embeddings are quantized as well, as the output matrix where they are that. Rows that no type fits stay as they are.
    Raises ParameterError for a model that is quantized already.
    """
    quantized = sorted({info.type.name for info in model.tensors.values() if info.type.block_size > 1})
    if quantized:
        raise ParameterError(
            f"{model.path}: the weights are quantized already ({', '.join(quantized)}): again makes them worse",
            parameter=parameter,
            hint=f"leave {parameter} out, or use a model in F16, BF16 or F32",
        )
    return dict(_chosen(model, RECIPES[name]))


def _chosen(model: Checkpoint, recipe: Recipe) -> Iterator[tuple[str, GGMLType]]:
    arch = model.get_str("general.architecture")
    layers = model.get_int(f"{arch}.block_count")
    experts = model.get_int(f"{arch}.expert_count", 0)
    matrices = {n: info for n, info in model.tensors.items() if prod(info.shape[:-1]) > 1 and n.endswith(".weight")}
    order = _order_of_values(matrices)
    for name, info in matrices.items():
        if _KEPT.fullmatch(name):
            continue
        if name == _OUTPUT or (name in _EMBEDDINGS and _OUTPUT not in matrices):
            type = GGMLType.Q8_0 if arch == "falcon" else recipe.output
        elif recipe.type is GGMLType.MXFP4 and experts and len(info.shape) < 3:
            type = GGMLType.Q8_0  # as files of gpt-oss are
        elif part := _PART.fullmatch(name):
            number, count = order.get(name, int(part[1])), len(order) if name in order else layers
            is_precise = recipe.precise is not None and has_more_bits(number, count)
            type = _of_part(part[2], recipe, number, layers, is_precise, experts == _FEW_EXPERTS, arch == "falcon")
        else:
            type = recipe.type
        if info.shape[-1] % type.block_size:
            type = _FALLBACK.get(type, type)
        if info.shape[-1] % type.block_size == 0:
            yield name, type


def _order_of_values(matrices: Mapping[str, TensorInfo]) -> dict[str, int]:
    """Numbers of the matrices of values, counted: a layer may have none of its own."""
    found = [(int(part[1]), name) for name in matrices if (part := _PART.fullmatch(name)) and part[2] in _VALUES]
    return {name: i for i, (_, name) in enumerate(sorted(found))}


def _of_part(
    part: str, recipe: Recipe, number: int, layers: int, is_precise: bool, has_few_experts: bool, is_falcon: bool
) -> GGMLType:
    """The type of a part of a layer. number: The layer, or of values how many come before."""
    is_mixture, is_4_bit = recipe.precise is not None, recipe.type is GGMLType.Q4_K
    if has_few_experts and part in (*_VALUES, "attn_k"):
        return GGMLType.Q8_0
    if has_few_experts and part == "attn_output" and is_mixture and is_4_bit:
        return GGMLType.Q5_K
    if part not in (*_VALUES, "ffn_down"):
        return recipe.type
    if part == "ffn_down" and is_falcon and is_mixture and is_4_bit and number >= layers // 16:
        return GGMLType.Q5_K if is_precise else recipe.type
    if recipe.precise and is_precise:
        return recipe.precise
    return GGMLType.Q5_K if part in _VALUES and layers == _MANY_LAYERS and is_4_bit else recipe.type
