"""States: what goes on from one is what a plain request gives, and files of them are checked."""

from __future__ import annotations

import gc
import json
import pickle
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
from tiny_models import ARCH, assert_idle, settle, tiny_llm

import forge
from forge import LLM, ContextLengthError, ForgeError, FormatError, OutOfMemoryError, ParameterError, State
from forge.backend import NUMPY
from forge.formats import safetensors
from forge.formats.safetensors_writer import write_file

LONG = np.random.default_rng(5).integers(0, 250, 80).tolist()
IDS = LONG[:40]
GREEDY, SEEDED = replace(tiny_models.GREEDY, max_tokens=8), replace(tiny_models.SEEDED, max_tokens=8)
FAMILIES = [pytest.param("llama", marks=pytest.mark.slow), "gemma3", pytest.param("gemma4_e2b", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest) -> LLM:
    """With a sliding window of 16 in gemma3."""
    return tiny_llm(request.param, max_step_tokens=16)


@pytest.fixture(scope="module")
def windowed() -> LLM:
    return tiny_llm("gemma3", max_step_tokens=16)


def close_all(llm: LLM, *states: State) -> None:
    for state in states:
        state.close()
    gc.collect()
    assert_idle(llm)


def test_what_goes_on_is_what_a_plain_request_gives(llm: LLM) -> None:
    state = llm.prefill(IDS)
    np.testing.assert_allclose(state.logits, llm.logits(IDS, -1), rtol=0, atol=1e-4)
    assert (state.ids, len(state)) == (IDS, 40)
    wanted, more = llm.generate(IDS, SEEDED), replace(SEEDED, n=3)
    for _ in range(2):
        found = state.generate("", SEEDED)
        assert (found.ids, found.text, found.prompt_ids) == (wanted.ids, wanted.text, IDS)
    assert found.timings.cached_tokens == 39
    assert state.generate("", SEEDED, seed=12).ids == llm.generate(IDS, SEEDED, seed=12).ids
    batch = state.generate([[1, 2], [3]], more)
    assert [c.ids for c in batch] == [c.ids for c in llm.generate([[*IDS, 1, 2], [*IDS, 3]], more)]
    assert "".join(chunk.text for chunk in state.stream([7], GREEDY)) == llm.generate([*IDS, 7], GREEDY).text
    np.testing.assert_allclose(state.logits, llm.logits(IDS, -1), rtol=0, atol=1e-4)
    close_all(llm, state)


def test_a_state_grows_goes_back_and_is_forked(llm: LLM) -> None:
    state = llm.prefill(IDS)
    fork = state.fork()
    fork.extend([7, 8, 9])
    assert (fork.ids, state.ids) == ([*IDS, 7, 8, 9], IDS)
    fork.rollback(-2)
    other = fork.fork()
    other.extend([1] * 20)
    fork.extend([4])
    for one, ids in ((fork, [*IDS, 7, 4]), (other, [*IDS, 7, *[1] * 20]), (state, IDS)):
        assert one.ids == ids
        np.testing.assert_allclose(one.logits, llm.logits(ids, -1), rtol=0, atol=1e-4)
        assert one.generate("", GREEDY).ids == llm.generate(ids, GREEDY).ids
    fork.rollback(41)
    np.testing.assert_allclose(fork.logits, llm.logits([*IDS, 7], -1), rtol=0, atol=1e-4)
    fork.rollback(41)
    assert len(fork) == 41
    close_all(llm, state, fork, other)


def test_text_goes_on_without_bos_or_space() -> None:
    llm = tiny_llm("llama")
    llm.tokenizer.add_bos = True
    state = llm.prefill("a b")
    state.extend(" c")
    assert state.ids == llm.tokenizer.encode_prompt("a b c")
    assert state.generate(" d", GREEDY).ids == llm.generate("a b c d", GREEDY).ids


def test_a_window_that_has_moved_on_is_not_gone_back_to(windowed: LLM) -> None:
    state = windowed.prefill(LONG)
    with pytest.raises(ParameterError) as error:
        state.rollback(5)
    assert re.fullmatch(
        r"length: the state cannot go back to 5 tokens: layers with a window of 16 have kept what (\d+) tokens need, "
        "and nothing before: prefill the shorter prompt, or fork the state before it grows",
        str(error.value),
    )
    fewest = int(re.search(r"what (\d+)", str(error.value))[1])  # type: ignore[index]
    with pytest.raises(ParameterError, match=f"to {fewest - 1} tokens"):
        state.rollback(fewest - 1)
    state.rollback(fewest)
    np.testing.assert_allclose(state.logits, windowed.logits(LONG[:fewest], -1), rtol=0, atol=1e-4)
    close_all(windowed, state)


@pytest.mark.parametrize("length", [0, 41, -40, 1.5, True, "3"])
def test_a_length_that_there_is_not_is_refused(length: Any, windowed: LLM) -> None:
    with windowed.prefill(IDS) as state, pytest.raises(ParameterError, match="length must be"):
        state.rollback(length)
    close_all(windowed)


def test_what_cannot_be_added_leaves_a_state_as_it_was(windowed: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    state = windowed.prefill(IDS)
    for more, error in (([1] * 57, ContextLengthError), ([9999], ParameterError), ("", ParameterError)):
        with pytest.raises(error):
            state.extend(more)  # type: ignore[arg-type]
    run = windowed.engine.runner.forward
    monkeypatch.setattr(windowed.engine.runner, "forward", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        state.extend([1] * 40)
    monkeypatch.setattr(windowed.engine.runner, "forward", run)
    assert state.generate("", GREEDY).ids == windowed.generate(IDS, GREEDY).ids
    with pytest.raises(ParameterError, match="prefill takes one prompt"):
        windowed.prefill([[1], [2]])  # type: ignore[list-item]
    with pytest.raises(ParameterError, match="stream takes one prompt"):
        state.stream([[1], [2]])  # type: ignore[arg-type]
    close_all(windowed, state)


@pytest.mark.parametrize("prefix_caching", [pytest.param(False, marks=pytest.mark.slow), True])
def test_requests_whose_pages_run_out_start_again_from_their_state(prefix_caching: bool) -> None:
    roomy = tiny_llm("gemma3")
    llm = tiny_llm("gemma3", num_pages=13, prefix_caching=prefix_caching)
    prompts = [[number] * (3 + number) for number in range(5)]
    wanted = [roomy.generate([*IDS, *prompt], SEEDED).ids for prompt in prompts]
    state = llm.prefill(IDS)
    assert [completion.ids for completion in state.generate(prompts, SEEDED)] == wanted
    assert llm.engine.scheduler.num_preemptions > 0
    close_all(llm, state)


def test_a_state_is_not_found_by_other_requests() -> None:
    """What it holds may have been changed, or be another's: only those that go on from it read it."""
    llm = tiny_llm("llama")
    wanted = llm.generate(IDS, GREEDY)
    llm.engine.prefix_cache.clear()  # type: ignore[union-attr]
    state = llm.prefill(IDS)
    settle(llm)
    for array in (array for cache in llm.engine.runner.state.caches for array in cache.arrays):
        array *= np.float32(1.5)
    changed = state.generate("", GREEDY)
    assert changed.ids != wanted.ids
    assert llm.generate(IDS, GREEDY).ids == wanted.ids
    assert state.generate("", GREEDY).ids == changed.ids
    close_all(llm, state)


def test_pages_that_states_hold_are_said_where_they_are_missing() -> None:
    llm = tiny_llm("llama", num_pages=12)
    states = [llm.prefill([number] * 40) for number in range(2)]
    held = r"2 states of 80 tokens, which take 10 of 12 pages \(all positions\): close states that are not needed"
    for use in (
        lambda: llm.prefill([3] * 40),
        lambda: states[0].extend([1] * 30),
        lambda: llm.logits([3] * 40),
        lambda: llm.generate([3] * 40, GREEDY),
        lambda: llm.generate([3], replace(GREEDY, max_tokens=30)),
    ):
        with pytest.raises(OutOfMemoryError, match=held):
            use()
    assert llm.generate([3, 4], replace(GREEDY, max_tokens=5)).ids
    states.pop().close()
    gc.collect()
    short = replace(GREEDY, max_tokens=10)
    assert llm.generate([3] * 40, short).ids == tiny_llm("llama").generate([3] * 40, short).ids
    assert states[0].generate([5], GREEDY).ids
    close_all(llm, *states)


def test_a_state_takes_pages_of_requests_that_can_go_on_beside_it_and_of_no_others() -> None:
    llm = tiny_llm("llama", num_pages=14)
    params, prompts = replace(GREEDY, max_tokens=20), [[number] * 10 for number in range(4)]
    wanted = [llm.generate(prompt, params).ids for prompt in prompts]
    streams = [llm.stream(prompt, params) for prompt in prompts]
    found = [list(next(stream).ids) for stream in streams]
    with pytest.raises(OutOfMemoryError, match=r"a pass over 96 positions .* that others hold: requests under way"):
        llm.prefill([3] * 96)
    state = llm.prefill([3] * 60)
    for ids, stream in zip(found, streams, strict=True):
        ids += [token for chunk in stream for token in chunk.ids]
    assert found == wanted
    close_all(llm, state)


def test_a_state_that_is_forgotten_or_closed_gives_its_pages_back(windowed: LLM) -> None:
    state = windowed.prefill(IDS)
    bytes_of_page = [pool.kind.page_bytes for pool in windowed.engine.pools]
    taken = [pool.num_pages - pool.num_free for pool in windowed.engine.pools]
    assert state.nbytes == np.dot(bytes_of_page, taken) > 0
    assert repr(state) == f"<forge.State: 40 tokens, {state.nbytes / 1000:.4g} kB of the KV cache>"
    assert "40 tokens" in state._repr_html_()
    fork, stream = state.fork(), state.stream("", GREEDY)
    first = next(stream)
    state.close()
    assert repr(state) == "<forge.State: closed>"
    for use in (
        lambda: state.ids,
        lambda: len(state),
        lambda: state.generate(""),
        state.fork,
        lambda: state.extend("a"),
    ):
        with pytest.raises(ForgeError, match="the state is closed"):
            use()
    assert [*first.ids, *(i for chunk in stream for i in chunk.ids)] == fork.generate("", GREEDY).ids
    del fork
    gc.collect()
    assert_idle(windowed)
    with pytest.raises(ForgeError, match="fork it, or save it"):
        pickle.dumps(state)


def test_a_state_of_a_closed_model_says_so() -> None:
    llm = tiny_llm("llama")
    state = llm.prefill(IDS)
    llm.close()
    for use in (
        lambda: state.generate(""),
        lambda: state.extend([1]),
        lambda: state.rollback(3),
        lambda: state.save("x"),
        lambda: llm.load_state("x"),
    ):
        with pytest.raises(ForgeError, match="the model is closed"):
            use()
    assert state.ids == IDS
    state.close()


def test_threads_that_change_one_state_are_told_and_those_that_read_it_are_not(llm: LLM) -> None:
    state, found = llm.prefill(IDS), []
    wanted = llm.generate(IDS, GREEDY).ids

    def change(number: int) -> None:
        try:
            state.fork().extend([number])
            state.extend([number] * 30)
        except ForgeError as error:
            found.append(str(error))

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    readers = [threading.Thread(target=lambda: found.append(fork.generate("", GREEDY).ids)) for _ in range(2)]
    fork = state.fork()
    for thread in (*threads, *readers):
        thread.start()
    for thread in (*threads, *readers):
        thread.join(60)
    assert found.count(wanted) == 2
    told = [one for one in found if one != wanted]
    assert all("changed or closed by another thread" in one or "fit the context" in one for one in told)
    number = state.ids[-1]
    assert state.ids == [*IDS, *[number] * 30]
    np.testing.assert_allclose(state.logits, llm.logits(state.ids, -1), rtol=0, atol=1e-4)
    close_all(llm, state, fork)


# Within a step


def test_a_processor_may_use_states_and_scores_at_once(windowed: LLM) -> None:
    seen: list[Any] = []

    def other_model(ids: Any, logits: Any) -> Any:
        """As contrastive decoding would ask one."""
        held = windowed.prefill(ids.tolist() if hasattr(ids, "tolist") else list(ids))
        np.testing.assert_allclose(held.logits, logits, rtol=0, atol=1e-4)
        held.extend([5])
        held.rollback(-1)
        seen.append(windowed.score(held.ids, [[5], [6, 7]])[1].logprob)
        held.close()

    plain = windowed.generate(IDS, GREEDY).ids
    assert windowed.generate(IDS, GREEDY, logits_processors=[other_model]).ids == plain
    whole = [windowed.score([*IDS, *plain[:count]], [6, 7]).logprob for count in range(8)]
    np.testing.assert_allclose(seen, whole, rtol=0, atol=1e-3)
    state = windowed.prefill(IDS)
    with pytest.raises(ForgeError, match="cannot wait for the step"):
        windowed.generate([1], GREEDY, logits_processors=[lambda *_: state.generate("", GREEDY) and None])
    close_all(windowed, state)


# Hooks


def test_hooks_see_what_is_computed_and_a_state_keeps_what_they_changed(windowed: LLM) -> None:
    point = "blk.2.resid_post"
    with windowed.capture(point) as whole:
        windowed.logits(IDS)
    with windowed.capture(point) as prefill:
        state = windowed.prefill(IDS[:30])
    with windowed.capture(point) as extend:
        state.extend(IDS[30:])
    np.testing.assert_allclose(prefill[point], whole[point][:30], rtol=0, atol=1e-4)
    assert extend.requests[0].positions(point).tolist() == list(range(30, 40))
    np.testing.assert_allclose(extend[point], whole[point][30:], rtol=0, atol=1e-4)
    vector = np.full(windowed.config.width, 3.0, np.float32)
    with windowed.steer(point, vector, steps="prompt"):
        wanted, changed = windowed.generate(IDS, GREEDY), windowed.prefill(IDS)
    plain = windowed.generate(IDS, GREEDY).ids
    assert wanted.ids != plain
    assert changed.logits.argmax() == wanted.ids[0]
    changed.extend(wanted.ids[:1])
    assert changed.generate("", GREEDY).ids[:7] == wanted.ids[1:]
    assert windowed.generate(IDS, GREEDY).ids == state.generate("", GREEDY).ids == plain
    close_all(windowed, state, changed)


# Files


def test_a_saved_state_goes_on_in_another_process_s_model(llm: LLM, tmp_path: Path) -> None:
    path, name = tmp_path / "state.safetensors", llm.path.parent.name
    state = llm.prefill(IDS)
    state.extend([7, 8])
    state.save(path)
    other = tiny_llm(name, num_pages=50)
    for one in (other, llm):
        loaded = one.load_state(path)
        assert (loaded.ids, loaded.nbytes) == (state.ids, state.nbytes)
        np.testing.assert_array_equal(loaded.logits, state.logits)
        assert loaded.generate([3], SEEDED).ids == llm.generate([*IDS, 7, 8, 3], SEEDED).ids
        loaded.rollback(-1)
        np.testing.assert_allclose(loaded.logits, llm.logits([*IDS, 7], -1), rtol=0, atol=1e-4)
        close_all(one, *[loaded] if one is other else [loaded, state])
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_state_is_of_one_model_with_one_set_of_weights(tmp_path: Path) -> None:
    def load(name: str, **how: Any) -> LLM:
        return forge.load(ARCH / name / "model.gguf", device="cpu", progress=False, **how)

    path = tmp_path / "state.safetensors"
    with load("llama", context=64) as llm, llm.prefill(IDS) as state:
        state.rollback(30)
        state.save(path)
        with load("llama", context=32) as same, same.load_state(path) as loaded:
            np.testing.assert_array_equal(loaded.logits, state.logits)
        with (
            load("llama", context=16) as short,
            pytest.raises(ContextLengthError, match="has 30 tokens and the context"),
        ):
            short.load_state(path)
    changed = tmp_path / "model.gguf"
    data = (ARCH / "llama" / "model.gguf").read_bytes()
    with forge.formats.gguf.read(ARCH / "llama" / "model.gguf") as file:
        offset = file.tensors["blk.1.ffn_norm.weight"].offset
    changed.write_bytes(data[:offset] + np.float32(1.25).tobytes() + data[offset + 4 :])
    refused = pytest.raises(FormatError, match="was computed by another model, or by other weights of it")
    with forge.load(changed, device="cpu", progress=False) as fine_tune, refused:
        fine_tune.load_state(path)


def saved(llm: LLM, path: Path, ids: list[int] = IDS) -> tuple[dict[str, Any], dict[str, str]]:
    """A state's file: its tensors and metadata."""
    with llm.prefill(ids) as state:
        state.save(path)
    with safetensors.read_file(path) as file:
        arrays = {}
        for name, info in file.tensors.items():
            arrays[name] = np.empty(info.shape, {"F32": np.float32, "I32": np.int32}[info.dtype])
            file.read(name, 0, arrays[name])
        return arrays, dict(file.metadata)


HOSTILE: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "no state": ({}, {"forge_state": ""}, "is a state of version ''"),
    "another model": ({}, {"model": "0" * 64}, "was computed by another model"),
    "an adapter": ({}, {"adapter": "x"}, "is a state of the adapter 'x', which is not loaded"),
    "no ids": ({"ids": np.zeros(0, np.int32)}, {}, "which is no list of tokens"),
    "ids of two sides": ({"ids": np.zeros((2, 2), np.int32)}, {}, "which is no list of tokens"),
    "ids as floats": ({"ids": np.zeros(40, np.float32)}, {}, "tensor 'ids' is F32, and this model computes in int32"),
    "an id outside": ({"ids": np.full(40, 9999, np.int32)}, {}, "token id 9999"),
    "a negative id": ({"ids": np.full(40, -1, np.int32)}, {}, "token id -1"),
    "more ids": ({"ids": np.zeros(41, np.int32)}, {}, "has 40 of 41 positions"),
    "fewer ids": ({"ids": np.zeros(39, np.int32)}, {}, "has 40 of 39 positions"),
    "far too many ids": ({"ids": np.zeros(97, np.int32)}, {}, "has 97 tokens and the context holds 96"),
    "short logits": ({"logits": np.zeros(3, np.float32)}, {}, r"'logits' has the shape \(3,\)"),
    "a layer too many": ({"blk.99.k": np.zeros(1, np.float32)}, {}, "has tensor 'blk.99.k': it is no state of"),
    "a layer too few": ({"blk.0.k": None}, {}, "lacks tensor 'blk.0.k'"),
    "half precision": (
        {"blk.0.k": np.zeros(1, np.float16)},
        {},
        "'blk.0.k' is F16, and this model computes in float32",
    ),
    "no positions": ({"blk.0.k": np.zeros((0, 1, 8), np.float32)}, {}, "blk.0.k' has"),
    "one number": ({"blk.0.k": np.zeros((), np.float32)}, {}, r"blk.0.k' has the shape \(\)"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused(case: str, windowed: LLM, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    arrays, metadata = saved(windowed, path)
    tensors, told, message = HOSTILE[case]
    kept = {name: array for name, array in (arrays | tensors).items() if array is not None}
    write_file(path, kept, metadata | told)
    with pytest.raises(ForgeError, match=message):
        windowed.load_state(path)
    close_all(windowed)


def test_a_window_that_lacks_positions_is_refused(windowed: LLM, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    arrays, metadata = saved(windowed, path, LONG)
    for count, message in (
        (8, "has 8 of 80 positions, and layers with window of 16 need 16"),
        (17, "begins at position 63, and a page of this model has 8 positions"),
    ):
        short = {name: a[-count:] if name.startswith("blk") and len(a) < 80 else a for name, a in arrays.items()}
        assert any(len(short[name]) != len(arrays[name]) for name in arrays)
        write_file(path, short, metadata)
        with pytest.raises(FormatError, match=message):
            windowed.load_state(path)
    write_file(path, arrays, {key: text for key, text in metadata.items() if key != "forge_state"})
    with pytest.raises(FormatError, match="is no state"):
        windowed.load_state(path)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(FormatError, match="truncated"):
        windowed.load_state(path)
    close_all(windowed)


def test_bad_paths_and_little_memory(windowed: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with windowed.prefill(IDS) as state:
        for path in (None, 5, "", b"x", "a\0b", "a\ud800"):
            with pytest.raises(ParameterError, match="path must be a path"):
                state.save(path)  # type: ignore[arg-type]
            with pytest.raises(ParameterError, match="path must be a path"):
                windowed.load_state(path)  # type: ignore[arg-type]
        with pytest.raises(ForgeError, match="the state cannot be written: No such file or directory"):
            state.save(tmp_path / "missing" / "state")
        with pytest.raises(FormatError, match="cannot be read"):
            windowed.load_state(tmp_path / "missing")
        state.save(tmp_path / "state")
    monkeypatch.setattr(NUMPY, "free_bytes", lambda: 1000)
    with pytest.raises(OutOfMemoryError, match=r"the state needs 0\.00 GB, 0\.00 GB are free"):
        windowed.load_state(tmp_path / "state")
    close_all(windowed)


def test_a_state_that_finds_no_pages_is_not_loaded(tmp_path: Path) -> None:
    llm = tiny_llm("llama", num_pages=12)
    state = llm.prefill(IDS)
    state.save(tmp_path / "state")
    other = llm.load_state(tmp_path / "state")
    with pytest.raises(OutOfMemoryError, match=r"a state of 40 tokens needs pages .* 2 states of 80 tokens"):
        llm.load_state(tmp_path / "state")
    close_all(llm, state, other)


def test_the_file_is_plain_safetensors(windowed: LLM, tmp_path: Path) -> None:
    """As its format says, read by hand."""
    path = tmp_path / "state"
    with windowed.prefill(IDS) as state:
        state.save(path)
        logits = state.logits
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert header["ids"] == {"dtype": "I32", "shape": [40], "data_offsets": [0, 160]}
    begin, end = header["logits"]["data_offsets"]
    np.testing.assert_array_equal(np.frombuffer(data[8 + length :][begin:end], np.float32), logits)
    assert (
        max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        == len(data) - 8 - length
    )


def test_logits_are_the_callers_own(windowed: LLM) -> None:
    """What is computed in place with them reaches neither the state, nor its forks, nor its file."""
    with windowed.prefill(IDS) as state, state.fork() as fork:
        before = state.logits.copy()
        state.logits[:] = 0
        mine = state.logits
        mine -= mine.max()
        np.testing.assert_array_equal(state.logits, before)
        np.testing.assert_array_equal(fork.logits, before)
    close_all(windowed)
