"""The tensors of one layer's mixer or feed-forward, or of what lies outside of layers, by their short names."""

from __future__ import annotations

from typing import Any

import numpy as np

from forge.config import ModelConfig
from forge.models.arch import ARCHS
from forge.models.family import Sublayer
from forge.models.host_experts import HostExperts
from forge.models.layers import Linear, Norm
from forge.models.weights import Weights
from forge.ops.experts import Experts


class LayerTensors:
    """Takes the tensors of one sublayer out of a model's file.

    index: The layer; None = outside of layers. first: The first layer with the same sublayer. is_deterministic: As of
    `EngineConfig`.
    """

    def __init__(
        self,
        weights: Weights,
        config: ModelConfig,
        sublayer: Sublayer,
        index: int | None,
        first: int | None,
        *,
        is_deterministic: bool,
    ) -> None:
        self.config, self.index, self.kind = config, index or 0, sublayer.kind
        self.is_deterministic = is_deterministic
        self._weights, self._layer, self._first = weights, index, first
        required, optional = sublayer.tensors.split(), sublayer.optional.split()
        self._names = {name: other for name, _, other in (text.partition("=") for text in (*required, *optional))}
        """The names in the file, where they are others: see `Sublayer`."""
        self._required = [text.partition("=")[0] for text in required]
        self._optional = [text.partition("=")[0] for text in optional]

    def _name(self, tensor: str) -> str:
        return self._full(self.stored(tensor), self._layer)

    def _full(self, tensor: str, index: int | None) -> str:
        suffix = "" if tensor.endswith((".bias", ".scale")) else ".weight"
        return f"{'' if index is None else f'blk.{index}.'}{tensor}{suffix}"

    def stored(self, tensor: str) -> str:
        """The short name of a tensor in the file; "1" where it is not there and its numbers are ones. A bias is the one
        of its weight."""
        *others, last = (self._names.get(tensor) or tensor).split("|")
        weights = (self._full(other.removesuffix(".bias"), self._first) for other in others)
        return next((other for other, weight in zip(others, weights, strict=True) if self._weights.has(weight)), last)

    def is_required(self, tensor: str) -> bool:
        """Whether every such layer of the family has the tensor."""
        return tensor in self._required

    def is_stored(self, tensor: str, index: int | None = None) -> bool:
        """Whether the file has the tensor of this layer, or of another one."""
        return self._weights.has(self._full(self.stored(tensor), self._layer if index is None else index))

    def ignore(self, tensor: str) -> None:
        """Take a tensor that some files have and the model does not read."""
        self._weights.ignore(self._name(tensor))

    def linear(self, tensors: dict[str, int], cols: int, joined: str | None = None) -> Linear:
        """The named matrices, by their rows, as one product; a bias if the family has it or this file brings it.

        A file may hold them as one tensor, `joined`.
        """
        matrix = self._weights.matrix(*self._stored("", tensors, joined), cols=cols)
        how: dict[str, Any] = {
            "is_deterministic": self.is_deterministic,
            "parts": self._weights.stored(*self._stored("", tensors, joined)),
        }
        known = [f"{tensor}.bias" for tensor in tensors]
        is_joined = joined is not None and self.is_stored(f"{joined}.bias", self._first)
        if any(map(self.has, known)) or (is_joined and set(known) & set(self._optional)):
            bias = self._weights.vector(*self._stored(".bias", tensors, joined))
            return Linear(matrix, bias, **how)
        return Linear(matrix, **how)

    def has(self, tensor: str) -> bool:
        """Whether the layer has this tensor: the family requires it, or has it as an option and this file brings it.
        All layers with the same sublayer have it if the first one does."""
        return tensor in self._required or (tensor in self._optional and self.is_stored(tensor, self._first))

    @property
    def leaves_experts(self) -> bool:
        """Whether the layer's experts stay in the host's memory: `experts` then gives NumPy's arrays."""
        return self.index < self._weights.cpu_experts

    def on_host(self, experts: Experts, used: int) -> HostExperts:
        """Experts of NumPy's arrays, of which so many compute a token, in memory that the device reads."""
        return HostExperts(experts, used, self._weights.staging(), self._weights.backend)

    def experts(self, tensors: dict[str, int], cols: int, joined: str | None = None) -> tuple[Any, ...]:
        """The named tensors of all experts, by an expert's rows: one matrix, or one for each if their types differ."""
        count = self.config.num_experts
        sizes = self._stored("", tensors, joined)
        found = self._weights.experts(*sizes, count=count, cols=cols, on_host=self.leaves_experts)
        return found if isinstance(found, tuple) else (found,)

    def expert_biases(self, tensors: dict[str, int]) -> Any:
        """float32 (count * sum of sizes,): the named tensors' biases, stacked for each expert; None without any."""
        count = self.config.num_experts
        names = {self._name(f"{tensor}.bias"): (count, size) for tensor, size in tensors.items()}
        if not all(self.has(f"{tensor}.bias") for tensor in tensors):
            return None
        return self._weights.columns(names)

    def rows(self, tensor: str, count: int) -> Any:
        """float32 (count, E) on the device: a small matrix that is not rounded."""
        return self._weights.array({self._name(tensor): (count, self.config.width)})

    def row(self, tensor: str, size: int) -> Any:
        """(size,) float32 on the device: a vector of finite numbers, which files also hold as a matrix of one row."""
        name = self._name(tensor)
        found = self._weights.array({name: (1, size) if self._weights.is_matrix(name) else (size,)}).reshape(-1)
        self._weights.check_finite(name)
        return found

    def _stored(self, suffix: str, tensors: dict[str, int], joined: str | None) -> tuple[dict[str, int], str | None]:
        sizes = {self._name(tensor + suffix): size for tensor, size in tensors.items()}
        return sizes, self._name(joined + suffix) if joined else None

    def matrix(self, tensor: str, rows: int, cols: int) -> Any:
        """(rows, cols) on the device: a matrix that no product takes."""
        return self._weights.matrix({self._name(tensor): rows}, cols=cols)

    def norm(self, tensor: str, factor: float = 1.0) -> Norm | None:
        """A norm of E numbers, times the factor, or None where the layer has none."""
        if not self.has(tensor):
            return None
        has_bias = f"{tensor}.bias" in (*self._required, *self._optional)
        bias = self.vector(f"{tensor}.bias", self.config.width, factor) if has_bias else None
        return Norm(self.config.norm, self.vector(tensor, self.config.width, factor), bias, self.config.norm_eps)

    def norm_before(self, tensor: str, factor: float = 1.0) -> Norm | None:
        """A norm that reads the stream, which holds x / stream_scale: its epsilon is as much smaller."""
        found = self.norm(tensor, factor)
        if found:
            found.eps /= self.config.stream_scale**2
        return found

    def norm_behind(self, tensor: str) -> Norm | None:
        """A norm of a result that is added to the stream, which holds x / stream_scale."""
        found = self.norm(tensor, self.config.residual_scale / self.config.stream_scale)
        if found:
            found.eps = ARCHS[self.config.arch].post_norm_eps or found.eps
        return found

    def number(self, tensor: str) -> float:
        """The number that a tensor of one holds."""
        return self._weights.number(self._name(tensor))

    def ones(self, size: int) -> Any:
        """(size,) float32 on the device: the weights of a norm without weights."""
        return self._weights.backend.asarray(np.ones(size, np.float32))

    def vector(self, tensor: str, size: int, factor: float = 1.0) -> Any:
        """(size,) float32 on the device, times the factor."""
        if self.stored(tensor) == "1":
            return self._weights.backend.asarray(np.full(size, factor, np.float32))
        return self._weights.array({self._name(tensor): (size,)}, factor)

    def heads(self, tensor: str, count: int) -> Any:
        """(count, D) float32 on the device: a vector for each head."""
        dim = self.config.layer_head_dims[self.index]
        return self._weights.array({self._name(tensor): (count, dim)})
