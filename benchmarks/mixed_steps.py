"""What prompt tokens in a step cost those who decode in it: the time of a step by `EngineConfig.max_prefill_tokens`.

    python benchmarks/mixed_steps.py -m MODEL [--device cpu] [--decoding 8] [--prompt 512] [--budgets 16 32 64 ...]

A prompt arrives beside sequences that decode, once for each budget, in several rounds: compare within one run. Without
a model it is a synthetic llama-3.2-1b in F16.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import numpy as np

import forge
from forge import EngineConfig, SamplingParams
from forge.engine import Engine, Sequence

_DECODE_STEPS = 8
"""Steps without a prompt behind each one with prompts: the pipeline of a GPU is full again."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="a name or a path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--decoding", type=int, default=8, help="sequences that decode")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt that arrives")
    parser.add_argument("--budgets", type=int, nargs="+", default=[16, 32, 64, 128, 256, 512])
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        model = arguments.model or _synthetic(Path(directory))
        most = arguments.decoding + max(arguments.budgets)
        settings = EngineConfig(context=4096, max_sequences=arguments.decoding + 1, max_step_tokens=most)
        with forge.load(model, device=arguments.device, engine=settings) as llm:
            print(f"{llm.path.name} on {llm.device}: {arguments.decoding} decode, {arguments.prompt} arrive")
            _report(*_measured(llm.engine, arguments))


def _synthetic(directory: Path) -> Path:
    from synthetic import write

    path = directory / "llama-3.2-1b-F16.gguf"
    write("llama-3.2-1b", "F16", path)
    return path


def _measured(engine: Engine, arguments: argparse.Namespace) -> tuple[list[float], dict[int, list[list[float]]]]:
    """Seconds of the steps of those who decode alone, and by budget those of each prompt's steps beside them."""
    rng = np.random.default_rng(0)
    params = SamplingParams(max_tokens=None, ignore_eos=True)
    alone: list[float] = []
    mixed: dict[int, list[list[float]]] = defaultdict(list)

    def added(length: int) -> Sequence:
        return engine.add(rng.integers(0, engine.runner.vocab_size, length).tolist(), params)[0]

    for round_number in range(arguments.rounds + 1):  # the first one compiles, and fills pools
        decoding = [added(128) for _ in range(arguments.decoding)]
        while not all(sequence.is_decoding for sequence in decoding):
            engine.step()
        for budget in arguments.budgets:
            engine.scheduler.budget, engine.scheduler.max_prefill_tokens = None, budget
            arriving = added(arguments.prompt)
            times: list[float] = []
            while len(arriving.ids) == arguments.prompt:
                times.append(_timed(engine))
            engine.finish(arriving, "abort")
            own = [_timed(engine) for _ in range(_DECODE_STEPS)]
            if round_number:
                mixed[budget].append(times)
                alone += own[_DECODE_STEPS // 2 :]
        for sequence in decoding:
            engine.finish(sequence, "abort")
    return alone, mixed


def _timed(engine: Engine) -> float:
    started = time.perf_counter()
    engine.step()
    return time.perf_counter() - started


def _report(alone: list[float], mixed: dict[int, list[list[float]]]) -> None:
    base = median(alone)
    print(f"a step without prompt tokens: {1000 * base:.2f} ms")
    print("budget  step, ms  of one without   longest, ms   prompt in, ms")
    for budget, prompts in mixed.items():
        step = median(seconds for times in prompts for seconds in times)
        longest = median(max(times) for times in prompts)
        total = median(sum(times) for times in prompts)
        print(f"{budget:6} {1e3 * step:9.2f} {step / base:15.2f} {1e3 * longest:13.2f} {1e3 * total:15.1f}")


if __name__ == "__main__":
    main()
