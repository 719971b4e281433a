"""What `forge tune` measures: calls of ops that launch a kernel at a shape, with random inputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from forge.backend.gpu import GPU
from forge.config import EngineConfig
from forge.devtools.cases.attention import attention_case
from forge.devtools.cases.case import Case, normal
from forge.devtools.cases.decode_attention import decode_case
from forge.devtools.cases.experts import experts_case
from forge.devtools.recorder import Recorder
from forge.devtools.variants import record
from forge.ops.attention import paged_attention
from forge.ops.decode_attention import decode_attention
from forge.ops.experts import Experts, experts
from forge.ops.linear import linear
from forge.ops.norm import Normed, norm
from forge.ops.op import Arrays, Op
from forge.ops.quant import Packed, QuantTensor, split
from forge.tuning import Key
from forge.tuning.lds import WITHOUT_LINES
from forge.tuning.spec import ANY, Shape
from forge.tuning.table import KERNELS

_DRAWN_ROWS = 512
"""Rows of a matrix that are drawn. The matrix repeats them, which changes nothing about the speed of a product."""
_NORM_ROWS = (8, 512)
_CONTEXTS = {1: ((1, 1024), (1, 8192)), 16: ((2, 4096), (8, 1024)), ANY: ((64, 1024),)}
"""Numbers of sequences and of their positions, by the class of the number of sequences."""
_PROMPTS = {1: (1, 2048), ANY: (8, 512)}
"""Prompts of a step and their tokens, by the class of the number of sequences."""
_MOST_ROWS = 4096
"""Rows of a product that are measured, of a class without a limit."""
_EXPERTS = 64
"""Experts of a layer that is measured, of which a row has 4."""
_EXPERT_WIDTH = 1024
_TABLE_POSITIONS = 16_384
"""Positions of the page table, which is longer than the sequences, as in an engine."""


def shapes_of(device: GPU, path: Path | None = None) -> dict[Key, list[Shape]]:
    """Classes of shapes of a model's kernels that have more than one candidate, with the shapes of each.

    path: A GGUF file; None for usual models. On Hopper the tiles of experts are not among them: they are asked for as
    those of a product, which other kernels multiply there.
    """
    recorder = Recorder(device.arch, device.num_cus, has_wgmma=device.has_wgmma)
    record(path, recorder)
    found: dict[Key, list[Shape]] = {}
    for kernel, shape in recorder.tuning.asked:
        spec = KERNELS[kernel]
        if kernel == "matmul" and device.has_wgmma and shape["format"] not in WITHOUT_LINES:
            continue
        shape_class = spec.class_of(shape)
        if "rows" in shape:  # a step's numbers of sequences are measured together
            shape["rows"] = spec.named(shape_class)["rows"]
        members = found.setdefault((kernel, shape_class), [])
        if shape not in members and len(spec.permitted(shape)) > 1:
            members.append(shape)
    return {key: shapes for key, shapes in found.items() if shapes}


def workloads(kernel: str, shape: Shape) -> list[tuple[Op, Case]]:
    """Calls of ops that launch a kernel at a shape. The results are near 1."""
    if kernel == "norm":
        return [(norm, _norm_case(rows, shape["width"])) for rows in _NORM_ROWS]
    if kernel == "attention_decode":
        contexts = next(some for rows, some in _CONTEXTS.items() if shape["rows"] <= rows)
        return [(decode_attention, _attention_case(shape, *context)) for context in contexts]
    if kernel == "attention_wgmma":
        return [(paged_attention, _prompt_case(shape, *_PROMPTS[shape["rows"]]))]
    if kernel == "attention_prefill":
        return [(paged_attention, _prompt_case(shape, *prompts)) for prompts in _PROMPTS.values()]
    if kernel == "expert_mma_quant":
        return [(experts, _experts_case(shape))]
    if kernel in ("expert_up", "expert_down"):
        return [(experts, _row_experts_case(kernel, shape))]
    return [(linear, _product_case(shape))]


def _norm_case(rows: int, width: int) -> Case:
    return Case("", lambda rng: (_normed(rng, rows, width),), {"out": "act"})


def _attention_case(shape: Shape, sequences: int, length: int) -> Case:
    page_size, heads = EngineConfig().page_size, (shape["packed"] * shape["kv_heads"], shape["kv_heads"])
    more_pages = (_TABLE_POSITIONS - length) // page_size
    return decode_case("", [length] * sequences, heads, shape["dim"], page_size=page_size, more_pages=more_pages)


def _prompt_case(shape: Shape, sequences: int, length: int) -> Case:
    heads = shape["packed"] * shape["kv_heads"], shape["kv_heads"]
    lengths = [length] * sequences
    return attention_case("", lengths, lengths, heads, shape["dim"], EngineConfig().page_size)


def _product_case(shape: Shape) -> Case:
    op, inner = shape.get("op", "linear"), shape["inner"]
    tokens = shape.get("tokens", min(shape.get("rows", 1), _MOST_ROWS))
    is_gated = op == "rms_gated"

    def make(rng: np.random.Generator) -> Arrays:
        x = normal(rng, tokens, inner) if op == "linear" else _normed(rng, tokens, inner)
        return x, _matrix(rng, shape.get("format", "F16"), shape["outer"] * (2 if is_gated else 1), inner), None, None

    return Case("", make, {"glu": "silu" if is_gated else "none", "split_k": "never"})


def _experts_case(shape: Shape) -> Case:
    """Few rows of a class, or as many as have four pairs for each expert. The shape is of the first product or of the
    second."""
    sizes = shape["inner"], shape["outer"]
    inner, width = sizes if shape["op"] == "rms_gated" else sizes[::-1]
    rows = min(shape["rows"] // 2, _EXPERTS)
    return experts_case("", rows, inner, width, _EXPERTS, 4, format=shape["format"])


def _row_experts_case(kernel: str, shape: Shape) -> Case:
    """A row and the experts that are chosen for it, of which as many are there."""
    inner, kind = shape["inner"], shape["format"]
    used = next((count for count in (8, 4, 2) if inner % (256 * count) == 0), 1)
    width, k = (_EXPERT_WIDTH, inner) if kernel == "expert_up" else (inner // used, _EXPERT_WIDTH)

    def make(rng: np.random.Generator) -> Arrays:
        gate, down = _matrix(rng, kind, used * 2 * width, k), _matrix(rng, kind, used * k, width)
        chosen, weights = rng.permutation(used)[None].astype(np.int32), np.full((1, used), 1 / used, np.float32)
        return _normed(rng, 1, k), chosen, weights, Experts(gate, None, None, None, down, None, used), None

    return Case("", make, {"activation": "silu", "weighs": "output", "order": "any", "partials": "never"})


def _matrix(rng: np.random.Generator, kind: str, outer: int, inner: int) -> Any:
    drawn = min(outer, _DRAWN_ROWS)
    repeats = -(-outer // drawn), 1
    if kind == "F16":
        return np.tile((normal(rng, drawn, inner) * inner**-0.5).astype(np.float16), repeats)[:outer]
    few = QuantTensor.random(kind, drawn, inner, rng, scale=1e-4)
    return Packed(few.type, (outer, inner), *split(few.type, np.tile(few.blocks, repeats)[:outer]))


def _normed(rng: np.random.Generator, rows: int, width: int) -> Normed:
    return Normed(normal(rng, rows, width), None, np.ones(width, np.float32), None, 1e-5, True)
