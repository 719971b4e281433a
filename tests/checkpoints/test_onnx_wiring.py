"""Graphs that feed a weight, the attention or a norm with something else than the family does are refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx_files import array, attribute, fields_of, node, payload_of, span, with_nodes

from forge.checkpoints import open_checkpoint
from forge.errors import UnsupportedError

DATA = Path(__file__).parents[1] / "data/onnx"
QWEN, SHARED = "genai/qwen3_int4_128", "genai/llama_shared"
LLAMA, GPT2, OLMO = "optimum/llama", "optimum/gpt2", "optimum/olmo"
OUT = "/output_0"
SCALE = 8**-0.5
"""A number of the configuration, that of scores."""
Change = Callable[[list[bytes]], list[bytes]]


def rewired(name: str, inputs: Mapping[str, str]) -> Change:
    """A node that reads other values."""

    def change(nodes: list[bytes]) -> list[bytes]:
        found = []
        for one in nodes:
            if span(3, name) in one:
                fields = [(number, payload_of(field), field) for number, field in fields_of(one)]
                one = b"".join(
                    span(1, inputs.get(data.decode(), data.decode())) if number == 1 else field
                    for number, data, field in fields
                )
            found.append(one)
        assert found != nodes, name
        return found

    return change


def swapped(name: str, one: str, other: str) -> Change:
    return rewired(name, {one: other, other: one})


def bypassed(output: str, source: str) -> Change:
    """Whatever reads the one value reads the other."""

    def change(nodes: list[bytes]) -> list[bytes]:
        found = [one.replace(span(1, output), span(1, source)) for one in nodes]
        assert found != nodes, output
        return found

    return change


def scaled(output: str, factor: float) -> Change:
    """A value times a constant, for all that read it."""

    def change(nodes: list[bytes]) -> list[bytes]:
        place = next(at for at, one in enumerate(nodes) if span(2, output) in one)
        constant = attribute("value", 4, span(5, array("c", np.array([factor], np.float32))))
        nodes = [one.replace(span(2, output), span(2, "before")) for one in nodes]
        more = [node("Constant", [], ["c"], "c", [constant]), node("Mul", ["before", "c"], [output], "/scaled/Mul")]
        return [*nodes[: place + 1], *more, *nodes[place + 1 :]]

    return change


L, A, M = "/model/layers.0", "/model/layers.0/self_attn", "/model/layers.0/mlp"
ATTN = f"{L}/attn"
GQA = f"{ATTN}/GroupQueryAttention"
ROTARY = "rotary/RotaryEmbedding/output_0"
ROWS: dict[str, tuple[str, Change, str]] = {
    "queries for keys, fused": (
        QWEN,
        swapped(GQA, f"{ATTN}/q_{ROTARY}", f"{ATTN}/k_{ROTARY}"),
        "has attn_k_norm.0, attn_q_norm.0, attn_v.0 for queries, keys and values",
    ),
    "keys for values, fused": (
        QWEN,
        rewired(GQA, {f"{ATTN}/v_proj/MatMul{OUT}": f"{ATTN}/k_proj/MatMul{OUT}"}),
        "has attn_q_norm.0, attn_k_norm.0, attn_k.0 for queries",
    ),
    "a norm of queries left out": (
        QWEN,
        rewired(f"{ATTN}/q_rotary/RotaryEmbedding", {f"{ATTN}/q_norm/Reshape_2{OUT}": f"{ATTN}/q_proj/MatMul{OUT}"}),
        "has attn_q.0, attn_k_norm.0",
    ),
    "the residual left out, fused": (
        QWEN,
        rewired(
            f"{L}/post_attention_layernorm/SkipLayerNorm",
            {"/model/embed_tokens/Gather/output_0": f"{ATTN}/o_proj/MatMul{OUT}"},
        ),
        "adds attn_output.0 twice, or to nothing",
    ),
    "the stream without the attention": (
        QWEN,
        rewired(
            "/model/layers.1/final_norm_layernorm/SkipLayerNorm",
            {f"{L}/post_attention_layernorm/output_3": "/model/embed_tokens/Gather/output_0"},
        ),
        "reads ffn_down.0 and token_embd for output_norm, and the family reads attn_output.0 and ffn_down.0 and",
    ),
    "the activation of the other one": (
        QWEN,
        swapped(f"{M}/act_fn/Sigmoid", f"{M}/gate_proj/MatMul{OUT}", f"{M}/up_proj/MatMul{OUT}"),
        "is of ffn_up.0, and the family's is of the gate",
    ),
    "no activation": (
        QWEN,
        rewired(f"{M}/Mul", {f"{M}/act_fn/Mul{OUT}": f"{M}/gate_proj/MatMul{OUT}"}),
        "reads ffn_gate.0 and ffn_up.0 for ffn_down.0, which is not activated",
    ),
    "no up": (
        QWEN,
        rewired(f"{M}/Mul", {f"{M}/up_proj/MatMul{OUT}": f"{M}/gate_proj/MatMul{OUT}"}),
        "reads ffn_gate.0 for ffn_down.0, and the family reads ffn_gate.0 and ffn_up.0",
    ),
    "a feed-forward of the stream": (
        QWEN,
        rewired(
            f"{M}/gate_proj/MatMul_Q4",
            {f"{L}/post_attention_layernorm/output_0": f"{L}/post_attention_layernorm/output_3"},
        ),
        "reads attn_output.0 and token_embd for ffn_gate.0, and the family reads ffn_norm.0",
    ),
    "logits of the stream": (
        SHARED,
        rewired("/lm_head/MatMul_Q4", {"/model/layers.1/final_norm_layernorm/output_0": f"{M}/down_proj/MatMul{OUT}"}),
        "reads ffn_down.0 for output, and the family reads output_norm",
    ),
    "queries for keys": (
        LLAMA,
        swapped(f"{A}/MatMul", f"{A}/Mul_8_output_0", f"{A}/Mul_9_output_0"),
        "multiplies attn_k.0 by attn_q.0: queries are not first",
    ),
    "keys for values": (
        LLAMA,
        rewired(f"{A}/MatMul_1", {f"{A}/Reshape_6_output_0": f"{A}/Reshape_4_output_0"}),
        "multiplies by attn_k.0 where the family has values",
    ),
    "no softmax": (LLAMA, bypassed(f"{A}/Softmax_output_0", f"{A}/Add_2_output_0"), "multiplies attn_"),
    "no mask": (LLAMA, bypassed(f"{A}/Add_2_output_0", f"{A}/MatMul_output_0"), "multiplies attn_k.0 and attn_q.0 by"),
    "no bias": (
        LLAMA,
        bypassed(f"{A}/k_proj/Add_output_0", f"{A}/k_proj/MatMul_output_0"),
        "multiplies attn_q.0 by unbiased attn_k.0",
    ),
    "the bias of another": (
        LLAMA,
        rewired(f"{A}/k_proj/Add", {f"{A}/k_proj/MatMul_output_0": f"{A}/q_proj/MatMul_output_0"}),
        "adds the bias of attn_k.0 to unbiased attn_q.0",
    ),
    "no residual": (
        LLAMA,
        bypassed(f"{L}/Add_output_0", f"{A}/o_proj/Add_output_0"),
        "reads attn_output.0 for ffn_norm.0, and the family reads attn_output.0 and token_embd",
    ),
    "no attention": (
        LLAMA,
        bypassed(f"{L}/Add_output_0", f"{L}/input_layernorm/Cast_output_0"),
        "reads token_embd for ffn_norm.0",
    ),
    "a share of the stream": (
        LLAMA,
        scaled(f"{L}/Add_output_0", SCALE),
        "reads 0.353553 times attn_output.0 and token_embd",
    ),
    "a share of a layer": (LLAMA, scaled(f"{M}/down_proj/MatMul_output_0", SCALE), "reads 0.353553 times ffn_down.0"),
    "no rotation": (LLAMA, bypassed(f"{A}/Add_output_0", f"{A}/Transpose_output_0"), "are not rotated"),
    "half a rotation": (LLAMA, bypassed(f"{A}/Add_1_output_0", f"{A}/Mul_2_output_0"), "are not rotated"),
    "another rotation": (
        LLAMA,
        bypassed(f"{A}/Neg_output_0", f"{A}/Slice_1_output_0"),
        "adds attn_q.0 twice|not rotated",
    ),
    "a norm of another root": (
        LLAMA,
        bypassed(f"{L}/post_attention_layernorm/Div_output_0", f"{L}/input_layernorm/Div_output_0"),
        "for ffn_norm.0, which is not normed",
    ),
    "a norm without its mean": (
        LLAMA,
        bypassed(f"{L}/input_layernorm/ReduceMean_output_0", f"{L}/input_layernorm/Pow_output_0"),
        "reads token_embd for attn_norm.0, which is not normed",
    ),
    "a norm without its epsilon": (
        LLAMA,
        bypassed(f"{L}/input_layernorm/Add_output_0", f"{L}/input_layernorm/ReduceMean_output_0"),
        "for attn_norm.0, which is not normed",
    ),
    "a norm left out": (
        LLAMA,
        bypassed(f"{L}/input_layernorm/Mul_1_output_0", f"{L}/input_layernorm/Cast_1_output_0"),
        "for attn_q.0, and the family reads attn_norm.0",
    ),
    "scores without their scale": (
        LLAMA,
        bypassed(f"{A}/Mul_9_output_0", f"{A}/Transpose_3_output_0"),
        "times attn_k.0",
    ),
    "keys of the joined matrix for queries": (
        GPT2,
        swapped(
            "/transformer/h.0/attn/MatMul", "/transformer/h.0/attn/Mul_output_0", "/transformer/h.0/attn/Mul_1_output_0"
        ),
        "takes queries and keys of each other's part of the joined matrix",
    ),
    "half a gelu": (
        GPT2,
        bypassed("/transformer/h.0/mlp/act/Add_1_output_0", "/transformer/h.0/mlp/act/Tanh_output_0"),
        "reads 0.5 times ffn_up.0, and the family 1 times",
    ),
    "twice a gelu": (
        GPT2,
        bypassed("/transformer/h.0/mlp/act/Mul_output_0", "/transformer/h.0/mlp/c_fc/Reshape_1_output_0"),
        "reads 2 times ffn_up.0, and the family 1 times",
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_graph_that_is_wired_otherwise_is_refused(tmp_path: Path, name: str) -> None:
    source, change, words = ROWS[name]
    folder = Path(shutil.copytree(DATA / source, tmp_path / "model"))
    path = folder / "model.onnx"
    path.write_bytes(with_nodes(path.read_bytes(), change))
    with pytest.raises(UnsupportedError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert any(word in message for word in words.split("|")), message
    assert message.isprintable()
    assert len(message) < 500 + len(str(path))
