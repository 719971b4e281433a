"""Which kernel variants there are to compile: a model's, by recording its launches, and those of the ops' cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from forge import loading, models
from forge.backend import sources
from forge.checkpoints import open_checkpoint
from forge.config import EngineConfig
from forge.devtools.cases import all_cases
from forge.devtools.recorder import Recorder
from forge.devtools.usual import usual_models
from forge.devtools.verify import launch
from forge.formats.ggml import GGMLType
from forge.models.weights import Weights
from forge.ops.quant import Packed
from forge.planning import make_plan

_SETTINGS = EngineConfig(context=4096)
"""Settings of recorded models. Launches do not depend on the context, but tables of its positions take time."""


_FETCH = sources.Variant("expert_fetch", ())


def case_variants(arch: str = "", *, wgmma: bool = False) -> list[sources.Variant]:
    """Variants that the cases of all ops launch, by name.

    arch: The name of a GPU. wgmma: On a GPU that `has_wgmma`, which none of AMD's does.
    """
    device = Recorder(arch, has_wgmma=wgmma)
    launch(all_cases(), device)
    return device.variants


def model_variants(path: Path | None, arch: str, *, is_deterministic: bool = False) -> list[sources.Variant]:
    """Variants that a model's warm-up launches on an AMD GPU, by name; of experts behind them that of `cpu_experts`.

    Of the file only the header is read. Raises what `load` raises for a file.

    path: A GGUF file or a model's directory; None for usual models.
    arch: The name of a GPU, such as gfx1100. is_deterministic: As of `EngineConfig`.
    """
    device = Recorder(arch)
    record(path, device, replace(_SETTINGS, deterministic=is_deterministic))
    found = device.variants
    has_experts = any(variant.file == "route" for variant in found)
    return [*found, _FETCH] if has_experts else found


def record(path: Path | None, device: Recorder, settings: EngineConfig = _SETTINGS) -> None:
    """Note on a device what the warm-up of a model launches, or of each usual model where there is no path."""
    for opened in [open_checkpoint(path)] if path else usual_models():
        with opened as file:
            plan = make_plan(file, settings, device)
            config = models.read_config(file, plan.context)
            is_deterministic = settings.deterministic
            decoder = models.build(file, config, device, None, HeaderWeights, is_deterministic=is_deterministic)
            runner = loading.build_runner(decoder, plan, settings, device)
            runner.run_typical_steps(plan.max_step_tokens)


class HeaderWeights(Weights):
    """Weights by their shapes and types alone: nothing of them is read."""

    def _joined(self, kept: GGMLType, names: Sequence[str], count: int = 1, *, on_host: bool = False) -> Any:
        infos = [self.file.tensors[name] for name in names]
        shape = sum(prod(info.shape[:-1]) for info in infos), infos[0].shape[-1]
        if kept is GGMLType.F16:
            return self.backend.empty(shape, np.float16)
        return Packed.empty(kept, shape, self.backend)

    def _loaded(self, shapes: Mapping[str, tuple[int, ...]], factor: float) -> Any:
        (_, *dims), rows = next(iter(shapes.values())), sum(shape[0] for shape in shapes.values())
        return self.backend.empty((rows, *dims), np.float32)

    def _beside(self, shapes: Mapping[str, tuple[int, int]]) -> Any:
        return self.backend.empty((sum(map(prod, shapes.values())),), np.float32)
