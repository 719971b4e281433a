"""What a config.json says and no key or tensor carries: each is computed as transformers computes it, or refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_models import HF, NAMES, unpacked
from safetensors_files import safetensors_bytes
from test_hf_stored import tensors_of
from test_huggingface import said_by

from forge.checkpoints import open_checkpoint
from forge.checkpoints.settings import Settings
from forge.errors import ForgeError, FormatError, UnsupportedError

_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
KINDS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": _LLAMA3,
    "longrope": {"short_factor": [1.5] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64},
    "dynamic": {"factor": 4.0},
    "proportional": {},
    "zzz": {},
}
NEEDED = {"linear": ["factor"], "yarn": ["factor"], "llama3": list(_LLAMA3)}
"""Numbers that transformers reads without a default."""


def config_of(name: str) -> dict[str, Any]:
    """The numbers of a model's text."""
    config: dict[str, Any] = json.loads((HF / name / "config.json").read_text())
    return {**config, **config.get("text_config", {}), "text_config": None}


def with_rope(name: str, kind: str, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A model with another RoPE, of its layers without a window where these have their own."""
    config = config_of(name)
    config |= {key: value for key, value in numbers.items() if key in config}  # Phi 3's lies outside, too
    rope = config.get("rope_parameters") or {}
    old = rope.get("full_attention", rope)
    kept = {key: old[key] for key in ("partial_rotary_factor", "truncate") if key in old}
    new = {"rope_theta": old.get("rope_theta", 1e4), **kept, "rope_type": kind, **numbers}
    return config | {"rope_parameters": {**rope, "full_attention": new} if "full_attention" in rope else new}


def outcome(config: dict[str, Any]) -> dict[str, object] | str:
    """What keys and tensors say, or why there are none."""
    try:
        return said_by(config)
    except ForgeError as error:
        return str(error)


def test_every_kind_of_rope_is_carried_out_or_refused_by_name() -> None:
    """Some key or tensor says it: without one, a kind would be computed as none."""
    carried: dict[str, set[str]] = {kind: set() for kind in KINDS}
    for name in NAMES:
        plain = outcome(with_rope(name, "default", {}))
        for kind, numbers in KINDS.items():
            found = outcome(with_rope(name, kind, numbers))
            if isinstance(found, dict):
                assert found != plain, (name, kind)
                carried[kind].add(name)
            else:
                assert str(HF) in found
                problems = (f"{kind!r} is not supported", "should be", "alpha", "partial_rotary_factor")
                assert any(problem in found for problem in problems), (name, kind)
    assert carried["longrope"] == {"phi3_window"}  # the other Phi 3 has lists of another length
    assert carried["proportional"] == {"gemma4", "gemma4_26b_a4b", "gemma4_e2b"}
    assert carried["dynamic"] == carried["zzz"] == set()  # Hunyuan's has an alpha
    assert {"llama_linear", "mistral", "smollm3", "granite", "apertus", "llama4"} <= carried["llama3"]
    assert not {"qwen3", "gemma3", "gpt_oss", "olmo3"} & carried["llama3"]
    assert {"llama_linear", "gemma3_linear", "qwen3", "olmo3", "gpt_oss"} <= carried["linear"] & carried["yarn"]
    assert not {"gemma2", "phi2", "phi3_window", "falcon", "cohere", "cohere2", "muse_glimmer"} & carried["linear"]


def test_a_kind_of_rope_has_the_numbers_that_it_needs() -> None:
    for kind, names in NEEDED.items():
        for name in names:
            for wrong in ({}, {name: None}, {name: 0}):
                numbers = {key: value for key, value in KINDS[kind].items() if key != name} | wrong
                with pytest.raises(FormatError, match=f"'{name}' (is missing|should be)"):
                    said_by(with_rope("mistral", kind, numbers))


_PLAIN = {"rope_type": "default", "rope_theta": 1e4}
_LINEAR = {"rope_type": "linear", "factor": 2.0}
REFUSED: list[tuple[str, Mapping[str, Any], str]] = [
    ("granite", {"attention_multiplier": None}, "'attention_multiplier' should be a value, not null"),
    ("granite", {"logits_scaling": None}, "'logits_scaling' should be a value, not null"),
    ("mistral", {"rms_norm_eps": None}, "'rms_norm_eps' should be a value, not null"),
    ("ernie4_5", {"rope_theta": None, "rope_parameters": {}}, "'rope_theta' should be a value, not null"),
    ("glm4moe", {"n_group": None}, "'n_group' should be a value, not null"),
    ("glm4moe", {"routed_scaling_factor": None}, "'routed_scaling_factor' should be a value, not null"),
    ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layer_interval says other layers"),
    ("llama4", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "no_rope_layer_interval says other layers"),
    ("llama4", {"no_rope_layers": [], "layer_types": ["full_attention"] * 4}, "no_rope_layer_interval says other"),
    ("smollm3", {"no_rope_layers": ""}, "'no_rope_layers' should be a list for 4 layers"),
    ("smollm3", {"no_rope_layers": 0}, "'no_rope_layers' should be a list for 4 layers"),
    ("smollm3", {"no_rope_layers": {}}, "'no_rope_layers' should be a list for 4 layers"),
    ("ernie4_5_moe", {"moe_norm_min": 0.9}, "moe_norm_min = 0.9 is not supported"),
    ("mistral", {"rope_parameters": _PLAIN, "rope_scaling": _LINEAR}, "rope_parameters says .* and the older keys"),
    ("mistral", {"rope_parameters": {**_LINEAR, "factor": 4.0}, "rope_scaling": _LINEAR}, "'factor' = 4.0, .* 2.0"),
    ("mistral", {"rope_parameters": {**_LINEAR, "x": 1}, "rope_scaling": _LINEAR}, "says 'x' = 1, .* null"),
    ("mistral", {"rope_parameters": _PLAIN, "rope_theta": 5e5}, "'rope_theta' = 10000.0, and the older keys 500000.0"),
]


@pytest.mark.parametrize(("name", "changes", "message"), REFUSED)
def test_what_no_key_says_is_refused(name: str, changes: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ForgeError, match=message) as caught:
        said_by({**config_of(name), **changes})
    assert str(HF) in str(caught.value)


_HONOURED = {
    "partial_rotary_factor": {"gemma4_text", "glm4", "glm4_moe", "minimax_m2", "phi", "phi3", "stablelm"},
    "rotary_pct": {"gpt_neox"},
    "rope_pct": set[str](),
    "rotary_dim": {"minimax_m2"},
}
"""Families in which transformers 5.24 rotates another share of the heads if config.json has such a number."""


def without_share(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that leaves to its family how much of each head rotates."""
    copy: dict[str, Any] = json.loads(json.dumps(config))
    rope = copy.get("rope_parameters") or {}
    for inner in (copy, rope, *(value for value in rope.values() if isinstance(value, dict))):
        for name in _HONOURED:
            inner.pop(name, None)
    return copy


@pytest.mark.parametrize("name", [name for name in NAMES if name != "phi3_longrope"])  # its lists have a length
def test_a_share_of_heads_that_rotates_is_carried_out_or_refused(name: str) -> None:
    config = without_share(config_of(name))
    head = Settings(HF, config, {}).head_dim
    plain = said_by(config)
    for key, families in _HONOURED.items():
        value, count = (4, 4) if key == "rotary_dim" else (0.75, head * 3 // 4)
        if config["model_type"] in families:
            found = said_by({**config, key: value})
            if "rope_freqs.weight" in found:  # Gemma 4's: pairs that do not rotate have an endless wave
                factors = found["rope_freqs.weight"]
                assert isinstance(factors, list)
                assert factors.count(1.0) == len(factors) * 3 // 4
            else:
                assert found["rope.dimension_count"] == count
        elif plain.get("rope.dimension_count", head) != count:
            with pytest.raises(UnsupportedError, match=f"{key} = {value} is not supported: in .* numbers of a head"):
                said_by({**config, key: value})


@pytest.mark.parametrize("name", ["mistral", "gemma3", "gemma4", "cohere2", "gptneox"])
def test_a_share_in_rope_parameters_is_carried_out_or_refused(name: str) -> None:
    config = without_share(config_of(name))
    rope = config["rope_parameters"]
    inner = rope.get("sliding_attention", rope)
    inner["partial_rotary_factor"] = 0.75
    if name == "gptneox":
        assert said_by(config)["rope.dimension_count"] == 12  # of 16
        return
    with pytest.raises(UnsupportedError, match=r"partial_rotary_factor = 0\.75 is not supported"):
        said_by(config)
    inner["partial_rotary_factor"] = 1.0
    said_by(config)


_WINDOWED = {"use_sliding_window": True, "sliding_window": 8, "layer_types": None}
WINDOWS, PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"
SAID: list[tuple[str, Mapping[str, Any], Mapping[str, Any]]] = [
    ("gemma2", {"attn_logit_softcapping": None}, {"attn_logit_softcapping": 0.0}),
    ("gemma2", {"final_logit_softcapping": None}, {"final_logit_softcapping": 0.0}),
    ("qwen3moe", {"norm_topk_prob": None}, {"expert_weights_norm": False}),
    ("glm4moe", {"norm_topk_prob": None}, {"expert_weights_norm": False}),
    ("qwen3", {"head_dim": None}, {"attention.key_length": 48 // 4}),
    ("ernie4_5", {"rope_theta": None}, {"rope.freq_base": 1e5}),  # which rope_parameters says
    ("smollm3", _WINDOWED, {WINDOWS: 8, PATTERN: [False, False, False, True]}),
    ("smollm3", {**_WINDOWED, "use_sliding_window": False}, {WINDOWS: None}),
    ("qwen3", {**_WINDOWED, "max_window_layers": 1}, {WINDOWS: 8, PATTERN: [False, True, True]}),
    ("qwen3", _WINDOWED, {WINDOWS: None}),  # from layer 28 on
    ("llama4", {"no_rope_layers": []}, {}),
    ("gptneox", {"rope_parameters": None, "rotary_pct": 0.5}, {"rope.dimension_count": 8}),
    ("gptneox", {"rope_parameters": None, "rotary_emb_base": 5e5}, {"rope.freq_base": 5e5}),
    (
        "mistral",
        {"rope_parameters": {**_LINEAR, "rope_theta": 1e4}, "rope_scaling": {"type": "linear", "factor": 2}},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
    ),
]


@pytest.mark.parametrize(("name", "changes", "expected"), SAID)
def test_what_keys_say_is_what_transformers_means(
    name: str, changes: Mapping[str, Any], expected: Mapping[str, Any]
) -> None:
    """Null is never another value of the family, and a name of older files goes before a default."""
    keys = said_by({**config_of(name), **changes})
    assert {key: keys.get(key) for key in expected} == expected


@pytest.mark.parametrize("end", ["_scale", "_scale_inv"])
def test_scales_of_weights_that_have_none_are_refused(end: str, tmp_path: Path) -> None:
    directory = unpacked("mistral", tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors = tensors_of(directory) | {name + end: np.full(1, 2.0, np.float32)}
    (directory / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(UnsupportedError, match=f"weights with scales, '{name}{end}', are not supported"):
        open_checkpoint(directory)
