"""A real model on a device against float32 numbers of an independent implementation, as a Markdown table.

    python benchmarks/proof.py MODEL GOLDEN.json [--device cuda]

GOLDEN is a file of tests/data/golden. Agreement is teacher-forced: along the golden's greedy ids, at every position.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

import forge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("golden", type=Path)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    golden = json.loads(arguments.golden.read_text())
    with forge.load(arguments.model, device=arguments.device, context=2048) as llm:
        positions, gaps, alone = 0, [], 0
        cases = golden["greedy"]
        for case in cases:
            prompt, ids = case["prompt_ids"], case["ids"]
            logits = llm.logits([*prompt, *ids[:-1]])[len(prompt) - 1 :]
            wrong = logits.argmax(axis=1) != np.array(ids)
            gaps += np.array(case["top2_gap"])[wrong].tolist()
            positions += len(ids)
            completion = llm.generate(prompt, max_tokens=len(ids), ignore_eos=True)
            assert isinstance(completion, forge.Completion)
            alone += list(completion.ids) == ids
        most = max(len(case["ids"]) for case in cases)
        batch = llm.generate([case["prompt_ids"] for case in cases], max_tokens=most, ignore_eos=True)
        assert isinstance(batch, list)
        together = sum(found.ids[: len(case["ids"])] == case["ids"] for found, case in zip(batch, cases, strict=True))
        text = (arguments.golden.parent / golden["ppl"]["passage_file"]).read_text()
        ppl = llm.perplexity(text, context=golden["ppl"]["ctx"]).ppl
        expected = golden["ppl"]["ppl_all"]
        print(f"| {llm.path.name} | {llm.device} |")
        print("| --- | --- |")
        print(f"| positions that agree | {positions - len(gaps)} of {positions} |")
        print(f"| largest float32 top-2 gap of the others | {max(gaps, default=0.0):.3f} |")
        print(f"| greedy texts equal, alone; all together | {alone}, {together} of {len(cases)} |")
        print(f"| perplexity, float32's | {ppl:.4f}, {expected:.4f} ({ppl / expected - 1:+.3%}) |")


if __name__ == "__main__":
    main()
