"""`forge kernels build` compiles what models launch: engines run on a device that notes launches and computes zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_memory import HostMemory

import forge
from forge import backend as backends
from forge import loading
from forge.backend import sources
from forge.devtools.variants import HEAD_DIMS, Recorder, model_variants
from forge.ops.embed import embed
from forge.ops.linear import linear
from forge.ops.norm import add_layernorm, add_rmsnorm, layernorm, rmsnorm
from forge.ops.quant import FORMATS, QuantTensor
from forge.tuning.kernel import Row, Rows
from forge.tuning.table import KERNELS

ARCHS = sorted(path.name for path in (Path(__file__).parents[1] / "data" / "arch").iterdir() if path.is_dir())


class Zeros(np.ndarray[Any, Any]):
    """An array of the recording device."""

    device: Any = None

    def __array_finalize__(self, of: Any) -> None:
        self.device = getattr(of, "device", None)


class RecordingBackend(HostMemory, Recorder):
    """A backend whose results are zeros."""

    device, arch = "recorder", "gfx1100"

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        return self.asarray(np.zeros(shape, dtype))

    def asarray(self, array: Any, dtype: Any = None) -> Any:
        made = np.ascontiguousarray(array, dtype).view(Zeros)
        made.device = self
        return made

    def to_numpy(self, array: Any) -> Any:
        return np.array(array)

    def prepare(self, run: Callable[[], None], progress: Any = None) -> None:
        run()

    def capture(self, step: Callable[[], Any], state: Any, perturb: Any) -> tuple[Any, Callable[[], Any]]:
        return step(), step

    def free_bytes(self) -> int:
        return 1 << 30


backends.register(Zeros, lambda array: array.device)


def real_sizes(variant: sources.Variant) -> sources.Variant:
    """The variant of a tiny model's launch, with the head size of a model that is not tiny."""
    defines = tuple((name, HEAD_DIMS[0] if name == "HEAD_DIM" else value) for name, value in variant.defines)
    return replace(variant, defines=defines)


@pytest.mark.parametrize("name", ARCHS)
def test_what_a_model_launches_is_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = RecordingBackend()
    monkeypatch.setattr(loading.backends, "select", lambda _: device)
    path = Path(__file__).parents[1] / "data" / "arch" / name / "model.gguf"
    with forge.load(path, max_sequences=20) as llm:
        warm = set(device.variants)
        every = {"max_tokens": 3, "ignore_eos": True}
        llm.generate([[1, 2, 3]] * 18, **every)
        launched = set(device.variants)
        llm.generate([5] * 70, n=3, logprobs=2, repetition_penalty=1.5, **every)
        llm.logits([1, 2, 3])
    assert {"norm", "rope", "matvec_f16", "decode_state", "sample", "penalize", "logprobs"} <= {
        variant.file for variant in warm
    }
    assert launched - warm <= {
        v for v in launched if v.file in ("embed", "linear", "dequantize", "matmul")
    }  # rows not rehearsed
    assert "kv_cache" in {variant.file for variant in device.variants}
    assert {real_sizes(variant) for variant in device.variants} <= set(model_variants())


def test_products_and_norms_of_any_size_are_built() -> None:
    device, rng = Recorder(), np.random.default_rng(0)
    for _ in range(300):
        rows = int(rng.integers(1, 40))
        kind = str(rng.choice(["float", *FORMATS]))
        inner = int(rng.integers(1, 160)) * 256 if kind.endswith(("_K", "_XS")) else int(rng.integers(1, 1000)) * 32
        inner += int(rng.integers(0, 32)) if kind == "float" else 0
        outer = int(rng.integers(1, 9))
        weight: Any = np.empty((outer, inner), np.float16)
        if kind != "float":
            packed = QuantTensor.random(kind, 1, inner, rng).on(device)  # type: ignore[arg-type]
            outer = int(rng.choice([outer, 9000]))
            weight = replace(packed, shape=(outer, inner))  # what a launch depends on is the shape
        bias = np.empty(outer, np.float32) if rng.integers(2) else None
        device.launch(linear, (np.empty((rows, inner), np.float16), weight, bias, None), {})
        device.launch(embed, (np.zeros(rows, np.int32), weight, 1.0), {})
        width = 4 * int(rng.integers(1, 4096))
        x, scale = np.empty((rows, width), np.float32), np.empty(width, np.float32)
        device.launch(rmsnorm, (x, scale, 1e-6), {"out": str(rng.choice(["act", "f32"]))})
        device.launch(add_rmsnorm, (x, x, scale, 1e-6), {})
        device.launch(layernorm, (x, scale, None, 1e-6), {})
        device.launch(add_layernorm, (x, x, scale, scale, 1e-6), {})
    assert set(device.variants) <= set(model_variants())


def test_variants_of_every_architectures_rows_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = set(model_variants())
    own = Rows("nowhere", (Row({}, {"MAX_THREADS": 256}),))
    norm = replace(KERNELS["norm"], rows={**KERNELS["norm"].rows, "RDNA3": own})
    monkeypatch.setitem(KERNELS, "norm", norm)
    device = Recorder()
    device.arch = "gfx1100"
    x = np.empty((1, 4096), np.float32)
    device.launch(rmsnorm, (x, x[0], 1e-6), {"out": "act"})
    built = set(model_variants())
    assert usual < built
    assert set(device.variants) <= built - usual
