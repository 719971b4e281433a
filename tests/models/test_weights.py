"""Weights for a device: what is joined and converted, by threads and in parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf_files import write_gguf
from numpy.typing import NDArray

from forge.errors import UnsupportedError
from forge.formats import gguf
from forge.models.weights import Weights


class Device:
    """A GPU that keeps what it is given."""

    is_gpu = True

    @staticmethod
    def asarray(values: NDArray[Any]) -> NDArray[Any]:
        return values


@pytest.fixture
def taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, NDArray[np.float32]]], Weights]:
    """Weights of these tensors, read three rows at a time."""
    monkeypatch.setattr("forge.models.weights._TASK_WEIGHTS", 3 * 64)

    def take(tensors: dict[str, NDArray[np.float32]]) -> Weights:
        write_gguf(tmp_path / "model.gguf", {"general.architecture": "llama"}, tensors)
        return Weights(gguf.read(tmp_path / "model.gguf"), Device(), range(0), None)  # type: ignore[arg-type]

    return take


def numbers(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(shape[0]).standard_normal(shape).astype(np.float32)


def test_matrices_lie_one_behind_the_other_as_float16(taken: Any) -> None:
    tensors = {"a.weight": numbers(7, 64), "b.weight": numbers(5, 64)}
    found = taken(tensors).matrix({"a.weight": 7, "b.weight": 5}, cols=64)
    np.testing.assert_array_equal(found, np.concatenate([*tensors.values()]).astype(np.float16))


def test_tensors_of_an_expert_lie_together(taken: Any) -> None:
    tensors = {"gate.weight": numbers(3, 4, 64), "up.weight": numbers(3, 5, 64)}
    found = taken(tensors).experts({"gate.weight": 4, "up.weight": 5}, count=3, cols=64)
    expected = np.concatenate([*tensors.values()], axis=1).reshape(27, 64)
    np.testing.assert_array_equal(found, expected.astype(np.float16))


def test_a_weight_beyond_float16_is_refused_with_its_tensor(taken: Any) -> None:
    tensors = {"a.weight": numbers(7, 64)}
    tensors["a.weight"][5, 9] = 7e4
    with pytest.raises(UnsupportedError, match=r"tensor 'a\.weight' has weights beyond float16"):
        taken(tensors).matrix({"a.weight": 7}, cols=64)
