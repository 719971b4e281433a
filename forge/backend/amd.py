"""AMD GPUs by the name their compiler gives them: which of them forge has kernels for, and what HIP says of them."""

from __future__ import annotations

import os
import re

_NAME = re.compile(r"gfx([0-9]{1,2})([0-9a-f])([0-9a-f])")
"""Version of the instruction set: major, minor, stepping. gfx90a is 9.0.10, gfx1151 is 11.5.1."""
_FEATURES = re.compile(r"(gfx9[0-9a-f]{2}|gfx101[0-9a-f])(:(sramecc|xnack)[+-])+")
_OLDEST = (9, 0)


def version(arch: str) -> tuple[int, int] | None:
    """Major and minor version of a GPU's instruction set; None where the name is no AMD GPU's."""
    match = _NAME.fullmatch(arch)
    return (int(match[1]), int(match[2], 16)) if match else None


def without_features(arch: str) -> str:
    """gfx90a of ``gfx90a:sramecc+:xnack-``, as HIP names one: code compiled without them runs whatever they are."""
    match = _FEATURES.fullmatch(arch)
    return match[1] if match else arch


def refusal(arch: str) -> str:
    """Why forge has no kernels for an AMD GPU, as a predicate of its name. "" where there are kernels, or may be."""
    is_old = (version(arch) or _OLDEST) < _OLDEST
    return "is older than gfx900 (Vega): forge has no kernels for it, and ROCm 7 no driver" if is_old else ""


def compute_units(arch: str, multiprocessors: int) -> int:
    """Compute units of a GPU that HIP says has so many multiprocessors.

    On RDNA HIP counts pairs of them (WGPs, ROCm/hip#3767) unless its variable GPU_ENABLE_WGP_MODE is 0. From gfx1250 on
    there are no pairs. Source: `rocsettings.cpp` of ROCm/rocm-systems.
    """
    counts_pairs = (10, 0) <= (version(arch) or (0, 0)) < (12, 5) and _wgp_mode()
    return multiprocessors * 2 if counts_pairs else multiprocessors


def wave_size(arch: str) -> int:
    """Threads of a wave: 64 on GCN and CDNA, 32 on RDNA and elsewhere."""
    return 64 if (version(arch) or (10, 0)) < (10, 0) else 32


def _wgp_mode() -> bool:
    """The variable as HIP reads it: "true", or a number that is not 0."""
    value = os.environ.get("GPU_ENABLE_WGP_MODE", "1")
    number = re.match(r"\s*[+-]?\d+", value)
    return value == "true" or bool(number and int(number[0]))
