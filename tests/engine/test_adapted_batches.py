"""Requests with different adapters, and with none, in one batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adapter_files import merge, random_pairs, write_adapter
from harness import COMPILER, Harness
from host_memory import HostMemory, Replayed

import forge
from forge import LLM, SamplingParams, loading
from forge.backend.numpy import NumpyBackend
from forge.engine.sequence import Sequence
from forge.formats import gguf

PATH = Path(__file__).parents[1] / "data" / "arch" / "llama" / "model.gguf"
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True)
PROMPTS = [[5, 9, 17, 3], [22, 40, 7], [*range(30, 50)], [11]]
slow = pytest.mark.slow
NAMES = ("first", None, "second", "third")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three adapters, of different ranks and targets."""
    folder = tmp_path_factory.mktemp("adapters")
    wants = (lambda name: True, lambda name: "attn_" in name, lambda name: "ffn_down" in name)
    return {
        name: write_adapter(
            folder / f"{name}.gguf", "llama", random_pairs(PATH, seed=seed, rank=rank, wants=of, size=1.0)
        )
        for seed, (name, rank, of) in enumerate(zip(("first", "second", "third"), (4, 8, 12), wants, strict=True))
    }


def load(files: dict[str, Path], **settings: Any) -> LLM:
    return forge.load(PATH, device="cpu", context=64, adapters=files, **settings)


def together(llm: LLM, requests: list[tuple[list[int], str | None]]) -> list[list[int]]:
    """The completions of requests that run in the same steps."""
    sequences: list[Sequence] = []
    for prompt, name in requests:
        sequences += llm.engine.add(prompt, GREEDY, llm._slot_of(name))
    while llm.engine.has_work:
        llm.engine.step()
    return [sequence.completion for sequence in sequences]


@pytest.mark.parametrize("ahead", [pytest.param(False, marks=slow), True])
def test_a_batch_of_several_adapters_gives_each_request_its_own(
    ahead: bool, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = []
    for prompt, name in zip(PROMPTS, NAMES, strict=True):
        with forge.load(PATH, device="cpu", context=64) as llm:
            if name:
                seed = ("first", "second", "third").index(name)
                wants = (lambda n: True, lambda n: "attn_" in n, lambda n: "ffn_down" in n)[seed]
                merge(llm, random_pairs(PATH, seed=seed, rank=(4, 8, 12)[seed], wants=wants, size=1.0))
            wanted.append(llm.generate([prompt], GREEDY)[0].ids)
    plain = forge.load(PATH, device="cpu", context=64).generate(PROMPTS, GREEDY)
    assert sum(one.ids != ids for one, ids in zip(plain, wanted, strict=True)) == 3
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", ahead)
    with load(files) as llm:
        assert together(llm, list(zip(PROMPTS, NAMES, strict=True))) == wanted
        # sequences that come later take the rows of others, with other adapters
        assert together(llm, list(zip(PROMPTS[::-1], NAMES[::-1], strict=True))) == wanted[::-1]


def test_pages_of_one_adapter_are_not_found_for_another(files: dict[str, Path]) -> None:
    prompt, few = [*range(20, 44)], replace(GREEDY, max_tokens=4)
    with load(files, engine=forge.EngineConfig(page_size=8, prefix_caching=False)) as llm:
        fresh = {name: llm.generate([prompt], few, adapter=name)[0].ids for name in (None, "first", "second")}
    with load(files, engine=forge.EngineConfig(page_size=8)) as llm:
        for name in (None, "first", "second"):
            found = llm.generate([prompt], few, adapter=name)[0]
            assert found.timings.cached_tokens == 0
            assert found.ids == fresh[name]
        for name in ("second", None, "first"):
            again = llm.generate([prompt], few, adapter=name)[0]
            assert again.timings.cached_tokens == 16
            assert again.ids == fresh[name]
    assert len({tuple(ids) for ids in fresh.values()}) == 3


def test_choices_of_a_prompt_share_its_adapter_and_its_pages(files: dict[str, Path]) -> None:
    with load(files) as llm:
        sampled = llm.generate([5, 9, 17], temperature=0.9, seed=3, n=3, max_tokens=8, adapter="first")
        alone = llm.generate([5, 9, 17], temperature=0.9, seed=3, n=3, max_tokens=8, adapter="first")
        plain = llm.generate([5, 9, 17], temperature=0.9, seed=3, n=3, max_tokens=8)
    assert [one.ids for one in sampled] == [one.ids for one in alone] != [one.ids for one in plain]


def test_every_way_in_takes_an_adapter(files: dict[str, Path]) -> None:
    import asyncio

    with load(files) as llm:
        wanted = llm.generate([5, 9, 17], GREEDY, adapter="first").ids
        assert wanted != llm.generate([5, 9, 17], GREEDY).ids

        async def run() -> tuple[list[int], list[int]]:
            whole = await llm.agenerate([5, 9, 17], GREEDY, adapter="first")
            return whole.ids, [
                id async for chunk in llm.astream([5, 9, 17], GREEDY, adapter="first") for id in chunk.ids
            ]

        assert asyncio.run(run()) == (wanted, wanted)
        assert [id for chunk in llm.stream([5, 9, 17], GREEDY, adapter="first") for id in chunk.ids] == wanted
        logits = llm.logits([5, 9, 17, *wanted], adapter="first")
        assert logits[2:-1].argmax(axis=1).tolist() == wanted
        for compute in (llm.embed, llm.attention):
            assert not np.array_equal(compute([5, 9, 17], adapter="first"), compute([5, 9, 17]))
        assert llm.perplexity([5, 9, 17, *wanted], adapter="first").ppl < llm.perplexity([5, 9, 17, *wanted]).ppl


def test_an_unknown_name_is_an_error_with_the_names_that_there_are(files: dict[str, Path]) -> None:
    with load(files) as llm:
        for call in (llm.generate, llm.stream, llm.logits, llm.embed, llm.astream):
            with pytest.raises(forge.ParameterError) as caught:
                call([5], adapter="frist")
            assert str(caught.value).startswith("adapter 'frist' is not loaded; there are: 'first', 'second', 'third'")
    with forge.load(PATH, device="cpu", context=64) as llm, pytest.raises(forge.ParameterError) as caught:
        llm.generate([5], adapter="first")
    assert str(caught.value).startswith("adapter 'first' is not loaded; load was given none")


@slow
@pytest.mark.skipif(COMPILER is None, reason="no clang++: scripts/install-toolchain installs it")
class TestOnKernels:
    class Device(Replayed, HostMemory, Harness):
        """Counts launches by kernel."""

        arch = "harness"

        def _run(self, entry: Any, grid: tuple[int, ...], args: list[Any]) -> None:
            self.launched = [*getattr(self, "launched", ()), entry.function]
            super()._run(entry, grid, args)

    @pytest.mark.parametrize(
        ("name", "wave"),
        [
            *(("gemma2", 32), ("phi3", 64), ("qwen2moe", 32), ("gemma4_e2b", 64), ("falcon_40b", 32), ("exaone4", 64)),
            ("gemma4_26b_a4b", 64),
        ],
    )
    def test_a_model_agrees_with_float32(
        self, name: str, wave: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Prompts and decode steps, whose products, norms and activations are others."""
        path, ids = PATH.parents[1] / name / "model.gguf", list(range(20, 40))
        with gguf.read(path) as file:
            arch = file.get_str("general.architecture")
        adapters = {
            each: write_adapter(tmp_path / f"{each}.gguf", arch, random_pairs(path, seed=seed))
            for seed, each in enumerate("ab")
        }
        with forge.load(path, device="cpu", context=64, adapters=adapters) as llm:
            expected = [llm.generate([ids], GREEDY, adapter=each)[0].ids for each in (*adapters, None)]
            exact = [
                llm.logits([*ids, *found], adapter=each)
                for each, found in zip((*adapters, None), expected, strict=True)
            ]
        assert np.sqrt(np.mean((exact[0] - exact[2])[:20] ** 2) / np.mean(exact[2] ** 2)) > 0.05
        monkeypatch.setattr(loading.backends, "select", lambda _: self.Device(wave))
        with forge.load(path, context=64, max_sequences=4, adapters=adapters) as llm:
            for each, found, wanted in zip((*adapters, None), expected, exact, strict=True):
                got = llm.logits([*ids, *found], adapter=each)
                errors = np.sqrt(np.mean((got - wanted) ** 2, axis=1) / np.mean(wanted**2, axis=1))
                assert np.median(errors) < 0.005
                assert np.mean(errors > 0.01) < 0.1  # a router may choose another expert in a near tie
            ids_together = together(llm, [(ids, each) for each in (*adapters, None)])
        for got_ids, found, wanted in zip(ids_together, expected, exact, strict=True):
            parted = [i for i, pair in enumerate(zip(got_ids, found, strict=True)) if len({*pair}) > 1]
            if parted:  # only a near tie may part them
                assert np.diff(np.sort(wanted[len(ids) + parted[0] - 1])[-2:])[0] < 0.05

    def launches(
        self, files: dict[str, Path] | None, names: tuple[str | None, ...], monkeypatch: pytest.MonkeyPatch
    ) -> tuple[list[str], list[list[int]], int]:
        """What two prompts launch once the model is loaded, their ids, and how many steps were replayed."""
        device = self.Device(32)
        monkeypatch.setattr(loading.backends, "select", lambda _: device)
        with forge.load(PATH, context=64, max_sequences=4, adapters=files) as llm:
            device.launched, device.replays = [], 0
            ids = together(llm, list(zip(PROMPTS, names, strict=False)))
            return device.launched, ids, device.replays

    @pytest.mark.parametrize("name", [None, "first"])
    def test_a_deterministic_request_has_the_same_bits_beside_other_adapters(
        self, name: str | None, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(loading.backends, "select", lambda _: self.Device(64))
        logged = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=3)
        settings = forge.EngineConfig(deterministic=True, context=64, max_sequences=4)
        found = []
        for others in ((), ("second", "third", None)):
            with forge.load(PATH, adapters=files, engine=settings) as llm:
                waiting = [llm.engine.add(PROMPTS[1], logged, llm._slot_of(other)) for other in others]
                found.append(llm.generate([PROMPTS[0]], logged, adapter=name)[0].logprobs)
                assert len(waiting) == len(others)
        assert found[0] == found[1]

    def test_steps_without_adapters_launch_what_they_do_in_a_model_without_any(
        self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain, plain_ids, replays = self.launches(None, (None, None), monkeypatch)
        beside, ids, again = self.launches(files, (None, None), monkeypatch)
        assert beside == plain
        assert ids == plain_ids
        assert again == replays > 3
        assert not any(name.startswith("lora") for name in beside)

    def test_a_mixed_batch_is_replayed_with_two_launches_more_for_each_product(
        self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with load(files) as llm:
            wanted = together(llm, list(zip(PROMPTS, NAMES, strict=True)))
            layers = llm.config.num_layers
        launched, ids, replays = self.launches(files, NAMES, monkeypatch)
        assert ids == wanted
        assert replays > 3
        products, steps = 4 * layers, launched.count("embed")
        assert launched.count("lora_shrink") == products * steps
        assert launched.count("lora_expand_glu") == layers * steps
        assert launched.count("lora_expand") == (products - layers) * steps
