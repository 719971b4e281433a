"""How much KV cache a load takes: what one sequence needs, or what was asked for, and never all that is free."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from tiny_models import ARCH

import forge
from forge import models, planning
from forge.backend import NUMPY
from forge.backend.numpy import NumpyBackend
from forge.config import EngineConfig
from forge.formats import gguf
from forge.planning import make_plan
from forge.state.model_state import kinds_of

PATH = ARCH / "llama" / "model.gguf"
PAGE = 64


def planned(context: int | None, *, sequences: int | None, backend: Any = NUMPY) -> Any:
    settings = EngineConfig(context=context, max_sequences=sequences)
    with gguf.read(PATH) as file:
        return make_plan(file, settings, backend)


def bytes_of(tokens: int) -> int:
    with gguf.read(PATH) as file:
        config = models.read_config(file)
        (kind,) = kinds_of(config, context=tokens, page_size=PAGE, step_tokens=512, itemsize=4)
        return tokens * kind.token_bytes


@pytest.mark.parametrize(
    ("context", "sequences", "tokens"),
    [
        (8192, None, 32768),  # four whole contexts for up to 64 sequences
        (32768, None, 32768),
        (131072, None, 131072),  # one
        (256, None, 64 * 256),  # 64 whole ones are less than that
        (8192, 1, 8192),  # what is asked for, neither more nor less
        (8192, 3, 3 * 8192),
        (8192, 64, 64 * 8192),
        (100, 2, 2 * 128),
    ],
)
def test_pages_for_what_is_asked_for_else_for_one_context_or_a_bounded_number(
    context: int, sequences: int | None, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: 1 << 50)
    plan = planned(context, sequences=sequences)
    assert (plan.context, plan.num_pages) == (context, (tokens // PAGE,))


@pytest.mark.parametrize("sequences", [None, 64])
def test_no_more_pages_than_fit(sequences: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = 4 * 171_000  # a little more than the model's
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: round((weights + bytes_of(10_048)) / 0.9))
    plan = planned(8192, sequences=sequences)
    assert 9_000 < plan.num_pages[0] * PAGE < 10_500


def test_a_gpu_says_how_much_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In gigabytes; a cache that is small beside any GPU goes without a word."""

    class Gpu(NumpyBackend):
        is_gpu = True

        def free_bytes(self) -> int:
            return 1 << 50

    plan = planned(1 << 20, sequences=1, backend=Gpu())
    (note,) = [note for note in plan.notes if note.startswith("KV cache: ")]
    taken = bytes_of((1 << 20) + PAGE)
    assert note == (
        f"KV cache: 1048576 tokens take {taken / 1e9:.2f} GB ({bytes_of(1 << 20) >> 20:,} bytes per token of context); "
        "a smaller context takes less"
    )
    assert not [note for note in planned(8192, sequences=1, backend=Gpu()).notes if "KV cache" in note]


def test_the_default_is_stated() -> None:
    text = " ".join((inspect.getdoc(forge.load) or "").split())
    assert f"{planning.SHARED_TOKENS:,} tokens" in text
    with forge.load(PATH, device="cpu", context=128) as llm:
        assert llm.engine.scheduler.max_sequences == 64
        assert llm.engine.pools[0].num_pages * PAGE == 64 * 128
    with forge.load(PATH, device="cpu", context=128, max_sequences=1) as llm:
        assert llm.engine.pools[0].num_pages * PAGE == 128


def test_requests_share_a_default_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together they need eight times as much as there is."""
    monkeypatch.setattr(planning, "SHARED_TOKENS", 128)
    prompts = [[number] * 100 for number in range(16)]
    with forge.load(PATH, device="cpu", context=128) as llm:
        assert llm.engine.pools[0].num_pages == 2
        found = llm.generate(prompts, max_tokens=8, ignore_eos=True)
    with forge.load(PATH, device="cpu", context=128, max_sequences=16) as llm:
        assert llm.engine.pools[0].num_pages == 32
        assert [c.ids for c in found] == [c.ids for c in llm.generate(prompts, max_tokens=8, ignore_eos=True)]


@pytest.mark.parametrize(("given", "found"), [(None, 64), (5, 5), (4096, 4096)])
def test_prompt_tokens_beside_decoding_sequences_are_few_on_a_cpu_unless_given(given: int | None, found: int) -> None:
    with forge.load(PATH, device="cpu", engine=EngineConfig(max_prefill_tokens=given)) as llm:
        assert llm.engine.scheduler.max_prefill_tokens == found


def test_memory_of_steps_is_not_taken_while_the_warm_up_has_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both together are not planned."""
    calls: list[str] = []
    monkeypatch.setattr(NumpyBackend, "prepare", lambda *_: calls.append("warm-up"))
    monkeypatch.setattr(NumpyBackend, "reserve", lambda *_: calls.append("steps"))
    forge.load(PATH, device="cpu", context=256).close()
    assert calls == ["warm-up", "steps"]
