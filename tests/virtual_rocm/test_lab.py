"""A kernel replaced under a loaded model: captured and recorded steps have it from the next one on, and none after."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from threading import Thread
from time import sleep
from typing import Any

import pytest

import forge
from forge import lab
from forge.backend import edits, sources
from forge.lab import kernels, replacing
from virtual_rocm import tiny

pytestmark = [pytest.mark.virtual_rocm, pytest.mark.slow]

ON = ("gfx1100",)
IMPORTED = "from forge.lab.trial"
FEW_COPIES = "from forge.devtools import autotune; autotune.ROTATED_BYTES = autotune._ROUNDS = 1; "
PROMPTS = [[5, 9, 17, 3], list(range(20, 60))]


@pytest.fixture(autouse=True)
def quick_trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Times of the virtual GPU mean nothing: each is taken once."""
    run = replacing.probe.run

    def quickly(command: Sequence[str], *rest: Any) -> Any:
        return run([part.replace(IMPORTED, FEW_COPIES + IMPORTED) for part in command], *rest)

    monkeypatch.setattr(replacing.probe, "run", quickly)
    yield
    lab.restore()


def made(llm: forge.LLM, prompts: Any) -> list[float]:
    """Log probabilities of what a model makes of prompts, to the bit."""
    found = llm.generate(prompts, max_tokens=5, ignore_eos=True, logprobs=1, temperature=0)
    return [token.logprob for completion in found for token in completion.logprobs or ()]


def test_a_loaded_model_uses_a_replaced_kernel_from_the_next_step_on_and_its_own_after(device: Any) -> None:
    text = lab.source("embed").replace("* factor", "* factor * 1.0005f")
    with forge.load(tiny.ARCH / "llama" / "model.gguf", device="hip", context=128, max_sequences=2) as llm:
        own = [
            made(llm, PROMPTS[:1]),
            made(llm, PROMPTS),
        ]  # captured steps of one and two rows, recorded ones of prompts
        assert [made(llm, PROMPTS[:1]), made(llm, PROMPTS)] == own
        generation = device.step_generation
        with lab.replaced("embed", text, device="hip") as report:
            assert device.step_generation is not generation
            other = [made(llm, PROMPTS[:1]), made(llm, PROMPTS)]
            assert [made(llm, PROMPTS[:1]), made(llm, PROMPTS)] == other
        assert [made(llm, PROMPTS[:1]), made(llm, PROMPTS)] == own

    for one, changed in zip(own, other, strict=True):
        assert one[0] != changed[0]  # of the prompt's step, which is recorded
        assert one[1] != changed[1]  # of a captured one
        assert one == pytest.approx(changed, abs=0.01)
    used = edits.of(report_file := next(v.file for v in device.loaded if v.file.startswith("embed@")))
    assert used is not None, report_file
    assert "1.0005f" in used.text
    assert report.cases == 3
    assert {each.kernel for each in report.resources} == {"embed"}
    assert all(each.new["VGPRs"] > 0 and not each.new["VGPR spills"] for each in report.resources)
    assert [time.workload.split()[0] for time in report.times] == ["embed", "embed"]


def test_a_kernel_is_replaced_while_another_thread_generates(device: Any) -> None:
    """The same text under other names: whatever step it comes into, the bits stay, and no step fails."""
    place = kernels.find("embed.hip")
    names = [edits.add(kernels.edited(place, f"{lab.source('embed.hip')}// {n}", 1)) for n in range(3)]
    found: list[list[float]] = []
    with forge.load(tiny.ARCH / "llama" / "model.gguf", device="hip", context=128, max_sequences=2) as llm:
        own = made(llm, PROMPTS)
        device.build(
            [replace(variant, file=name) for variant in device.loaded if variant.file == "embed" for name in names]
        )
        thread = Thread(target=lambda: found.extend(made(llm, PROMPTS) for _ in range(12)))
        thread.start()
        changes = 0
        while thread.is_alive():
            edits.replace(dict.fromkeys(place.kernels, (*names, None)[changes % 4]))
            changes += 1
            sleep(0.02)
        thread.join()
    assert changes > 12
    assert found == [own] * 12


def test_a_refused_kernel_changes_nothing(device: Any) -> None:
    generation, shared = device.step_generation, device.shared
    with pytest.raises(
        forge.ParameterError, match=r"source: embed is wrong in case .* of embed: off by .* times what is allowed"
    ):
        lab.replace("embed", lab.source("embed").replace("* factor", "* factor * 1.5f"), device="hip")
    with pytest.raises(
        forge.ParameterError, match=r"does not compile for gfx1100 .*: cell:11: use of undeclared identifier 'xs'"
    ):
        lab.replace(
            "embed", lab.source("embed").replace("Vec<f16, VECTOR> x =", "xs = x; Vec<f16, VECTOR> x ="), device="hip"
        )
    assert device.step_generation is generation
    assert all(one is other for one, other in zip(shared, device.shared, strict=True))
    assert lab.source("embed") in sources.text("embed")
