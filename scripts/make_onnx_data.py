"""Build tests/data/onnx: files that the `onnx` package, optimum's exporter and onnxruntime-genai's builder write.

    types/model.onnx   one tensor of every type and in every form, by `onnx.helper`; types/values.npz holds its numbers.
    optimum/NAME       tiny random transformers models, exported; logits.npz: ids (T,), transformers' logits (T, V).
    dynamo/llama       the same by torch.onnx with dynamo, without optimum.
    genai/NAME         the same by the builder; logits.npz: onnxruntime's logits of the builder's float32 graph, with
                       the weights that its operation MatMulNBits multiplies by, scales rounded to float16.

Downloads nothing. optimum needs optimum-onnx, and so transformers 4. The others need transformers 5, dynamo onnxscript,
genai onnxruntime-genai and onnx-ir: give what the environment is made for.
    python scripts/make_onnx_data.py types|optimum|dynamo|genai [NAME ...] [--out tests/data/onnx]
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# No dependencies of forge, so without types in its development environment.
onnx: Any = importlib.import_module("onnx")

SHAPE = (3, 5)


def make_types(folder: Path, _: list[str]) -> None:
    """Random numbers of every type: within the file as bytes and as protobuf's numbers, and in another file."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, proto = np.random.default_rng(0), onnx.TensorProto
    plain = ("FLOAT", "UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE", "UINT32")
    small = ("UINT64", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2", "UINT4", "INT4", "FLOAT4E2M1", "COMPLEX64")
    tensors: list[Any] = []
    values: dict[str, Any] = {}
    for name in (*plain, *small):
        number = getattr(proto, name)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(number)
        array = (rng.standard_normal(SHAPE) * 3).astype(np.float32)
        array = (np.abs(array) if name.startswith(("U", "B")) and name != "BFLOAT16" else array).astype(dtype)
        for form in ("raw", "typed", "external"):
            if form == "typed":
                tensor = onnx.helper.make_tensor(f"{name}.{form}", number, SHAPE, array.reshape(-1))
            else:
                tensor = onnx.numpy_helper.from_array(array, f"{name}.{form}")
            tensors.append(tensor)
        values[name] = np.frombuffer(tensors[-1].raw_data, np.uint8)
    scalar = onnx.numpy_helper.from_array(np.float32(2.5), "scalar")
    empty = onnx.numpy_helper.from_array(np.zeros((2, 0), np.float32), "empty")
    nodes = [
        onnx.helper.make_node("Op", ["a", ""], ["b"], "all attributes", domain="forge", **ATTRIBUTES),
        onnx.helper.make_node("Constant", [], ["c"], value=scalar),
    ]
    graph = onnx.helper.make_graph(nodes, "types", [], [], [*tensors, scalar, empty])
    for entry in ("a", "b"):
        info = onnx.helper.make_tensor_value_info(entry, proto.FLOAT, ["batch", 3])
        (graph.input if entry == "a" else graph.output).append(info)
    model = onnx.helper.make_model(graph, producer_name="forge", opset_imports=[onnx.helper.make_opsetid("", 24)])
    onnx.helper.set_model_props(model, {"answer": "42"})
    outside = [tensor for tensor in model.graph.initializer if tensor.name.endswith(".external")]
    for tensor in outside:
        onnx.external_data_helper.set_external_data(tensor, location="model.onnx.data")
    (folder / "model.onnx.data").unlink(missing_ok=True)  # onnx appends
    onnx.save(model, str(folder / "model.onnx"))
    np.savez_compressed(folder / "values.npz", **values)


ATTRIBUTES = {"number": -3, "real": 1.5, "text": "words", "numbers": [1, -(2**40)], "reals": [0.5, 2.0], "texts": ["a"]}


BASE = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
    "tie_word_embeddings": False,
}
WIDE = {"hidden_size": 64, "intermediate_size": 128}
# Name: model type, configuration over BASE. Norms of "llama" are ones, so that the exporter makes them one tensor.
OPTIMUM: dict[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True, "num_hidden_layers": 2}),
    "gemma": ("gemma", {"head_dim": 8, "tie_word_embeddings": True}),
    "gpt2": ("gpt2", {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24, "n_positions": 64}),
    "olmo": ("olmo", {}),
}
# And the precision, the device that it is for, and options of the builder.
GENAI: dict[str, tuple[str, Mapping[str, Any], str, str, tuple[str, ...]]] = {
    "llama_int4_f16": ("llama", {**WIDE, "attention_bias": True, "num_hidden_layers": 2}, "int4", "dml", ()),
    "qwen3_int4_128": (
        "qwen3",
        {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32},
        "int4",
        "dml",
        ("block_size=128", "is_symmetric=false"),
    ),
    "mistral_int4_int8": ("mistral", {**WIDE, "sliding_window": None}, "int4", "cpu", ("algo_config=k_quant_mixed",)),
    "llama_shared": (
        "llama",
        {**WIDE, "tie_word_embeddings": True},
        "int4",
        "cpu",
        ("shared_embeddings=true", "algo_config=rtn", "block_size=64"),
    ),
    "qwen2_int4_tail": (
        "qwen2",
        {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 6},
        "int4",
        "dml",
        ("block_size=128", "is_symmetric=false"),
    ),
    "phi3_f16": ("phi3", {"hidden_size": 64, "original_max_position_embeddings": 128}, "fp16", "dml", ()),
    "gemma_f16": ("gemma", {"hidden_size": 64, "head_dim": 16, "tie_word_embeddings": True}, "fp16", "dml", ()),
}
WITH_CONFIG = ("llama_shared", "gemma_f16")
# The builder rounds the scale of Gemma's embedding to two digits: it is 8 here.
NUM_IDS = 16


def make_checkpoint(kind: str, config: Mapping[str, Any], folder: Path, *, ones: bool = False) -> tuple[Any, Any]:
    """A random model of float16 values with a tokenizer of bytes, saved. Returns ids and transformers' logits."""
    torch, transformers, tokenizers = map(importlib.import_module, ("torch", "transformers", "tokenizers"))
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(kind, **{**BASE, **config})
    model = transformers.AutoModelForCausalLM.from_config(made, attn_implementation="eager").eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            is_norm = weight.ndim == 1 and name.endswith("weight")
            values = torch.randn_like(weight) * (0.2 if weight.ndim == 1 else 0.15)
            if is_norm and kind != "gemma":
                values = torch.ones_like(weight) if ones else 1 + values
            weight.copy_(values.half().float())
        model.tie_weights()
        ids = torch.randint(0, 250, (1, NUM_IDS), generator=torch.Generator().manual_seed(1))
        logits = model(ids).logits[0].numpy()
    model.save_pretrained(folder)
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return ids[0].numpy(), logits


def make_optimum(folder: Path, names: list[str]) -> None:
    exporter = Path(sys.executable).with_name("optimum-cli")
    for name, (kind, config) in OPTIMUM.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            ids, logits = make_checkpoint(kind, config, Path(scratch), ones=name == "llama")
            out = folder / name
            shutil.rmtree(out, ignore_errors=True)
            command = [exporter, "export", "onnx", "-m", scratch, "--task", "text-generation-with-past", out]
            subprocess.run(list(map(str, command)), check=True)
        np.savez_compressed(out / "logits.npz", ids=ids, logits=logits)


def make_dynamo(folder: Path, _: list[str]) -> None:
    """A Llama by torch.onnx with dynamo, which names nodes in their metadata."""
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    with tempfile.TemporaryDirectory() as scratch:
        ids, logits = make_checkpoint("llama", {}, Path(scratch))
        whole = transformers.AutoModelForCausalLM.from_pretrained(scratch, attn_implementation="eager").eval()
        shutil.rmtree(folder / "llama", ignore_errors=True)
        (folder / "llama").mkdir(parents=True)
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(scratch) / name, folder / "llama")

    class Logits(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = whole.model, whole.lm_head

        def forward(self, input_ids: Any) -> Any:
            return self.lm_head(self.model(input_ids, use_cache=False).last_hidden_state)

    inputs = (torch.from_numpy(ids)[None],)
    torch.onnx.export(Logits(), inputs, folder / "llama/model.onnx", dynamo=True, external_data=False)
    np.savez_compressed(folder / "llama/logits.npz", ids=ids, logits=logits)


def build(checkpoint: Path, out: Path, precision: str, device: str, options: tuple[str, ...]) -> None:
    builder = Path(str(importlib.import_module("onnxruntime_genai").__file__)).parent / "models/builder.py"
    command = [
        sys.executable,
        builder,
        "-i",
        checkpoint,
        "-o",
        out,
        "-p",
        precision,
        "-e",
        device,
        "-c",
        out.parent / "c",
    ]
    subprocess.run([*map(str, command), *(("--extra_options", *options) if options else ())], check=True)


def make_genai(folder: Path, names: list[str]) -> None:
    for name, (kind, config, precision, device, options) in GENAI.items():
        if names and name not in names:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            checkpoint, plain, out = (Path(scratch) / part for part in ("checkpoint", "plain", "out"))
            ids, _ = make_checkpoint(kind, config, checkpoint)
            build(checkpoint, out, precision, device, options)
            weights = multiplied_by(out / "model.onnx")
            is_apart = any(module.endswith("q_proj") for module in weights)
            build(checkpoint, plain, "fp32", "cpu", ("fuse_qkv=false",) if is_apart else ())
            if name in WITH_CONFIG:
                shutil.copy(checkpoint / "config.json", out)
            logits = run_with_weights(plain / "model.onnx", out / "model.onnx", weights, config, ids)
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.copytree(out, folder / name)
        np.savez_compressed(folder / name / "logits.npz", ids=ids, logits=logits)


def multiplied_by(path: Path) -> dict[str, Any]:
    """By module, the matrix (K, N) that each MatMulNBits of a model multiplies by: its product with the identity."""
    runtime: Any = importlib.import_module("onnxruntime")
    model = onnx.load(str(path))
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        numbers = {attribute.name: attribute.i for attribute in node.attribute} | {"accuracy_level": 1}
        inputs = {place: tensors[place] for place in node.input[1:] if place}
        scales = inputs[node.input[2]]
        if numbers["bits"] == 4 or len(node.input) < 4:  # forge's blocks have scales of float16
            scales = scales.astype(np.float16)
        inputs[node.input[2]] = scales.astype(np.float32)
        one = onnx.helper.make_node("MatMulNBits", ["x", *node.input[1:]], ["y"], domain="com.microsoft", **numbers)
        rows = [onnx.helper.make_tensor_value_info(place, onnx.TensorProto.FLOAT, None) for place in "xy"]
        constants = [onnx.numpy_helper.from_array(array, place) for place, array in inputs.items()]
        graph = onnx.helper.make_graph([one], "one", rows[:1], rows[1:], constants)
        opsets = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid("com.microsoft", 1)]
        data = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        found[module_of(node)] = session.run(["y"], {"x": np.eye(numbers["K"], dtype=np.float32)})[0]
    return found


def module_of(node: Any) -> str:
    return str(node.name).rpartition("/")[0]


def run_with_weights(path: Path, other: Path, weights: Mapping[str, Any], config: Mapping[str, Any], ids: Any) -> Any:
    """onnxruntime's logits (T, V) of a float32 model with the tensors of another, and matrices (K, N) of modules."""
    runtime: Any = importlib.import_module("onnxruntime")
    model = onnx.load(str(path))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for tensor in onnx.load(str(other)).graph.initializer:
        is_table = tensor.name.endswith("_cache")  # forge computes the rotation in float32
        if tensor.name in tensors and tensor.data_type == onnx.TensorProto.FLOAT16 and not is_table:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensors[tensor.name].CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    replaced = set()
    for node in model.graph.node:
        if node.op_type == "MatMul" and module_of(node) in weights:
            name = node.input[1]
            tensors[name].CopyFrom(onnx.numpy_helper.from_array(weights[module_of(node)], name))
            replaced.add(module_of(node))
        is_embedding = (
            node.name == "/model/embed_tokens/Gather" and node.input[0] in tensors
        )  # else made of the output's
        if config.get("tie_word_embeddings") and "/lm_head" in weights and is_embedding:
            embedding = np.ascontiguousarray(weights["/lm_head"].T)
            tensors[node.input[0]].CopyFrom(onnx.numpy_helper.from_array(embedding, node.input[0]))
    assert replaced == weights.keys(), weights.keys() - replaced
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    sizes = {**BASE, **config}
    dim = sizes.get("head_dim", sizes["hidden_size"] // sizes["num_attention_heads"])
    feed = {
        entry.name: np.zeros((1, sizes["num_key_value_heads"], 0, dim), np.float32) for entry in session.get_inputs()
    }
    feed |= {"input_ids": ids[None].astype(np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    if "position_ids" in feed:
        feed["position_ids"] = np.arange(len(ids))[None]
    return session.run(["logits"], feed)[0][0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    makers = {"types": make_types, "optimum": make_optimum, "dynamo": make_dynamo, "genai": make_genai}
    parser.add_argument("what", choices=makers)
    parser.add_argument("names", nargs="*", help="of folders; without any all")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "tests/data/onnx")
    options = parser.parse_args()
    makers[options.what](options.out / options.what, options.names)


if __name__ == "__main__":
    main()
