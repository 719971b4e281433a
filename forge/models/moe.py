"""Mixtures of experts: feed-forwards of which a router chooses some for each token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from forge.models.arch import ARCHS
from forge.models.batch import Batch
from forge.models.feed_forward import gated, gated_points
from forge.models.hooks import ACT, F32, Hook, Points, Shape, points_in
from forge.models.host_experts import HostExperts
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear, Norm
from forge.models.residual import ResidualStream
from forge.models.router_points import gate_of, seen_choice
from forge.ops.activation import add
from forge.ops.experts import Experts, Router, experts, gate_rows, route
from forge.ops.norm import Normed, norm

GATED = ("silu", "gelu", "clamped_swiglu")
"""Activations of a gate and an up; the others are of an up alone."""


class _Experts:
    """A router and the experts that it chooses among."""

    def __init__(self, tensors: LayerTensors) -> None:
        config, row = tensors.config, ARCHS[tensors.config.arch].router
        assert config.experts is not None
        numbers, width = config.experts, config.width
        has_scale = tensors.has("ffn_down_exps.scale")
        self.router = Router(
            tensors.rows("ffn_gate_inp", numbers.count),
            tensors.vector("ffn_gate_inp.bias", numbers.count) if tensors.has("ffn_gate_inp.bias") else None,
            tensors.row("exp_probs_b.bias", numbers.count) if tensors.has("exp_probs_b.bias") else None,
            tensors.vector("ffn_down_exps.scale", numbers.count) if has_scale else None,
            *(numbers.used, numbers.groups, numbers.used_groups, numbers.scale),
        )
        order = "fixed" if tensors.is_deterministic else "any"
        self.scores = {
            "scores": numbers.scores,
            "weights": "renormalized" if numbers.renormalizes else "as_scored",
            "order": order,
            "tiles": "never" if tensors.is_deterministic else "allowed",
        }
        self.how = {
            "activation": row.activation,
            "weighs": "input" if row.weighs_input else "output",
            "order": order,
        }
        first = ("ffn_gate_exps", "ffn_up_exps") if row.activation in GATED else ("ffn_up_exps",)
        sizes = dict.fromkeys(first, numbers.width)
        gate, *up = tensors.experts(sizes, width, "ffn_gate_up_exps" if len(first) == 2 else None)
        apart = [{name: numbers.width} for name in sizes] if up else [sizes]
        biases = [tensors.expert_biases(part) for part in apart]
        (down,) = tensors.experts({"ffn_down_exps": width}, numbers.width)
        down_bias = tensors.expert_biases({"ffn_down_exps": width})
        self.experts = Experts(
            gate, up[0] if up else None, biases[0], biases[1] if up else None, down, down_bias, numbers.count
        )
        self.host: HostExperts | None = None
        if tensors.leaves_experts:
            self.host = tensors.on_host(self.experts, numbers.used)
            self.experts = self.host.fetched
            self.scores["tiles"] = "never"  # what is fetched goes by the experts alone

    def matrices(self) -> Iterator[tuple[Any, float]]:
        """The matrices that one token reads, and what share of each, without those on the host."""
        yield self.router.weight, 1.0
        for matrix in () if self.host else (self.experts.gate, self.experts.up, self.experts.down):
            if matrix is not None:
                yield matrix, self.router.used / self.experts.count

    def points(self) -> dict[str, tuple[Shape, str]]:
        """Of hooks: the router's logits with their biases, which experts compute each token, and their weights."""
        used: Shape = ("T", self.router.used)
        return {
            "router": (("T", self.experts.count), F32),
            "experts": (used, "i32"),
            "expert_weights": (used, F32),
        }

    def choose(self, normed: Any, points: Points | None) -> tuple[Any, Any]:
        """Experts and their weights (T, U) of rows with nothing pending, or of an array, which a hook has made."""
        if points and (points.wants(*self.points()) or not isinstance(normed, Normed)):
            return seen_choice(normed, self.router, self.scores, points)
        chosen, weights = route(normed, self.router, **self.scores)
        return chosen, weights

    def __call__(self, operand: Any, choice: tuple[Any, Any], residual: Any, *, partials: str = "never") -> Any:
        """The weighted sum (T, E), added to the residual if there is one. partials="allowed": not yet added up."""
        if self.host:
            self.host.fetch(choice[0])
        return experts(operand, *choice, self.experts, residual, **self.how, partials=partials)


class MixtureOfExperts:
    """The weighted sum of the feed-forwards that a router chooses for each token, and of a shared one.

    The family's `family.Router` and the file's numbers say how. Attributes that hold weights are named like the file's
    tensors.
    """

    def __init__(self, tensors: LayerTensors) -> None:
        config, self.index = tensors.config, tensors.index
        self.width = config.width
        self.ffn_norm = tensors.norm_before("ffn_norm")
        self.experts = _Experts(tensors)
        self.ffn_up_shexp: Linear | None = None
        if config.experts and config.experts.shared_width:
            width, shared_width = config.width, config.experts.shared_width
            self.glu = config.activation
            shared = dict.fromkeys(("ffn_gate_shexp", "ffn_up_shexp"), shared_width)
            self.ffn_up_shexp = tensors.linear(shared, width)
            self.ffn_down_shexp = tensors.linear({"ffn_down_shexp": width}, shared_width)
            has_gate = tensors.has("ffn_gate_inp_shexp")
            self.ffn_gate_inp_shexp = tensors.row("ffn_gate_inp_shexp", width) if has_gate else None

    def linears(self) -> list[Linear]:
        """The matrix products that compute every token, in the order of their launches."""
        return [] if self.ffn_up_shexp is None else [self.ffn_up_shexp, self.ffn_down_shexp]

    def points(self) -> dict[str, tuple[Shape, str]]:
        """Of hooks: what router and experts read, the choice, the shared expert's products, what is added."""
        stream: Shape = ("T", self.width)
        shared = {}
        if self.ffn_up_shexp is not None:
            shared = gated_points(self.ffn_down_shexp.weight.shape[1], self.glu, "shared.")
        return {"in": (stream, ACT)} | self.experts.points() | shared | {"down": (stream, F32)}

    def __call__(self, stream: ResidualStream, batch: Batch, hook: Hook | None) -> None:
        """Add the result to the stream."""
        normed = operand = stream.normed(self.ffn_norm)
        assert isinstance(normed, Normed)
        if points := points_in(hook, f"blk.{self.index}.ffn."):
            self._seen(normed, stream, batch, points)
            return
        if normed.shape[0] > 1 or normed.pending is not None or self.ffn_up_shexp is not None:
            operand = norm(normed, out="act")  # (T, E), which several products read
            normed = replace(normed, pending=None)
        choice = self.experts.choose(normed, None)
        if self.ffn_up_shexp is None:
            if stream.leaves_pending:
                stream.leave(self.experts(operand, choice, None, partials="allowed"))
            else:
                self.experts(operand, choice, stream.x)
            return
        h = self.ffn_up_shexp(operand, batch.adapters, glu=self.glu)  # (T, F)
        if self.ffn_gate_inp_shexp is not None:
            h = gate_rows(h, normed, self.ffn_gate_inp_shexp)
        # From here on the stream is no longer what was chosen by. The shared expert's result comes last: it may be left
        # pending, and sums are to have one order.
        self.experts(operand, choice, stream.x)
        stream.add(self.ffn_down_shexp, h, None, batch.adapters)

    def _seen(self, normed: Normed, stream: ResidualStream, batch: Batch, points: Points) -> None:
        """The same where hooks look: what is added is one sum, apart from the stream."""
        operand = norm(normed, out="act")
        found = points.at("in", operand)
        read = replace(normed, pending=None) if found is operand else found
        choice = self.experts.choose(read, points)
        result = self.experts(found, choice, None)
        if self.ffn_up_shexp is not None:
            h = gated(self.ffn_up_shexp, found, batch.adapters, self.glu, points, "shared.")
            if self.ffn_gate_inp_shexp is not None:
                gate = self.ffn_gate_inp_shexp
                h = gate_rows(h, read, gate) if isinstance(read, Normed) else gate_of(h, read, gate)
            self.ffn_down_shexp(h, batch.adapters, residual=result)
        stream.leave(result, points, "down")


class FeedForwardBesideExperts:
    """A gated feed-forward and a mixture of experts, each between two norms, and a norm of their sum: Gemma 4."""

    def __init__(self, tensors: LayerTensors) -> None:
        config, self.index = tensors.config, tensors.index
        width, inner = config.width, config.layer_ffn_widths[tensors.index]
        self.glu = config.activation
        self.ffn_norm = tensors.norm_before("ffn_norm")
        self.pre_ffw_norm_2 = _there(tensors.norm_before("pre_ffw_norm_2"))
        self.ffn_up = tensors.linear({"ffn_gate": inner, "ffn_up": inner}, width, "ffn_up")
        self.ffn_down = tensors.linear({"ffn_down": width}, inner)
        self.experts = _Experts(tensors)
        self.router_norm = Norm("rms", tensors.vector("ffn_gate_inp.scale", width, width**-0.5), None, config.norm_eps)
        self.post_ffw_norm_1 = _there(tensors.norm_behind("post_ffw_norm_1"))
        self.post_ffw_norm_2 = _there(tensors.norm_behind("post_ffw_norm_2"))
        self.post_ffw_norm = _there(tensors.norm_behind("post_ffw_norm"))

    def linears(self) -> list[Linear]:
        """The matrix products that compute every token, in the order of their launches."""
        return [self.ffn_up, self.ffn_down]

    def points(self) -> dict[str, tuple[Shape, str]]:
        """Of hooks: those of the feed-forward and of the choice. `in` is what the feed-forward alone reads, `down` what
        both add."""
        width, inner = self.ffn_down.weight.shape
        stream: Shape = ("T", width)
        return {"in": (stream, ACT)} | gated_points(inner, self.glu) | self.experts.points() | {"down": (stream, F32)}

    def __call__(self, stream: ResidualStream, batch: Batch, hook: Hook | None) -> None:
        """Add the result to the stream."""
        operand = norm(stream.normed(self.ffn_norm), out="act")  # what is pending is in the stream from here on
        slots, points = batch.adapters, points_in(hook, f"blk.{self.index}.ffn.")
        if points:
            h = gated(self.ffn_up, points.at("in", operand), slots, self.glu, points)
        else:
            h = self.ffn_up(operand, slots, glu=self.glu)
        dense = self.post_ffw_norm_1(self.ffn_down(h, slots))  # (T, E)
        choice = self.experts.choose(self.router_norm.operand(stream.x), points)
        sparse = self.post_ffw_norm_2(self.experts(self.pre_ffw_norm_2.operand(stream.x), choice, None))
        stream.leave(self.post_ffw_norm(add(dense, sparse)), points, "down")


def _there(norm: Norm | None) -> Norm:
    """A norm that the family requires."""
    assert norm is not None
    return norm
