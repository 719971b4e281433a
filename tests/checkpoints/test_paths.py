"""Paths of models, of files in them, of adapters and of what is written: each that cannot be used is one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hf_models import ARCH, EXPORTS, unpacked

import forge
from forge.checkpoints import open_checkpoint
from forge.checkpoints.adapters import check_adapters, read_adapter
from forge.errors import ForgeError, FormatError, ParameterError
from forge.formats import gguf
from forge.formats.model_directory import member

LLAMA = ARCH / "llama/model.gguf"
LONG = "x" * 300


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return unpacked("mistral", tmp_path / "model")


def refused(error: type[ForgeError], act: Callable[[], object]) -> str:
    """The message of an error, which is short and prints."""
    with pytest.raises(error) as raised:
        act()
    message = str(raised.value)
    assert message.isprintable()
    assert len(message) < 700
    return message


def test_a_file_of_weights_names_its_model_and_no_other(model: Path) -> None:
    with open_checkpoint(model / "model.safetensors") as opened:
        assert opened.path == model
    shutil.copy(model / "model.safetensors", model / "tuned.safetensors")
    message = refused(FormatError, lambda: open_checkpoint(model / "tuned.safetensors"))
    assert "tuned.safetensors: holds no weights of the model in its directory, which are in 'model" in message


@pytest.mark.parametrize("name", ["a.safetensors", "a.onnx", "a.gguf"])
def test_a_directory_is_one_whatever_its_name(name: str, model: Path) -> None:
    with open_checkpoint(model.rename(model.parent / name)) as opened:
        assert opened.format == "safetensors"


def test_folders_that_cannot_be_listed_are_one_line(model: Path) -> None:
    (model / "additional_chat_templates").symlink_to("additional_chat_templates")
    message = refused(FormatError, lambda: open_checkpoint(model))
    assert message.endswith("additional_chat_templates: cannot be read: Too many levels of symbolic links")
    (model / "additional_chat_templates").unlink()
    (model / "onnx").symlink_to("onnx")
    open_checkpoint(model).close()  # the weights are in safetensors
    (model / "model.safetensors").unlink()
    assert "onnx: cannot be read: Too many levels" in refused(FormatError, lambda: open_checkpoint(model))


def test_names_in_files_are_no_longer_than_the_systems(model: Path) -> None:
    for name in (LONG, "ü" * 128, "/".join("a" * 300)):
        assert "is no name of a file" in refused(FormatError, lambda name=name: member(model, name))  # type: ignore[misc]
    assert member(model, "ü" * 127) == model / ("ü" * 127)
    (model / "model.safetensors").unlink()
    index = {"weight_map": {"a": f"{LONG}.safetensors"}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "is no name of a file" in refused(FormatError, lambda: open_checkpoint(model))


def test_names_in_genai_config_are_no_longer_than_the_systems(tmp_path: Path) -> None:
    folder = shutil.copytree(EXPORTS.parent / "genai/llama_int4_f16", tmp_path / "model")
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["filename"] = f"{LONG}.onnx"
    (folder / "genai_config.json").write_text(json.dumps(config))
    assert "is no name of a file" in refused(FormatError, lambda: open_checkpoint(folder))


@pytest.mark.parametrize("path", ["a" * 5000, "a\0", "a\ud800", LONG], ids=range(4))
def test_paths_of_adapters_that_the_system_cannot_have(path: str) -> None:
    with gguf.read(LLAMA) as opened:
        assert "cannot be read: " in refused(
            FormatError, lambda: read_adapter(check_adapters({"x": path})["x"], opened)
        )


def test_an_empty_path_of_an_adapter_is_not_the_current_directory() -> None:
    for path, what in (("", "empty"), (b"a", "a bytes"), (3, "a int")):
        message = refused(ParameterError, lambda path=path: check_adapters({"x": path}))  # type: ignore[misc]
        assert message == f"adapters: 'x' must be a path, not {what}"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "path must be a path, not None"),
        (3, "path must be a path, not 3"),
        (b"a.gguf", "path must be a path, not b'a.gguf'"),
        ("", "path must end in .gguf"),
        ("a\0.gguf", "cannot be read: embedded null byte"),
        ("a\ud800.gguf", "cannot be read: 'utf-8' codec can't encode"),
        (f"{LONG}.gguf", "cannot be read: File name too long"),
        (f"{'a' * 5000}/a.gguf", "cannot be read: File name too long"),
    ],
    ids=range(8),
)
def test_targets_of_convert_that_the_system_cannot_have(path: object, message: str) -> None:
    found = refused(ParameterError, lambda: forge.convert(LLAMA, path, progress=False))  # type: ignore[arg-type]
    assert found.startswith("path ")
    assert message in found


def test_a_model_to_convert_is_a_name_or_a_path(tmp_path: Path) -> None:
    for value in (3, None):
        act = lambda value=value: forge.convert(value, tmp_path / "a.gguf", progress=False)  # type: ignore[misc]  # noqa: E731
        assert refused(ParameterError, act) == f"model must be a name or a path, not {value}"


def test_a_link_that_leads_nowhere_is_not_replaced_unasked(tmp_path: Path) -> None:
    link = tmp_path / "a.gguf"
    link.symlink_to("nowhere")
    assert "exists: use force=True" in refused(ParameterError, lambda: forge.convert(LLAMA, link, progress=False))
    assert os.readlink(link) == "nowhere"
    forge.convert(LLAMA, link, force=True, progress=False)
    assert link.read_bytes() == LLAMA.read_bytes()


def test_a_directory_whose_name_is_no_utf_8_is_converted(model: Path) -> None:
    folder = model.rename(os.fsdecode(bytes(model.parent) + b"/na\xffme"))
    forge.convert(folder, model.parent / "a.gguf", progress=False)
    with gguf.read(model.parent / "a.gguf") as opened:
        assert opened.get_str("general.name") == "na?me"
