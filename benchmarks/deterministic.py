"""What EngineConfig.deterministic costs on a device, and whether it holds there, as a Markdown table.

    python benchmarks/deterministic.py MODEL [--device cuda] [--batches 1 8 64] [--prompt 512] [--new 128]

Ends with status 1 where a bit of a request's log probabilities depends on the batch, or of its prompt's logits on how
it is cut.
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

import numpy as np

import forge

_CUTS = (100, 64, 37, 1)
"""Tokens of a step, beside the default."""
_COUNTS = (2, 12, 28)
"""Requests at once, beside those whose speed is measured: kernels have room for 8, 16, 32 and 64 rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=128, help="new tokens of a request")
    parser.add_argument("--speed-only", action="store_true")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    prompts = rng.integers(5, 1000, (max(*_COUNTS, *arguments.batches), arguments.prompt)).tolist()
    speeds = {deterministic: measure(arguments, prompts, deterministic) for deterministic in (False, True)}
    print("| | default | deterministic | ratio |\n| --- | --- | --- | --- |")
    for what, default in speeds[False].items():
        found = speeds[True][what]
        print(f"| {what} | {default:,.1f} | {found:,.1f} | {found / default:.2f} |")
    if arguments.speed_only:
        return
    differences = compare(arguments, prompts)
    print("\n".join(differences) or "every bit equal: alone, in a batch, and with prompts cut otherwise")
    sys.exit(bool(differences))


def load(arguments: argparse.Namespace, **engine: Any) -> forge.LLM:
    settings = forge.EngineConfig(context=arguments.prompt + arguments.new, prefix_caching=False, **engine)
    return forge.load(arguments.model, device=arguments.device, threads=arguments.threads, engine=settings)


def measure(arguments: argparse.Namespace, prompts: list[list[int]], deterministic: bool) -> dict[str, float]:
    """Tokens per second: of prompts, and of answers by the number of requests. The best of three."""
    speeds = {}
    with load(arguments, deterministic=deterministic) as llm:
        for count in arguments.batches:
            seconds = {1: np.inf, arguments.new: np.inf}
            for _ in range(3):
                for new in seconds:
                    start = time.perf_counter()
                    llm.generate(prompts[:count], max_tokens=new, ignore_eos=True)
                    seconds[new] = min(seconds[new], time.perf_counter() - start)
            prefill, both = seconds.values()
            speeds[f"prompt tokens/s of {count}"] = count * arguments.prompt / prefill
            speeds[f"new tokens/s of {count}"] = count * (arguments.new - 1) / (both - prefill)
            speeds[f"all tokens/s of {count}"] = count * (arguments.prompt + arguments.new) / both
    return speeds


def compare(arguments: argparse.Namespace, prompts: list[list[int]]) -> list[str]:
    """What differs, in words."""
    params = forge.SamplingParams(max_tokens=arguments.new, ignore_eos=True, logprobs=2)
    found = []
    with load(arguments, deterministic=True) as llm:
        logits = llm.logits(prompts[0])
        alone = [llm.generate(prompt, params) for prompt in prompts]
        for count in sorted({*_COUNTS, *arguments.batches}):
            for index, (one, other) in enumerate(
                zip(alone[:count], llm.generate(prompts[:count], params), strict=True)
            ):
                if one.ids != other.ids or one.logprobs != other.logprobs:
                    found.append(f"request {index} differs in a batch of {count}")
    for most in _CUTS:
        with load(arguments, deterministic=True, max_step_tokens=most, max_sequences=1) as llm:
            rows = (llm.logits(prompts[0]) != logits).any(axis=1)
        if rows.any():
            found.append(f"in steps of {most} tokens {rows.sum()} of {len(rows)} positions have other logits")
    return found


if __name__ == "__main__":
    main()
