"""Repacking ggml blocks into planes loses nothing and moves nothing."""

import numpy as np
import pytest

from forge.formats import ggml
from forge.ops.quant import FORMATS, join, split


@pytest.mark.parametrize("name", FORMATS)
def test_planes_are_a_bijection_at_the_size_of_the_file(name: str) -> None:
    kind = ggml.GGMLType[name]
    blocks = np.random.default_rng(0).integers(0, 256, (3, 5 * kind.type_size), np.uint8)
    planes = split(kind, blocks)
    np.testing.assert_array_equal(join(kind, planes), blocks)
    assert sum(plane.nbytes for plane in planes if plane is not None) == blocks.nbytes
