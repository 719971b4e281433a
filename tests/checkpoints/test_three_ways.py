"""A checkpoint of each family as a directory, as the converted file and as ONNX: transformers' logits everywhere.

What proves it of all families, so that nothing is computed twice:
    directory   test_huggingface.py compares its logits with transformers', at 5e-4.
    converted   test_convert.py finds its tensors equal bit by bit to those of tests/data/arch, and its keys alike.
                tests/models compares the logits of these files with transformers', at 5e-4.
    ONNX        here, of the families that optimum-onnx 0.1 exports as forge reads them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hf_models import ARCH, EXPORTS, NAMES, exported

import forge
from forge.checkpoints import open_checkpoint
from forge.checkpoints.families import FAMILIES

NAMES_OF_EXPORTS = sorted(path.name.removesuffix(".onnx.xz") for path in EXPORTS.iterdir())
NOT_EXPORTED = {
    # The exporter has no configuration of them, or its transformers no class
    *("apertus", "cohere2", "ernie4_5", "ernie4_5_moe", "exaone4", "gemma4_text", "glm4", "glm4_moe", "granitemoe"),
    *("granitemoeshared", "hunyuan_v1_dense", "llama4_text", "minimax_m2", "ministral3", "mixtral"),
    *("muse_glimmer_text", "olmo3", "olmoe", "qwen2_moe", "seed_oss", "starcoder2"),
    "gpt_oss",  # its experts are refused: their names in the graph are not those of modules
}


@pytest.mark.parametrize(
    "name",
    [name if name == "llama_bias_tied" else pytest.param(name, marks=pytest.mark.slow) for name in NAMES_OF_EXPORTS],
)
def test_logits_of_the_export_are_transformers(name: str, tmp_path: Path) -> None:
    golden = np.load(ARCH / name / "logits.npz")
    contexts = json.loads((ARCH / name / "meta.json").read_text("utf-8")).get("context", {})
    directory = exported(name, tmp_path)
    for prompt in ("24", "96"):
        with forge.load(directory, device="cpu", context=contexts.get(prompt, 512), progress=False) as llm:
            found = llm.logits(golden[f"ids_{prompt}"].tolist())
        np.testing.assert_allclose(found, golden[f"logits_{prompt}"], rtol=0, atol=5e-4)


def test_every_family_is_read_three_ways_or_is_not_exported() -> None:
    kinds = {}
    for name in NAMES:
        config = json.loads((ARCH.parent / "hf" / name / "config.json").read_text("utf-8"))
        kinds[name] = config.get("text_config", config)["model_type"]
    assert set(kinds.values()) == FAMILIES.keys()
    assert {kinds[name] for name in NAMES_OF_EXPORTS} == FAMILIES.keys() - NOT_EXPORTED


def test_the_export_is_what_is_read(tmp_path: Path) -> None:
    with open_checkpoint(exported("qwen3moe", tmp_path)) as file:
        assert file.format == "ONNX"
