"""Pictures: their numbers against logits and captured values, their HTML, and the data of their charts."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib import pyplot
from tiny_models import assert_idle, tiny_llm

from forge import LLM, ContextLengthError, ParameterError, UnsupportedError, viz
from forge.viz import lens

IDS = [3, 17, 5, 9, 200, 41, 8]
VOID = {"br"}


@pytest.fixture(scope="module")
def llm() -> LLM:
    return tiny_llm("llama")


@pytest.fixture(autouse=True)
def _figures() -> Any:
    mpl.use("Agg")
    yield
    pyplot.close("all")


class Page(HTMLParser):
    """Tags, texts and notes of HTML. Raises AssertionError where tags do not close in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def log_softmax(logits: Any) -> Any:
    """In float64."""
    z = np.asarray(logits, np.float64)
    z = z - z.max(axis=-1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=-1, keepdims=True))


# Logit lens


def test_the_lens_is_the_streams_softmax(llm: LLM) -> None:
    """Of each layer, by a norm and a product in float64; behind the last one it is that of the model's logits."""
    found = viz.logit_lens(llm, IDS, top_k=3)
    layers, model = llm.config.num_layers, llm.engine.runner.model
    assert found.points == ["blk.0.resid_pre", *(f"blk.{layer}.resid_post" for layer in range(layers))]
    with llm.capture("*.resid_*") as cache:
        logits = llm.logits(IDS)
    for at, point in enumerate(found.points):
        x = cache[point].astype(np.float64)
        normed = x / np.sqrt(np.mean(x**2, axis=1, keepdims=True) + llm.config.norm_eps) * model.output_norm.weight
        wanted = log_softmax(normed @ np.asarray(model.output.weight, np.float64).T)  # (T, V)
        np.testing.assert_array_equal(found.ids[at], np.argsort(-wanted, axis=1, kind="stable")[:, :3])
        np.testing.assert_allclose(
            found.logprobs[at], np.take_along_axis(wanted, found.ids[at], axis=1), rtol=0, atol=1e-4
        )
        of_next = wanted[np.arange(6), IDS[1:]]
        np.testing.assert_allclose(found.next_logprobs[at, :6], of_next, rtol=0, atol=1e-4)
    np.testing.assert_allclose(found.logprobs[-1, :, 0], log_softmax(logits).max(axis=1), rtol=0, atol=1e-5)
    assert np.isnan(found.next_logprobs[:, -1]).all()
    assert not np.isnan(found.next_logprobs[:, :-1]).any()
    text = llm.tokenizer.token_text
    assert found.tokens == [text(token) for token in IDS]
    assert found.predictions == [[[text(one) for one in own] for own in layer] for layer in found.ids.tolist()]
    assert_idle(llm)


def test_a_batch_in_groups_is_its_texts_alone(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [IDS, IDS[:2], [9, 8, 7, 6], IDS[::-1]]
    monkeypatch.setattr(lens, "_RESIDUAL_BYTES", 2 * 6 * 4 * llm.config.width)
    found = viz.logit_lens(llm, prompts, layers=[2, 0], positions=slice(-4, None), top_k=2)
    assert len(found) == 4
    for ids, one in zip(prompts, found, strict=True):
        whole = viz.logit_lens(llm, ids, top_k=2)
        assert one.points == ["blk.0.resid_post", "blk.2.resid_post"]
        assert one.positions.tolist() == list(range(len(ids)))[-4:]
        np.testing.assert_array_equal(one.ids, whole.ids[[1, 3]][:, one.positions])
        np.testing.assert_allclose(one.logprobs, whole.logprobs[[1, 3]][:, one.positions], rtol=0, atol=1e-5)
        np.testing.assert_allclose(one.next_logprobs, whole.next_logprobs[[1, 3]][:, one.positions], rtol=0, atol=1e-5)
        assert one.tokens == [whole.tokens[at] for at in one.positions]
    assert viz.logit_lens(llm, []) == []


def test_the_lens_sees_hooks_and_computes_no_logits_of_the_prompts(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    vector = np.random.default_rng(1).normal(size=llm.config.width).astype(np.float32)
    plain = viz.logit_lens(llm, IDS, positions=-1)
    with llm.steer("blk.1.resid_post", vector, scale=30.0):
        steered = viz.logit_lens(llm, IDS, positions=-1)
        wanted = log_softmax(llm.logits(IDS, -1))
    monkeypatch.setattr(llm.engine.runner, "forward", None)
    viz.logit_lens(llm, IDS)
    np.testing.assert_array_equal(steered.logprobs[:2], plain.logprobs[:2])  # before layer 0, and behind it
    assert np.abs(steered.logprobs[2] - plain.logprobs[2]).max() > 1e-2
    np.testing.assert_allclose(steered.logprobs[-1, 0, 0], wanted.max(), rtol=0, atol=1e-4)


def test_the_lens_is_drawn(llm: LLM) -> None:
    found = viz.logit_lens(llm, IDS, layers=[0, 2], top_k=2)
    axes = found.plot()
    np.testing.assert_array_equal(axes.images[0].get_array(), np.exp(found.logprobs[:, :, 0]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "2"]
    written = {(round(t.get_position()[0]), round(t.get_position()[1])): t.get_text() for t in axes.texts}
    assert len(written) == 14
    assert written[4, 1] == viz.figures.plain(found.predictions[1][4][0])
    bottom, top = axes.get_ylim()
    assert bottom < top  # the last layer on top
    own = pyplot.subplots()[1]
    assert found.plot(own) is own
    pyplot.gcf().canvas.draw()


# Attention


def test_attention_maps_are_the_models(llm: LLM) -> None:
    whole = llm.attention(IDS, 1)
    found = viz.attention(llm, IDS, 1, [3, 0])
    np.testing.assert_array_equal(found.weights, whole[[3, 0]])
    np.testing.assert_array_equal(viz.attention(llm, IDS, 1).weights, whole)
    np.testing.assert_array_equal(viz.attention(llm, IDS, 1, 2).weights, whole[[2]])
    axes = found.plot()
    assert [one.get_title() for one in axes] == ["head 3", "head 0"]
    for one, weights in zip(axes, found.weights, strict=True):
        np.testing.assert_array_equal(one.images[0].get_array(), weights)
    page = Page(found._repr_html_())
    best = whole[3].argmax(axis=1)
    assert page.attributes[page.tags.index("td") + 6]["title"] == f"{whole[3, 6].max():.3f} at position {best[6]}"
    own = pyplot.subplots()[1]
    assert viz.attention(llm, IDS, 1, 2).plot(own) == [own]
    with pytest.raises(ParameterError, match=r"^ax holds 1 axes, and there are 2 heads$"):
        found.plot(own)


# Norms


def test_norms_are_those_of_captured_values(llm: LLM) -> None:
    points = ["blk.*.resid_post", "blk.*.attn.q"]
    found = viz.activation_norms(llm, IDS, points)
    with llm.capture(points) as cache:
        llm.logits(IDS)
    assert found.points == list(cache.names)
    for point, norms in zip(found.points, found.norms, strict=True):
        values = cache[point].astype(np.float64).reshape(len(IDS), -1)
        np.testing.assert_allclose(norms, np.sqrt((values**2).sum(axis=1)), rtol=1e-5)
    default = viz.activation_norms(llm, IDS)
    assert default.points == [f"blk.{layer}.resid_post" for layer in range(llm.config.num_layers)]
    axes = default.plot()
    np.testing.assert_array_equal(axes.images[0].get_array(), default.norms)
    assert [label.get_text() for label in axes.get_yticklabels()] == default.points
    page = Page(default._repr_html_())
    assert page.tags.count("td") == default.norms.size
    assert f"{default.norms[-1, 0]:.4g}" == page.texts[page.texts.index(default.points[-1]) + 1]


def test_norms_that_are_no_numbers_are_shown() -> None:
    norms = np.array([[0.0, np.inf], [np.nan, 2.0]], np.float32)
    found = viz.ActivationNorms(["a", "b"], ["x", "y"], norms)
    Page(found._repr_html_())
    found.plot()
    viz.ActivationNorms(["a"], ["x"], np.zeros((1, 1), np.float32)).plot()
    pyplot.gcf().canvas.draw()


# Surprise


def test_surprise_is_the_negative_log_softmax(llm: LLM) -> None:
    found = viz.token_surprise(llm, IDS)
    wanted = -log_softmax(llm.logits(IDS))[np.arange(6), IDS[1:]] / np.log(2)
    assert np.isnan(found.bits[0])
    np.testing.assert_allclose(found.bits[1:], wanted, rtol=0, atol=1e-4)
    assert found.mean_bits == pytest.approx(wanted.mean(), abs=1e-4)
    axes = found.plot()
    assert [bar.get_height() for bar in axes.patches] == found.bits[1:].tolist()
    page = Page(found._repr_html_())
    spans = [own for tag, own in zip(page.tags, page.attributes, strict=True) if tag == "span"]
    assert [own["title"] for own in spans] == ["the first token", *(f"{bits:.2f} bits" for bits in found.bits[1:])]


# All of them

HOSTILE = ["<script>alert(1)</script>", "\"&'", "$x_{", "a\n\tb", "\\", "日本"]


@pytest.mark.parametrize(
    "picture",
    [
        viz.LogitLens(
            ["blk.0.resid_pre"],
            np.arange(6),
            HOSTILE,
            np.zeros((1, 6, 1), np.int32),
            [[[text] for text in HOSTILE]],
            np.full((1, 6, 1), -0.5, np.float32),
            np.zeros((1, 6), np.float32),
        ),
        viz.AttentionMaps(0, [1], HOSTILE, np.eye(6, dtype=np.float32)[None]),
        viz.ActivationNorms(["blk.0.resid_post"], HOSTILE, np.ones((1, 6), np.float32)),
        viz.TokenSurprise([1] * 6, HOSTILE, np.array([np.nan, 1, 2, 3, 4, 50]), 12.0),
    ],
    ids=lambda picture: type(picture).__name__,
)
def test_tokens_are_texts_in_html_and_in_charts(picture: Any) -> None:
    page = Page(picture._repr_html_())
    assert set(page.tags) <= {"div", "b", "table", "tr", "th", "td", "span", "br"}
    assert {name for own in page.attributes for name in own} <= {"style", "title"}
    shown = "".join(page.texts)
    assert all(text in shown for text in ("<script>alert(1)</script>", "\"&'", "a⏎⇥b", "日本"))
    picture.plot()
    with pytest.warns(UserWarning, match="Glyph .* missing") if "日" in shown else pytest.warns():
        pyplot.gcf().canvas.draw()


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda llm: viz.logit_lens(llm, IDS, layers=[9]), "layers"),
        (lambda llm: viz.logit_lens(llm, IDS, layers=[]), "layers"),
        (lambda llm: viz.logit_lens(llm, IDS, layers=3), "layers"),
        (lambda llm: viz.logit_lens(llm, IDS, top_k=0), "top_k"),
        (lambda llm: viz.logit_lens(llm, IDS, positions=[7]), "positions"),
        (lambda llm: viz.logit_lens(llm, IDS, positions=slice(9, None)), "positions"),
        (lambda llm: viz.logit_lens(llm, IDS, positions=[]), "positions"),
        (lambda llm: viz.logit_lens(llm, 3), "text"),
        (lambda llm: viz.logit_lens(llm, IDS, top=3), "top"),
        (lambda llm: viz.logit_lens("smollm2", IDS), "llm"),
        (lambda llm: viz.attention(llm, IDS, 99), "layer"),
        (lambda llm: viz.attention(llm, IDS, 0, [4]), "heads"),
        (lambda llm: viz.attention(llm, IDS, 0, []), "heads"),
        (lambda llm: viz.attention(llm, IDS, 0, "all"), "heads"),
        (lambda llm: viz.attention(llm, [IDS], 0), "text"),
        (lambda llm: viz.activation_norms(llm, IDS, "blk.*.resid_past"), "points"),
        (lambda llm: viz.activation_norms(llm, IDS, "blk.0.attn.pattern"), "reduce"),
        (lambda llm: viz.activation_norms(llm, [IDS]), "text"),
        (lambda llm: viz.token_surprise(llm, [5]), "text"),
        (lambda llm: viz.token_surprise(llm, [10**6, 1]), "prompt"),
        (lambda llm: viz.token_surprise(llm, []), "text"),
    ],
)
def test_what_cannot_be_drawn_is_an_error_of_one_line(llm: LLM, call: Any, parameter: str) -> None:
    with pytest.raises(ParameterError, match=r"^[^\n]+$") as raised:
        call(llm)
    assert raised.value.parameter == parameter
    assert_idle(llm)


def test_a_text_that_is_too_long_says_so(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="97 tokens do not fit the context of 96"):
        viz.logit_lens(llm, [IDS, [5] * 97])


def test_without_matplotlib_a_chart_says_how_to_install_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    found = viz.token_surprise(llm, IDS)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError, match=r"^plot needs matplotlib .*: pip install 'forge-llm\[viz\]'$"):
        found.plot()
    Page(found._repr_html_())


@pytest.mark.slow
def test_importing_forge_viz_loads_no_matplotlib() -> None:
    code = "import sys, forge.viz; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
