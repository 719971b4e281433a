"""LLM: prompts in every form, streams, logits, perplexity and attention, against computations of their own."""

from __future__ import annotations

import codecs
import copy
import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
from tiny_models import ARCH, CONTEXT, GREEDY, SEEDED, assert_idle, random_prompts, settle, tiny_llm

from forge import (
    LLM,
    Chunk,
    Completion,
    ContextLengthError,
    ForgeError,
    OutOfMemoryError,
    ParameterError,
    SamplingParams,
)
from forge.backend import NUMPY
from forge.backend.numpy import NumpyBackend
from forge.engine import ModelRunner
from forge.engine.pipeline import StepPipeline
from forge.engine.scheduler import Scheduler
from forge.hooks import attention as of_attention
from forge.models import attention, attention_pattern
from forge.runtime.request import Choice
from forge.tokenizer.chat import ChatTemplate

TEXT = "Hello world, the end of the text"


@pytest.fixture(scope="module")
def shared() -> LLM:
    return tiny_llm("llama", max_step_tokens=24)  # longer prompts, and their logits, come in pieces


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    yield shared
    assert_idle(shared)


def step_by_step(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Each step of the engine waits until the semaphore is released."""
    steps, step = threading.Semaphore(0), llm.engine.step

    def stepped() -> Any:
        assert steps.acquire(timeout=60)
        return step()

    monkeypatch.setattr(llm.engine, "step", stepped)
    return steps


def same(completion: Completion, chunks: list[Chunk]) -> None:
    """The chunks of one choice say what its completion says."""
    assert {chunk.index for chunk in chunks} == {completion.index}
    assert "".join(chunk.text for chunk in chunks) == completion.text
    assert [token for chunk in chunks for token in chunk.ids] == completion.ids
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [completion.finish_reason]
    assert all(chunk.timings is None for chunk in chunks[:-1])
    timings = chunks[-1].timings
    assert timings is not None
    assert timings.prompt_tokens == len(completion.prompt_ids)
    assert timings.completion_tokens == len(completion.ids)
    assert timings.prefill_ms > 0
    assert timings.decode_ms >= 0
    if completion.logprobs is None:
        assert all(chunk.logprobs is None for chunk in chunks)
    else:
        assert all(chunk.logprobs is not None for chunk in chunks)
        assert tuple(entry for chunk in chunks for entry in chunk.logprobs or ()) == completion.logprobs


# Streams


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        replace(SEEDED, logprobs=2),
        replace(SEEDED, n=3, max_tokens=30, logprobs=0),
        replace(SEEDED, stop=["e", "\ufffd"], max_tokens=50),
        replace(SEEDED, n=3, stop_token_ids=range(100), max_tokens=50),
        replace(SEEDED, max_tokens=1),
    ],
    ids=["greedy", "logprobs", "n", "stop", "stop_token_ids", "one"],
)
@pytest.mark.parametrize("prompt", [TEXT, [1, 2, 3]], ids=["text", "ids"])
def test_a_stream_says_what_generate_says(llm: LLM, params: SamplingParams, prompt: Any) -> None:
    completions = llm.generate(prompt, params)
    completions = completions if isinstance(completions, list) else [completions]
    chunks = list(llm.stream(prompt, params))
    for completion in completions:
        same(completion, [chunk for chunk in chunks if chunk.index == completion.index])
        if params.stop == ():
            assert completion.text == whole_characters(llm, completion.ids)
    assert [completion.index for completion in completions] == list(range(params.n))


def test_streams_read_in_turn_equal_streams_read_alone(llm: LLM) -> None:
    prompts = random_prompts(3, 30, seed=1)
    expected = [list(llm.stream(prompt, SEEDED)) for prompt in prompts]
    streams: dict[int, Iterator[Chunk]] = {}
    found: list[list[Chunk]] = [[], [], []]
    rng = np.random.default_rng(0)
    while len(streams) < 3 or any(streams.values()):
        turn = int(rng.integers(3))
        stream = streams.setdefault(turn, llm.stream(prompts[turn], SEEDED))
        if stream:
            chunk = next(stream, None)
            if chunk is None:
                streams[turn] = ()  # type: ignore[assignment]
            else:
                found[turn].append(chunk)
    for chunks, others in zip(found, expected, strict=True):
        assert [replace(c, timings=None) for c in chunks] == [replace(c, timings=None) for c in others]


@pytest.mark.parametrize("read", [0, 1, 5])
@pytest.mark.parametrize("n", [1, 3])
def test_closing_a_stream_frees_its_pages(llm: LLM, read: int, n: int) -> None:
    stream = llm.stream(TEXT, replace(GREEDY, n=n, max_tokens=None))
    for _ in range(read):
        next(stream)
    stream.close()
    assert_idle(llm)
    assert list(stream) == []


def test_a_dropped_stream_frees_its_pages(llm: LLM) -> None:
    for _ in llm.stream(TEXT, GREEDY):
        break
    assert_idle(llm)


@pytest.mark.parametrize(
    ("ahead", "n"),
    [
        pytest.param(True, 3, id="as on a GPU-3"),
        pytest.param(False, 1, id="1", marks=pytest.mark.slow),
        pytest.param(False, 3, id="3", marks=pytest.mark.slow),
        pytest.param(True, 1, id="as on a GPU-1", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("target", "name"),
    [
        (Scheduler, "schedule"),
        pytest.param(ModelRunner, "forward", marks=pytest.mark.slow),
        pytest.param(ModelRunner, "sample", marks=pytest.mark.slow),
        pytest.param(Scheduler, "commit", marks=pytest.mark.slow),
        pytest.param(Choice, "push", marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_stream_that_the_garbage_collector_closes_within_a_step_ends_behind_it(
    target: type, name: str, n: int, before: bool, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python may collect anywhere. What a step works on stays what it is until the step is done."""
    if ahead and target is ModelRunner:
        target, name = StepPipeline, {"forward": "launch", "sample": "collect"}[name]
    monkeypatch.setattr(NumpyBackend, "is_asynchronous", ahead)
    llm = tiny_llm("llama", max_step_tokens=8)
    expected = llm.generate([1, 2, 3], SEEDED).ids
    steps = step_by_step(llm, monkeypatch)
    streams = {"dropped": llm.stream(list(range(10)), replace(SEEDED, n=n))}
    kept = llm.stream([1, 2, 3], SEEDED)
    steps.release(4)
    next(streams["dropped"])
    steps.release(3)
    found = list(next(kept).ids)
    sequences = [s for s in list(llm._loop.work.choices) if s.num_prompt == 10]
    assert len(sequences) == n
    other = llm.stream([4] * 20, GREEDY)  # a prompt that takes steps which are not only decoding
    called: list[str] = []
    original = getattr(target, name)

    def within(*arguments: Any, **options: Any) -> Any:
        result = None if before else original(*arguments, **options)
        if streams:
            state = [(s.finish_reason, copy.deepcopy(s.pages), s in llm._loop.work.choices) for s in sequences]
            streams.clear()  # the last reference: the generator is closed here
            gc.collect()
            assert [(s.finish_reason, copy.deepcopy(s.pages), s in llm._loop.work.choices) for s in sequences] == state
            called.append(name)
        return original(*arguments, **options) if before else result

    with monkeypatch.context() as patch:
        patch.setattr(target, name, within)
        steps.release(1000)
        next(other)
    assert called == [name]
    settle(llm)
    assert [s.finish_reason for s in sequences] == ["abort"] * n
    assert [s.pages for s in sequences] == [[]] * n
    other.close()
    assert found + [token for chunk in kept for token in chunk.ids] == expected
    assert_idle(llm)


def test_streams_that_are_closed_within_a_step_that_fails_end_too(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = step_by_step(llm, monkeypatch)
    streams = [llm.stream([1, 2, 3], GREEDY), llm.stream([4, 5], GREEDY)]
    for stream in streams:
        steps.release(2)
        next(stream)
    del stream

    def fails(*_: Any, **__: Any) -> Any:
        streams.pop()
        raise ZeroDivisionError  # not MemoryError: the others would be computed again

    with monkeypatch.context() as patch:
        patch.setattr(ModelRunner, "forward", fails)
        steps.release(1000)
        with pytest.raises(ZeroDivisionError):
            list(streams[0])
    assert len(streams) == 1
    assert_idle(llm)


def test_closing_the_llm_ends_what_runs_as_aborted() -> None:
    with tiny_llm("llama") as llm:
        streams = [llm.stream(TEXT, replace(SEEDED, n=2)), llm.stream([1, 2], GREEDY)]
        for stream in streams:
            next(stream)
    assert_idle(llm)
    for stream in streams:
        last = {chunk.index: chunk for chunk in stream}
        assert {chunk.finish_reason for chunk in last.values()} == {"abort"}
        assert all(chunk.timings is not None for chunk in last.values())


def test_a_prompt_that_is_refused_is_refused_before_the_first_chunk_is_read(llm: LLM) -> None:
    with pytest.raises(ContextLengthError):
        llm.stream([1] * CONTEXT)
    with pytest.raises(ParameterError, match="one prompt"):
        llm.stream(["a", "b"])


# Stop strings


def test_a_stop_string_across_tokens_ends_the_text_before_it(llm: LLM) -> None:
    """Whatever piece of the text it is: borders of tokens do not matter, nor does what precedes it."""
    params = replace(SEEDED, max_tokens=40, seed=5)
    whole = llm.generate(TEXT, params)
    pieces = [whole.text[start : start + 3] for start in range(0, len(whole.text) - 3, 2)]
    pieces = [piece for piece in pieces if "\ufffd" not in piece]  # half a character is one in decode, not in a stream
    assert len(pieces) >= 5
    for stop in pieces:
        found = llm.generate(TEXT, replace(params, stop=[stop, "never there"]))
        assert found.text == whole.text[: whole.text.index(stop)]
        assert found.finish_reason == "stop"
        assert found.ids == whole.ids[: len(found.ids)]
        assert stop in llm.tokenizer.decode(found.ids)
        assert stop not in llm.tokenizer.decode(found.ids[:-1])


def test_a_beginning_of_a_stop_string_is_shown_at_the_end(llm: LLM) -> None:
    whole = llm.generate(TEXT, SEEDED)
    held = replace(SEEDED, stop=[whole.text[-4:] + "more"])
    assert llm.generate(TEXT, held).text == whole.text
    chunks = list(llm.stream(TEXT, held))
    assert "".join(chunk.text for chunk in chunks[:-1]) + chunks[-1].text == whole.text
    assert chunks[-1].text.endswith(whole.text[-4:])


def test_a_stop_string_with_the_last_token_is_a_stop(llm: LLM) -> None:
    whole = llm.generate(TEXT, replace(GREEDY, max_tokens=10))
    assert "\ufffd" not in whole.text[-1]
    found = llm.generate(TEXT, replace(GREEDY, max_tokens=10, stop=whole.text[-1]))
    shown = whole.text[: whole.text.index(whole.text[-1])]
    assert (found.text, found.finish_reason) == (shown, "stop")
    exactly = llm.generate(TEXT, replace(GREEDY, max_tokens=10, stop=whole.text[-2:]))
    assert exactly.finish_reason == "stop"


def test_a_character_cut_by_the_end_is_left_out(llm: LLM) -> None:
    ids = llm.tokenizer.encode("aé", add_special=False)
    assert [llm.tokenizer.token_bytes(id) for id in ids[-2:]] == [b"\xc3", b"\xa9"]
    llm_forced = replace(GREEDY, logit_bias={ids[-2]: 1e6})
    for params in (
        replace(llm_forced, max_tokens=1),
        replace(llm_forced, max_tokens=1, stop=["x"]),
        replace(llm_forced, stop_token_ids=ids[-2:-1], ignore_eos=False),
    ):
        found = llm.generate(TEXT, params)
        assert found.text == ""
        assert llm.tokenizer.decode(ids[-2:-1]) == "\ufffd"
        assert "".join(chunk.text for chunk in llm.stream(TEXT, params)) == ""
    found = llm.generate(TEXT, replace(llm_forced, max_tokens=3))  # only the last may yet become a character
    assert (found.text, found.ids) == ("\ufffd\ufffd", [ids[-2]] * 3)


def whole_characters(llm: LLM, ids: list[int]) -> str:
    """The text of ids, without the bytes of a character that their end cuts."""
    raw = b"".join(llm.tokenizer.token_bytes(id) for id in ids)
    return codecs.getincrementaldecoder("utf-8")("replace").decode(raw)


# Prompts


def test_a_prompt_in_every_form(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT, parse_special=True)
    expected = llm.generate(ids, GREEDY)
    for prompt in (TEXT, tuple(ids), np.array(ids), np.array(ids, np.uint16), [np.int64(i) for i in ids]):
        found = llm.generate(prompt, GREEDY)
        assert isinstance(found, Completion)
        assert (found.ids, found.text, found.prompt_ids) == (expected.ids, expected.text, ids)
        assert all(type(token) is int for token in found.prompt_ids + found.ids)
    for batch in ([TEXT], (TEXT, ids), [ids, TEXT, np.array(ids)], np.array([ids, ids])):
        found = llm.generate(batch, GREEDY)
        assert [c.ids for c in found] == [expected.ids] * len(batch)
    assert llm.generate([], GREEDY) == []
    assert len(llm.generate(TEXT, replace(SEEDED, n=2))) == 2
    assert [c.index for c in llm.generate([TEXT, [1]], replace(SEEDED, n=2))] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("prompt", "error"),
    [
        ("", ParameterError),
        ([[]], ParameterError),
        ([1, -1], ParameterError),
        ([1, 320], ParameterError),
        ([2**70], ParameterError),
        ([True, False], ParameterError),
        ([1, 2.5], ParameterError),
        ([1, "a"], ParameterError),
        ([1, None], ParameterError),
        (b"bytes", ParameterError),
        (7, ParameterError),
        (None, ParameterError),
        (iter([1, 2]), ParameterError),
        (["a", ""], ParameterError),
        ([[1, 2], [3, "x"]], ParameterError),
        ("\ud800", ForgeError),
        ([1] * CONTEXT, ContextLengthError),
        ([[1], [1] * (CONTEXT + 5)], ContextLengthError),
    ],
    ids=lambda value: repr(value).partition(" object at 0x")[0][:30],  # the same in every process
)
def test_a_prompt_that_cannot_be_used_is_one_line(llm: LLM, prompt: Any, error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        llm.generate(prompt, GREEDY)
    assert "\n" not in str(caught.value)
    assert_idle(llm)


@pytest.mark.parametrize(
    "prompt", [[3.5], [None], ["a", 5], [b"ab"], {1: 2}, {1, 2}, np.array(5)], ids=lambda value: repr(value)[:30]
)
def test_a_prompt_that_is_no_text_and_no_ids_is_refused(llm: LLM, prompt: Any) -> None:
    with pytest.raises(ParameterError):
        llm.generate(prompt, GREEDY)


@pytest.mark.parametrize(
    ("method", "name", "meant"),
    [
        ("generate", "temprature", "temperature"),
        ("stream", "stop_id", "stop_token_ids"),
        ("chat", "tool", "tools"),
        ("stream_chat", "max_token", "max_tokens"),
        ("logits", "promt", "prompt"),
        ("attention", "layers", "layer"),
        ("perplexity", "contxt", "context"),
        ("encode_chat", "tool", "tools"),
    ],
)
def test_a_misspelled_keyword_is_answered_with_the_nearest_one(llm: LLM, method: str, name: str, meant: str) -> None:
    for arguments in ((TEXT,), (TEXT, SamplingParams()), ()):
        with pytest.raises(ParameterError, match=f"^{name} is no parameter of {method}: did you mean {meant}\\?$"):
            getattr(llm, method)(*arguments, **{name: 1})


def test_a_misspelled_keyword_of_render_chat_is_no_variable_of_the_template(llm: LLM) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    for name, meant in (("add_generation_promt", "add_generation_prompt"), ("tool", "tools"), ("mesages", "messages")):
        with pytest.raises(ParameterError, match=rf"^{name} is no parameter of render_chat: did you mean {meant}\?$"):
            llm.render_chat(messages, **{name: False})
    templated = LLM(
        llm.engine,
        llm.tokenizer,
        ChatTemplate(
            "{{ builtin_tools }} {{ tool_use }} {{ documents }} {{ enable_thinking }}", name="x", special_tokens={}
        ),
        path=llm.path,
        notes=(),
        load_parts={},
        load_ms=0.0,
    )
    variables = {"builtin_tools": 1, "tool_use": 2, "documents": 3, "enable_thinking": 4}
    assert templated.render_chat(messages, **variables) == "1 2 3 4"


def test_keywords_override_params(llm: LLM) -> None:
    assert len(llm.generate(TEXT, GREEDY, max_tokens=3).ids) == 3
    with pytest.raises(ParameterError, match="top_p"):
        llm.generate(TEXT, GREEDY, top_p=3)


# Threads


def test_requests_of_several_threads_run_together(llm: LLM) -> None:
    prompts = random_prompts(4, 30, seed=8)
    params = replace(SEEDED, n=2, stop="e")
    expected = [llm.generate(prompt, params) for prompt in prompts]
    found: dict[tuple[int, int], Any] = {}

    def work(number: int) -> None:
        for turn in range(3):
            if (number + turn) % 2:
                found[number, turn] = [(c.ids, c.text) for c in llm.generate(prompts[number], params)]
            else:
                chunks = list(llm.stream(prompts[number], params))
                found[number, turn] = [
                    (
                        [token for c in chunks if c.index == choice for token in c.ids],
                        "".join(c.text for c in chunks if c.index == choice),
                    )
                    for choice in range(2)
                ]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {
        (number, turn): [(c.ids, c.text) for c in expected[number]] for number in range(4) for turn in range(3)
    }


def test_a_stream_loses_nothing_while_another_thread_runs_its_steps(llm: LLM) -> None:
    expected = "".join(chunk.text for chunk in llm.stream(TEXT, SEEDED))
    for _ in range(5):
        stream = llm.stream(TEXT, SEEDED)
        texts = [next(stream).text]
        other = threading.Thread(target=lambda: llm.generate([1, 2, 3], replace(SEEDED, max_tokens=25)))
        other.start()
        texts += [chunk.text for chunk in stream]
        other.join(60)
        assert "".join(texts) == expected


# Logits, perplexity, attention


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_logits_equal_those_of_decoding_step_by_step(name: str) -> None:
    llm = tiny_llm(name, max_step_tokens=24)
    ids = random_prompts(1, 1)[0] + list(range(2, 80))
    whole = llm.logits(ids)
    assert whole.shape == (len(ids), llm.config.vocab_size)
    assert whole.dtype == np.float32
    rows: list[np.ndarray] = []
    sample = llm.engine.runner.sample

    def recording(logits: Any, *arguments: Any) -> Any:
        rows.append(np.array(logits[0]))
        return sample(logits, *arguments)

    llm.engine.runner.sample = recording  # type: ignore[method-assign]
    generated = llm.generate(ids[:60], replace(SEEDED, max_tokens=30)).ids
    expected = llm.logits([*ids[:60], *generated])
    np.testing.assert_allclose(expected[:60], whole[:60], rtol=0, atol=1e-4)
    np.testing.assert_allclose(np.stack(rows), expected[59:-1], rtol=0, atol=1e-4)
    assert_idle(llm)


def _nll(logits: np.ndarray, targets: list[int]) -> float:
    logits = logits.astype(np.float64)
    return float((np.logaddexp.reduce(logits, axis=1) - logits[np.arange(len(targets)), targets]).sum())


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize(
    ("length", "context"), [(2, 64), (40, 64), (64, 64), (65, 64), (120, 50), (66, 66), (65, 65), (6, 2)]
)
def test_perplexity_equals_its_definition(llm: LLM, length: int, context: int, add_bos: bool) -> None:
    ids = np.random.default_rng(length).integers(0, 250, length).tolist()
    llm.tokenizer.add_bos = add_bos
    try:
        found = llm.perplexity(ids, context=context)
    finally:
        llm.tokenizer.add_bos = False
    chunks = [ids] if length < context else [ids[i * context : (i + 1) * context] for i in range(length // context)]
    total = tokens = 0
    for chunk in chunks:
        chunk = [llm.tokenizer.bos_id, *chunk[1:]] if add_bos else chunk
        total += _nll(llm.logits(chunk)[:-1], chunk[1:])
        tokens += len(chunk) - 1
    assert found.tokens == tokens
    assert found.remainder == length - sum(map(len, chunks))
    assert found.nll == pytest.approx(total / tokens, rel=1e-6)
    assert found.ppl == pytest.approx(np.exp(total / tokens), rel=1e-5)


def test_perplexity_of_text_is_that_of_its_ids(llm: LLM) -> None:
    ids = llm.tokenizer.encode(TEXT)
    assert llm.perplexity(TEXT, context=8) == llm.perplexity(ids, context=8)


@pytest.mark.parametrize("arguments", [("a",), ("",), ([5],), (TEXT, 1), (TEXT, CONTEXT + 1), ([1, 2.5, 3],)])
def test_perplexity_refuses(llm: LLM, arguments: tuple[Any, ...]) -> None:
    prompt, context = (*arguments, 64)[:2]
    with pytest.raises(ParameterError) as caught:
        llm.perplexity(prompt, context=context)
    assert "\n" not in str(caught.value)


def _tensor(reader: gguf.GGUFReader, name: str) -> np.ndarray:
    [tensor] = [t for t in reader.tensors if t.name == name]
    shape = [int(n) for n in reversed(tensor.shape)]
    return gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float64)


def _rms(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def first_attention(name: str, ids: list[int], *, base: float, eps: float, window: int = 0) -> np.ndarray:
    """Attention weights (H, T, T) of layer 0 in float64 from the file's tensors: llama, or gemma3 if it has q norms."""
    reader = gguf.GGUFReader(ARCH / name / "model.gguf")
    x = _tensor(reader, "token_embd.weight")[ids]
    gemma = name == "gemma3"
    if gemma:
        x = x * np.sqrt(x.shape[1])
    x = _rms(x, _tensor(reader, "blk.0.attn_norm.weight"), eps)
    heads = []
    for part, count in (("q", 4), ("k", 2)):
        y = (x @ _tensor(reader, f"blk.0.attn_{part}.weight").T).reshape(len(ids), count, -1)
        if gemma:
            y = _rms(y, _tensor(reader, f"blk.0.attn_{part}_norm.weight"), eps)
        dim = y.shape[2]
        angle = np.arange(len(ids))[:, None, None] * base ** (-2.0 * np.arange(dim // 2) / dim)
        pairs = (y[..., : dim // 2], y[..., dim // 2 :]) if gemma else (y[..., 0::2], y[..., 1::2])
        turned = (pairs[0] + 1j * pairs[1]) * np.exp(1j * angle)  # a pair is a complex number, rotated
        heads.append(np.repeat(turned, 4 // count, axis=1))
    scores = np.einsum("thd,shd->hts", heads[0], heads[1].conj()).real / np.sqrt(dim)
    distance = np.subtract.outer(np.arange(len(ids)), np.arange(len(ids)))
    scores[:, (distance < 0) | (distance >= (window or len(ids)))] = -np.inf
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    return weights / weights.sum(axis=2, keepdims=True)


@pytest.mark.parametrize(
    ("name", "facts"),
    [("llama", {"base": 500000.0, "eps": 1e-5}), ("gemma3", {"base": 10000.0, "eps": 1e-3, "window": 16})],
)
def test_attention_equals_float64_from_the_weights(name: str, facts: dict[str, Any]) -> None:
    llm = tiny_llm(name, max_step_tokens=24)
    ids = np.random.default_rng(0).integers(0, 250, 80).tolist()
    found = llm.attention(ids, 0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, first_attention(name, ids, **facts), rtol=0, atol=2e-5)
    assert_idle(llm)


def test_attention_of_all_layers_is_that_of_each_alone() -> None:
    """Causal, within the layer's window, and each row adds up to 1."""
    llm = tiny_llm("gemma3", max_step_tokens=24)
    ids = list(range(70))
    found = llm.attention(ids)
    assert (found.shape, found.dtype) == ((7, 4, 70, 70), np.float32)
    distance = np.subtract.outer(np.arange(70), np.arange(70))
    for layer, window in enumerate([16, 16, 16, 16, 16, 0, 16]):
        np.testing.assert_array_equal(llm.attention(ids, layer), found[layer])
        visible = (distance >= 0) & (distance < (window or 70))
        assert (found[layer][:, ~visible] == 0).all()
        assert (found[layer][:, visible] > 0).all()
    np.testing.assert_allclose(found.sum(axis=3), 1, rtol=0, atol=1e-5)
    assert_idle(llm)


@pytest.mark.parametrize("name", ["gemma2", "llama"])
@pytest.mark.parametrize("together", [1 << 25, 4 * 4 * 40 * 3])
def test_attention_weighs_what_paged_attention_adds_up(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer's weights times its values are what the fused op gives: with windows, soft caps and several steps."""
    monkeypatch.setattr(attention_pattern, "_SCORE_BYTES", together)
    llm = tiny_llm(name, max_step_tokens=24)
    outputs: list[np.ndarray] = []
    fused = attention.paged_attention

    def recording(*arguments: Any) -> Any:
        outputs.append(fused(*arguments))
        return outputs[-1]

    monkeypatch.setattr(attention, "paged_attention", recording)
    state = llm.engine.runner.state
    weights = llm.attention(list(range(40)))
    layers = llm.config.num_layers
    for layer in range(layers):
        v_pages = state[layer].pages.v
        values = v_pages.reshape(-1, *v_pages.shape[2:])[:40]  # the first pages of an idle cache
        values = np.repeat(values, llm.config.num_heads // llm.config.num_kv_heads, axis=1).astype(np.float64)
        wanted = np.concatenate(outputs[layer::layers])
        np.testing.assert_allclose(np.einsum("hts,shd->thd", weights[layer], values), wanted, rtol=0, atol=1e-5)


def test_attention_takes_one_pass_and_no_logits(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    run_blocks = llm.engine.runner.run_blocks
    monkeypatch.setattr(
        llm.engine.runner, "run_blocks", lambda *arguments: steps.append(arguments) or run_blocks(*arguments)
    )
    monkeypatch.setattr(llm.engine.runner.model, "output", None)
    assert llm.attention([1, 2, 3]).shape == (3, 4, 3, 3)
    assert len(steps) == 1


def test_attention_that_does_not_fit_is_refused_with_the_numbers(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr(llm.engine.runner, "run_blocks", lambda *arguments: computed.append(arguments))
    ids = list(range(50))
    weights = 4 * 50 * 50 * 4  # heads, T, T
    one, all_layers = 3 * weights, 5 * weights
    for layer, needed, words in ((0, one, "in one layer"), (None, all_layers, "in 3 layers")):
        monkeypatch.setattr(NUMPY, "free_bytes", lambda needed=needed: needed - 1)
        with pytest.raises(OutOfMemoryError, match=rf"attention of 50 tokens {words} needs 0\.00 GB.* are free: use"):
            llm.attention(ids, layer)

    def refused(*_: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(NUMPY, "free_bytes", lambda: 1 << 40)
        patch.setattr(of_attention, "np", SimpleNamespace(zeros=refused, float32=np.float32))
        with pytest.raises(OutOfMemoryError, match=r"needs 0\.00 GB, the system gives less: use"):
            llm.attention(ids)
    with pytest.raises(ContextLengthError, match="97 tokens"):  # not that they do not fit the memory
        llm.attention([1] * 97)
    assert not computed


def test_attention_refuses_a_layer_that_is_not_there(llm: LLM) -> None:
    for layer in (-1, 3, True, 1.0):
        with pytest.raises(ParameterError, match="layer must be"):
            llm.attention(TEXT, layer)  # type: ignore[arg-type]


# Prompts as text


def test_every_way_in_gives_a_text_one_bos_and_no_eos(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = tiny_llm("llama")
    llm.tokenizer.add_bos = llm.tokenizer.add_eos = True
    bos = llm.tokenizer.bos_id
    assert bos is not None
    name = llm.tokenizer.token_text(bos)
    plain = llm.tokenizer.encode("a b", add_special=False)
    seen: list[list[int]] = []
    complete, stream, check = llm._complete, llm._stream, llm.engine.check_ids
    monkeypatch.setattr(llm, "_complete", lambda prompts, *more: (seen.extend(prompts), complete(prompts, *more))[1])
    monkeypatch.setattr(llm, "_stream", lambda ids, *more: (seen.append(ids), stream(ids, *more))[1])
    monkeypatch.setattr(llm.engine, "check_ids", lambda ids: (seen.append(ids), check(ids))[1])
    for source in ("{{ bos_token }}{{ messages[0].content }}", "{{ messages[0].content }}"):
        llm.chat_template = ChatTemplate(source, name="m", special_tokens={"bos_token": name})
        messages = [{"role": "user", "content": "a b"}]
        rendered = llm.render_chat(messages)
        llm.chat(messages, GREEDY)
        list(llm.stream_chat(messages, GREEDY))
        for text in ("a b", name + "a b", rendered):
            llm.generate(text, GREEDY)
            llm.generate([text, text], GREEDY)
            list(llm.stream(text, GREEDY))
            llm.logits(text)
            assert len(llm.attention(text, 0)[0]) == 1 + len(plain)
            llm.perplexity(text)
    assert seen == [[bos, *plain]] * len(seen)
    assert len(seen) == 2 * (2 + 3 * 8)  # of `attention` twice
    llm.generate([bos, bos, *plain], GREEDY)
    llm.generate(plain, GREEDY)
    assert seen[-2:] == [[bos, bos, *plain], plain]  # ids are taken as they are


def test_a_continued_message_is_the_prompt_and_what_follows_the_completion() -> None:
    llm = tiny_llm("llama")
    source = "{% for m in messages %}[{{ m.content | trim }}]{% endfor %}"
    llm.chat_template = ChatTemplate(source, name="m", special_tokens={})
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "the end "}]
    expected = llm.generate("[Hello][the end", GREEDY)
    assert isinstance(expected, Completion)
    found = llm.chat(messages, GREEDY, continue_final_message=True)
    assert isinstance(found, Completion)
    assert (found.prompt_ids, found.ids, found.text) == (expected.prompt_ids, expected.ids, expected.text)
    chunks = llm.stream_chat(messages, GREEDY, continue_final_message=True)
    assert "".join(chunk.text for chunk in chunks) == expected.text
    assert llm.render_chat(messages, continue_final_message=True) == "[Hello][the end"


@pytest.mark.parametrize("name", ["messages", "tools", "continue_final_message"])
def test_what_is_no_template_variable_is_named(name: str) -> None:
    llm = tiny_llm("llama")
    llm.chat_template = ChatTemplate("{{ messages[0].content }}", name="m", special_tokens={})
    with pytest.raises(ParameterError, match=f"^template_variables: {name} is none"):
        llm.chat([{"role": "user", "content": "a"}], template_variables={name: []})
