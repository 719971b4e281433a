"""Whole models on the kernels, run by the CPU harness: from ids to ids, with replayed decode steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf as package
import numpy as np
import pytest
from gguf_files import Blocks, write_gguf
from harness import COMPILER, Harness
from hf_models import int4_directory
from host_memory import HostMemory, Replayed

import forge
from forge import loading
from forge.formats import ggml, gguf

slow = pytest.mark.slow
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")

ARCH = Path(__file__).parents[1] / "data" / "arch"
MAX_ERROR = 0.005
"""Of float16 activations, in all logits together, as a share of their root mean square."""
NEAR_TIE = 0.05
"""Top-2 gap of float32 logits under which float16 activations may choose the other id."""


OTHER_FAMILIES = [
    *(("qwen2moe", 64), ("gpt_oss", 32), ("gemma4_26b_a4b", 64), ("gemma4_e2b", 32), ("muse_glimmer", 64)),
    *(("granite", 32), ("olmo", 64), ("olmo2", 32), ("exaone4", 64)),
    *(("hunyuan", 64), ("gpt2", 32), ("falcon_40b", 64), ("apertus", 32)),
]
"""Models and wave sizes of the slow tests."""


class HarnessBackend(Replayed, HostMemory, Harness):
    """What engines ask of a backend beside launches."""

    arch = "harness"


@pytest.mark.parametrize(
    ("name", "wave"),
    [
        ("llama", 32),
        ("gemma3", 64),
        *(pytest.param(*row, marks=slow) for row in OTHER_FAMILIES),
    ],
)
def test_a_model_agrees_with_float32(name: str, wave: int, monkeypatch: pytest.MonkeyPatch) -> None:
    agrees_with_float32(ARCH / name / "model.gguf", wave, monkeypatch)


@slow
@pytest.mark.parametrize(("name", "wave"), [("qwen2_awq", 32), ("qwen2_gptq_v2", 64)])
def test_a_directory_of_int4_agrees_with_float32(
    name: str, wave: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    agrees_with_float32(int4_directory(name, tmp_path), wave, monkeypatch)


@slow
@pytest.mark.parametrize(("name", "quantize", "wave"), [("llama", "Q4_K_M", 32), ("mixtral", "MXFP4", 64)])
def test_a_model_that_a_device_quantizes_agrees_with_float32(
    name: str, quantize: str, wave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    agrees_with_float32(ARCH / name / "model.gguf", wave, monkeypatch, quantize)


def agrees_with_float32(path: Path, wave: int, monkeypatch: pytest.MonkeyPatch, quantize: str | None = None) -> None:
    prompts = [[5, 9, 17, 3], list(range(20, 40))]
    with forge.load(path, device="cpu", context=64, quantize=quantize) as llm:
        expected = llm.generate(prompts, max_tokens=8, temperature=0, ignore_eos=True)
        exact = [llm.logits([*c.prompt_ids, *c.ids]) for c in expected]
    device = HarnessBackend(wave)
    monkeypatch.setattr(loading.backends, "select", lambda _: device)
    with forge.load(path, context=64, max_sequences=4, quantize=quantize) as llm:
        for completion, wanted in zip(expected, exact, strict=True):
            got = llm.logits([*completion.prompt_ids, *completion.ids])
            assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < MAX_ERROR
            gap = np.diff(np.sort(wanted, axis=1)[:, -2:], axis=1)[:, 0]
            agree = got.argmax(axis=1) == wanted.argmax(axis=1)
            assert (agree | (gap < NEAR_TIE)).all()
        completions = llm.generate(prompts, max_tokens=8, temperature=0, ignore_eos=True)
    for completion, wanted_ids, wanted in zip(completions, expected, exact, strict=True):
        first = next((i for i, (a, b) in enumerate(zip(completion.ids, wanted_ids.ids, strict=True)) if a != b), None)
        if first is not None:  # only a near tie may part them
            row = wanted[len(wanted_ids.prompt_ids) + first - 1]
            assert np.diff(np.sort(row)[-2:])[0] < NEAR_TIE
    assert device.replays >= 5


@slow
def test_a_stream_beyond_float16_that_no_norm_precedes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms behind OLMo 2's results make one number 100,000 and more, which the matrices weigh as little."""
    file = gguf.read(ARCH / "olmo2" / "model.gguf")
    tensors = {name: file.load(name) for name in file.tensors}
    for name, array in tensors.items():
        if "post_" in name:
            array[7] *= 50_000
        elif name.endswith(("attn_q.weight", "attn_k.weight", "attn_v.weight", "ffn_gate.weight", "ffn_up.weight")):
            array[:, 7] /= 1024
    metadata = {
        key: value if isinstance(value, int | float | str | np.ndarray) else list(value)
        for key, value in file.metadata.items()
    }
    path, ids = write_gguf(tmp_path / "model.gguf", metadata, tensors), [5, 9, 17, 3]
    with forge.load(path, device="cpu", context=64) as llm:
        with llm.capture("*.resid_post") as cache:
            wanted = llm.logits(ids)
        assert max(np.abs(cache[name]).max() for name in cache.requests[0]) > 1e5
    monkeypatch.setattr(loading.backends, "select", lambda _: HarnessBackend(32))
    with forge.load(path, context=64) as llm:
        got = llm.logits(ids)
        assert llm.generate([ids], max_tokens=2, ignore_eos=True)[0].ids[0] == wanted[-1].argmax()
    assert np.sqrt(np.mean((got - wanted) ** 2) / np.mean(wanted**2)) < MAX_ERROR


@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=slow)])
def test_penalties_and_log_probabilities_of_replayed_steps_are_those_of_steps_that_wait(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = forge.SamplingParams(
        max_tokens=8,
        temperature=0,
        ignore_eos=True,
        repetition_penalty=1.5,
        frequency_penalty=0.5,
        logit_bias={3: 2.0},
        logprobs=2,
    )
    found = []
    for waits in (True, False):
        device = HarnessBackend(64)
        device.is_asynchronous = not waits
        monkeypatch.setattr(loading.backends, "select", lambda _, device=device: device)
        with forge.load(ARCH / name / "model.gguf", context=64, max_sequences=4) as llm:
            found.append(llm.generate([[7, 3, 200, 3], [1, 2]], params))
        assert (device.replays == 0) == waits
    for waited, replayed in zip(*found, strict=True):
        assert waited.ids == replayed.ids
        for one, other in zip(waited.logprobs, replayed.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
            assert dict(one.top) == pytest.approx(dict(other.top), abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wave"), [("llama", 32), ("gemma3", 64), ("qwen3", 64)])
def test_deterministic_requests_have_the_same_bits_beside_any_others(
    name: str, wave: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in a batch of replayed steps, in chunks; and a decoded token as one of a prompt."""
    device = HarnessBackend(wave)
    monkeypatch.setattr(loading.backends, "select", lambda _: device)
    prompts = [[5, 9, 17, 3], list(range(20, 53)), [7]]
    params = forge.SamplingParams(max_tokens=6, ignore_eos=True, logprobs=2)

    def loaded(max_sequences: int, max_step_tokens: int) -> forge.LLM:
        settings = forge.EngineConfig(
            context=48,
            max_sequences=max_sequences,
            max_step_tokens=max_step_tokens,
            page_size=16,
            deterministic=True,
        )
        return forge.load(ARCH / name / "model.gguf", engine=settings)

    with loaded(4, 64) as llm:
        together = llm.generate(prompts, params)
        assert device.replays >= 3
        alone = [llm.generate(prompt, params) for prompt in prompts]
        ids = [*prompts[1], *together[1].ids]
        whole = llm.logits(ids)
        again = llm.generate(ids[:-2], params, max_tokens=1)
    assert together[1].logprobs
    assert again.logprobs == together[1].logprobs[-2:-1]
    with loaded(2, 7) as llm:
        chunked = llm.generate(prompts, params)
        np.testing.assert_array_equal(llm.logits(ids), whole)
    for one, two, three in zip(together, alone, chunked, strict=True):
        assert one.ids == two.ids == three.ids
        assert one.logprobs == two.logprobs == three.logprobs


@pytest.mark.parametrize(
    "name", ["llama", *(pytest.param(name, marks=slow) for name in ("gemma3", "stablelm_parallel"))]
)
def test_looking_inside_and_every_parameter_need_ops_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The harness's arrays refuse what would launch a kernel of CuPy's."""
    path, prompt = ARCH / name / "model.gguf", [5, 9, 17, 3, 2, 40]
    with forge.load(path, device="cpu", context=64) as llm:
        # Halves of one product, which CuPy copies by a kernel of its own, are left out.
        points = [one.name for one in llm.hook_points() if not one.name.endswith((".ffn.gate", ".ffn.up"))]
        with llm.capture(points) as wanted:
            llm.logits(prompt)
        weights = llm.attention(prompt)
    device = HarnessBackend(64)
    monkeypatch.setattr(loading.backends, "select", lambda _: device)
    with forge.load(path, context=64, max_sequences=4) as llm:
        with llm.capture(points) as got:
            llm.logits(prompt)
        np.testing.assert_allclose(llm.attention(prompt), weights, atol=0.01)
        np.testing.assert_allclose(llm.attention(prompt, 1), weights[1], atol=0.01)
        options = {"n": 3, "temperature": 0.8, "logprobs": 2, "repetition_penalty": 1.2, "logit_bias": {7: 1.0}}
        completions = llm.generate(prompt, max_tokens=4, seed=1, ignore_eos=True, **options)
    assert [len(completion.ids) for completion in completions] == [4, 4, 4]
    for point in points:
        array = wanted[point]
        np.testing.assert_allclose(got[point], array, atol=0.02 * np.abs(array).max(), err_msg=point)


def test_joined_blocks_are_the_separate_ones_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k, v and gate, up as blocks of Q8_0, one tensor or several: the same planes on a GPU, and the same logits."""
    file = gguf.read(ARCH / "llama" / "model.gguf")
    metadata = {k: v if isinstance(v, int | float | str | np.ndarray) else list(v) for k, v in file.metadata.items()}
    tensors: dict[str, Any] = {}
    for name in file.tensors:
        array = file.load(name)
        kind = package.GGMLQuantizationType.Q8_0
        is_matrix = array.ndim == 2 and name.startswith("blk.")
        tensors[name] = Blocks(8, array.shape, package.quantize(array, kind).tobytes()) if is_matrix else array
    joined = dict(tensors)
    for layer in range(3):
        for whole, parts in (("attn_qkv", ("attn_q", "attn_k", "attn_v")), ("ffn_up", ("ffn_gate", "ffn_up"))):
            blocks = [joined.pop(f"blk.{layer}.{part}.weight") for part in parts]
            shape = sum(b.shape[0] for b in blocks), blocks[0].shape[1]
            joined[f"blk.{layer}.{whole}.weight"] = Blocks(8, shape, b"".join(b.data for b in blocks))
    device = HarnessBackend(64)
    monkeypatch.setattr(loading.backends, "select", lambda _: device)
    found, planes = [], []
    for stored in (tensors, joined):
        with forge.load(write_gguf(tmp_path / "model.gguf", metadata, stored), context=64, max_sequences=2) as llm:
            mixer, feed_forward = llm.engine.runner.model.layers[1]
            planes.append([mixer.attn_qkv.weight, feed_forward.ffn_up.weight])
            found.append(llm.logits([5, 9, 17, 3]))
    for separate, whole in zip(*planes, strict=True):
        assert separate.type is whole.type is ggml.GGMLType.Q8_0
        for a, b in zip(separate.planes, whole.planes, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                np.testing.assert_array_equal(device.to_numpy(a), device.to_numpy(b))
    np.testing.assert_array_equal(*found)


@slow
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_states_and_scores_are_those_of_float32(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ids, path = np.random.default_rng(0).integers(0, 250, 30).tolist(), ARCH / name / "model.gguf"
    host, device = forge.load(path, device="cpu", context=64), HarnessBackend(64)
    monkeypatch.setattr(loading.backends, "select", lambda _: device)
    with host, forge.load(path, context=64, max_sequences=4) as llm:
        others = [[5], [7, 8, 9], ids[20:24]]
        for found, wanted in zip(llm.score(ids[:20], others), host.score(ids[:20], others), strict=True):
            np.testing.assert_allclose(found.logprobs, wanted.logprobs, rtol=0, atol=0.1)
        np.testing.assert_allclose(llm.embed([ids[:5], ids]), host.embed([ids[:5], ids]), rtol=0, atol=0.01)
        state, tokens = llm.prefill(ids), llm.generate(ids, max_tokens=6, ignore_eos=True).ids
        np.testing.assert_allclose(state.logits, llm.logits(ids, -1), rtol=0, atol=0.02)
        state.extend([3, 4])
        state.rollback(-2)
        state.save(tmp_path / "state")
        for one in (state, llm.load_state(tmp_path / "state")):
            assert one.generate("", max_tokens=6, ignore_eos=True).ids == tokens
        with pytest.raises(forge.FormatError, match="is F16, and this model computes in float32"):
            host.load_state(tmp_path / "state")
