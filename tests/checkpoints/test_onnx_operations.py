"""Graphs that compute something else than the family does are refused, by operation, attribute and number."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from onnx_files import array, attribute, integer, node, span, with_nodes

from forge.checkpoints import open_checkpoint
from forge.errors import ForgeError

DATA = Path(__file__).parents[1] / "data/onnx"
QWEN, GEMMA, SHARED = "genai/qwen3_int4_128", "genai/gemma_f16", "genai/llama_shared"
LLAMA, GPT2 = "optimum/llama", "optimum/gpt2"
GQA = "GroupQueryAttention"
Change = Callable[[list[bytes]], list[bytes]]


def replaced(op: str, old: bytes, new: bytes) -> Change:
    """Bytes of the nodes of an operation."""

    def change(nodes: list[bytes]) -> list[bytes]:
        found = [one.replace(old, new) if span(4, op) in one else one for one in nodes]
        assert found != nodes
        return found

    return change


def renamed(old: str, new: str) -> Change:
    return replaced(old, span(4, old), span(4, new))


def encoded(name: str, value: int | float | str) -> bytes:
    """An attribute of a node."""
    if isinstance(value, str):
        return span(5, attribute(name, 3, span(4, value)))
    if isinstance(value, float):
        return span(5, attribute(name, 1, b"\x15" + struct.pack("<f", value)))
    return span(5, attribute(name, 2, integer(3, value)))


def number(op: str, name: str, old: int | float, new: int | float | str) -> Change:
    """An attribute with another value."""
    return replaced(op, encoded(name, old), encoded(name, new))


def without(op: str, name: str, old: int | float) -> Change:
    return replaced(op, encoded(name, old), b"")


def added(op: str, name: str, value: int) -> Change:
    return replaced(op, span(4, op), span(4, op) + encoded(name, value))


def scaled_logits(factor: float) -> Change:
    """The logits times a constant, in the last node."""

    def change(nodes: list[bytes]) -> list[bytes]:
        constant = attribute("value", 4, span(5, array("c", np.array([factor], np.float32))))
        nodes = [one.replace(span(2, "logits"), span(2, "before")) for one in nodes]
        return [*nodes, node("Constant", [], ["c"], "c", [constant]), node("Mul", ["before", "c"], ["logits"], "/Mul")]

    return change


SINK = replaced(GQA, span(1, "") * 5, span(1, "") * 4 + span(1, "past_key_values.0.key"))
ROWS: dict[str, tuple[str, Change, str]] = {
    "an unknown operation": (QWEN, renamed("Sigmoid", "Softplus"), "'Softplus', which is no operation of those"),
    "another activation": (QWEN, renamed("Sigmoid", "Tanh"), "is no operation of qwen3"),
    "no activation": (QWEN, renamed("Sigmoid", "Identity"), "has 0 operations that are silu"),
    "another form of gelu": (
        GEMMA,
        replaced("Gelu", attribute("approximate", 3, span(4, "tanh")), attribute("approximate", 3, span(4, "none"))),
        "approximate = 'none': it is not gelu",
    ),
    "differences": (LLAMA, renamed("Add", "Sub"), "Sub '/model/layers.0/input_layernorm/Add' is no operation of llama"),
    "the larger ones": (LLAMA, renamed("Add", "Max"), "is no operation of llama"),
    "a factor of the logits": (LLAMA, scaled_logits(3.7), "Mul '/Mul' computes with 3.7: llama"),
    "a factor of Gemma's": (GEMMA, scaled_logits(0.3), "computes with 0.3: gemma"),
    "an epsilon": (GEMMA, number("SimplifiedLayerNormalization", "epsilon", 1e-6, 1e-3), "epsilon = 0.001"),
    "no epsilon": (GEMMA, without("SimplifiedLayerNormalization", "epsilon", 1e-6), "epsilon = 1e-05"),
    "no rotation": (SHARED, number(GQA, "do_rotary", 1, 0), "has no rotated queries and keys"),
    "a rotation without tables": (QWEN, number(GQA, "do_rotary", 0, 1), "no tables of the rotation"),
    "rotated neighbours": (QWEN, number(GQA, "rotary_interleaved", 0, 1), "rotary_interleaved = 1"),
    "rotated neighbours before": (QWEN, number("RotaryEmbedding", "interleaved", 0, 1), "interleaved = 1"),
    "another softmax": (QWEN, added(GQA, "smooth_softmax", 1), "smooth_softmax = 1"),
    "an unknown attribute": (QWEN, added(GQA, "later", 1), "the attribute 'later', which is not known"),
    "a sink": (QWEN, SINK, "the input head_sink"),
    "a window": (
        GEMMA,
        number(GQA, "local_window_size", -1, 4),
        "local_window_size = 4, and its configuration says none",
    ),
    "a scale": (GEMMA, number(GQA, "scale", 0.25, 0.5), "scale = 0.5, and its configuration says 0.25"),
    "a soft cap": (GEMMA, number(GQA, "softcap", 0.0, 30.0), "softcap = 30.0, and its configuration says 0"),
    "a factor of a product": (GPT2, number("Gemm", "alpha", 1.0, 2.0), "alpha = 2.0"),
    "another axis": (LLAMA, number("Softmax", "axis", -1, 0), "axis = 0"),
    "heads of a long text": (GEMMA, number(GQA, "num_heads", 4, "\x1b" * 4000), "has '\\x1b"),
}


@pytest.mark.parametrize("name", ROWS)
def test_another_computation_is_refused(tmp_path: Path, name: str) -> None:
    source, change, words = ROWS[name]
    folder = Path(shutil.copytree(DATA / source, tmp_path / "model"))
    path = folder / "model.onnx"
    path.write_bytes(with_nodes(path.read_bytes(), change))
    with pytest.raises(ForgeError) as caught:
        open_checkpoint(folder)
    message = str(caught.value)
    assert words in message, message
    assert message.isprintable()
    assert len(message) < 500
