"""Where forge keeps what it can make or fetch again."""

from __future__ import annotations

import os
from pathlib import Path

from forge.errors import DownloadError


def cache_dir() -> Path:
    """$FORGE_CACHE, else the user's cache directory for forge. Asking does not create it."""
    import platformdirs  # here, because `forge --help` needs no directory and no time

    chosen = os.environ.get("FORGE_CACHE")
    try:
        return Path(os.path.abspath(os.path.expanduser(chosen)) if chosen else platformdirs.user_cache_dir("forge"))
    except (OSError, RuntimeError) as error:  # no working directory, or no home
        raise DownloadError(f"no cache directory ({error}): set FORGE_CACHE to an absolute path") from None
