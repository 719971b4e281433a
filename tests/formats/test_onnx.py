"""ONNX files that the `onnx` package wrote: every type and form of tensors, nodes and their attributes."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from forge.errors import ParameterError
from forge.formats.onnx import ONNX

TYPES = Path(__file__).parents[1] / "data/onnx/types"
VALUES = dict(np.load(TYPES / "values.npz"))


@pytest.fixture
def opened() -> Iterator[ONNX]:
    with ONNX(TYPES / "model.onnx") as model:
        yield model


@pytest.mark.parametrize("form", ["raw", "typed", "external"])
def test_tensors_of_every_type_have_the_bytes_of_onnx(opened: ONNX, form: str) -> None:
    for name, expected in VALUES.items():
        tensor = opened.graph.initializers[f"{name}.{form}"]
        assert (tensor.type, tensor.shape, tensor.nbytes) == (name, (3, 5), expected.size)
        out = np.zeros(expected.size, np.uint8)
        opened.read(tensor, 0, out)
        assert out.tolist() == expected.tolist(), name


def test_what_a_model_says_of_itself(opened: ONNX) -> None:
    assert (opened.producer, opened.opsets, opened.metadata) == ("forge", {"": 24}, {"answer": "42"})
    assert [path.name for path in opened.paths] == ["model.onnx", "model.onnx.data"]
    assert (opened.graph.inputs, opened.graph.outputs) == (("a",), ("b",))


def test_nodes_and_their_attributes(opened: ONNX) -> None:
    first, constant = opened.graph.nodes
    assert (first.op_type, first.domain, first.name, first.inputs) == ("Op", "forge", "all attributes", ("a", ""))
    assert first.attributes == {
        "number": -3,
        "real": 1.5,
        "text": "words",
        "numbers": [1, -(2**40)],
        "reals": [0.5, 2.0],
        "texts": ["a"],
    }
    out = np.zeros((), np.float32)
    opened.read(constant.attributes["value"], 0, out.reshape(1))
    assert out == 2.5


def test_scalars_and_empty_tensors(opened: ONNX) -> None:
    scalar, empty = (opened.graph.initializers[name] for name in ("scalar", "empty"))
    assert (scalar.shape, scalar.nbytes, empty.shape, empty.nbytes) == ((), 4, (2, 0), 0)


@pytest.mark.parametrize("form", ["raw", "typed", "external"])
def test_columns_are_read_apart(opened: ONNX, form: str) -> None:
    tensor = opened.graph.initializers[f"INT16.{form}"]
    out = np.zeros((3, 2), "<i2")
    opened.read_strided(tensor, 4, 10, out)
    assert out.tolist() == VALUES["INT16"].view("<i2").reshape(3, 5)[:, 2:4].tolist()


@pytest.mark.parametrize(
    ("start", "step", "shape"),
    [(2, 10, (3, 5)), (0, 11, (3, 5)), (-2, 10, (3, 2)), (0, 10, (4, 2)), (24, 10, (2, 5))],
)
def test_bytes_behind_a_tensor_are_not_read(opened: ONNX, start: int, step: int, shape: tuple[int, int]) -> None:
    with pytest.raises(ParameterError, match=r"within the 30 bytes of 'INT16\.external'"):
        opened.read_strided(opened.graph.initializers["INT16.external"], start, step, np.zeros(shape, "<i2"))
