"""The CPU harness of forge.devtools, for tests: what it compiles is kept in the repository's .harness."""

import os
from pathlib import Path

CACHE = Path(os.environ.setdefault("FORGE_HARNESS_CACHE", str(Path(__file__).parents[1] / ".harness")))

from forge.devtools.harness import COMPILER as COMPILER  # noqa: E402  (where it keeps things is said before)
from forge.devtools.harness import TILE_FAMILIES as TILE_FAMILIES  # noqa: E402
from forge.devtools.harness import TILES as TILES  # noqa: E402
from forge.devtools.harness import TOOLS as TOOLS  # noqa: E402
from forge.devtools.harness import Harness as Harness  # noqa: E402
from forge.devtools.harness import HarnessArray as HarnessArray  # noqa: E402
from forge.devtools.harness import alone as alone  # noqa: E402
from forge.devtools.harness import build as build  # noqa: E402
from forge.devtools.harness import compiled as compiled  # noqa: E402
from forge.devtools.harness import launch as launch  # noqa: E402

if COMPILER is None and os.environ.get("FORGE_REQUIRE_TOOLCHAIN"):
    raise RuntimeError("no clang++, and FORGE_REQUIRE_TOOLCHAIN is set: run scripts/install-toolchain")
