"""A headless Chromium, and the chat page in it."""

from __future__ import annotations

import importlib.util
import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_missing = [
    *(["the package playwright"] if not importlib.util.find_spec("playwright") else []),
    *(["a Chromium: run scripts/install-browser"] if not CHROMIUM else []),
]
if _missing and os.environ.get("FORGE_REQUIRE_BROWSER"):
    raise RuntimeError(f"FORGE_REQUIRE_BROWSER is set, and there is no {_missing[0]}")

needs_browser = pytest.mark.skipif(bool(_missing), reason=f"no {_missing[0]}" if _missing else "")
