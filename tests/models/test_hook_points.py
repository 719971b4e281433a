"""Every family's points: watched they change nothing, they belong together, and what a hook writes there counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import ARCH, CONTEXT, tiny_llm

from forge import LLM
from forge.engine.hooked import Ints, Mask, Where

FAMILIES = sorted(path.name for path in Path(ARCH).iterdir())
QUICK = {"llama", "gemma4_e2b", "gpt_oss", "granitemoe_shared", "stablelm_parallel"}
IDS = [3, 17, 5, 9, 200, 41, 8, 8, 77, 30, 2]
families = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)


class Hook:
    """Keeps the values of points, and gives what `edit` makes of them."""

    request = 0

    def __init__(self, names: Any, edit: Any = lambda value: None) -> None:
        self.names, self._edit = frozenset(names), edit
        self.seen: dict[str, Any] = {}

    def selects(self, positions: Ints, num_prompt: int) -> Mask:
        return np.ones(len(positions), bool)

    def at(self, value: Any, where: Where) -> Any:
        self.seen[where.name] = value.copy()
        return self._edit(value)

    def end(self) -> None: ...

    def finished(self, is_whole: bool) -> None: ...


def logits_of(llm: LLM, *hooks: Any) -> Any:
    return np.concatenate(list(llm.engine.logits(IDS, hooks=hooks)))


def load(name: str) -> LLM:
    return tiny_llm(name, context=min(CONTEXT, 64))


@families
def test_watching_every_point_changes_nothing_and_each_is_seen_with_its_shape(name: str) -> None:
    llm = load(name)
    points = llm.engine.runner.hook_points
    hook = Hook(point.name for point in points)
    expected = logits_of(llm)
    np.testing.assert_allclose(logits_of(llm, hook), expected, rtol=1e-5, atol=1e-5)
    sizes = {"T": len(IDS), "S": len(IDS), "R": len(IDS)}
    for point in points:
        value = hook.seen[point.name]
        assert value.shape == tuple(sizes.get(size, size) for size in point.shape), point  # type: ignore[call-overload]
        assert value.dtype.name == point.dtype, point
    np.testing.assert_array_equal(hook.seen["logits"], logits_of(llm, hook))


@families
def test_points_belong_together(name: str) -> None:
    """What each sublayer adds is the difference of the stream; weights times values are what heads give."""
    llm = load(name)
    hook = Hook(point.name for point in llm.engine.runner.hook_points)
    logits_of(llm, hook)
    seen, config = hook.seen, llm.config
    for layer, (mixer, _) in enumerate(llm.engine.runner.model.layers):
        at = {key.removeprefix(f"blk.{layer}."): value for key, value in seen.items() if f"blk.{layer}." in key}
        middle = at["resid_pre"] + at["attn.out"]
        if "resid_mid" in at:
            np.testing.assert_allclose(at["resid_mid"], middle, rtol=1e-5, atol=1e-5)
        if not llm.engine.runner.model.ends:
            np.testing.assert_allclose(at["resid_post"], middle + at["ffn.down"], rtol=1e-5, atol=2e-5)
        if layer:
            np.testing.assert_array_equal(at["resid_pre"], seen[f"blk.{layer - 1}.resid_post"])
        if not mixer.gates:
            values = seen[f"blk.{config.layer_kv[layer]}.attn.v"]
            values = np.repeat(values, at["attn.q"].shape[1] // values.shape[1], axis=1)
            heads = np.einsum("hts,shd->thd", at["attn.pattern"], values)
            np.testing.assert_allclose(at["attn.heads"], heads, rtol=1e-4, atol=1e-5)
        if "ffn.expert_weights" in at:
            assert (np.diff(np.sort(at["ffn.experts"], axis=1)) > 0).all()  # each once
    np.testing.assert_allclose(seen["embed"], seen["blk.0.resid_pre"], rtol=1e-6, atol=1e-6)


@families
def test_what_is_written_at_a_point_counts(name: str) -> None:
    """Its own value gives the same logits, another one others: at each point of a layer and outside of layers."""
    llm = load(name)
    expected = logits_of(llm)
    layer = llm.config.num_layers - 2
    for point in llm.engine.runner.hook_points:
        if point.name.startswith("blk.") and not point.name.startswith(f"blk.{layer}."):
            continue
        same = logits_of(llm, Hook([point.name], lambda value: value.copy()))
        np.testing.assert_allclose(same, expected, rtol=1e-4, atol=2e-5, err_msg=point.name)
        if point.dtype == "int32":
            other = Hook([point.name], lambda value: (value + 1) % 4)
        else:  # of each token or weight another number: a factor of all is nothing to a norm
            other = Hook([point.name], lambda value: value * np.linspace(0.2, 3, value.shape[-1], dtype=value.dtype))
        is_changed = np.abs(logits_of(llm, other) - expected).max() > 1e-4
        assert is_changed, point.name
