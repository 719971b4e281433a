"""Adapters of PEFT's directories: against PEFT's logits, and damaged or unsupported ones with their messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hf_models
import numpy as np
import pytest
from safetensors_files import safetensors_bytes
from table_rows import row

import forge
from forge.checkpoints.adapters import read_adapter
from forge.checkpoints.families import FAMILIES
from forge.errors import ForgeError
from forge.formats import gguf, safetensors
from forge.models.adapters import ADAPTED

DATA = Path(__file__).parents[1] / "data"
LORA, ARCH = DATA / "lora", DATA / "arch"
WEIGHTS = "adapter_model.safetensors"
NAMES = sorted(path.name for path in LORA.iterdir())
slow = pytest.mark.slow


def base_of(name: str) -> str:
    return str(json.loads((LORA / name / "adapter_config.json").read_text())["base_model_name_or_path"])


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[slow] * (n not in ("llama_all", "phi3", "falcon"))) for n in NAMES]
)
def test_logits_are_pefts(name: str) -> None:
    golden = np.load(LORA / name / "logits.npz")
    with forge.load(ARCH / base_of(name) / "model.gguf", device="cpu", context=64, adapters={"a": LORA / name}) as llm:
        got = llm.logits(golden["ids"].tolist(), adapter="a")
    np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=5e-4)


@slow
@pytest.mark.parametrize(
    ("name", "made"),
    [(name, hf_models.unpacked) for name in NAMES if base_of(name) in hf_models.NAMES]
    + [(name, hf_models.exported) for name in NAMES if (hf_models.EXPORTS / f"{base_of(name)}.onnx.xz").exists()],
)
def test_logits_are_pefts_where_the_model_is_a_directory_too(
    name: str, made: Callable[[str, Path], Path], tmp_path: Path
) -> None:
    """Of safetensors, and of ONNX."""
    golden = np.load(LORA / name / "logits.npz")
    model = made(base_of(name), tmp_path / "model")
    with forge.load(model, device="cpu", context=64, adapters={"a": LORA / name}) as llm:
        got = llm.logits(golden["ids"].tolist(), adapter="a")
    np.testing.assert_allclose(got, golden["logits"], rtol=0, atol=5e-4)


@pytest.mark.parametrize("name", [name for name in NAMES if (LORA / name / "adapter.gguf").exists()])
def test_pairs_are_those_of_llama_cpps_converter(name: str) -> None:
    with gguf.read(ARCH / base_of(name) / "model.gguf") as model:
        got, wanted = (read_adapter(path, model).pairs for path in (LORA / name, LORA / name / "adapter.gguf"))
    assert got.keys() == wanted.keys()
    for target, pair in wanted.items():
        np.testing.assert_array_equal(got[target].a, pair.a)
        np.testing.assert_array_equal(got[target].b, pair.b)
        assert got[target].scale == pair.scale


def test_rows_of_one_architecture_agree_on_what_adapters_need() -> None:
    """A GGUF file says the architecture alone, and several rows may have it."""
    known: dict[tuple[str, str], tuple[str, Any]] = {}
    for family in FAMILIES.values():
        for name, target in family.names.items():
            targets = [f"{each.replace('#', '0')}.weight" for each in target.split()]
            if any(ADAPTED.fullmatch(each) for each in targets):
                found = target, family.edits.get(name)
                assert known.setdefault((family.arch, name), found) == found, (family.arch, name)


def tensors_of(path: Path) -> dict[str, Any]:
    with safetensors.read_file(path) as files:
        found = {name: np.empty(info.shape, np.float32) for name, info in files.tensors.items()}
        for name, array in found.items():
            files.read(name, 0, array)
    return found


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
A, B = Q.format("A"), Q.format("B")
Config, Tensors = dict[str, Any], dict[str, Any]


def said(**changes: Any) -> Callable[[Config, Tensors], Any]:
    return lambda config, _: config.update(changes)


def put(**arrays: Any) -> Callable[[Config, Tensors], Any]:
    """a and b: Of layer 0's q_proj."""
    return lambda _, tensors: tensors.update({Q.format(half.upper()): array for half, array in arrays.items()})


def renamed(new: str) -> Callable[[Config, Tensors], Any]:
    """Layer 0's q_proj becomes another module."""

    def change(_: Config, tensors: Tensors) -> None:
        for half in "AB":
            tensors[f"base_model.model.{new}.lora_{half}.weight"] = tensors.pop(Q.format(half))

    return change


def extra(name: str, *shape: int) -> Callable[[Config, Tensors], Any]:
    return lambda _, tensors: tensors.update({name: np.ones(shape, np.float32)})


ROWS: dict[str, tuple[Callable[[Config, Tensors], Any], str]] = {
    "another kind": (said(peft_type="IA3"), "peft_type is 'IA3', and LORA alone is supported"),
    "no kind": (lambda config, _: config.pop("peft_type"), "peft_type is null, and LORA alone is supported"),
    "DoRA": (said(use_dora=True), "'use_dora' = True (DoRA) is not supported"),
    "biases": (said(bias="lora_only"), "'bias' = 'lora_only': trained biases are not supported"),
    "biases of B": (said(lora_bias=True), "'lora_bias' = True (biases of B) is not supported"),
    "whole modules": (
        said(modules_to_save=["lm_head"]),
        "'modules_to_save' = an array of 1 (whole modules beside the pairs) is not supported",
    ),
    "activated": (said(alora_invocation_tokens=[1]), "'alora_invocation_tokens' = an array of 1 (activated LoRA)"),
    "experts": (
        said(target_parameters=["mlp.experts.gate_up_proj"]),
        "'target_parameters' = an array of 1 (adapters of a mixture's experts) is not supported",
    ),
    "new tokens": (said(trainable_token_indices=[3]), "'trainable_token_indices' = an array of 1 (embeddings of new"),
    "layers again": (said(layer_replication=[[0, 2]]), "'layer_replication' = an array of 1 is not supported"),
    "QALoRA": (said(use_qalora=True), "'use_qalora' = True is not supported"),
    "of tomorrow": (said(use_xlora2=True), "'use_xlora2' = True is not supported"),
    "PiSSA": (
        said(init_lora_weights="pissa_niter_4"),
        "'init_lora_weights' = 'pissa_niter_4' changes the model's weights",
    ),
    "alpha is text": (said(lora_alpha="8"), "'lora_alpha' should be a number, not '8'"),
    "alpha is true": (said(lora_alpha=True), "'lora_alpha' should be a number, not True"),
    "no alpha": (said(lora_alpha=None), "'lora_alpha' should be a number, not null"),
    "alpha is too large": (said(lora_alpha=1e300), "'lora_alpha' should be a number, not 1e+300"),
    "another rank": (said(r=8), "self_attn.k_proj' is 8, and its tensors have 4"),
    "a rank of 2^31": (said(r=2**31), "'r' should be a number, not 2147483648"),
    "rank is a list": (said(r=[4]), "'r' should be a number, not an array of 1"),
    "rslora is text": (said(use_rslora="no"), "'use_rslora' should be true or false, not 'no'"),
    "patterns are a list": (said(alpha_pattern=["q_proj"]), "'alpha_pattern' should be an object, not an array of 1"),
    "a regular expression": (
        said(alpha_pattern={"(a+)+q_proj": 2}),
        "'alpha_pattern' has the pattern '(a+)+q_proj', which is no end of a name",
    ),
    "a pattern's alpha": (said(alpha_pattern={"q_proj": None}), "'alpha_pattern.q_proj' should be a number, not null"),
    "half a pair": (lambda _, tensors: tensors.pop(A), "has no lora_a beside it: the file is damaged"),
    "the other half": (lambda _, tensors: tensors.pop(B), "has no lora_b beside it: the file is damaged"),
    "no tensors": (lambda _, tensors: tensors.clear(), "has no tensors"),
    "a magnitude": (
        extra(Q.replace("{}.weight", "magnitude_vector"), 128),
        "is of DoRA: not supported",
    ),
    "an embedding": (
        extra("base_model.model.model.embed_tokens.lora_embedding_A", 4, 320),
        "adapts an embedding: not supported",
    ),
    "a whole tensor": (extra("base_model.model.lm_head.weight", 320, 64), "is no half of a low-rank pair"),
    "an adapter of the output": (
        renamed("lm_head"),
        "adapts the embedding or the output's matrix ('output.weight'): not supported",
    ),
    "an adapter of the embedding": (renamed("model.embed_tokens"), "adapts the embedding or the output's matrix"),
    "an unknown module": (
        renamed("model.layers.0.self_attn.qqq_proj"),
        "adapts 'model.layers.0.self_attn.qqq_proj', which the model has not: it is for another model",
    ),
    "a layer beyond the last": (
        renamed("model.layers.3.self_attn.q_proj"),
        "adapts 'model.layers.3.self_attn.q_proj', which the model has not: it is for another model",
    ),
    "a norm": (
        renamed("model.layers.0.input_layernorm"),
        "adapts 'blk.0.attn_norm.weight', which is no matrix of a layer's products: not supported",
    ),
    "no module": (renamed(""), "adapts 'base_model.model.', which the model has not: it is for another model"),
    "twice": (
        lambda _, tensors: tensors.update({A.replace("model.model.model.", "model.model."): tensors[A]}),
        "two tensors are blk.0.attn_q.weight.lora_a",
    ),
    "too wide": (put(a=np.ones((4, 65), np.float32)), "has shape (4, 65), not (4, 64): it is for another model"),
    "too few rows": (put(b=np.ones((64, 4), np.float32)), "has shape (64, 4), not (128, 4): it is for another model"),
    "odd heads": (put(b=np.ones((126, 4), np.float32)), "a tensor (126, 4) cannot be that of 4 heads"),
    "a vector for B": (put(b=np.ones(128, np.float32)), "should be a matrix, not of shape (128,)"),
    "a vector for A": (put(a=np.ones(64, np.float32)), "should be a matrix, not of shape (64,)"),
    "a number": (put(a=np.float32(3).reshape(())), "should be a matrix, not of shape (1,)"),
    "nothing": (put(a=np.ones((0, 64), np.float32)), "is empty"),
    "integers": (put(a=np.ones((4, 64), np.int32)), "has I32 numbers, not weights"),
    "NaN": (put(b=np.full((128, 4), np.nan, np.float32)), "holds numbers that are not finite"),
    "infinity in float16": (put(b=np.full((128, 4), np.inf, np.float16)), "holds numbers that are not finite"),
}


def adapter(directory: Path, change: Callable[[Config, Tensors], Any]) -> Path:
    """llama_attention in another directory, its configuration and its tensors changed."""
    directory.mkdir()
    source = LORA / "llama_attention"
    config, tensors = json.loads((source / "adapter_config.json").read_text()), tensors_of(source / WEIGHTS)
    change(config, tensors)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / WEIGHTS).write_bytes(safetensors_bytes(tensors))
    return directory


def refusal(directory: Path) -> str:
    with gguf.read(ARCH / "llama" / "model.gguf") as model, pytest.raises(ForgeError) as caught:
        read_adapter(directory, model)
    line = str(caught.value)
    assert line.startswith(str(directory))
    assert "\n" not in line
    return line


def test_a_directory_is_refused_with_a_line_that_says_why(tmp_path: Path) -> None:
    for number, (name, (change, message)) in enumerate(ROWS.items()):
        with row(name):
            assert message in refusal(adapter(tmp_path / str(number), change))


def test_an_adapter_without_the_prefix_of_peft_is_the_same(tmp_path: Path) -> None:
    def change(_: Config, tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("base_model.model.")] = tensors.pop(name)

    with gguf.read(ARCH / "llama" / "model.gguf") as model:
        found = read_adapter(adapter(tmp_path / "bare", change), model).pairs
        wanted = read_adapter(LORA / "llama_attention", model).pairs
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal(found["blk.0.attn_q.weight"].b, wanted["blk.0.attn_q.weight"].b)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("adapter_config.json", "has no adapter_config.json: give a GGUF adapter, or a directory of PEFT's"),
        (WEIGHTS, f"has no {WEIGHTS}: download it again"),
    ],
)
def test_a_directory_that_lacks_a_file_is_refused(missing: str, message: str, tmp_path: Path) -> None:
    directory = adapter(tmp_path / "lacks", lambda *_: None)
    (directory / missing).unlink()
    assert message in refusal(directory)
    if missing == WEIGHTS:
        (directory / "adapter_model.bin").write_bytes(b"PK")
        assert "has no adapter_model.safetensors, but adapter_model.bin: PyTorch's pickles run code" in refusal(
            directory
        )


def test_a_link_out_of_the_directory_is_refused(tmp_path: Path) -> None:
    directory = adapter(tmp_path / "linked", lambda *_: None)
    (directory / WEIGHTS).unlink()
    (directory / WEIGHTS).symlink_to(LORA / "llama_attention" / WEIGHTS)
    assert "is a link that leads out of its directory" in refusal(directory)


@pytest.mark.parametrize("text", ['{"r": 4, "r": 5}', "[" * 100 + "]" * 100, '{"r": NaN}', "{", "[]"])
def test_a_configuration_that_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    directory = adapter(tmp_path / "forged", lambda *_: None)
    (directory / "adapter_config.json").write_text(text)
    assert "adapter_config.json: " in refusal(directory)


def test_an_adapter_of_another_model_is_refused() -> None:
    with gguf.read(ARCH / "gpt2" / "model.gguf") as model, pytest.raises(ForgeError, match="for another model"):
        read_adapter(LORA / "llama_attention", model)


def test_an_adapter_in_the_place_of_a_model_is_said_to_be_one() -> None:
    with pytest.raises(ForgeError, match=r"phi3' is a LoRA adapter and not a model"):
        forge.load(LORA / "phi3", device="cpu")
    with pytest.raises(
        ForgeError, match=r"adapter\.gguf: is an adapter, and no model: give its model, and this as adap"
    ):
        forge.load(LORA / "phi3" / "adapter.gguf", device="cpu")
