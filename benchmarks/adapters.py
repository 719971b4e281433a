"""Decoding with LoRA adapters: tokens per second of batches without any, with one, and with several.

python benchmarks/adapters.py MODEL.gguf [--rank 16] [--count 8] [--batch 1,8,64] [--device auto]

The adapters are random, of all matrices of the layers' products. Each line is one batch size: "no load" is a model that
was loaded without adapters, "none" the same requests in a model that has some.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import gguf as package
import numpy as np

import forge
from forge.formats import gguf
from forge.models.adapters import ADAPTED

_WARM_TOKENS, _TOKENS, _PROMPT, _LONG = 32, 160, 64, 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--count", type=int, default=8)
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    batches = [int(batch) for batch in arguments.batch.split(",")]
    settings = {"device": arguments.device, "context": 4096, "max_sequences": max(batches)}
    found: dict[tuple[str, int], float] = {}
    with forge.load(arguments.model, **settings) as llm:
        for batch in batches:
            found["no load", batch] = rate(llm, [-1] * batch)
    with tempfile.TemporaryDirectory() as folder:
        names = [f"a{number}" for number in range(arguments.count)]
        files = {
            name: write(arguments.model, Path(folder) / f"{name}.gguf", arguments.rank, seed)
            for seed, name in enumerate(names)
        }
        size = sum(path.stat().st_size for path in files.values())
        with forge.load(arguments.model, **settings, adapters=files) as llm:
            print(f"{llm.device}; {arguments.count} adapters of rank {arguments.rank}, {size / 1e6:.0f} MB as float16")
            for batch in batches:
                found["none", batch] = rate(llm, [-1] * batch)
                found["one", batch] = rate(llm, [0] * batch)
                found["several", batch] = rate(llm, [row % arguments.count for row in range(batch)])
                found["half", batch] = rate(
                    llm, [row if row < arguments.count and row % 2 else -1 for row in range(batch)]
                )
            for kind, slot in (("none", -1), ("one", 0)):
                print(f"a prompt of {_LONG} tokens, {kind}: {prefill(llm, slot):.0f} tokens/s")
    kinds = ("no load", "none", "one", "several", "half")
    print("batch", *(f"{kind:>10}" for kind in kinds), " tokens/s; several / none")
    for batch in batches:
        row = [found[kind, batch] for kind in kinds]
        print(f"{batch:5}", *(f"{each:10.1f}" for each in row), f"{row[3] / row[1]:10.3f}")


def rate(llm: forge.LLM, slots: list[int]) -> float:
    """Tokens per second of sequences with these adapters that decode together."""
    params = forge.SamplingParams(max_tokens=_TOKENS, ignore_eos=True)
    engine = llm.engine
    best = 0.0
    for _ in range(2):  # steps of the first turn are captured
        sequences = [
            engine.add([(7 * row + place) % 1000 for place in range(_PROMPT)], params, slot)[0]
            for row, slot in enumerate(slots)
        ]
        while min(len(sequence.completion) for sequence in sequences) < _WARM_TOKENS:
            engine.step()
        count, start = sum(len(sequence.completion) for sequence in sequences), time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds = time.perf_counter() - start
        best = max(best, (sum(len(sequence.completion) for sequence in sequences) - count) / seconds)
    return best


def prefill(llm: forge.LLM, slot: int) -> float:
    """Tokens per second of a long prompt, the best of three."""
    best, ids = 0.0, llm.config.vocab_size
    for turn in range(3):
        llm.engine.add([(turn + 3 * place) % ids for place in range(_LONG)], forge.SamplingParams(max_tokens=1), slot)
        start = time.perf_counter()
        while llm.engine.has_work:
            llm.engine.step()
        best = max(best, _LONG / (time.perf_counter() - start))
    return best


def write(model: Path, path: Path, rank: int, seed: int) -> Path:
    """A random adapter of a model, as a GGUF file in float16."""
    rng = np.random.default_rng(seed)
    with gguf.read(model) as file:
        writer = package.GGUFWriter(path, file.get_str("general.architecture"))
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", 2.0 * rank)
        for name, info in file.tensors.items():
            if ADAPTED.fullmatch(name):
                for half, shape in (("a", (rank, info.shape[1])), ("b", (info.shape[0], rank))):
                    numbers = 0.02 * rng.standard_normal(shape, np.float32)
                    writer.add_tensor(f"{name}.lora_{half}", numbers.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


if __name__ == "__main__":
    main()
