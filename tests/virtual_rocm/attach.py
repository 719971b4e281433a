"""Puts the virtual GPU into this process; `site/sitecustomize.py` imports it before anything else."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
from pathlib import Path

from virtual_rocm import blas, rtc, runtime
from virtual_rocm.libraries import Loaded

loaded = Loaded(Path(os.environ["LD_LIBRARY_PATH"]))
loaded.provide({**runtime.functions(), **rtc.functions(), **blas.functions()})
runtime.DEVICE.missing = lambda: loaded.last_missing
atexit.register(loaded.end)
_PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # no virtual machine outlives who started it
