"""Build tests/data/onnx: files that the `onnx` package writes.

    types/model.onnx   one tensor of every type and in every form, by `onnx.helper`; types/values.npz holds its numbers.

Needs onnx; downloads nothing.
    python scripts/make_onnx_data.py [--out tests/data/onnx]
"""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import Any

import numpy as np

# No dependencies of forge, so without types in its development environment.
onnx: Any = importlib.import_module("onnx")

SHAPE = (3, 5)


def make_types(folder: Path) -> None:
    """Random numbers of every type: within the file as bytes and as protobuf's numbers, and in another file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, proto = np.random.default_rng(0), onnx.TensorProto
    plain = ("FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE", "UINT32")
    small = ("UINT64", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "UINT4", "INT4", "FLOAT4E2M1", "COMPLEX64")
    tensors: list[Any] = []
    values: dict[str, Any] = {}
    for name in (*plain, *small):
        number = getattr(proto, name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
        array = (rng.standard_normal(SHAPE) * 3).astype(np.float32)
        array = (np.abs(array) if name.startswith(("U", "B")) and name != "BFLOAT16" else array).astype(dtype)
        for form in ("raw", "typed", "external"):
            if form == "typed":
                tensor = onnx.helper.make_tensor(f"{name}.{form}", number, SHAPE, array.reshape(-1))
            else:
                tensor = onnx.numpy_helper.from_array(array, f"{name}.{form}")
            tensors.append(tensor)
        values[name] = np.frombuffer(tensors[-1].raw_data, np.uint8)
    scalar = onnx.numpy_helper.from_array(np.float32(2.5), "scalar")
    empty = onnx.numpy_helper.from_array(np.zeros((2, 0), np.float32), "empty")
    nodes = [
        onnx.helper.make_node("Op", ["a", ""], ["b"], "all attributes", domain="forge", **ATTRIBUTES),
        onnx.helper.make_node("Constant", [], ["c"], value=scalar),
    ]
    graph = onnx.helper.make_graph(nodes, "types", [], [], [*tensors, scalar, empty])
    for entry in ("a", "b"):
        info = onnx.helper.make_tensor_value_info(entry, proto.FLOAT, ["batch", 3])
        (graph.input if entry == "a" else graph.output).append(info)
    model = onnx.helper.make_model(graph, producer_name="forge", opset_imports=[onnx.helper.make_opsetid("", 24)])
    onnx.helper.set_model_props(model, {"answer": "42"})
    outside = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".external")]
    for tensor in outside:
        onnx.external_data_helper.set_external_data(tensor, location="model.onnx.data")
    (folder / "model.onnx.data").unlink(missing_ok=True)  # onnx appends
    onnx.save(model, str(folder / "model.onnx"))
    np.savez_compressed(folder / "values.npz", **values)


ATTRIBUTES = {"number": -3, "real": 1.5, "text": "words", "numbers": [1, -(2**40)], "reals": [0.5, 2.0], "texts": ["a"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests/data/onnx")
    options = parser.parse_args()
    make_types(options.out / "types")


if __name__ == "__main__":
    main()
