"""What lm-evaluation-harness' own `hf` model answers, in float32, to the tasks of tests/data/lm_eval.

    HF_DATASETS_OFFLINE=1 PYTHONPATH=tests python scripts/make_lm_eval_goldens.py

in an environment with lm_eval, torch and transformers. forge itself is not used; tests/contrib compares its answers.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from lm_eval_tasks import GOLDENS, MAX_LENGTH, MODELS, evaluate, model_directory, task_directory


def main() -> None:
    """Write the goldens of all models."""
    from lm_eval.models.huggingface import HFLM

    goldens: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        tasks = task_directory(Path(folder) / "tasks")
        for name in MODELS:
            path = model_directory(name, Path(folder))
            model = HFLM(
                pretrained=str(path),
                device="cpu",
                dtype="float32",
                batch_size=1,
                max_length=MAX_LENGTH,
                trust_remote_code=False,
            )
            goldens[name] = {
                "plain": evaluate(model, tasks),
                "chat": evaluate(model, tasks, apply_chat_template=True, fewshot_as_multiturn=True),
            }
    GOLDENS.write_text(json.dumps(goldens, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
