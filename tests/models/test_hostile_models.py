"""Whole models with forged numbers, tensors and names: one clear line or a request that ends, and little memory."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import gguf as _gguf  # noqa: F401  (forge imports it for rare tensor types: not to be counted)
import numpy as np
import pytest
from gguf_files import ARR, BOOL, F32, F64, I32, I64, U32, U64, Blocks, Typed, write_gguf
from table_rows import row

import forge
from forge import FormatError, UnsupportedError, models
from forge.devtools.recorder import Recorder
from forge.formats import gguf

DATA = Path(__file__).parents[1] / "data"
MAX_BYTES = 64 << 20
PROMPT = [71, 72, 3]
INF, NAN = float("inf"), float("nan")


@contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MAX_BYTES, f"{peak / 1e6:.0f} MB"


@cache
def golden(arch: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Key-values and float32 tensors of a tiny model."""
    with gguf.read(DATA / "arch" / arch / "model.gguf") as file:
        keys = {
            key: value if isinstance(value, int | float | str | np.ndarray) else list(value)
            for key, value in file.metadata.items()
        }
        return keys, {name: file.load(name) for name in file.tensors}


@pytest.fixture
def forged(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny model with keys and tensors changed; None removes one. `{}` in a key stands for its family."""

    def write(
        arch: str = "llama", keys: Mapping[str, Any] | None = None, tensors: Mapping[str, Any] | None = None
    ) -> Path:
        metadata, weights = golden(arch)
        family = metadata["general.architecture"]
        metadata = metadata | {key.format(family): value for key, value in (keys or {}).items()}
        path: Path = write_gguf(
            tmp_path / "forged.gguf",
            {key: value for key, value in metadata.items() if value is not None},
            {name: value for name, value in (weights | dict(tensors or {})).items() if value is not None},
        )
        return path

    return write


def refusal(path: Path, error: type[forge.ForgeError]) -> str:
    """What load says: one line, not long, that names the file."""
    with little_memory(), pytest.raises(error) as caught:
        forge.load(path, device="cpu")
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message
    assert len(message) < len(str(path)) + 300
    assert str(path) in message
    return message


def is_refused(path: Path) -> bool:
    try:
        with gguf.read(path) as file:
            models.read_config(file)
    except FormatError:
        return True
    return False


COUNTS = [
    *("context_length", "embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    *("attention.key_length", "attention.sliding_window", "rope.scaling.original_context_length", "expert_count"),
]
WRONG_COUNTS = {
    "negative": Typed(I32, -1),
    "least": Typed(I64, -(2**63)),
    "2**62": Typed(U64, 2**62),
    "2**64 - 1": Typed(U64, 2**64 - 1),
    "float": 64.0,
    "NaN": NAN,
    "boolean": True,
    "strings": ["64"],
    "nested": Typed(ARR, [[64]]),
}


@pytest.mark.parametrize("key", COUNTS)
def test_a_count_that_is_none(forged: Callable[..., Path], key: str) -> None:
    for name, value in WRONG_COUNTS.items():
        with row(name):
            assert f"'llama.{key}'" in refusal(forged(keys={f"{{}}.{key}": value}), FormatError)


NUMBERS = [
    ("llama", "rope.freq_base"),
    ("llama", "rope.scaling.factor"),
    ("llama", "rope.scale_linear"),
    ("llama", "rope.scaling.attn_factor"),
    ("llama", "attention.scale"),
    ("llama", "attention.temperature_scale"),
    ("llama", "attention.layer_norm_rms_epsilon"),
    ("stablelm", "attention.layer_norm_epsilon"),
    ("gemma2", "attn_logit_softcapping"),
    ("gemma2", "final_logit_softcapping"),
    ("gemma3", "rope.freq_base_swa"),
    ("qwen2_yarn", "rope.scaling.yarn_beta_fast"),
    ("qwen2_yarn", "rope.scaling.yarn_beta_slow"),
    ("qwen2_yarn", "rope.scaling.yarn_attn_factor"),
    ("qwen2_yarn", "rope.scaling.yarn_log_multiplier"),
]
WRONG_NUMBERS = {"NaN": NAN, "-inf": -INF, "inf, float64": Typed(F64, INF), "boolean": True, "numbers": [1.0, 1.0]}


@pytest.mark.parametrize(("arch", "key"), NUMBERS)
def test_a_number_that_is_none(forged: Callable[..., Path], arch: str, key: str) -> None:
    for name, value in WRONG_NUMBERS.items():
        with row(name):
            message = refusal(forged(arch, {f"{{}}.{key}": value}), FormatError)
            assert f".{key}' should be a finite number" in message


@pytest.mark.parametrize(
    ("arch", "keys", "error", "words"),
    [
        ("gemma2", {"{}.attn_logit_softcapping": -1.0}, FormatError, "attn_logit_softcapping"),
        ("gemma3", {"{}.rope.freq_base_swa": 0.5}, FormatError, "freq_base_swa"),
        ("gemma3", {"{}.attention.sliding_window_pattern": [True]}, FormatError, "1 entries for 7 layers"),
        ("gemma3", {"{}.attention.sliding_window_pattern": Typed(BOOL, [])}, FormatError, "0 entries"),
        (
            "gemma3",
            {"{}.attention.sliding_window_pattern": Typed(BOOL, [True] * 8)},
            FormatError,
            "8 entries for 7 layers",
        ),
        ("gemma3", {"{}.attention.sliding_window": Typed(U32, [16] * 6)}, FormatError, "6 entries for 7 layers"),
        ("gemma3", {"{}.attention.sliding_window_pattern": -6}, FormatError, "sliding_window_pattern"),
        ("gemma3", {"{}.attention.sliding_window_pattern": "6"}, FormatError, "sliding_window_pattern"),
        ("qwen2_yarn", {"{}.rope.freq_base": 1.0}, FormatError, "rope.freq_base above 1"),
        ("qwen2_yarn", {"{}.rope.scaling.yarn_beta_fast": 0.0}, FormatError, "yarn_beta_fast"),
        ("qwen2_yarn", {"{}.rope.scaling.original_context_length": 0}, FormatError, "original_context_length"),
        ("llama", {"{}.rope.scaling.type": 3}, FormatError, "rope.scaling.type"),
        ("llama", {"{}.block_count": 1024}, FormatError, "'blk.3.attn_norm.weight' is missing"),
        ("llama", {"{}.block_count": 2}, FormatError, "has no place"),
        ("llama", {"{}.nextn_predict_layers": 3}, FormatError, "nextn_predict_layers"),
        ("llama", {"{}.embedding_length": Typed(I32, [-64, -64])}, FormatError, "embedding_length"),
        ("llama", {"{}.attention.head_count": 2**31 - 1, "{}.attention.key_length": None}, FormatError, "key_length"),
        ("llama", {"general.architecture": 3}, FormatError, "general.architecture"),
        ("llama", {"general.architecture": "a\n\x1b[31mb"}, UnsupportedError, r"a\n\x1b[31mb"),
        ("llama", {"tokenizer.ggml.pre": "y" * 100_000}, UnsupportedError, "tokenizer.ggml.pre"),
        ("llama", {"tokenizer.ggml.model": None}, FormatError, "tokenizer.ggml.model"),
        ("llama", {"tokenizer.ggml.tokens": Typed(U32, [1, 2])}, FormatError, "tokenizer.ggml.tokens"),
        ("llama", {"tokenizer.ggml.token_type": Typed(I32, [1] * 319)}, FormatError, "319 entries for 320 tokens"),
        ("llama", {"tokenizer.ggml.bos_token_id": "320"}, FormatError, "bos_token_id is not an integer"),
        ("llama", {"tokenizer.chat_template": 3}, FormatError, "tokenizer.chat_template is not a string"),
        ("llama", {"tokenizer.chat_template": "x" * (2 << 20)}, forge.ChatTemplateError, "2,097,152 characters"),
        ("gpt_oss", {"{}.attention.key_length_swa": 8, "{}.attention.scale": 0.25}, UnsupportedError, "lengths"),
        (
            "gpt_oss",
            {
                "{}.attention.key_length_swa": 8,
                "{}.attention.value_length_swa": 8,
                "{}.attention.scale": 0.25,
            },
            FormatError,
            "layer 0 rotates 16 numbers of heads that have 8",
        ),
        ("glm4", {"{}.rope.dimension_sections": Typed(ARR, [[1], [1, 2]])}, UnsupportedError, "an array of 2 is not"),
        ("mixtral", {"{}.expert_weights_scale": 1e30}, FormatError, "expert_weights_scale"),
        ("llama", {"tokenizer.ggml.suppress_tokens": Typed(I32, [7] * 5000)}, FormatError, "holds 5000 ids"),
        ("llama", {"split.count": 2, "split.no": 0}, FormatError, "*-00001-of-00002.gguf"),
    ],
)
def test_a_forged_key(
    forged: Callable[..., Path], arch: str, keys: dict[str, Any], error: type[forge.ForgeError], words: str
) -> None:
    assert words in refusal(forged(arch, keys), error)


@pytest.mark.parametrize("count", [0, 1, 2, 4, 1000])
@pytest.mark.parametrize("key", [key for key in COUNTS if key.startswith(("attention.", "feed_"))])
def test_a_per_layer_array_of_another_length_than_the_layers(forged: Callable[..., Path], key: str, count: int) -> None:
    value = {"attention.head_count": 4, "attention.head_count_kv": 2, "feed_forward_length": 96}.get(key, 32)
    path = forged(keys={f"{{}}.{key}": Typed(U32, [value] * count)})
    assert f"key 'llama.{key}' has {count} entries for 3 layers" in refusal(path, FormatError)


def test_per_layer_arrays_cover_the_layers_that_are_not_run(forged: Callable[..., Path]) -> None:
    """As llama.cpp counts: with those of multi-token prediction, which may differ."""
    for heads, right in (([2, 2, 2], True), ([2, 2], False), ([2, 2, 0], True), ([2, 0, 2], False)):
        keys = {"{}.nextn_predict_layers": 1, "{}.attention.head_count_kv": Typed(U32, heads)}
        with gguf.read(forged(keys=keys)) as file:
            if right:
                assert (models.read_config(file).num_layers, models.read_config(file).num_kv_heads) == (2, 2)
            else:
                with pytest.raises(forge.ForgeError, match="head_count_kv"):
                    models.read_config(file)


def full(*shape: int, value: float = 1.0) -> np.ndarray[Any, Any]:
    return np.full(shape, value, np.float32)


def numbered(type: int, *shape: int, item_bytes: int) -> Blocks:
    return Blocks(type, shape, bytes(int(np.prod(shape)) * item_bytes))


@pytest.mark.parametrize(
    ("arch", "tensors", "error", "words"),
    [
        ("llama", {"token_embd.weight": full(320 * 64)}, FormatError, "token_embd.weight has shape (20480,)"),
        ("llama", {"token_embd.weight": full(1, 320, 64)}, FormatError, "token_embd.weight has shape (1, 320, 64)"),
        ("llama", {"token_embd.weight": full(64, 320)}, FormatError, "token_embd.weight has shape (64, 320)"),
        ("llama", {"token_embd.weight": full(321, 64)}, FormatError, "320 tokens, the embedding 321 rows"),
        ("llama", {"token_embd.weight": full(319, 64)}, FormatError, "320 tokens, the embedding 319 rows"),
        ("llama", {"output.weight": full(321, 64)}, FormatError, "'output.weight' has shape (321, 64)"),
        ("llama", {"blk.1.ffn_up.weight": full(96, 64, 1)}, FormatError, "'blk.1.ffn_up.weight' has shape (96, 64, 1)"),
        ("llama", {"blk.0.attn_norm.weight": full(1, 64)}, FormatError, "'blk.0.attn_norm.weight' has shape (1, 64)"),
        (
            "llama",
            {"blk.0.attn_norm.weight": numbered(26, 64, item_bytes=4)},
            UnsupportedError,
            "attn_norm.weight': type I32",
        ),
        (
            "llama",
            {"output_norm.weight": numbered(28, 64, item_bytes=8)},
            UnsupportedError,
            "'output_norm.weight': type F64",
        ),
        ("llama", {"rope_freqs.weight": full(15)}, FormatError, "'rope_freqs.weight' should be 16 positive"),
        ("llama", {"rope_freqs.weight": full(1, 16)}, FormatError, "'rope_freqs.weight' should be 16 positive"),
        ("llama", {"rope_freqs.weight": full(16, value=NAN)}, FormatError, "'rope_freqs.weight' should be 16 positive"),
        ("llama", {"rope_freqs.weight": full(16, value=0.0)}, FormatError, "'rope_freqs.weight' should be 16 positive"),
        (
            "llama",
            {"rope_freqs.weight": full(16, value=-1.0)},
            FormatError,
            "'rope_freqs.weight' should be 16 positive",
        ),
        ("muse_glimmer", {"blk.0.attn_gate.weight": full(48, 32)}, FormatError, "has 48 rows for 4 heads"),
        ("muse_glimmer", {"blk.0.attn_gate.weight": full(33, 32)}, FormatError, "has 33 rows for 4 heads"),
        (
            "muse_glimmer",
            {f"blk.{i}.attn_gate.weight": None for i in range(4)},
            FormatError,
            "attn_gate.weight' is miss",
        ),
        ("muse_glimmer", {"blk.1.attn_gate.weight": full(4, 32)}, FormatError, "'blk.1.attn_gate.weight' has shape"),
        ("gpt_oss", {"blk.1.attn_sinks.weight": full(3)}, FormatError, "'blk.1.attn_sinks.weight' has shape (3,)"),
        ("gpt_oss", {"blk.1.attn_sinks.weight": full(4, value=INF)}, FormatError, "not finite"),
        ("gpt_oss", {"blk.1.ffn_up_exps.bias": None}, FormatError, "'blk.1.ffn_up_exps.bias' is missing"),
        ("gpt_oss", {"output.weight": None}, FormatError, "'output.weight' is missing"),
        ("gemma4", {"blk.0.attn_v.weight": None}, FormatError, "'blk.0.attn_v.weight' is missing"),
        (
            "gemma4_e2b",
            {"blk.2.attn_v.weight": None, "blk.5.attn_v.weight": full(16, 32)},
            FormatError,
            "attn_v.weight'",
        ),
        ("gemma4_e2b", {"blk.1.layer_output_scale.weight": None}, FormatError, "'blk.1.layer_output_scale.weight' is"),
        ("gemma4_e2b", {"blk.0.layer_output_scale.weight": None}, FormatError, "has no place"),
        (
            "gemma4_e2b",
            {f"blk.{i}.post_norm.weight": None for i in range(6)},
            FormatError,
            "post_norm.weight' is missing",
        ),
        ("gemma4_26b_a4b", {"blk.1.ffn_down_exps.scale": None}, FormatError, "'blk.1.ffn_down_exps.scale' is missing"),
        ("gemma4_26b_a4b", {"rope_freqs.weight": None}, FormatError, "'rope_freqs.weight' is missing"),
        ("falcon_40b", {"blk.0.attn_norm_2.bias": None}, FormatError, "'blk.0.attn_norm_2.bias' is missing"),
        ("qwen2moe", {"blk.0.attn_output.bias": full(64)}, FormatError, "'blk.1.attn_output.bias' is missing"),
        ("glm4moe", {"blk.1.exp_probs_b.bias": full(8, value=NAN)}, FormatError, "exp_probs_b.bias' holds"),
    ],
)
def test_a_forged_tensor(
    forged: Callable[..., Path], arch: str, tensors: dict[str, Any], error: type[forge.ForgeError], words: str
) -> None:
    assert words in refusal(forged(arch, tensors=tensors), error)


def test_experts_of_a_width_that_no_kernel_takes_are_refused_before_a_gpu_computes(forged: Callable[..., Path]) -> None:
    weights = golden("mixtral")[1]
    narrow = {
        name: full(*(12 if size == 32 else size for size in array.shape))
        for name, array in weights.items()
        if "_exps" in name
    }
    keys = {"{}.feed_forward_length": 12, "{}.expert_feed_forward_length": None}
    with gguf.read(forged("mixtral", keys, narrow)) as file:
        config = models.read_config(file)
        with pytest.raises(UnsupportedError, match=r"ffn_down_exps.weight' has rows of 12: no multiple of 8"):
            models.build(file, config, Recorder("gfx1100"), None)


def test_memory_is_taken_for_tensors_that_are_read_alone(forged: Callable[..., Path]) -> None:
    """The file is sparse: a layer of multi-token prediction is its last 32 GB."""
    data = sum(-(-array.nbytes // 32) * 32 for array in golden("llama")[1].values())
    path = forged(tensors={"blk.3.nextn.eh_proj.weight": Blocks(0, (1 << 12, 1 << 21), b"", data)})
    os.truncate(path, path.stat().st_size + (1 << 35))
    with little_memory(), forge.load(path, device="cpu") as llm:
        assert llm.generate(PROMPT, max_tokens=1)


def test_a_file_of_a_vocabulary_alone() -> None:
    path = DATA / "vocab" / "ggml-vocab-llama-spm.gguf"
    assert "'token_embd.weight' is missing" in refusal(path, FormatError)
    assert forge.load_tokenizer(path).encode("hi") == [1, 7251]


@pytest.mark.parametrize(
    ("arch", "keys"),
    [
        pytest.param("llama", {"{}.context_length": 2**31 - 1}, marks=pytest.mark.slow),
        ("llama", {"{}.attention.sliding_window": 2**31 - 1}),
        ("llama", {"{}.rope.scaling.original_context_length": 2**31 - 1}),
        ("llama", {"{}.rope.freq_base": Typed(F64, 1e308)}),
        ("llama", {"{}.rope.scaling.factor": Typed(F64, 1e308)}),
        ("llama", {"{}.rope.scaling.attn_factor": Typed(F64, 1e308)}),
        ("llama", {"{}.attention.scale": Typed(F64, -1e308)}),
        ("llama", {"{}.attention.temperature_scale": Typed(F64, 1e308)}),
        ("llama", {"{}.attention.layer_norm_rms_epsilon": 0.0}),
        ("llama", {"{}.attention.layer_norm_rms_epsilon": Typed(F64, 1e308)}),
        ("llama", {"{}.vocab_size": "many"}),
        ("gemma2", {"{}.attn_logit_softcapping": Typed(F64, 1e308)}),
        ("gemma2", {"{}.final_logit_softcapping": Typed(F64, 1e-320)}),
        ("gemma2", {"{}.attention.sliding_window": 1}),
        ("gemma3", {"{}.attention.sliding_window_pattern": Typed(F32, [NAN] * 7)}),
        ("qwen2_yarn", {"{}.rope.freq_base": Typed(F64, 1.0 + 2**-52)}),
        ("qwen2_yarn", {"{}.rope.scaling.yarn_log_multiplier": Typed(F64, 1e308)}),
    ],
)
def test_an_extreme_number_is_refused_or_every_request_ends(
    forged: Callable[..., Path], arch: str, keys: dict[str, Any]
) -> None:
    """Such a model may run; where its logits are no numbers, the request says so."""
    path = forged(arch, keys)
    if is_refused(path):
        assert next(iter(keys)).removeprefix("{}") in refusal(path, FormatError)
        return
    with little_memory(), forge.load(path, device="cpu") as llm:
        completion = llm.generate(PROMPT, max_tokens=3, ignore_eos=True)
        assert isinstance(completion, forge.Completion)
        assert len(completion.ids) == (0 if completion.finish_reason == "error" else 3)
        assert completion.finish_reason in ("length", "error")
        assert all(pool.num_free == pool.num_pages for pool in llm.engine.pools)


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("name", ["token_embd.weight", "blk.1.attn_v.weight", "output.weight", "blk.2.ffn_norm.weight"])
def test_weights_that_are_no_numbers_end_a_request(forged: Callable[..., Path], name: str, value: float) -> None:
    path = forged(tensors={name: np.full_like(golden("llama")[1][name], value)})
    with little_memory(), forge.load(path, device="cpu") as llm:
        for params in (forge.SamplingParams(), forge.SamplingParams(temperature=1.0, top_p=0.5, seed=1, logprobs=2)):
            completion = llm.generate(PROMPT, params, max_tokens=3)
            assert isinstance(completion, forge.Completion)
            assert (completion.finish_reason, list(completion.ids), completion.text) == ("error", [], "")
        assert all(pool.num_free == pool.num_pages for pool in llm.engine.pools)


def test_a_request_that_fails_harms_no_other(forged: Callable[..., Path]) -> None:
    """One token's embedding is NaN: neither the batch it is in nor the pages it leaves behind are poisoned."""
    table = golden("llama")[1]["token_embd.weight"].copy()
    table[9] = NAN
    params = forge.SamplingParams(max_tokens=8, ignore_eos=True, logit_bias={9: -INF})
    with forge.load(forged(tensors={"token_embd.weight": table}), device="cpu") as llm:
        alone = llm.generate(PROMPT, params)
        together = llm.generate([[9, 1], PROMPT, [1, 9]], params)
        after = llm.generate(PROMPT, params)
        assert isinstance(alone, forge.Completion)
        assert isinstance(after, forge.Completion)
        assert isinstance(together, list)
        assert [completion.finish_reason for completion in together] == ["error", "length", "error"]
        assert together[1].ids == after.ids == alone.ids


@pytest.mark.parametrize("name", [b"\xff\xfe.gguf", "a b\t漢.gguf".encode(), b"-00001-of-.gguf", b"%s{}.gguf"])
def test_names_that_files_may_have(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    try:
        shutil.copy(DATA / "arch" / "llama" / "model.gguf", path)
    except OSError:
        pytest.skip("this file system takes no such name")
    with forge.load(path, device="cpu") as llm:
        assert llm.generate(PROMPT, max_tokens=1)
    path.write_bytes(path.read_bytes()[:-100])
    assert "truncated" in refusal(path, FormatError)
