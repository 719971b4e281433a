"""What tells a model from others, so that what one has computed is not taken for another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from hashlib import sha256

import numpy as np

from forge.config import ModelConfig
from forge.formats.checkpoint import Checkpoint
from forge.models.adapters import Adapter


def fingerprints(file: Checkpoint, config: ModelConfig, adapters: Mapping[str, Adapter]) -> dict[str | None, str]:
    """A hash of the model alone, under None, and of the model with each adapter, by its name.

    It covers the numbers of the configuration, the names, shapes and types of all tensors, and of the weights those
    that are cheap to read: tensors of one dimension that lie in the file as they are, such as the norms', and of
    matrices the first row. So a fine-tune of a model has another hash, if it has changed a norm or a first row. Of an
    adapter it covers all numbers.
    """
    base = sha256(json.dumps(asdict(config), sort_keys=True).encode())
    table = sorted((info.name, info.shape, int(info.type)) for info in file.tensors.values())
    base.update(json.dumps(table).encode())
    for name, info in sorted(file.tensors.items()):
        if info.offset:  # else it is put together, perhaps of all that a matrix has
            base.update(file.raw(name, slice(0, 1)).tobytes())
    found: dict[str | None, str] = {None: base.hexdigest()}
    for name, adapter in adapters.items():
        digest = sha256(base.digest())
        for tensor, pair in sorted(adapter.pairs.items()):
            digest.update(json.dumps([tensor, pair.a.shape, pair.b.shape, pair.scale]).encode())
            digest.update(np.ascontiguousarray(pair.a).data)
            digest.update(np.ascontiguousarray(pair.b).data)
        found[name] = digest.hexdigest()
    return found
