"""Experts that stay in the host's memory: a step copies those that it has chosen over the device's link, and reads the
copies. What chose them is on the device, and so is what copies: no step waits for the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from forge.backend import Backend
from forge.backend.gpu import GPU
from forge.errors import OutOfMemoryError
from forge.models.weights import STAGING_ALIGNMENT
from forge.ops.expert_fetch import PIECE, fetch_experts
from forge.ops.experts import Experts
from forge.ops.quant import Packed, planes_of


class HostExperts:
    """A layer's experts. `fetched` are the same on the device: those that were fetched, until another layer fetches."""

    def __init__(self, experts: Experts, used: int, staging: Any, backend: Backend) -> None:
        """experts: Of NumPy's arrays. used: Experts that compute a token. staging: uint32, the device's memory that
        layers share. Raises OutOfMemoryError where the system does not pin so much memory."""
        self._experts, self._used, self._backend, self._staging = experts.count, used, backend, staging
        matrices = {name: getattr(experts, name) for name in ("gate", "up", "down")}
        planes = [plane for matrix in matrices.values() for plane in planes_of(matrix) if plane is not None]
        begins, self.nbytes = [], 0
        for plane in planes:
            begins.append(self.nbytes)
            self.nbytes += -(-plane.nbytes // STAGING_ALIGNMENT) * STAGING_ALIGNMENT
        self._source, host = self._pinned()
        for plane, begin in zip(planes, begins, strict=True):
            host[begin : begin + plane.nbytes] = plane.reshape(-1).view(np.uint8)
        sizes = [plane.nbytes // experts.count for plane in planes]
        parts = [(begin // PIECE, size) for begin, size in zip(begins, sizes, strict=True)]
        self._parts = backend.asarray(np.array(parts, np.uint32))
        places = iter(begins)

        def fetched(plane: Any) -> Any:
            if plane is None:
                return None
            begin = next(places)
            return staging.view(np.uint8)[begin : begin + plane.nbytes].view(plane.dtype).reshape(plane.shape)

        self.fetched = replace(
            experts,
            **{name: _with_planes(matrix, tuple(map(fetched, planes_of(matrix)))) for name, matrix in matrices.items()},
        )

    def _pinned(self) -> tuple[Any, Any]:
        try:
            source, host = self._backend.host_visible((self.nbytes // 4,), np.uint32)
        except OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the host has no {self.nbytes / 1e9:.2f} GB of memory to pin for a layer's experts: {error.args[0]}",
                parameter="cpu_experts",
                hint="use a smaller cpu_experts, or free some of the host's memory",
            ) from None
        return source, host.view(np.uint8)

    @property
    def token_bytes(self) -> int:
        """Bytes that a token's experts have."""
        return self.nbytes * self._used // self._experts

    def fetch(self, chosen: Any) -> None:
        """Copy the experts that rows have chosen, int32 (M, U)."""
        fetch_experts(chosen, self._source, self._staging, self._parts)

    def token_seconds(self) -> float:
        """Seconds to fetch a token's experts at the rate of all of them, measured now."""
        assert isinstance(self._backend, GPU)
        every = self._backend.asarray(np.arange(self._experts, dtype=np.int32)[None])
        return self._backend.seconds(lambda: self.fetch(every)) * self._used / self._experts


def _with_planes(matrix: Any, planes: tuple[Any, ...]) -> Any:
    return Packed(matrix.type, matrix.shape, *planes) if isinstance(matrix, Packed) else planes[0]
