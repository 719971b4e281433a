"""What hooks cost: tokens per second of decode steps with captures, steering and functions, beside steps without any.

python benchmarks/hooks.py MODEL [--device auto] [--batch 1,8,64] [--tokens 128]

Each kind runs three times in turn with the others, after one round that captures steps. Rates are of the time from the
first generated token to the last, so prompts, which hooked requests compute apart, are not in them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any

import numpy as np

import forge

_ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--tokens", type=int, default=128)
    arguments = parser.parse_args()
    batches = [int(part) for part in arguments.batch.split(",")]
    context = 64 + arguments.tokens
    with forge.load(arguments.model, device=arguments.device, context=context, max_sequences=max(batches)) as llm:
        print(llm.device)
        for batch in batches:
            measure(llm, batch, arguments.tokens)


def measure(llm: forge.LLM, batch: int, tokens: int) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, llm.config.vocab_size, 32).tolist() for _ in range(batch)]
    vector = rng.standard_normal(llm.config.width).astype(np.float32)
    one, every = f"blk.{llm.config.num_layers // 2}.resid_post", "blk.*.resid_post"
    kinds: dict[str, Callable[[], AbstractContextManager[Any]]] = {
        "no hooks": nullcontext,
        "capture of one layer": lambda: llm.capture(one),
        "steering of one layer": lambda: llm.steer(one, vector),
        "capture of each layer": lambda: llm.capture(every),
        "a function at one layer": lambda: llm.patch(one, lambda value, where: None),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(_ROUNDS + 1):
        for name, block in kinds.items():
            with block():
                done = llm.generate(prompts, max_tokens=tokens, ignore_eos=True)
            slowest = max(one.timings.decode_ms for one in done) / 1000
            if number:
                rates[name].append(batch * (tokens - 1) / slowest)
    plain = median(rates["no hooks"])
    for name, found in rates.items():
        print(f"{batch:3} sequences, {name:24} {median(found):9.1f} tokens/s, {median(found) / plain:.3f}")


if __name__ == "__main__":
    main()
