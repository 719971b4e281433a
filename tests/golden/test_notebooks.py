"""The notebooks run from top to bottom, show what they say they show, and are committed without outputs."""

import base64
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from harness import COMPILER
from nbclient import NotebookClient

import forge

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_sampling_and_processors",
        "03_logit_lens_and_attention",
        "04_activation_patching",
        "05_steering_vectors",
        "06_attention_sinks_and_massive_activations",
        "07_induction_heads",
        "08_what_quantization_does",
        "09_write_your_own_kernel",
        "10_batch_inference",
        "11_benchmarks_and_roofline",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_the_file_is_valid_and_stripped(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in notebook.cells:
        assert cell.source.strip()
        assert not cell.metadata
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None


class Executed:
    """A notebook after a run; its cells by their ids."""

    def __init__(self, path: Path, folder: Path) -> None:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
        self.cells = {cell.id: cell for cell in notebook.cells if cell.cell_type == "code"}

    def outputs(self, cell: str, kind: str) -> list[str]:
        """What a cell shows as one MIME type; what it prints is text/plain."""
        found = []
        for output in self.cells[cell].outputs:
            data = {"text/plain": output.text} if output.output_type == "stream" else output.data
            found += [data[kind]] if kind in data else []
        return found

    def text(self, cell: str) -> str:
        return "\n".join(self.outputs(cell, "text/plain")).strip()

    def picture_size(self, cell: str) -> tuple[int, int]:
        (picture,) = self.outputs(cell, "image/png")
        data = base64.b64decode(picture)
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        width, height = struct.unpack(">II", data[16:24])
        return width, height


@pytest.mark.slow
def test_quickstart(smollm2: forge.LLM, tmp_path: Path) -> None:
    done = Executed(NOTEBOOKS[0], tmp_path)
    expected: Callable[..., Any] = smollm2.generate

    assert not [output for cell in done.cells.values() for output in cell.outputs if output.get("name") == "stderr"], (
        "warnings"
    )
    status, model = done.outputs("load", "text/plain")
    assert not status  # the line of progress is empty at the end
    assert model.startswith("<forge.LLM SmolLM2-135M-Instruct.Q4_1.gguf: llama")

    paris = expected("The capital of France is", max_tokens=16)
    assert paris.text.startswith(" Paris")
    assert done.text("generate") == paris.text.strip()
    assert f"ids: {paris.ids}" in done.text("completion")

    story = expected("Once upon a time", max_tokens=48)
    assert done.text("stream") == f"[{len(story.ids)} of 48 tokens] Once upon a time{story.text}".strip()

    drawn = done.text("sample").splitlines()
    assert len(set(drawn)) == 3
    assert done.text("repeat") == "the same texts again: True"

    italy, japan, hot = done.text("batch").splitlines()
    assert italy.startswith("The capital of Italy is Rome")
    assert japan.startswith("The capital of Japan is Tokyo")
    assert hot.startswith("The opposite of hot is cold")

    assert "Paris" in done.text("chat")
    assert "<|im_start|>user\nWhat is the capital of France?<|im_end|>" in done.text("render")

    label, number = re.fullmatch(r"'(.+)' has probability (0\.\d\d)", done.text("probabilities")).groups()
    token = expected("The capital of France is", max_tokens=1, logprobs=1).logprobs[0]
    assert label == " Paris"
    assert abs(float(number) - 2.718281828459045**token.logprob) <= 0.006  # two digits are shown

    assert done.text("attention") == "9 heads, 10 tokens; every row adds up to 1: True"
    for cell in ("probabilities-picture", "attention-picture"):
        assert min(done.picture_size(cell)) > 200


def named(name: str) -> Path:
    return next(path for path in NOTEBOOKS if path.stem == name)


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")
def test_write_your_own_kernel(tmp_path: Path) -> None:
    """A kernel that is right comes into use, with fewer registers; those that are wrong do not."""
    done = Executed(named("09_write_your_own_kernel"), tmp_path)

    assert not [output for cell in done.cells.values() for output in cell.outputs if output.get("name") == "stderr"]
    assert done.text("source").startswith("KERNEL(BLOCK) rmsnorm(\n    const float *x,      // (T, E)\n")
    assert "DEVICE void normalize(" in done.text("file")
    assert done.text("replace").startswith("rmsnorm is replaced\nverified ")
    cases, share = re.match(r"(\d+) cases on .*\nlargest error: (\d+)% of", done.text("report")).groups()
    assert int(cases) > 18
    assert 0 < int(share) <= 100
    if "CPU harness" in done.text("report"):
        before_and_now = re.findall(
            r"^gfx\w+: (\d+) VGPRs of a thread before, (\d+) now", done.text("registers"), re.MULTILINE
        )
        assert [int(now) < int(before) for before, now in before_and_now] == [True, True]
    assert re.match(r"source: rmsnorm is wrong in case 'rms small values' of norm: off by \d", done.text("wrong"))
    assert re.search(r"does not compile for .*: cell:11: .*\bO\b.*: 'float squares = O;'", done.text("compile"))
    assert done.text("context") == "3 cases; in use: True\nin use: False"
    assert done.text("restore") == "restored: rmsnorm"


# Of notebooks whose cells assert what they find.
PICTURES = {
    "02_sampling_and_processors": 3,
    "03_logit_lens_and_attention": 5,
    "04_activation_patching": 3,
    "05_steering_vectors": 3,
    "06_attention_sinks_and_massive_activations": 5,
    "07_induction_heads": 4,
    "08_what_quantization_does": 4,
    "11_benchmarks_and_roofline": 2,
    "10_batch_inference": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PICTURES)
def test_an_experiment_finds_what_it_says(name: str, smollm2: forge.LLM, tmp_path: Path) -> None:
    done = Executed(named(name), tmp_path)

    assert not [output for cell in done.cells.values() for output in cell.outputs if output.get("name") == "stderr"]
    pictures = [cell for cell in done.cells if done.outputs(cell, "image/png")]
    assert len(pictures) == PICTURES[name]
    assert all(min(done.picture_size(cell)) > 200 for cell in pictures)
