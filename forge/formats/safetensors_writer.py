"""Safetensors files, written whole or not at all. Format: as `safetensors`."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from forge.formats.source import U64

_NAMES = {"float32": "F32", "float16": "F16", "int32": "I32"}


def write_file(path: Path, tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> None:
    """Write tensors of float32, float16 or int32 to a file, which they replace. Raises OSError if it cannot be."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype.name], "shape": tensor.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that numbers are aligned in the file
    scratch = path.with_name(f".{secrets.token_hex(8)}")
    try:
        with open(scratch, "xb") as file:
            file.write(U64.pack(len(text)))
            file.write(text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor).data)
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
