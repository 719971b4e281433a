"""What users computed before: ids of every kind of request, reasons, log probabilities, logits, perplexity on the CPU.

The recording is no independent truth: it shows that a change that should change nothing changed nothing.
UPDATE_GOLDEN=1 records the models that run anew. Only the public API is used, so that modules may move.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forge

DATA = Path(__file__).parents[1] / "data"
RECORDED = DATA / "recorded-ids.json"
REAL = ("smollm2", "gemma3-270m")
TINY = sorted(json.loads(RECORDED.read_text()).keys() - set(REAL))
"""Models of before the redesign. What came later has goldens of transformers alone."""
PASSAGE = (DATA / "golden" / "ppl_passage.txt").read_text()
CONTEXT = 600
LONG = 560
"""More than the 512 tokens of a step, and little less than the context."""
TOLERANCE = 1e-4
SMALLEST = 1e-5
"""Absolute tolerance: a log probability near 0 is a difference of two numbers around 20."""


def record(llm: forge.LLM) -> dict[str, Any]:
    """The results of all cases, by name."""
    ids = llm.tokenizer.encode(PASSAGE)
    prompt = ids[:12]
    greedy = llm.generate(prompt, max_tokens=24)
    assert isinstance(greedy, forge.Completion)
    seeded: dict[str, dict[str, Any]] = {
        "temperature": {"temperature": 0.8, "seed": 1},
        "top_k": {"temperature": 1.0, "top_k": 20, "seed": 2},
        "top_p": {"temperature": 1.0, "top_p": 0.7, "seed": 2},
        "min_p": {"temperature": 1.0, "min_p": 0.3, "seed": 2},
        "top_k, top_p, min_p": {"temperature": 1.2, "top_k": 50, "top_p": 0.95, "min_p": 0.02, "seed": 2},
        "logit_bias": {
            "temperature": 0.7,
            "logit_bias": {greedy.ids[0]: -math.inf, 40: 3.5, 41: -2.0, 200: 3.5},
            "seed": 4,
        },
        "stop_ids": {"temperature": 1.5, "stop_token_ids": range(0, llm.config.vocab_size, 9), "seed": 6},
    }
    penalties: dict[str, Any] = {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2}
    penalties["logprobs"] = 3
    found: dict[str, Any] = {"greedy": shown(greedy)}
    found |= {name: shown(llm.generate(prompt, max_tokens=24, **options)) for name, options in seeded.items()}
    found["text"] = shown(llm.generate(PASSAGE[:30], max_tokens=12), with_text=True)
    found["penalties, greedy"] = shown(llm.generate(prompt, max_tokens=16, **penalties))
    found["penalties"] = shown(llm.generate(prompt, max_tokens=16, temperature=0.8, seed=3, **penalties))
    found["n=3"] = shown(llm.generate(prompt, max_tokens=16, temperature=0.9, seed=5, n=3))
    batch = [ids[:3], ids[50:130], ids[200:217], ids[20:21]]
    found["batch"] = shown(llm.generate(batch, max_tokens=12))
    found["batch, seeded"] = shown(llm.generate(batch, max_tokens=12, temperature=0.8, seed=11, n=2))
    longs = [ids[:LONG], ids[5:9], ids[100:400]]
    found["several chunks"] = shown(llm.generate(longs, max_tokens=8, temperature=0.8, seed=8))
    found["to the context"] = shown(llm.generate(ids[:LONG], max_tokens=None, ignore_eos=True))
    stop: dict[str, Any] = {"stop": ["the", ".", "7", "Z", "q"], "max_tokens": 60}
    found["stop"] = shown(llm.generate(prompt, **stop), with_text=True)
    found["stop, seeded"] = shown(llm.generate(prompt, temperature=1.0, seed=9, **stop), with_text=True)
    found["stream"] = streamed(llm, prompt)
    logits = llm.logits(ids[:40]).astype(np.float64)
    found["logits"] = {"argmax": logits.argmax(1).tolist(), "sum of sizes": rounded(np.abs(logits).sum())}
    found["attention"] = rounded(np.square(llm.attention(ids[:40]), dtype=np.float64).sum())
    ppl = llm.perplexity(ids[:200], context=64)
    found["perplexity"] = {"ppl": rounded(ppl.ppl), "nll": rounded(ppl.nll), "tokens": ppl.tokens}
    if llm.chat_template is not None:
        found["chat"] = shown(llm.chat([{"role": "user", "content": "Hi"}], max_tokens=12), with_text=True)
    return found


def shown(completion: forge.Completion | list[forge.Completion], *, with_text: bool = False) -> Any:
    """A completion, or a list of them, as JSON has it."""
    if isinstance(completion, list):
        return [shown(one, with_text=with_text) for one in completion]
    out: dict[str, Any] = {"ids": completion.ids, "reason": completion.finish_reason}
    if with_text:
        out |= {"prompt": completion.prompt_ids, "text": completion.text}
    if completion.logprobs is not None:
        assert [token.id for token in completion.logprobs] == completion.ids
        out["logprobs"] = [rounded(token.logprob) for token in completion.logprobs]
        out["top"] = [[[other, rounded(value)] for other, value in token.top] for token in completion.logprobs]
    return out


def streamed(llm: forge.LLM, prompt: list[int]) -> list[dict[str, Any]]:
    """Two choices, each chunk by chunk."""
    out: list[dict[str, Any]] = [{"ids": [], "text": "", "reason": None} for _ in range(2)]
    for chunk in llm.stream(prompt, max_tokens=10, temperature=1.0, seed=10, n=2):
        one = out[chunk.index]
        assert one["reason"] is None
        one["ids"] += chunk.ids
        one["text"] += chunk.text
        one["reason"] = chunk.finish_reason
    return out


def rounded(number: float) -> float:
    return float(f"{number:.5g}")


def differences(found: Any, expected: Any, place: str) -> list[str]:
    """Where two results differ, one line each."""
    if isinstance(found, dict) and isinstance(expected, dict) and found.keys() == expected.keys():
        return [line for key in found for line in differences(found[key], expected[key], f"{place}: {key}")]
    if isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for index, pair in pairs for line in differences(*pair, f"{place}[{index}]")]
    if isinstance(found, float) and isinstance(expected, float):
        same = math.isclose(found, expected, rel_tol=TOLERANCE, abs_tol=SMALLEST)
    else:
        same = type(found) is type(expected) and found == expected
    return [] if same else [f"{place}: {found!r:.200}, recorded {expected!r:.200}"]


def compare(name: str, found: dict[str, Any]) -> None:
    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    if os.environ.get("UPDATE_GOLDEN"):
        recorded[name] = found
        RECORDED.write_text(written(recorded))
        recorded = json.loads(RECORDED.read_text())
    assert name in recorded, f"{name} is not recorded: UPDATE_GOLDEN=1 writes it"
    lines = differences(found, recorded[name], name)
    assert not lines, "\n".join(lines)


def written(recorded: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for each case, which a diff can show."""
    models = []
    for name, cases in sorted(recorded.items()):
        lines = [f"{json.dumps(case)}:{json.dumps(cases[case], separators=(',', ':'))}" for case in cases]
        models.append(f"{json.dumps(name)}:{{\n" + ",\n".join(lines) + "\n}")
    return "{\n" + ",\n".join(models) + "\n}\n"


@pytest.mark.parametrize(
    "name",
    [name if name == "llama_bias_tied" else pytest.param(name, marks=pytest.mark.slow) for name in TINY],
)
def test_tiny_models_compute_what_was_recorded(name: str) -> None:
    with forge.load(DATA / "arch" / name / "model.gguf", device="cpu", context=CONTEXT) as llm:
        compare(name, record(llm))


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_models_compute_what_was_recorded(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue({"smollm2": "smollm2_path", "gemma3-270m": "gemma3_path"}[name])
    with forge.load(path, device="cpu", context=CONTEXT) as llm:
        compare(name, record(llm))


def test_nothing_else_is_recorded() -> None:
    assert set(TINY) <= {path.name for path in (DATA / "arch").iterdir()}


def test_a_difference_is_named() -> None:
    assert not differences({"a": [1, 2.0]}, {"a": [1, 2.0001]}, "m")
    assert differences({"a": [1, 2.0]}, {"a": [1, 2.001]}, "m") == ["m: a[1]: 2.0, recorded 2.001"]
    assert differences({"a": [1, 2]}, {"a": [1, 3]}, "m") == ["m: a[1]: 2, recorded 3"]
    assert differences([1], [1, 2], "m") == ["m: [1], recorded [1, 2]"]
    assert differences({"a": 1}, {"b": 1}, "m") == ["m: {'a': 1}, recorded {'b': 1}"]
