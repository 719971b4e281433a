"""Repacking ggml blocks into planes loses nothing and moves nothing; kernels and Python agree on the types' numbers."""

import re
from importlib import resources

import numpy as np
import pytest

from forge.formats import ggml
from forge.formats.ggml import BLOCK_FORMATS, GGMLType
from forge.ops.quant import FORMATS, split


@pytest.mark.parametrize("name", FORMATS)
def test_planes_hold_every_byte_of_each_block_once_block_after_block(name: str) -> None:
    kind = GGMLType[name]
    size = kind.type_size
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5 * size), np.uint8)
    held = []
    for field, plane in zip(BLOCK_FORMATS[kind].planes, split(kind, blocks), strict=True):
        assert (field is None) == (plane is None)
        if field is not None and plane is not None:
            held += range(*field)
            expected = [[row[n * size + byte] for n in range(5) for byte in range(*field)] for row in blocks]
            np.testing.assert_array_equal(plane, expected)
    assert sorted(held) == list(range(size))


def test_kernels_name_the_types_by_the_numbers_of_the_table() -> None:
    text = (resources.files("forge") / "raw_kernels" / "include" / "quant_blocks.hip").read_text(encoding="utf-8")
    found = {
        name: int(number) for name, number in re.findall(r"^#define ((?:I?Q|F|MXFP)\d\w*) (\d+)$", text, re.MULTILINE)
    }
    assert found == {type.name: type.value for type in (ggml.GGMLType.F16, *BLOCK_FORMATS)}
