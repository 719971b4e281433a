"""Tiny tasks of lm-evaluation-harness over local files, and what a model answers to each of their requests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hf_models import DATA, older, unpacked

TASKS = DATA / "lm_eval"
GOLDENS = TASKS / "goldens.json"
NAMES = ["tiny_choice", "tiny_last", "tiny_rolling", "tiny_answer"]
MODELS = ["llama_linear", "qwen3", "gpt2"]
MAX_LENGTH = 96
"""Some texts are longer."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def model_directory(name: str, folder: Path) -> Path:
    """A tiny model with a chat template, as transformers 4 and forge read it."""
    path = unpacked(name, folder / name)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(older(config)))
    tokenizer = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    return path


def task_directory(folder: Path) -> Path:
    """The tasks, which name their data by its whole path."""
    folder.mkdir(parents=True, exist_ok=True)
    for task in (TASKS / "tasks").glob("*.yaml"):
        (folder / task.name).write_text(task.read_text().replace("DATA/", f"{TASKS}/"))
    return folder


def evaluate(model: Any, tasks: Path, **settings: Any) -> dict[str, Any]:
    """By task: its metrics, and the answer to each request, in order."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    found = lm_eval.simple_evaluate(
        model=model,
        tasks=NAMES,
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
        **settings,
    )
    assert found is not None
    answers: dict[str, Any] = {}
    for name in NAMES:
        samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
        metrics = {key: value for key, value in found["results"][name].items() if key.endswith(",none")}
        answers[name] = {
            "metrics": {key: value for key, value in metrics.items() if "stderr" not in key},
            "resps": [resp for sample in samples for resp in sample["resps"]],
        }
    return answers
