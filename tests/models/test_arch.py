"""Each family against logits of `transformers` (scripts/make_goldens.py), and what its files may and may not hold."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import Blocks, write_gguf

import forge
from forge import models
from forge.backend import NUMPY
from forge.config import RopeConfig
from forge.formats import gguf
from forge.models.arch import ARCHS
from forge.models.rope import frequencies

ARCH = Path(__file__).parents[1] / "data" / "arch"
GOLDENS = sorted(path.name for path in ARCH.iterdir())
TOLERANCE = 5e-4


@pytest.mark.parametrize("name", GOLDENS)
def test_logits_equal_transformers_at_every_position(name: str) -> None:
    """A prompt whole, one in chunks; then one token at a time, through the cache and the sampler's path."""
    golden = np.load(ARCH / name / "logits.npz")
    contexts = json.loads((ARCH / name / "meta.json").read_text()).get("context", {})
    for prompt, step_tokens in (("24", None), ("96", 40)):
        settings = forge.EngineConfig(context=contexts.get(prompt, 512), max_step_tokens=step_tokens)
        with forge.load(ARCH / name / "model.gguf", engine=settings) as llm:
            ids, expected = golden[f"ids_{prompt}"].tolist(), golden[f"logits_{prompt}"]
            np.testing.assert_allclose(llm.logits(ids), expected, rtol=0, atol=TOLERANCE)
            if step_tokens is None:
                continue
            more = llm.generate(ids, max_tokens=3, logprobs=5, ignore_eos=True)
            order = np.argsort(-expected[-1], kind="stable")[:5]
            assert [token for token, _ in more.logprobs[0].top] == order.tolist()
            whole = llm.logits([*ids, *more.ids])[len(ids) - 1 : -1]
            assert more.ids == whole.argmax(axis=1).tolist()
            chosen = whole.max(axis=1) - np.log(np.exp(whole).sum(axis=1))
            np.testing.assert_allclose([each.logprob for each in more.logprobs], chosen, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    "name", ["gemma3", "gemma4_e2b", "gpt_oss", "llama4", "ministral3", "phi3_window", "olmo3", "hunyuan", "granite"]
)
def test_attention_weights_equal_transformers_in_every_layer(name: str) -> None:
    """Windows by layer, both RoPE bases, norms of q and k before and behind RoPE, YaRN's magnitude, queries that grow
    with the position, a scale of the scores, sinks, chunks, keys of an earlier layer."""
    golden = np.load(ARCH / name / "logits.npz")
    with forge.load(ARCH / name / "model.gguf") as llm:
        found = llm.attention(golden["ids_24"].tolist())
    np.testing.assert_allclose(found, golden["attention_24"], rtol=0, atol=2e-5)


def test_decoding_with_the_cache_equals_computing_all_at_once() -> None:
    """Windows and layers without rotation, one token at a time over several pages."""
    ids = np.load(ARCH / "exaone4" / "logits.npz")["ids_96"].tolist()
    with forge.load(ARCH / "exaone4" / "model.gguf") as llm:
        sequence = llm.generate(ids[:1], max_tokens=95, logit_bias={}, ignore_eos=True)
        alone = llm.logits([ids[0], *sequence.ids])
        assert [int(token) for token in alone[:-1].argmax(1)] == list(sequence.ids)


@pytest.mark.parametrize("name", ["olmo2", "olmo3", "exaone4"])
def test_a_stream_that_is_held_smaller_gives_the_same_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where products without a norm before them read it as float16."""
    read = models.read_config
    monkeypatch.setattr(models, "read_config", lambda *given: replace(read(*given), stream_scale=1024.0))
    golden = np.load(ARCH / name / "logits.npz")
    with forge.load(ARCH / name / "model.gguf") as llm:
        found = llm.logits(golden["ids_24"].tolist())
        np.testing.assert_allclose(found, golden["logits_24"], rtol=0, atol=TOLERANCE)
        ids = llm.generate([5, 9, 17], max_tokens=2, ignore_eos=True).ids
        assert ids == llm.logits([5, 9, 17, *ids])[2:-1].argmax(axis=1).tolist()


def test_the_stream_is_held_as_small_as_the_norms_of_results_may_make_it_large(tmp_path: Path) -> None:
    """Two layers of 64 numbers have four such norms: a number becomes sqrt(64) * 4 times their weight at most."""
    norms = [f"blk.{layer}.{norm}.weight" for layer in range(2) for norm in ("post_attention_norm", "post_ffw_norm")]
    for size, expected in ((1800.0, 1.0), (1900.0, 2.0), (-1900.0, 2.0), (8000.0, 8.0), (np.nan, 1.0), (np.inf, 1.0)):
        weights = {name: np.where(np.arange(64) == 7, size, 1).astype(np.float32) for name in norms}
        file = gguf.read(rewritten(tmp_path, "olmo2", add=weights))
        assert models.stream_scale(file, models.read_config(file)) == expected


def test_every_architecture_of_the_table_has_a_golden() -> None:
    proven = {gguf.read(ARCH / name / "model.gguf").get_str("general.architecture") for name in GOLDENS}
    assert proven == ARCHS.keys() - {"mistral"}  # mistral is llama's row under another name


def test_longrope_takes_its_factors_by_the_context_asked_for() -> None:
    file = gguf.read(ARCH / "phi3_longrope" / "model.gguf")
    factors = {context: models.read_config(file, context).ropes[0].factors for context in (63, 64, 65, 512, None)}
    short, long = (tuple(file.load(f"rope_factors_{length}.weight").tolist()) for length in ("short", "long"))
    assert factors == {63: short, 64: short, 65: long, 512: long, None: long}


def test_gemma3_of_270m_gets_what_its_file_leaves_unsaid() -> None:
    file = gguf.read(ARCH / "gemma3" / "model.gguf")
    config = models.read_config(file)
    assert config.layer_windows == (16, 16, 16, 16, 16, 0, 16)
    assert config.layer_ropes == (1, 1, 1, 1, 1, 0, 1)
    assert [rope.base for rope in config.ropes] == [1e6, 1e4]


def test_yarn_frequencies_by_hand() -> None:
    """Dim 4, base e**4, context 2 pi e**2: pair 0 turns e**2 times, pair 1 once; betas (e**2, 1) give the ramp 0, 1."""
    e = np.e
    rope = RopeConfig(
        style="neox",
        dim=4,
        base=e**4,
        frequency_scale=0.25,
        yarn_betas=(e**2 * 0.999, 1.001),
        original_context=round(2 * np.pi * e**2),
    )
    np.testing.assert_allclose(frequencies(rope), [1.0, 0.25 * e**-2], rtol=1e-12)
    np.testing.assert_allclose(frequencies(replace(rope, yarn_betas=None)), [0.25, 0.25 * e**-2], rtol=1e-12)


def rewritten(
    tmp_path: Path, name: str, *, drop: str | set[str] = "", add: dict | None = None, keys: dict | None = None
) -> Path:
    """A golden's file with tensors dropped, tensors added, keys changed (None removes one)."""
    drop = {drop} if isinstance(drop, str) else drop
    file = gguf.read(ARCH / name / "model.gguf")
    scalars_or_arrays = (int, float, str, np.ndarray)
    metadata = {k: v if isinstance(v, scalars_or_arrays) else list(v) for k, v in file.metadata.items()} | (keys or {})
    tensors = {tensor: file.load(tensor) for tensor in file.tensors if tensor not in drop} | (add or {})
    path = tmp_path / "model.gguf"
    write_gguf(path, {key: value for key, value in metadata.items() if value is not None}, tensors)
    return path


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "blk.2.ffn_down.weight"),
        ("llama", "token_embd.weight"),
        ("llama", "output_norm.weight"),
        ("qwen2", "blk.1.attn_k.bias"),
        ("qwen3", "blk.0.attn_q_norm.weight"),
        ("gemma2", "blk.3.post_ffw_norm.weight"),
        ("phi3", "blk.0.attn_qkv.weight"),
        ("stablelm", "output_norm.bias"),
        ("llama_bias_tied", "blk.0.attn_v.bias"),
        ("stablelm", "blk.1.ffn_norm.weight"),  # in the first layer it would be the mark of a parallel residual
        ("stablelm", "blk.0.ffn_norm.bias"),
        ("stablelm_parallel", "blk.0.attn_k_norm.weight"),
        ("stablelm_parallel", "blk.1.attn_q_norm.weight"),
        ("qwen3moe", "blk.1.ffn_gate_inp.weight"),
        ("qwen2moe", "blk.0.ffn_up_exps.weight"),
        ("qwen2moe", "blk.0.ffn_gate_inp_shexp.weight"),
        ("gpt2", "position_embd.weight"),
        ("phi2", "output.bias"),
        ("falcon_40b", "blk.1.attn_norm_2.bias"),
        ("olmo2", "blk.0.post_attention_norm.weight"),
        ("seed_oss", "blk.1.post_attention_norm.weight"),
        ("cohere", "blk.1.attn_q_norm.weight"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path: Path, name: str, tensor: str) -> None:
    with pytest.raises(forge.FormatError, match=tensor.replace(".", r"\.")):
        forge.load(rewritten(tmp_path, name, drop=tensor))


JOINED = {"attn_qkv": ("attn_q", "attn_k", "attn_v"), "ffn_up": ("ffn_gate", "ffn_up")}


def other_form(name: str, layers: range, parts: tuple[str, ...] = ("attn_qkv", "ffn_up")) -> tuple[set[str], dict]:
    """The tensors to drop and to add, so that q, k and v (gate and up) of some layers are stored in the other form:
    as one tensor where the golden has several, as several where it has one; weights and biases."""
    file = gguf.read(ARCH / name / "model.gguf")
    config = models.read_config(file)
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    sizes = {"attn_qkv": [heads, kv_heads, kv_heads], "ffn_up": [config.ffn_width] * 2}
    drop: set[str] = set()
    add: dict[str, np.ndarray] = {}
    for layer in layers:
        for joined in parts:
            for kind in ("weight", "bias"):
                whole = f"blk.{layer}.{joined}.{kind}"
                alone = [f"blk.{layer}.{part}.{kind}" for part in JOINED[joined]]
                if alone[0] in file.tensors:
                    drop |= set(alone)
                    add[whole] = np.concatenate([file.load(part) for part in alone])
                elif whole in file.tensors and file.tensor(whole).shape[0] == sum(sizes[joined]):
                    drop.add(whole)
                    add |= dict(zip(alone, np.split(file.load(whole), np.cumsum(sizes[joined])[:-1]), strict=True))
    assert drop
    return drop, add


FORMS = (
    *("llama", "llama_bias_tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "phi3_longrope", "stablelm_parallel"),
    *("starcoder2", "glm4", "gpt2", "gptneox", "falcon_40b", "olmo2"),
)


@pytest.mark.parametrize("layers", [pytest.param("all", marks=pytest.mark.slow), "the second"])
@pytest.mark.parametrize("name", FORMS)
def test_joined_and_separate_tensors_are_the_same_model(tmp_path: Path, name: str, layers: str) -> None:
    """As llama.cpp's `--fuse-qkv` writes them: q, k, v in this order, permuted where they were. Layers may differ."""
    golden = np.load(ARCH / name / "logits.npz")
    count = models.read_config(gguf.read(ARCH / name / "model.gguf")).num_layers
    drop, add = other_form(name, range(count) if layers == "all" else range(1, 2))
    context = json.loads((ARCH / name / "meta.json").read_text()).get("context", {}).get("24", 512)
    path = rewritten(tmp_path, name, drop=drop - add.keys(), add=add)
    with forge.load(path, context=context) as llm:
        found = llm.logits(golden["ids_24"].tolist())
    np.testing.assert_allclose(found, golden["logits_24"], rtol=0, atol=TOLERANCE)
    if layers == "all":
        with forge.load(ARCH / name / "model.gguf", context=context) as llm:
            np.testing.assert_array_equal(found, llm.logits(golden["ids_24"].tolist()))


def test_a_joined_weight_may_have_separate_biases(tmp_path: Path) -> None:
    """Which llama.cpp reads too."""
    golden = np.load(ARCH / "qwen2" / "logits.npz")
    drop, add = other_form("qwen2", range(2))
    biases = {name for name in (*drop, *add) if name.endswith(".bias")}
    path = rewritten(
        tmp_path, "qwen2", drop=drop - add.keys() - biases, add={n: add[n] for n in add if n not in biases}
    )
    with forge.load(path) as llm:
        found = llm.logits(golden["ids_24"].tolist())
    np.testing.assert_allclose(found, golden["logits_24"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "drop", "message"),
    [
        ("llama", (), "'blk.1.attn_q.weight' is in 'blk.1.attn_qkv.weight' as well"),
        ("llama", ("attn_q.weight", "attn_k.weight"), "'blk.1.attn_v.weight' is in 'blk.1.attn_qkv.weight' as well"),
        ("qwen2", ("attn_q.weight", "attn_k.weight", "attn_v.weight"), "'blk.1.attn_q.bias' is in .*qkv.bias' as well"),
        ("qwen2", ("attn_qkv.weight", "attn_k.weight", "attn_qkv.bias"), "'blk.1.attn_k.weight' is missing"),
        ("qwen2", ("attn_qkv.weight", "attn_k.bias", "attn_qkv.bias"), "'blk.1.attn_k.bias' is missing"),
        (
            "llama",
            ("attn_qkv.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight"),
            "attn_qkv.weight' is missing",
        ),
        ("llama", ("attn_qkv.weight", "ffn_gate.weight"), "ffn_gate.weight' is missing"),
    ],
)
def test_half_of_a_form_or_both_are_one_line(tmp_path: Path, name: str, drop: tuple[str, ...], message: str) -> None:
    _, add = other_form(name, range(1, 2), ("attn_qkv",))
    dropped = {f"blk.1.{tensor}" for tensor in drop}
    path = rewritten(tmp_path, name, drop=dropped, add={n: array for n, array in add.items() if n not in dropped})
    with pytest.raises(forge.FormatError, match=message) as caught:
        forge.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("tensor", "shape", "message"),
    [
        ("attn_qkv.weight", (64, 64), r"blk.1.attn_qkv.weight' has shape \(64, 64\), not \(256, 64\)"),
        ("ffn_up.weight", (192, 64), r"blk.1.ffn_up.weight' has shape \(192, 64\), not \(96, 64\)"),
    ],
)
def test_a_joined_tensor_of_another_size_is_one_line(
    tmp_path: Path, tensor: str, shape: tuple[int, ...], message: str
) -> None:
    drop, _ = other_form("llama", range(1, 2), ("attn_qkv",))
    path = rewritten(tmp_path, "llama", drop=drop, add={f"blk.1.{tensor}": np.ones(shape, np.float32)})
    if tensor == "ffn_up.weight":  # beside a gate
        path = rewritten(tmp_path, "llama", add={f"blk.1.{tensor}": np.ones(shape, np.float32)})
    with pytest.raises(forge.FormatError, match=message):
        forge.load(path)


VECTOR = np.ones(64, np.float32)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("llama", "blk.0.attn_q_norm.weight"),
        ("llama", "blk.3.attn_norm.weight"),
        ("qwen3", "blk.0.ffn_gate.bias"),
        ("gemma2", "blk.0.attn_norm.bias"),
        ("llama", "vision.patch_embd.weight"),
        ("stablelm_parallel", "blk.1.ffn_norm.weight"),
        ("stablelm_parallel", "blk.0.ffn_norm.bias"),
        ("stablelm", "blk.1.attn_q_norm.weight"),
        ("olmo", "blk.0.attn_norm.weight"),
        ("olmo2", "blk.0.ffn_norm.weight"),
        ("falcon", "blk.1.attn_norm_2.weight"),
        ("smollm3", "blk.0.attn_q_norm.weight"),
        ("cohere2", "output.weight"),
        ("apertus", "blk.0.ffn_gate.weight"),
    ],
)
def test_a_tensor_without_a_place_is_named(tmp_path: Path, name: str, tensor: str) -> None:
    with pytest.raises(forge.FormatError, match=f"{tensor}.*no place"):
        forge.load(rewritten(tmp_path, name, add={tensor: VECTOR}))


def test_norms_of_heads_have_a_weight_for_each(tmp_path: Path) -> None:
    path = rewritten(tmp_path, "stablelm_parallel", add={"blk.1.attn_k_norm.weight": np.ones(16, np.float32)})
    with pytest.raises(forge.FormatError, match=r"blk.1.attn_k_norm.weight' has shape \(16,\), not \(2, 16\)"):
        forge.load(path)


def test_tensors_that_may_be_there_change_nothing(tmp_path: Path) -> None:
    """Rotation tables by name, and a layer of multi-token prediction behind the model's own."""
    extra = {
        "blk.0.attn_rot_embd.weight": VECTOR,
        "blk.3.nextn.eh_proj.weight": np.ones((64, 128), np.float32),
        "blk.3.attn_norm.weight": VECTOR,
    }
    path = rewritten(tmp_path, "llama", add=extra, keys={"llama.block_count": 4, "llama.nextn_predict_layers": 1})
    golden = np.load(ARCH / "llama" / "logits.npz")
    with forge.load(path) as llm:
        np.testing.assert_allclose(llm.logits(golden["ids_24"].tolist()), golden["logits_24"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"general.architecture": "rwkv9"}, forge.UnsupportedError, "'rwkv9' is not supported; of the"),
        ({"general.architecture": "qwen9"}, forge.UnsupportedError, "'qwen9' is not supported.*like it: qwen"),
        ({"general.architecture": None}, forge.FormatError, "general.architecture.*missing"),
        ({"llama.block_count": None}, forge.FormatError, "llama.block_count.*missing"),
        ({"llama.block_count": 0}, forge.FormatError, "llama.block_count"),
        ({"llama.block_count": 2**31}, forge.FormatError, "llama.block_count"),
        ({"llama.embedding_length": 65}, forge.FormatError, "token_embd.weight"),
        ({"llama.attention.head_count": 0}, forge.FormatError, "head_count"),
        ({"llama.attention.head_count": 3}, forge.FormatError, "evenly|shape"),
        ({"llama.attention.head_count": "4"}, forge.FormatError, "head_count"),
        ({"llama.attention.head_count_kv": 8}, forge.FormatError, "head_count_kv"),
        ({"llama.attention.head_count": [4, 2, 4]}, forge.UnsupportedError, "differs between layers"),
        ({"llama.attention.head_count_kv": [2, 0, 2]}, forge.FormatError, "head_count_kv"),
        ({"llama.attention.shared_kv_layers": 1}, forge.UnsupportedError, "shared_kv_layers"),
        ({"llama.attention.value_length": 16}, forge.UnsupportedError, "different lengths"),
        ({"llama.feed_forward_length": 2**30}, forge.FormatError, "ffn_gate.weight.*shape"),
        ({"llama.rope.dimension_count": 33}, forge.FormatError, "dimension_count"),
        ({"llama.rope.dimension_count": 7}, forge.FormatError, "odd"),
        ({"llama.rope.freq_base": float("nan")}, forge.FormatError, "freq_base"),
        ({"llama.rope.freq_base": 0.0}, forge.FormatError, "freq_base"),
        ({"llama.rope.scaling.type": "magic"}, forge.UnsupportedError, "'magic'"),
        ({"llama.rope.scaling.factor": -2.0}, forge.FormatError, "scaling.factor"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, forge.FormatError, "layer_norm_rms_epsilon"),
        ({"llama.attention.layer_norm_rms_epsilon": -1.0}, forge.FormatError, "layer_norm_rms_epsilon"),
        ({"llama.context_length": 0}, forge.FormatError, "context_length"),
        ({"llama.expert_count": 8}, forge.FormatError, "llama.expert_used_count"),
        ({"llama.expert_count": 8, "llama.expert_used_count": 9}, forge.FormatError, "expert_used_count.* to 8"),
        ({"llama.expert_count": 513, "llama.expert_used_count": 9}, forge.UnsupportedError, "513 experts"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, forge.ForgeError, "token"),
    ],
)
def test_impossible_keys_are_one_line_that_names_them(
    tmp_path: Path, keys: dict, error: type[forge.ForgeError], message: str
) -> None:
    path = rewritten(tmp_path, "llama", keys=keys)
    with pytest.raises(error, match=message) as caught:
        forge.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "keys", "error", "message"),
    [
        ("granite", {"granite.logit_scale": None}, forge.FormatError, "granite.logit_scale.*missing"),
        ("granite", {"granite.residual_scale": 0.0}, forge.FormatError, "granite.residual_scale"),
        ("cohere2", {"cohere2.attention.sliding_window": None}, forge.FormatError, "sliding_window.*missing"),
        ("gpt_oss", {"gpt-oss.attention.sliding_window": 0}, forge.FormatError, "sliding_window.*from 1 to"),
        ("apertus", {"xielu.alpha_n": None}, forge.FormatError, "xielu.alpha_n.*missing"),
        ("apertus", {"xielu.beta": [0.5] * 3}, forge.FormatError, "xielu.beta.*3 entries"),
        ("gptneox", {"gptneox.use_parallel_residual": "yes"}, forge.FormatError, "use_parallel_residual"),
        ("glm4", {"glm4.rope.dimension_sections": [8, 12, 12, 0]}, forge.UnsupportedError, "dimension_sections"),
        ("falcon", {"falcon.attention.max_alibi_bias": 8.0}, forge.UnsupportedError, "max_alibi_bias = 8.0"),
        ("gpt2", {"gpt2.hidden_activation": "relu"}, forge.UnsupportedError, "activation 'relu' is not supported"),
        ("smollm3", {"smollm3.attention.causal": False}, forge.UnsupportedError, "causal = False"),
    ],
)
def test_keys_of_some_families_are_checked(
    tmp_path: Path, name: str, keys: dict, error: type[forge.ForgeError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        forge.load(rewritten(tmp_path, name, keys=keys))
    assert "\n" not in str(caught.value)


def test_layers_without_rotation_are_those_that_the_family_says(tmp_path: Path) -> None:
    """Every fourth; those without a window, where there is one; none of a granite whose file says so."""

    def rotated(path: Path) -> list[bool]:
        config = models.read_config(gguf.read(path))
        return [config.ropes[index].dim > 0 for index in config.layer_ropes]

    for name in ("smollm3", "cohere2", "exaone4"):
        assert rotated(ARCH / name / "model.gguf") == [True, True, True, False]
    without = {"exaone4.attention.sliding_window": None}
    assert rotated(rewritten(tmp_path, "exaone4", keys=without)) == [True] * 4
    assert rotated(rewritten(tmp_path, "granite", keys={"granite.rope.scaling.finetuned": False})) == [False] * 2
    assert not any(rotated(ARCH / "gpt2" / "model.gguf"))


def test_a_context_beyond_learned_positions_is_refused() -> None:
    with pytest.raises(forge.ParameterError, match=r"learned 128 positions.*use context=128"):
        forge.load(ARCH / "gpt2" / "model.gguf", context=129)


def test_heads_given_per_layer_that_agree_are_one_number(tmp_path: Path) -> None:
    path = rewritten(tmp_path, "llama", keys={"llama.attention.head_count_kv": [2, 2, 2]})
    assert models.read_config(gguf.read(path)).num_kv_heads == 2


def test_a_tensor_with_infinite_weights_ends_a_request_with_an_error(tmp_path: Path) -> None:
    path = rewritten(tmp_path, "llama", add={"output_norm.weight": np.full(64, np.nan, np.float32)})
    with forge.load(path) as llm:
        completion = llm.generate([1, 2, 3], max_tokens=4)
        assert (completion.finish_reason, completion.ids) == ("error", [])
        assert all(pool.num_free == pool.num_pages for pool in llm.engine.pools)


def test_what_does_not_fit_is_said_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    path = ARCH / "llama" / "model.gguf"
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: 300_000)
    with pytest.raises(forge.OutOfMemoryError, match=r"weights need 0\.00 GB.* larger memory_fraction$"):
        forge.load(path)
    page = 2 * 3 * 64 * 2 * 32 * 4  # k and v, layers, P, G, D, bytes
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: round((4 * 171_000 + 3 * page) / 0.9))
    with pytest.raises(forge.OutOfMemoryError, match=r"context of 400 .* use context=\d+$"):
        forge.load(path, context=400)
    with forge.load(path) as llm:
        assert llm.context in (128, 192)
        assert any("cut to fit" in note for note in llm.notes)
        weights = 4 * sum(math.prod(info.shape) for info in gguf.read(path).tensors.values())
        state = sum(array.nbytes for cache in llm.engine.runner.state.caches for array in cache.arrays)
        assert weights + state <= 0.9 * NUMPY.free_bytes()


def test_gemma2_has_soft_caps_where_its_file_names_none(tmp_path: Path) -> None:
    path = rewritten(
        tmp_path, "gemma2", keys={"gemma2.attn_logit_softcapping": None, "gemma2.final_logit_softcapping": None}
    )
    config = models.read_config(gguf.read(path))
    assert (config.attention_softcap, config.final_softcap) == (50.0, 30.0)  # Gemma 2's, arXiv:2408.00118


def test_too_little_address_space_is_one_line() -> None:
    program = (
        "import resource, forge; forge.load; import forge.loading;"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, 3 << 30));"
        f"llm = forge.load({str(ARCH / 'llama' / 'model.gguf')!r}); print(len(llm.generate('a', max_tokens=3).ids))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("3\n", "")


def peak_mib(program: str) -> int:
    """Peak resident memory of a Python program, MiB. (getrusage would count what it inherits from this process.)"""
    program += "; print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-2]) // 1024


@pytest.mark.slow
def test_small_files_with_extreme_sizes_stay_small_in_memory(tmp_path: Path) -> None:
    """Many heads or a wide feed-forward make shorter steps; a huge context makes neither pages nor tables."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32) * 0.1

    heads, width, ffn = 16_384, 2, 1 << 18
    layer = {
        "attn_q": (2 * heads, width),
        "attn_k": (2, width),
        "attn_v": (2, width),
        "attn_output": (width, 2 * heads),
    }
    layer |= {"ffn_gate": (ffn, width), "ffn_up": (ffn, width), "ffn_down": (width, ffn)}
    tensors = {f"blk.0.{name}.weight": normal(*shape) for name, shape in layer.items()}
    norms = ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm")
    tensors |= {f"{name}.weight": np.ones(width, np.float32) for name in norms}
    keys = {
        "llama.block_count": 1,
        "llama.context_length": 2**31 - 1,
        "llama.embedding_length": width,
        "llama.feed_forward_length": ffn,
        "llama.attention.head_count": heads,
        "llama.attention.head_count_kv": 1,
        "llama.attention.key_length": 2,
        "llama.attention.value_length": 2,
        "llama.rope.dimension_count": 2,
        "llama.vocab_size": None,
    }
    vocabulary = gguf.read(ARCH / "llama" / "model.gguf").tensor("token_embd.weight").shape[0]
    whole = gguf.read(ARCH / "llama" / "model.gguf")
    metadata = {k: v if isinstance(v, int | float | str | np.ndarray) else list(v) for k, v in whole.metadata.items()}
    metadata = {k: v for k, v in (metadata | keys).items() if v is not None}
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata, tensors | {"token_embd.weight": normal(vocabulary, width)})
    load = f"import forge; llm = forge.load({str(path)!r}); "
    load += f"llm.generate([1] * 100, stop_token_ids=range({vocabulary}), "
    assert peak_mib(load + "max_tokens=2)") < 1024
    assert peak_mib(load + "max_tokens=None)") < 1024


def test_a_tensor_type_that_cannot_be_converted_is_named_with_its_file(tmp_path: Path) -> None:
    integers = Blocks(26, (96, 64), bytes(96 * 64 * 4))  # I32
    path = rewritten(tmp_path, "llama", add={"blk.1.ffn_up.weight": integers})
    with pytest.raises(forge.UnsupportedError, match=r"model\.gguf: tensor 'blk.1.ffn_up.weight': type I32"):
        forge.load(path)


def test_a_model_without_finite_logits_has_no_perplexity(tmp_path: Path) -> None:
    path = rewritten(tmp_path, "llama", add={"output_norm.weight": np.full(64, np.nan, np.float32)})
    with forge.load(path) as llm, pytest.raises(forge.NumericsError, match="not finite"):
        llm.perplexity([1, 2, 3, 4])


def test_a_text_that_cannot_fit_is_refused_before_it_is_encoded() -> None:
    with forge.load(ARCH / "llama" / "model.gguf") as llm, pytest.raises(forge.ContextLengthError, match="2000000"):
        llm.generate("a" * 2_000_000)
