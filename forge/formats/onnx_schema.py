"""The fields of ONNX's messages that are read, by number, as onnx.proto numbers them."""

from forge.formats.protobuf import Field, Schema

# Number of a type: its name and the bits of a number. Strings are no weights.
ITEM_BITS = {
    **{1: ("FLOAT", 32), 2: ("UINT8", 8), 3: ("INT8", 8), 4: ("UINT16", 16), 5: ("INT16", 16), 6: ("INT32", 32)},
    **{7: ("INT64", 64), 9: ("BOOL", 8), 10: ("FLOAT16", 16), 11: ("DOUBLE", 64), 12: ("UINT32", 32)},
    **{13: ("UINT64", 64), 14: ("COMPLEX64", 64), 15: ("COMPLEX128", 128), 16: ("BFLOAT16", 16)},
    **{17: ("FLOAT8E4M3FN", 8), 18: ("FLOAT8E4M3FNUZ", 8), 19: ("FLOAT8E5M2", 8), 20: ("FLOAT8E5M2FNUZ", 8)},
    **{21: ("UINT4", 4), 22: ("INT4", 4), 23: ("FLOAT4E2M1", 4), 24: ("FLOAT8E8M0", 8)},
    **{25: ("UINT2", 2), 26: ("INT2", 2)},
}

# Fields that hold numbers as protobuf does, the types that may lie there, and the bytes of such a type. int32_data has
# numbers of less than a byte packed in bytes.
_INT32 = {"INT32": "<u4", "INT16": "<u2", "UINT16": "<u2", "FLOAT16": "<u2", "BFLOAT16": "<u2"}
_INT32 |= dict.fromkeys(name for name, bits in ITEM_BITS.values() if bits <= 8)  # type: ignore[arg-type]
TYPED_FIELDS: dict[str, dict[str, str]] = {
    "float_data": {"FLOAT": "<f4", "COMPLEX64": "<f4"},
    "double_data": {"DOUBLE": "<f8", "COMPLEX128": "<f8"},
    "int32_data": {name: dtype or "u1" for name, dtype in _INT32.items()},
    "int64_data": {"INT64": "<u8"},
    "uint64_data": {"UINT64": "<u8", "UINT32": "<u4"},
}

# Number of an attribute's type: the field that its value lies in.
ATTRIBUTE_FIELDS = {
    **{1: "f", 2: "i", 3: "s", 4: "t", 5: "g", 6: "floats", 7: "ints", 8: "strings", 9: "tensors", 10: "graphs"},
    **{11: "sparse_tensor", 12: "sparse_tensors", 13: "tp", 14: "type_protos"},
}

_PAIR: Schema = {1: Field("key", "text"), 2: Field("value", "text")}

TENSOR: Schema = {
    1: Field("dims", "int", True),
    2: Field("data_type", "int"),
    3: Field("segment", "span"),
    4: Field("float_data", "span"),
    5: Field("int32_data", "span"),
    7: Field("int64_data", "span"),
    8: Field("name", "text"),
    9: Field("raw_data", "span"),
    10: Field("double_data", "span"),
    11: Field("uint64_data", "span"),
    13: Field("external_data", "message", True, _PAIR),
    14: Field("data_location", "int"),
}

_VALUE: Schema = {1: Field("name", "text")}

GRAPH: dict[int, Field] = {
    5: Field("initializer", "message", True, TENSOR),
    11: Field("input", "message", True, _VALUE),
    12: Field("output", "message", True, _VALUE),
    15: Field("sparse_initializer", "span", True),
}

ATTRIBUTE: Schema = {
    1: Field("name", "text"),
    2: Field("f", "float"),
    3: Field("i", "int"),
    4: Field("s", "span"),
    5: Field("t", "message", False, TENSOR),
    6: Field("g", "message", False, GRAPH),
    7: Field("floats", "float", True),
    8: Field("ints", "int", True),
    9: Field("strings", "span", True),
    10: Field("tensors", "message", True, TENSOR),
    11: Field("graphs", "message", True, GRAPH),
    14: Field("tp", "span"),
    15: Field("type_protos", "span", True),
    20: Field("type", "int"),
    22: Field("sparse_tensor", "span"),
    23: Field("sparse_tensors", "span", True),
}

NODE: Schema = {
    1: Field("input", "text", True),
    2: Field("output", "text", True),
    3: Field("name", "text"),
    4: Field("op_type", "text"),
    5: Field("attribute", "message", True, ATTRIBUTE),
    7: Field("domain", "text"),
    9: Field("metadata_props", "message", True, {1: Field("key", "text"), 2: Field("value", "span")}),
}
GRAPH[1] = Field("node", "message", True, NODE)

MODEL: Schema = {
    1: Field("ir_version", "int"),
    2: Field("producer_name", "text"),
    3: Field("producer_version", "text"),
    7: Field("graph", "message", False, GRAPH),
    8: Field("opset_import", "message", True, {1: Field("domain", "text"), 2: Field("version", "int")}),
    14: Field("metadata_props", "message", True, _PAIR),
}
