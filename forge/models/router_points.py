"""A router's choice where hooks look at it: logits, which kernels keep to themselves, are computed on the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from forge.backend import Backend, backend_of
from forge.models.hooks import Points
from forge.ops.experts import Router, chosen_by, route, router_logits
from forge.ops.norm import Normed, norm


def seen_choice(read: Any, router: Router, how: dict[str, str], points: Points) -> tuple[Any, Any]:
    """Experts and their weights (T, U). The op chooses, unless a hook has changed what it reads or its logits.

    read: Rows with nothing pending, or an array (T, E) that stands for them. how: Options of the op `route`.
    """
    backend = backend_of(router.weight)
    scores, weighed = how["scores"], how["weights"]
    is_known = isinstance(read, Normed)
    chosen, weights = route(read, router, **{**how, "tiles": "never"}) if is_known else (None, None)
    if points.wants("router") or not is_known:
        on_host = _on_host(router, backend)
        x = backend.to_numpy(norm(read, out="f32") if is_known else read)
        logits = backend.asarray(router_logits(np.asarray(x, np.float32), on_host))
        found = points.at("router", logits)
        if found is not logits or not is_known:
            made = chosen_by(backend.to_numpy(found), on_host, scores, weighed)
            chosen, weights = backend.asarray(made[0], np.int32), backend.asarray(made[1], np.float32)
    return points.at("experts", chosen), points.at("expert_weights", weights)


def _on_host(router: Router, backend: Backend) -> Router:
    names = ("weight", "bias", "selection_bias", "expert_scale")
    arrays = {name: array for name in names if (array := getattr(router, name)) is not None}
    on_host: dict[str, Any] = {name: backend.to_numpy(array) for name, array in arrays.items()}
    return replace(router, **on_host)


def gate_of(h: Any, x: Any, gate: Any) -> Any:
    """h (T, F) * sigmoid(x @ gate) of rows x (T, E) that a hook has made."""
    backend = backend_of(h)
    rows = np.asarray(backend.to_numpy(x), np.float32)
    with np.errstate(over="ignore"):
        factors: npt.NDArray[np.float32] = 1 / (1 + np.exp(-(rows @ backend.to_numpy(gate))))
    return h * backend.asarray(factors[:, None], h.dtype)
