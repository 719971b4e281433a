"""`forge inspect`: what a model's files hold."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forge.cli import options, output
from forge.cli.about import about

if TYPE_CHECKING:
    from pathlib import Path

    from forge.config import ExpertsConfig, ModelConfig
    from forge.errors import ForgeError
    from forge.formats.checkpoint import Checkpoint

_SHORT = 16  # longer arrays are summarized
_SHOWN_CHARS = 100


def command(
    file: Annotated[str, typer.Argument(metavar="FILE", help="A GGUF file, a model's directory, or a model's name.")],
    as_json: options.Json = False,
) -> None:
    """Show and check what a model's files hold. Its weights are not loaded."""
    from forge.checkpoints import open_checkpoint
    from forge.errors import ForgeError

    path = options.resolve(file)
    try:
        opened = open_checkpoint(path)
    except ForgeError as error:
        _show_refused(path, error, as_json)
        raise
    with opened as model:
        config, remark = _config(model)
        facts = _facts(model, config, remark)
        if as_json:
            output.write_json(about(model=model.path) | facts)
            return
        output.write_table(f"{model.path}", ("", ""), _summary(model, config, facts))
        rows = [(key, _shown(value)) for key, value in model.metadata.items()]
        output.write("\n")
        output.write_table(output.count(len(rows), "key"), ("key", "value"), rows)
        if model.tensors:
            output.write("\n")
            title = f"{output.count(len(model.tensors), 'tensor')} (* stands for the layer)"
            numbers = ("count", "shape", "size")
            tensors = [(info.name, info.shape, info.type.name, info.nbytes) for info in model.tensors.values()]
            output.write_table(title, ("tensor", "count", "shape", "type", "size"), _alike(tensors), right=numbers)
        if remark:
            output.note(remark)


def _show_refused(path: Path, error: ForgeError, as_json: bool) -> None:
    """What there is of a model that cannot be loaded; the error follows on stderr, with its exit code."""
    from forge.checkpoints.contents import contents_of

    found = contents_of(path)
    if found is None:
        return
    size = sum(tensor.nbytes for tensor in found.tensors)
    facts = {
        "path": str(path),
        "format": found.format or None,
        "files": [str(file) for file in found.files],
        "architecture": found.architecture,
        "layers": found.layers,
        "tokenizer": found.tokenizer,
        "tensors": [
            {"name": each.name, "shape": each.shape, "type": each.type, "bytes": each.nbytes} for each in found.tensors
        ],
        "bytes": size,
        "error": f"{error}",
    }
    if as_json:
        output.write_json(about() | {"model": None} | facts)
        return
    types = Counter[str]()
    for tensor in found.tensors:
        types[tensor.type] += tensor.nbytes
    mix = ", ".join(f"{name} {count / size:.1%}" for name, count in types.most_common()) if size else "none"
    rows = [
        ("format", found.format or "no weights that can be read"),
        ("architecture", _shown(found.architecture or "-")),
        ("layers", str(found.layers or "-")),
        ("weights", f"{output.num_bytes(size)} ({mix})"),
        ("tokenizer", ", ".join(found.tokenizer) or "none"),
        ("can be loaded", "no, as the error below says"),
    ]
    output.write_table(f"{path}", ("", ""), rows)
    if found.tensors:
        output.write("\n")
        title = f"{output.count(len(found.tensors), 'stored tensor')} (* stands for the layer)"
        alike = _alike([(each.name, each.shape, each.type, each.nbytes) for each in found.tensors])
        output.write_table(title, ("tensor", "count", "shape", "type", "size"), alike, right=("count", "shape", "size"))


def _config(model: Checkpoint) -> tuple[ModelConfig | None, str | None]:
    """The numbers of a model that forge can run, and the remark on a file that it cannot."""
    from forge.errors import ForgeError
    from forge.models import read_config

    config, remark = None, None
    try:
        config = read_config(model)
    except ForgeError as error:
        remark = f"{error}"
    if not model.tensors:
        remark = f"{model.path}: holds no tensors, so it can be used for its tokenizer only"
    return config, remark


def _facts(model: Checkpoint, config: ModelConfig | None, remark: str | None) -> dict[str, Any]:
    """The file as plain values; arrays of more than 16 items as their type and length."""
    tensors = model.tensors.values()
    name = model.metadata.get("general.architecture")
    return {
        "path": str(model.path),
        "format": model.format,
        "version": model.version,
        "files": [str(path) for path in model.paths],
        "architecture": name if isinstance(name, str) else None,
        "metadata": {key: _plain(value) for key, value in model.metadata.items()},
        "tensors": [
            {"name": info.name, "shape": info.shape, "type": info.type.name, "bytes": info.nbytes} for info in tensors
        ],
        "parameters": sum(math.prod(info.shape) for info in tensors),
        "bytes": sum(info.nbytes for info in tensors),
        "experts": _experts(config, model),
        "state": _state(config) if config else [],
        "remark": remark,
    }


def _state(config: ModelConfig) -> list[dict[str, Any]]:
    """What each kind of layer state takes in float32, with the default settings and the model's whole context."""
    from forge.config import EngineConfig
    from forge.planning import state_kinds

    context = config.context_length
    return [
        {
            "holds": kind.name,
            "layers": len(kind.layers),
            "bytes_per_token": kind.token_bytes,
            "bytes_per_sequence": kind.num_pages(context) * kind.page_bytes,
        }
        for kind in state_kinds(config, context, EngineConfig().page_size)
    ]


def _summary(model: Checkpoint, config: ModelConfig | None, facts: dict[str, Any]) -> list[tuple[str, str]]:
    types = Counter[str]()
    for info in model.tensors.values():
        types[info.type.name] += math.prod(info.shape)
    mix = ", ".join(f"{name} {count / facts['parameters']:.1%}" for name, count in types.most_common())
    template = model.metadata.get("tokenizer.chat_template")
    rows = [
        ("format", _format_text(model)),
        ("architecture", str(facts["architecture"])),
        ("name", _shown(model.metadata.get("general.name", "-"))),
        ("parameters", f"{facts['parameters']:,}"),
        ("weights", f"{output.num_bytes(facts['bytes'])} ({mix or 'none'})"),
        ("as float32", output.num_bytes(4 * facts["parameters"])),
        ("tokenizer", " ".join(_shown(model.metadata.get(f"tokenizer.ggml.{key}", "-")) for key in ("model", "pre"))),
        ("chat template", "yes" if isinstance(template, str) else "no"),
    ]
    if config is None:
        return rows
    layers = Counter(config.layer_windows).items()
    windows = "".join(f", {output.count(n, 'layer')} with a window of {w}" for w, n in layers if w)
    rows[2:2] = [
        (
            "layers",
            f"{config.num_layers}, width {config.width}{_widths_text(config, model)}, {_heads_text(config)}{windows}",
        ),
        *([("experts", _experts_text(config.experts, model))] if config.experts else []),
        ("vocabulary", f"{config.vocab_size:,} tokens"),
        ("context", f"{config.context_length:,} tokens"),
        *(("KV cache", _cache_text(kind)) for kind in facts["state"]),
    ]
    return rows


def _format_text(model: Checkpoint) -> str:
    """What a model lies in, and in how many files if they are several."""
    name = f"{model.format} {model.version}" if model.version else model.format
    return name if len(model.paths) == 1 else f"{name}, {output.count(len(model.paths), 'file')}"


def _widths_text(config: ModelConfig, model: Checkpoint) -> str:
    """Widths of the feed-forwards that are no experts, if there are such."""
    is_dense = config.experts is None or any(re.fullmatch(r"blk\.\d+\.ffn_up\.weight", name) for name in model.tensors)
    widths = " and ".join(str(width) for width in dict.fromkeys(config.layer_ffn_widths))
    return f", feed-forward {widths}" if is_dense else ""


def _heads_text(config: ModelConfig) -> str:
    """Query and KV heads; where layers differ, of each kind of layer."""
    kinds = Counter(zip(config.layer_kv_heads, config.layer_head_dims, strict=True)).items()
    texts = [f"{config.num_heads} query and {output.count(heads, 'KV head')} of {dim}" for (heads, dim), _ in kinds]
    if len(texts) == 1:
        return texts[0]
    return ", ".join(f"{text} in {output.count(n, 'layer')}" for text, (_, n) in zip(texts, kinds, strict=True))


def _experts(config: ModelConfig | None, model: Checkpoint) -> dict[str, Any] | None:
    """A mixture of experts as plain values, with the bytes that its matrices take in each layer."""
    from forge.models import expert_bytes

    if config is None or config.experts is None:
        return None
    return asdict(config.experts) | {"layer_bytes": expert_bytes(model.tensors)}


def _experts_text(experts: ExpertsConfig, model: Checkpoint) -> str:
    """A mixture of experts in words, with what layers take of a GPU, or of the host with `cpu_experts`."""
    from forge.models import expert_bytes

    sizes = expert_bytes(model.tensors).values()
    shared = f", and a shared one of {experts.shared_width}" if experts.shared_width else ""
    where = f"{output.count(len(sizes), 'layer')} of up to {output.num_bytes(max(sizes, default=0))}"
    return f"{experts.used} of {experts.count} of width {experts.width}{shared}, in {where}"


def _cache_text(kind: dict[str, Any]) -> str:
    """A kind of layer state in words."""
    sequence = f"{output.num_bytes(kind['bytes_per_sequence'])} per sequence"
    if kind["bytes_per_token"]:
        sequence = f"{output.num_bytes(kind['bytes_per_token'])} per token of context, {sequence} of the whole context"
    return f"{sequence} ({output.count(kind['layers'], 'layer')}, {kind['holds']}, float32)"


def _alike(tensors: Iterable[tuple[str, tuple[int, ...], str, int]]) -> list[tuple[str, int, str, str, str]]:
    """Tensors (name, shape, type, bytes) that differ in their layer alone, as one row."""
    groups: dict[tuple[str, tuple[int, ...], str], list[int]] = {}
    for name, shape, type, nbytes in tensors:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", name, count=1)
        groups.setdefault((name, shape, type), []).append(nbytes)
    return [
        (_shown(name), len(sizes), " x ".join(map(str, shape)), type, output.num_bytes(sum(sizes)))
        for (name, shape, type), sizes in groups.items()
    ]


def _plain(value: Any) -> Any:
    """A metadata value for JSON."""
    if isinstance(value, bool | int | float | str):
        return value
    if len(value) > _SHORT:
        return {"type": _item_type(value), "length": len(value)}
    return value.tolist() if hasattr(value, "tolist") else [_plain(item) for item in value]


def _item_type(value: Any) -> str:
    if hasattr(value, "dtype"):
        return str(value.dtype)
    return "array" if isinstance(value, list) else "string"


def _shown(value: Any) -> str:
    """A metadata value for people, on one line."""
    if not isinstance(value, bool | int | float | str) and len(value) > _SHORT:
        return f"{len(value):,} x {_item_type(value)}"
    text = str(_plain(value))
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}... ({len(text):,} characters)"
