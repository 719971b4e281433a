"""What `forge kernels build` compiles: the recording of a model is what engines launch when they run requests."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness import COMPILER, Harness
from host_memory import HostMemory, Replayed

import forge
from forge import loading
from forge.backend import sources
from forge.config import EngineConfig
from forge.devtools.recorder import Recorder
from forge.devtools.variants import model_variants, record
from forge.formats.gguf import GGUF
from forge.ops.norm import Normed, norm
from forge.tuning.spec import Row
from forge.tuning.table import KERNELS

DATA = Path(__file__).parents[1] / "data" / "arch"
LAUNCHING = [
    *("gemma2", "gemma3", "llama", "phi3", "phi3_longrope", "qwen2", "qwen3", "qwen2moe", "stablelm", "starcoder2"),
    *("apertus", "exaone4", "falcon_40b", "gpt2", "hunyuan", "olmo", "olmo2"),
]
"""Models that together launch every kind of kernel."""
NUM_CUS = 4
SEQUENCES = 20
"""More than tiles of 16 rows take, and no power of two."""


class HarnessBackend(Replayed, HostMemory, Harness):
    """The CPU harness as an engine's backend. It compiles nothing ahead."""

    arch = "harness"


class WithoutWarmUp(Recorder):
    """A recorder that notes what requests launch, and not what the warm-up does."""

    def prepare(self, run: object, progress: object = None) -> None:
        pass


def run_requests(
    device: Any,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sequences: int = SEQUENCES,
    *,
    is_deterministic: bool = False,
) -> None:
    """Load a model on a device; prompts of all row counts, decode steps, every kind of sampling, passes, hooks."""
    monkeypatch.setattr(loading.backends, "select", lambda _: device)
    settings = EngineConfig(context=128, max_sequences=sequences, deterministic=is_deterministic)
    with forge.load(path, engine=settings) as llm:
        every = forge.SamplingParams(max_tokens=2, ignore_eos=True, seed=1, logprobs=2, repetition_penalty=1.5)
        for rows in (1, 5, 8, 9, 16, 17, 32, 33, 64, 65, 70):
            llm.generate([[5] * rows], replace(every, repetition_penalty=1.0, logprobs=None))
        for batch in (2, 8, 9, 16, 17, sequences):
            llm.generate([[5, 6]] * min(batch, sequences), every)
        llm.generate([[5] * 30], replace(every, n=3))
        llm.generate([[5, 6]] * 2, max_tokens=3, temperature=0, ignore_eos=True)
        for rows in (2, 20, 40, 70):
            llm.logits([5] * rows)
        llm.attention([5, 6, 7], 0)
        with llm.capture("*.resid_post"):
            llm.logits([5, 6, 7])


def recorded(path: Path, arch: str, sequences: int = SEQUENCES, num_cus: int = NUM_CUS) -> set[sources.Variant]:
    device = Recorder(arch, num_cus)
    record(path, device, EngineConfig(context=128, max_sequences=sequences))
    return set(device.variants)


QUICK = {"gemma3": (1, SEQUENCES)} | dict.fromkeys(("llama", "phi3_window", "stablelm_parallel"), (SEQUENCES,))
RECORDED = [
    pytest.param(name, sequences, marks=() if sequences in QUICK.get(name, ()) else pytest.mark.slow)
    for name in sorted({*LAUNCHING, *QUICK})
    for sequences in (1, SEQUENCES)
]


@pytest.mark.parametrize(("name", "sequences"), RECORDED)
def test_the_recording_of_a_model_is_what_its_requests_launch(
    name: str, sequences: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = WithoutWarmUp("gfx942", NUM_CUS)
    run_requests(device, DATA / name / "model.gguf", monkeypatch, sequences)
    assert set(device.variants) == recorded(DATA / name / "model.gguf", "gfx942", sequences)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gemma3", "llama", "starcoder2"])
def test_so_it_is_of_a_deterministic_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path, found = DATA / name / "model.gguf", WithoutWarmUp("gfx942", NUM_CUS)
    run_requests(found, path, monkeypatch, is_deterministic=True)
    device = Recorder("gfx942", NUM_CUS)
    record(path, device, EngineConfig(context=128, max_sequences=SEQUENCES, deterministic=True))
    assert set(found.variants) == set(device.variants)
    files = {variant.file for variant in device.variants}
    assert "attention_split_kv" in files
    assert not files & {"attention_decode", "attention_prefill", "matvec_f16", "matvec_quant"}
    built = model_variants(path, "gfx942", is_deterministic=True)
    assert {variant.file for variant in built} == files


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")
@pytest.mark.parametrize("name", LAUNCHING)
def test_the_recording_of_a_model_is_what_the_harness_launches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = HarnessBackend(32, cores=NUM_CUS)
    run_requests(device, DATA / name / "model.gguf", monkeypatch)
    assert device.variants == recorded(DATA / name / "model.gguf", "gfx1100")


@pytest.mark.parametrize("name", ["llama", "gemma3", "starcoder2"])
def test_a_recording_reads_no_weights(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: GGUF, name: str, *_: object, **__: object) -> None:
        raise AssertionError(f"{name} is read")

    monkeypatch.setattr(GGUF, "raw", refuse)
    monkeypatch.setattr(GGUF, "load_rows", refuse)
    assert model_variants(DATA / name / "model.gguf", "gfx1100")


def test_usual_models_are_recorded_without_files() -> None:
    found = model_variants(None, "gfx1100")
    formats = {dict(variant.defines)["FORMAT"] for variant in found if variant.file == "matvec_quant"}
    assert formats == {8, 12, 14}  # Q8_0, Q4_K, Q6_K
    dims = {dict(variant.defines)["HEAD_DIM"] for variant in found if variant.file == "attention_decode"}
    assert dims == {64, 128}
    assert "expert_fetch" in {variant.file for variant in found}  # of a mixture that does not fit


def test_on_hopper_attention_of_one_prompt_and_of_several_is_recorded() -> None:
    """Their tiles differ: what the warm-up leaves out is compiled while requests wait."""
    device = Recorder("sm_90", 132, has_wgmma=True)
    record(None, device)
    names = "KEYS", "STAGES", "BLOCK"
    found = {
        (defines["HEAD_DIM"], *(defines[name] for name in names))
        for variant in device.variants
        if variant.file == "attention_wgmma" and (defines := dict(variant.defines))
    }
    row = KERNELS["attention_wgmma"].row
    chosen = {(dim, rows): row("sm_90", {"dim": dim, "rows": rows}) for dim in (64, 128) for rows in (1, 2, 200)}
    assert found == {(dim, *(choice[name] for name in names)) for (dim, _), choice in chosen.items()}


def test_a_model_has_few_variants_each_once() -> None:
    found = model_variants(DATA / "llama" / "model.gguf", "gfx1100")
    assert len(found) == len(set(found)) < 25
    counts = Counter(variant.file for variant in found)
    assert {"norm", "rope", "decode_state", "sample", "penalize", "logprobs", "kv_cache"} <= {*counts}
    assert counts["attention_prefill"] == 1


def test_a_recorder_of_many_compute_units_misses_nothing_that_fewer_launch() -> None:
    path = DATA / "llama" / "model.gguf"
    most = set(model_variants(path, "gfx1100"))
    for num_cus in (1, 8, 60, 304):
        device = Recorder("gfx1100", num_cus)
        record(path, device)
        assert set(device.variants) <= most


def test_every_architecture_has_the_variants_of_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    path = DATA / "llama" / "model.gguf"
    kernel = replace(KERNELS["norm"], rows=(Row({}, (64,), "gfx11"), *KERNELS["norm"].rows))
    usual = set(model_variants(path, "gfx1030"))
    monkeypatch.setitem(KERNELS, "norm", kernel)
    device = Recorder("gfx1100")
    normed = Normed(np.empty((1, 4096), np.float32), None, np.empty(4096, np.float32), None, 1e-6, is_rms=True)
    device.launch(norm, (normed,), {"out": "act"})
    (variant,) = device.variants
    assert ("BLOCK", 64) in variant.defines
    assert set(model_variants(path, "gfx1030")) == usual
