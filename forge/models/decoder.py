"""The decoder: an embedding, layers that add to a residual stream, and the product that gives logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from forge.backend import Backend
from forge.config import ModelConfig
from forge.models.arch import ARCHS
from forge.models.attention import Attention
from forge.models.batch import Batch
from forge.models.family import Sublayer
from forge.models.feed_forward import FeedForward
from forge.models.hooks import ACT, F32, Hook, HookPoint, Shape, points_in
from forge.models.host_experts import HostExperts
from forge.models.layer_end import LayerEnd, PerLayerInputs
from forge.models.layer_tensors import LayerTensors
from forge.models.layers import Linear, Norm
from forge.models.moe import FeedForwardBesideExperts, MixtureOfExperts
from forge.models.residual import ResidualStream
from forge.models.rope import RotaryEmbedding
from forge.models.weights import Weights
from forge.ops.activation import add, soft_cap
from forge.ops.embed import embed, take_rows
from forge.ops.norm import as_operand
from forge.state.model_state import ModelState

Mixer = Attention
_MIXERS: dict[str, type[Mixer]] = {"attention": Attention}
AnyFeedForward = FeedForward | MixtureOfExperts | FeedForwardBesideExperts
_MIXTURES: dict[str, type[MixtureOfExperts | FeedForwardBesideExperts]] = {
    "experts": MixtureOfExperts,
    "beside_experts": FeedForwardBesideExperts,
}


class Decoder:
    """A model's weights and its forward pass. The family's row in `arch` says which sublayers each layer has."""

    def __init__(
        self, weights: Weights, config: ModelConfig, backend: Backend, *, is_deterministic: bool = False
    ) -> None:
        self.config, self.backend, self.is_deterministic = config, backend, is_deterministic
        self.token_embd = weights.matrix({"token_embd.weight": config.vocab_size}, cols=config.width)
        self.num_adapters = 0
        """Slots that the layers' products have for adapters."""
        self._ropes = [RotaryEmbedding(rope, backend) for rope in config.ropes]
        self._rope_positions = 0
        self.layers: list[tuple[Mixer, AnyFeedForward]] = []
        self.ends: list[LayerEnd] = []
        """What comes behind each layer, where the family has that."""
        first: dict[Sublayer, int] = {}  # the index of the first layer with a sublayer
        for index, layer in enumerate(ARCHS[config.arch].layers(config.num_layers, config.layer_experts)):
            of_mixer, of_feed_forward = (
                LayerTensors(
                    weights, config, half, index, first.setdefault(half, index), is_deterministic=is_deterministic
                )
                for half in layer
            )
            mixer = _MIXERS[layer[0].kind](of_mixer, self._ropes)
            beside = self._norm_beside(of_feed_forward, of_mixer, mixer) if config.is_parallel else None
            mixture = _MIXTURES.get(layer[1].kind)
            assert beside is None or mixture is None  # no family has experts in layers whose halves read one stream
            self.layers.append((mixer, mixture(of_feed_forward) if mixture else FeedForward(of_feed_forward, beside)))
            if end := ARCHS[config.arch].end:
                of_end = LayerTensors(weights, config, end, index, 0, is_deterministic=is_deterministic)
                self.ends.append(LayerEnd(of_end))
        self._load_outer(weights)

    def _norm_beside(self, of_feed_forward: LayerTensors, of_mixer: LayerTensors, mixer: Mixer) -> Norm:
        """The norm of a feed-forward that reads the stream before its layer: the mixer's, or one of its own."""
        shared = of_feed_forward.stored("ffn_norm") == of_mixer.stored("attn_norm")
        own = None if shared else of_feed_forward.norm_before("ffn_norm")
        norm = own or mixer.attn_norm
        assert norm is not None
        return norm

    def _load_outer(self, weights: Weights) -> None:
        """What lies outside of the layers, as the family's row says."""
        config, arch = self.config, ARCHS[self.config.arch]
        sublayer = Sublayer("outer", arch.outer, arch.outer_optional)
        tensors = LayerTensors(weights, config, sublayer, None, None, is_deterministic=self.is_deterministic)
        self.position_embd = None
        if config.has_learned_positions:
            self.position_embd = tensors.matrix("position_embd", config.context_length, config.width)
        self.per_layer_inputs = PerLayerInputs(tensors) if config.per_layer_width else None
        self.token_embd_norm = tensors.norm("token_embd_norm")
        output_norm, logit_norm = (tensors.norm_before("output_norm", scale) for scale in (1.0, config.logit_scale))
        assert output_norm
        assert logit_norm
        self.output_norm, self._logit_norm = output_norm, logit_norm  # the second one scales logits
        if tensors.has("output"):
            self.output = tensors.linear({"output": config.vocab_size}, config.width)
        else:
            self.output = Linear(self.token_embd, is_deterministic=self.is_deterministic)

    def linears(self) -> Iterator[Linear]:
        """Every matrix product of a decode step, in order."""
        if self.per_layer_inputs:
            yield self.per_layer_inputs.per_layer_model_proj
        yield from self.layer_linears()
        yield self.output

    def layer_linears(self) -> Iterator[Linear]:
        """Those of the layers: the products that may have adapters."""
        for index, (mixer, feed_forward) in enumerate(self.layers):
            yield from mixer.linears()
            yield from feed_forward.linears()
            if self.ends:
                yield from self.ends[index].linears()

    def matrices(self) -> Iterator[tuple[Any, float]]:
        """The matrices that a decode step of one token reads, and what share of each, without `host_experts`."""
        for linear in self.linears():
            yield linear.weight, 1.0
        for _, feed_forward in self.layers:
            if not isinstance(feed_forward, FeedForward):
                yield from feed_forward.experts.matrices()

    def host_experts(self) -> list[HostExperts]:
        """The experts of each layer where they stay in the host's memory."""
        mixtures = (layer.experts for _, layer in self.layers if not isinstance(layer, FeedForward))
        return [mixture.host for mixture in mixtures if mixture.host]

    def reserve(self, positions: int) -> None:
        """Compute the RoPE tables for at least so many positions. Tables grow by doubling."""
        if positions > self._rope_positions:
            positions = max(positions, 2 * self._rope_positions)
            for rope in self._ropes:
                rope.compute(positions)
            self._rope_positions = positions  # not before: memory may run out

    def __call__(self, batch: Batch, state: ModelState, hook: Hook | None = None) -> Any:
        """float32 logits (R, V) of the batch's logit rows. The layers' state of its T tokens is written."""
        stream, points = self.hidden(batch, state, hook), points_in(hook)
        changed = None  # the operand, where a hook changes it
        if points and points.wants("final_norm"):
            normed = self.output_norm(stream.value())
            found = points.at("final_norm", normed)
            if found is not normed:
                found = found * self.config.logit_scale
                changed = as_operand(found if batch.logit_rows is None else take_rows(batch.logit_rows, found), None)
        if batch.logit_rows is not None:
            stream.take(batch.logit_rows)
        logits = self._logits(stream.normed(self._logit_norm) if changed is None else changed)
        return points.at("logits", logits) if points else logits

    def unembed(self, rows: Any) -> Any:
        """float32 logits (R, V) of rows (R, E) of the residual stream, as hooks see it: through the output's norm and
        product."""
        unit = self.config.stream_scale
        return self._logits(self._logit_norm.operand(rows if unit == 1.0 else rows / unit, None))

    def _logits(self, operand: Any) -> Any:
        """(R, V) of an operand of the output's product."""
        logits = self.output(operand)
        return soft_cap(logits, self.config.final_softcap) if self.config.final_softcap else logits

    def states(self, batch: Batch, state: ModelState, hook: Hook | None = None) -> Any:
        """The last layer's results through the output's norm, float32 (R, E): what logits are the product of."""
        stream, points = self.hidden(batch, state, hook), points_in(hook)
        if points and points.wants("final_norm"):
            normed = points.at("final_norm", self.output_norm(stream.value()))
            return normed if batch.logit_rows is None else take_rows(batch.logit_rows, normed)
        if batch.logit_rows is not None:
            stream.take(batch.logit_rows)
        return self.output_norm(stream.value())

    def hidden(self, batch: Batch, state: ModelState, hook: Hook | None = None) -> ResidualStream:
        """The residual stream after the last layer. No logits are computed."""
        x = embed(batch.ids, self.token_embd, self.config.embedding_scale / self.config.stream_scale)  # (T, E)
        if self.position_embd is not None:
            x = add(x, embed(batch.positions, self.position_embd, 1.0))
        if self.token_embd_norm:
            x = self.token_embd_norm(x)
        unit, points = self.config.stream_scale, points_in(hook)
        if points:
            x = points.at("embed", x, unit)
        inputs = self.per_layer_inputs(batch.ids, x) if self.per_layer_inputs else None
        # Products of several sequences' tokens are split-K partials. Their sum is a launch, unless the next norm adds
        # them, or a hook sees the stream. Rows cannot be taken of partials. The sums have the same bits either way.
        takes_partials = batch.is_decode and batch.logit_rows is None and (len(x) > 1 or self.is_deterministic)
        stream = ResidualStream(x, leaves_pending=takes_partials, unit=unit)
        for index, (mixer, feed_forward) in enumerate(self.layers):
            points = points_in(hook, f"blk.{index}.") if hook else None
            is_beside = isinstance(feed_forward, FeedForward) and feed_forward.beside
            stream.show(points, "resid_pre")
            if is_beside:
                stream.keep(is_beside)
            mixer(stream, batch, state, hook)
            if not is_beside:
                stream.show(points, "resid_mid")
            feed_forward(stream, batch, hook)
            if self.ends:
                self.ends[index](stream, inputs, batch.adapters, points)
            stream.show(points, "resid_post")
        return stream

    def points(self) -> list[HookPoint]:
        """The points of hooks, in the order in which a pass comes to them."""
        stream: tuple[Shape, str] = ("T", self.config.width), F32
        found = {"embed": stream}
        for index, (mixer, feed_forward) in enumerate(self.layers):
            is_beside = isinstance(feed_forward, FeedForward) and feed_forward.beside
            layer = {"resid_pre": stream} | {f"attn.{name}": point for name, point in mixer.points().items()}
            layer |= {} if is_beside else {"resid_mid": stream}
            layer |= {f"ffn.{name}": point for name, point in feed_forward.points().items()}
            layer |= self.ends[index].points() if self.ends else {}
            found |= {f"blk.{index}.{name}": point for name, point in {**layer, "resid_post": stream}.items()}
        found |= {"final_norm": stream, "logits": (("R", self.config.vocab_size), F32)}
        act = self.backend.dtype.name
        types = {F32: "float32", ACT: act, "i32": "int32"}
        return [HookPoint(name, shape, types[dtype]) for name, (shape, dtype) in found.items()]
