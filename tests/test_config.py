"""Settings refuse what cannot be used, and name it."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
from dataclasses import FrozenInstanceError, fields, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from table_rows import row

from forge import EngineConfig, OutOfMemoryError, ParameterError, SamplingParams, load
from forge.loading import settings_of

INF, NAN = math.inf, math.nan
LLAMA = Path(__file__).parent / "data" / "arch" / "llama" / "model.gguf"

BAD_SAMPLING: list[tuple[str, list[Any]]] = [
    ("max_tokens", [0, -1, 1.0, "8", True]),
    ("temperature", [-0.1, 100.5, NAN, INF, "1", None, False, 1j]),
    ("top_k", [-1, 1.5, None, True]),
    ("top_p", [0, 0.0, -0.5, 1.01, NAN, "0.9", None]),
    ("min_p", [-0.01, 1.01, NAN, None]),
    ("repetition_penalty", [0, -1, 0.005, 101, INF, NAN]),
    ("presence_penalty", [-101, 100.5, NAN, "0"]),
    ("frequency_penalty", [-101, 100.5, -INF, None]),
    ("logit_bias", [[(1, 2.0)], 5, {-1: 1.0}, {1.5: 1.0}, {"1": 1.0}, {True: 1.0}, {1: NAN}, {1: INF}, {1: "2"}]),
    ("seed", [-1, 2**64, 0.5, "7", True]),
    ("n", [0, -1, 257, 1.0, None, True]),
    ("stop", ["", ["a", ""], [1], [None], [b"a"]]),
    ("stop_token_ids", [[-1], [1.0], ["1"], [None], [True], "12"]),
    ("logprobs", [-1, 101, 1.0, True]),
    ("stop", [5, None, ["a"] * 65, map(str, count()), "x" * 1001, ["a", "x" * 1001]]),
    ("stop_token_ids", [5, None, count()]),
    ("ignore_eos", ["no", 2, None]),
    ("logit_bias", [{1: 1e300}, {1: 10**400}]),
    ("logits_processors", [print, [3], [lambda ids: None], [print] * 65, "x"]),
    ("sampler", [3, lambda ids, logits: 0, "x"]),
    ("temperature", [10**400]),
    ("timeout", [0, -1, NAN, INF, "5", True]),
]

GOOD_SAMPLING: list[tuple[str, list[Any]]] = [
    ("max_tokens", [1, None, 10**9, np.int64(3)]),
    ("temperature", [0, 0.0, 1e-30, 100, np.float32(0.7)]),
    ("top_k", [0, 1, 10**12, np.int32(40)]),
    ("top_p", [1e-9, 1, np.float64(0.5)]),
    ("min_p", [0, 1]),
    ("repetition_penalty", [0.01, 1, 100]),
    ("presence_penalty", [-100, 100]),
    ("frequency_penalty", [-100, 0, 100.0]),
    ("logits_processors", [(), (print,), (lambda ids, logits: None,)]),
    ("sampler", [None, print, lambda ids, logits, random: 0]),
    ("logit_bias", [{}, {0: -INF}, {np.int64(3): np.float32(1.5)}]),
    ("seed", [None, 0, 2**64 - 1, np.uint64(2**64 - 1)]),
    ("n", [1, 256, np.uint8(2)]),
    ("stop", [(), "x", ["x", "yy"], ("x",), ["x" * 1000] * 64]),
    ("stop_token_ids", [(), [1, 2], {3}, np.array([4, 5])]),
    ("logprobs", [None, 0, 100]),
    ("ignore_eos", [True, False]),
    ("timeout", [None, 1, 0.001, np.float32(2.5)]),
]

BAD_ENGINE: list[tuple[str, list[Any]]] = [
    ("context", [0, -5, 2.0, "8192", True]),
    ("memory_fraction", [0, -0.1, 1.01, NAN, "0.5", None]),
    ("cpu_experts", [-1, 1.5, "2", None]),
    ("dtype", ["f64", "", 16]),
    ("graphs", [0, -1, 1.5, "check:4"]),
    ("max_sequences", [0, 1.5]),
    ("max_step_tokens", [0, 1.5]),
    ("max_prefill_tokens", [0, -1, 64.0, "64"]),
    ("page_size", [0, -1, None]),
    ("prefix_caching", [0, None, "no"]),
    ("deterministic", [1, None, "true"]),
]


def rows(table: list[tuple[str, list[Any]]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table for value in values]


def test_a_bad_sampling_parameter_is_named() -> None:
    for name, value in rows(BAD_SAMPLING):
        with row(f"{name}={value!r:.30}"):
            is_refused(SamplingParams, name, value)
            with pytest.raises(ParameterError):
                replace(SamplingParams(), **{name: value})


def is_refused(settings: type[SamplingParams | EngineConfig], name: str, value: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        settings(**{name: value})
    assert str(caught.value).startswith(f"{name} ")
    assert caught.value.parameter == name
    assert "\n" not in str(caught.value)


def test_a_good_sampling_parameter_is_taken() -> None:
    for name, value in rows(GOOD_SAMPLING):
        expected = value
        if name in ("stop", "stop_token_ids"):
            expected = (value,) if isinstance(value, str) else tuple(value)
        with row(f"{name}={value!r:.30}"):
            assert getattr(SamplingParams(**{name: value}), name) == expected


def test_the_tables_cover_every_parameter() -> None:
    assert {name for name, _ in GOOD_SAMPLING} == {field.name for field in fields(SamplingParams)}
    assert {name for name, _ in BAD_SAMPLING} == {field.name for field in fields(SamplingParams)}
    assert {name for name, _ in BAD_ENGINE} == {field.name for field in fields(EngineConfig)}


def test_a_bad_engine_setting_is_named() -> None:
    for name, value in rows(BAD_ENGINE):
        with row(f"{name}={value!r:.30}"):
            is_refused(EngineConfig, name, value)


@pytest.mark.parametrize(
    ("settings", "name", "meant"),
    [
        (SamplingParams, "temprature", "temperature"),
        (SamplingParams, "Temperature", "temperature"),
        (SamplingParams, "top_n", "top_k or top_p"),
        (SamplingParams, "max_new_tokens", "max_tokens"),
        (EngineConfig, "contxt", "context"),
    ],
)
def test_a_misspelled_keyword_is_answered_with_the_nearest_one(settings: Any, name: str, meant: str) -> None:
    for refuse in (lambda: settings(**{name: 1}), lambda: replace(settings(), **{name: 1})):
        with pytest.raises(ParameterError) as caught:
            refuse()
        assert str(caught.value) == f"{name} is no parameter of {settings.__name__}: did you mean {meant}?"


def test_a_keyword_like_none_is_answered_with_all_of_them() -> None:
    with pytest.raises(
        ParameterError, match=r"^zzz is no parameter of EngineConfig: it takes context, memory_fraction"
    ):
        EngineConfig(zzz=1)  # type: ignore[call-arg]


def test_settings_show_their_parameters_to_help() -> None:
    for settings in (SamplingParams, EngineConfig):
        assert list(inspect.signature(settings).parameters) == [field.name for field in fields(settings)]


def test_settings_are_frozen() -> None:
    params = SamplingParams(logit_bias={1: 2.0}, stop=["x"], stop_token_ids=[3])
    with pytest.raises(FrozenInstanceError):
        params.temperature = 1.0  # type: ignore[misc]
    assert params.stop == ("x",)
    assert params.stop_token_ids == (3,)
    assert pickle.loads(pickle.dumps(params)) == copy.deepcopy(params) == params
    assert len({params, copy.copy(params)}) == 1


def test_what_is_given_is_copied() -> None:
    bias, stop, stop_token_ids = {1: 2.0}, ["x"], [3]
    params = SamplingParams(logit_bias=bias, stop=stop, stop_token_ids=stop_token_ids)
    bias[1], stop[0], stop_token_ids[0] = 9.0, "y", 9
    assert (params.logit_bias[1], params.stop, params.stop_token_ids) == (2.0, ("x",), (3,))


def test_one_stop_string_is_a_list_of_one() -> None:
    assert SamplingParams(stop="abc") == SamplingParams(stop=["abc"])


@pytest.mark.parametrize(
    "wrong",
    [
        *({"chat_template": value} for value in (1, True, b"x", ["x"])),
        *({"progress": value} for value in ("no", 0, 1, {})),
        *({"dtype": value} for value in (np.array(["f16", "f32"]), "a" * 1000, "\n")),
        {"device": "a" * 1000},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_load_names_the_parameter_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=rf"^{next(iter(wrong))} must be [^\n]*$") as raised:
        load(LLAMA, **{"device": "cpu", **wrong})
    assert len(str(raised.value)) < 200


def test_every_engine_setting_reaches_the_engine_through_load() -> None:
    settings = EngineConfig(
        context=96,
        memory_fraction=0.5,
        cpu_experts=0,
        dtype="f32",
        max_sequences=3,
        max_step_tokens=7,
        page_size=16,
        prefix_caching=False,
        graphs=False,
    )
    with load(LLAMA, device="cpu", engine=settings) as llm:
        scheduler = llm.engine.scheduler
        assert (llm.context, scheduler.max_sequences, scheduler.max_step_tokens) == (96, 3, 7)
        (pool,) = scheduler.pools
        assert (llm.engine.runner.state.page_size, pool.num_pages) == (16, 3 * 96 // 16)
        assert llm.engine.prefix_cache is None
        ids = llm.generate([5, 6, 7], max_tokens=5).ids  # type: ignore[union-attr]
    with load(LLAMA, device="cpu") as llm:
        assert llm.engine.prefix_cache is not None
        assert llm.generate([5, 6, 7], max_tokens=5).ids == ids  # type: ignore[union-attr]
    with pytest.raises(OutOfMemoryError, match=r"1e-12 of what is free on cpu"):
        load(LLAMA, device="cpu", engine=EngineConfig(memory_fraction=1e-12))


def test_a_keyword_of_load_sets_what_engine_leaves_at_its_default() -> None:
    given = {"context": 64, "max_sequences": 2, "memory_fraction": 0.5, "cpu_experts": 3, "graphs": False}
    settings = EngineConfig(max_step_tokens=9)
    assert settings_of(settings, given) == replace(settings, **given)
    assert settings_of(replace(settings, **given), given) == replace(settings, **given)
    assert settings_of(settings, dict.fromkeys(given)) == settings
    assert settings_of(None, given) == EngineConfig(**given)


@pytest.mark.parametrize(
    ("name", "value", "other"),
    [("context", 64, 32), ("max_sequences", 2, 3), ("memory_fraction", 0.5, 0.25), ("dtype", "f32", "f16")],
)
def test_a_keyword_of_load_that_contradicts_engine_is_refused(name: str, value: Any, other: Any) -> None:
    with pytest.raises(ParameterError) as caught:
        load(LLAMA, device="cpu", engine=EngineConfig(**{name: value}), **{name: other})
    assert str(caught.value) == f"{name} is {other} as a keyword and {value} in engine: give one of them"
    assert caught.value.parameter == name


def test_experts_in_the_hosts_memory_are_asked_of_a_model_that_has_experts() -> None:
    with pytest.raises(ParameterError, match=r"model.gguf: the model has no experts: leave cpu_experts out$") as caught:
        load(LLAMA, device="cpu", cpu_experts=1)
    assert caught.value.parameter == "cpu_experts"
    with load(LLAMA.parent.parent / "qwen3moe" / "model.gguf", device="cpu", cpu_experts=1) as llm:
        assert [note for note in llm.notes if note.startswith("cpu_experts: cpu (")]


def test_engine_must_be_an_engine_config() -> None:
    with pytest.raises(ParameterError, match=r"^engine must be an EngineConfig, not a dict$"):
        load(LLAMA, device="cpu", engine={"context": 5})  # type: ignore[arg-type]


def test_former_names_of_parameters_work_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"^stop_ids is now stop_token_ids; ") as seen:
        params = SamplingParams(stop_ids=[3, 4])  # type: ignore[call-arg]
    assert seen[0].filename == __file__
    assert params == SamplingParams(stop_token_ids=[3, 4])
    with pytest.warns(DeprecationWarning, match=r"^stop_ids is now ") as seen:
        assert params.stop_ids == (3, 4)
    assert seen[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"^stop_ids is now "):
        assert replace(SamplingParams(seed=1), stop_ids=[5]) == SamplingParams(seed=1, stop_token_ids=[5])
    with pytest.warns(DeprecationWarning, match=r"^activations is now dtype; "):
        settings = EngineConfig(activations="f16")  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match=r"^activations is now dtype; "):
        assert settings.activations == settings.dtype == "f16"


def test_former_names_of_parameters_work_in_load_and_generate_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match=r"^activations is now dtype; ") as seen:
        llm = load(LLAMA, device="cpu", activations="f32")  # type: ignore[call-arg]
    assert seen[0].filename == __file__
    with llm:
        first, *_ = llm.generate([5, 6, 7], max_tokens=5).ids  # type: ignore[union-attr]
        with pytest.warns(DeprecationWarning, match=r"^stop_ids is now stop_token_ids; ") as seen:
            assert llm.generate([5, 6, 7], stop_ids=[first]).ids == []  # type: ignore[union-attr]
        assert seen[0].filename == __file__


def test_a_parameter_under_both_its_names_is_refused() -> None:
    with (
        pytest.warns(DeprecationWarning, match=r"^stop_ids is now "),
        pytest.raises(ParameterError, match=r"^stop_ids is stop_token_ids now, and both are given: give stop_tok"),
    ):
        SamplingParams(stop_ids=[1], stop_token_ids=[2])  # type: ignore[call-arg]
