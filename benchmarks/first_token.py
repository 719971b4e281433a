"""What the engine's thread costs: a first token and decode through `LLM`, beside stepping the engine by hand.

    python benchmarks/first_token.py [-m MODEL] [--device cpu] [--prompt-tokens 16] [--tokens 64] [--runs 50]

Both take turns on one loaded model, so that a busy machine slows both. Without a model it is SmolLM2 135M.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import forge
from forge import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", default="smollm2", help="a name or a path")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="tokens of a decode run")
    parser.add_argument("--runs", type=int, default=50)
    arguments = parser.parse_args()
    prompt = list(range(5, 5 + arguments.prompt_tokens))
    whole = forge.EngineConfig(prefix_caching=False)  # the same prompt again and again
    with forge.load(arguments.model, device=arguments.device, context=1024, engine=whole) as llm:
        print(f"{llm.path.name} on {llm.device}, a prompt of {len(prompt)} tokens")
        for _ in range(3):  # memory, threads and graphs are made
            _by_hand(llm, prompt, arguments.tokens)
            _streamed(llm, prompt, arguments.tokens)
        first: dict[str, list[float]] = {"by hand": [], "through LLM": []}
        for _ in range(arguments.runs):
            first["by hand"].append(_by_hand(llm, prompt, 1)[0])
            first["through LLM"].append(_streamed(llm, prompt, 1)[0])
        decode: dict[str, list[float]] = {"by hand": [], "stream": [], "generate": []}
        for _ in range(max(arguments.runs // 10, 3)):
            decode["by hand"].append(_by_hand(llm, prompt, arguments.tokens)[1])
            decode["stream"].append(_streamed(llm, prompt, arguments.tokens)[1])
            decode["generate"].append(_generated(llm, prompt, arguments.tokens))
    hand, through = median(first["by hand"]), median(first["through LLM"])
    pairs = zip(first["by hand"], first["through LLM"], strict=True)
    more = median(one - other for other, one in pairs)
    print(f"first token by hand {1000 * hand:.3f} ms, through LLM {1000 * through:.3f} ms: ratio {through / hand:.3f}")
    print(f"a first token through LLM takes {1000 * more:.3f} ms more (median of {arguments.runs} pairs)")
    for name, rates in decode.items():
        rate = median(rates)
        print(f"decode, {name:<8} {rate:10.1f} tokens/s, {rate / median(decode['by hand']):.3f} of by hand")


def _params(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True)


def _by_hand(llm: LLM, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second from there on."""
    start = time.perf_counter()
    (sequence,) = llm.engine.add(prompt, _params(tokens))
    while not sequence.completion:
        llm.engine.step()
    first = time.perf_counter()
    while llm.engine.has_work:
        llm.engine.step()
    return first - start, (tokens - 1) / (time.perf_counter() - first)


def _streamed(llm: LLM, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Seconds to the first chunk, and tokens per second from there on."""
    start = time.perf_counter()
    chunks = llm.stream(prompt, _params(tokens))
    next(chunks)
    first = time.perf_counter()
    for _ in chunks:
        pass
    return first - start, (tokens - 1) / (time.perf_counter() - first)


def _generated(llm: LLM, prompt: list[int], tokens: int) -> float:
    """Tokens per second from the first token on."""
    completion = llm.generate(prompt, _params(tokens))
    assert isinstance(completion, forge.Completion)
    return completion.timings.decode_tokens_per_s


if __name__ == "__main__":
    main()
