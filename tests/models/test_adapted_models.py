"""Adapters beside the weights, against the same adapters merged into them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from adapter_files import merge, random_pairs, write_adapter

import forge
from forge.checkpoints.adapters import read_adapter
from forge.errors import ForgeError, OutOfMemoryError
from forge.formats import gguf
from forge.models.adapters import Adapter, Pair, adapter_bytes, attach

ARCH = Path(__file__).parents[1] / "data" / "arch"
IDS = [5, 9, 17, 3, 22, 40, 7]
slow = pytest.mark.slow
ALL = sorted(path.name for path in ARCH.iterdir() if (path / "model.gguf").exists())
QUICK = ("llama", "phi3", "gemma4_e2b")


def of(*names: str) -> Callable[[str], bool]:
    return lambda name: name.split(".")[2] in names


TARGETS = {
    "all": lambda name: True,
    "attention": of("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output"),
    "one of three": of("attn_v"),
    "down alone": of("ffn_down"),
    "up alone": of("ffn_up"),
    "the last layer": lambda name: name.startswith("blk.1."),
}


CASES = [
    *(pytest.param(name, "all", marks=[slow] * (name not in QUICK)) for name in ALL),
    *(pytest.param(name, targets, marks=slow) for name in ("llama", "gemma2", "qwen2") for targets in [*TARGETS][1:]),
]


@pytest.mark.parametrize(("name", "targets"), CASES)
def test_logits_are_those_of_merged_weights(name: str, targets: str, tmp_path: Path) -> None:
    path = ARCH / name / "model.gguf"
    pairs = random_pairs(path, seed=1, wants=TARGETS[targets])
    with gguf.read(path) as file:
        arch = file.get_str("general.architecture")
    adapter = write_adapter(tmp_path / "a.gguf", arch, pairs)
    with forge.load(path, device="cpu", context=64) as llm:
        plain = llm.logits(IDS)
        merge(llm, pairs)
        wanted = llm.logits(IDS)
    assert np.abs(wanted - plain).max() > 0.01
    with forge.load(path, device="cpu", context=64, adapters={"one": adapter}) as llm:
        assert llm.adapters == ("one",)
        np.testing.assert_array_equal(llm.logits(IDS), plain)
        np.testing.assert_allclose(llm.logits(IDS, adapter="one"), wanted, rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(each, marks=slow) for each in ("phi3", "gemma4_e2b", "falcon"))]
)
def test_the_plan_counts_what_adapters_take(name: str, tmp_path: Path) -> None:
    path = ARCH / name / "model.gguf"
    with gguf.read(path) as file:
        arch = file.get_str("general.architecture")
        files = [
            write_adapter(tmp_path / f"{rank}.gguf", arch, random_pairs(path, seed=rank, rank=rank)) for rank in (3, 9)
        ]
        read = [read_adapter(each, file) for each in files]
        counted = adapter_bytes(file, read, 4)
    with forge.load(path, device="cpu", context=64, adapters=dict(zip("ab", files, strict=True))) as llm:
        taken = sum(linear.adapters.nbytes for linear in llm.engine.runner.model.layer_linears())
    assert taken <= counted < 1.2 * taken
    if name == "llama":
        assert counted == taken


def test_a_model_that_fits_without_its_adapters_says_that_it_does_not_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = ARCH / "llama" / "model.gguf"
    adapter = write_adapter(tmp_path / "a.gguf", "llama", random_pairs(path, seed=0, rank=64))
    with gguf.read(path) as file:
        weights = 4 * sum(np.prod(info.shape) for info in file.tensors.values())
    monkeypatch.setattr("forge.backend.numpy.NumpyBackend.free_bytes", lambda _: int(weights) + 400_000)
    forge.load(path, device="cpu", context=64, memory_fraction=1.0).close()
    with pytest.raises(OutOfMemoryError, match=r"model\.gguf: the weights and adapters need 0\.00 GB"):
        forge.load(path, device="cpu", context=64, memory_fraction=1.0, adapters={"a": adapter})


def test_a_tensor_of_the_file_that_no_product_reads_has_no_adapter(tmp_path: Path) -> None:
    """Gemma 4's last layers read the keys of earlier ones, and files may have keys for them."""
    path = ARCH / "llama" / "model.gguf"
    pairs = {"blk.0.attn_q.weight": (np.ones((4, 64), np.float32), np.ones((128, 4), np.float32))}
    adapter = write_adapter(tmp_path / "a.gguf", "llama", pairs)
    with forge.load(path, device="cpu", context=64) as llm, gguf.read(path) as file:
        decoder = llm.engine.runner.model
        for linear in decoder.layer_linears():
            linear.parts = {name: rows for name, rows in linear.parts.items() if "attn_q" not in name}
        with pytest.raises(ForgeError, match=r"a\.gguf: adapts 'blk\.0\.attn_q\.weight', which the model does not"):
            forge.models.attach(decoder, [read_adapter(adapter, file)])


@pytest.mark.parametrize(
    "scales", [(0.0, 8.0, 2.0), (8.0, 0.0, -8.0), (1e-200, 1.0, 1e-3), (3e38, 1e-30, 1.0), (0.0, 0.0, 0.0)]
)
def test_matrices_of_one_product_have_any_scales(scales: tuple[float, ...]) -> None:
    """Queries, keys and values are one product with one scale: zero, tiny, huge and negative ones beside each other."""
    path = ARCH / "llama" / "model.gguf"
    random = random_pairs(path, seed=2, wants=lambda name: name in [f"blk.0.attn_{part}.weight" for part in "qkv"])
    pairs = {name: Pair(a, b, scale) for (name, (a, b)), scale in zip(sorted(random.items()), scales, strict=True)}
    with forge.load(path, device="cpu", context=64) as llm, np.errstate(all="raise", under="ignore"):
        decoder = llm.engine.runner.model
        attach(decoder, [Adapter(path, pairs)])
        linear = next(each for each in decoder.layer_linears() if "blk.0.attn_q.weight" in each.parts)
        found, start, lost = linear.adapters, 0, 1e-30 * max(map(abs, scales))
        for name, rows in linear.parts.items():
            pair = pairs[name]
            got = float(found.scales[0]) * found.b[0, start : start + rows, : pair.rank].astype(np.float64)
            np.testing.assert_allclose(got, pair.scale * pair.b.astype(np.float64), rtol=1e-5, atol=lost)
            start += rows
