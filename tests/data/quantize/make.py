"""What ggml-quants.c makes of some weights: make.py LLAMA_CPP, a checkout of llama.cpp; it needs gcc.

weights.npy: float16 (12, 2048), of a normal, a Laplacian and a uniform distribution, four rows each.
q4_k.npy, q5_k.npy, q6_k.npy: uint8 (12, row_bytes), by quantize_row_*_ref of llama.cpp 0c1e57098, which
llama-cpp-python 0.3.36 has.
"""

import ctypes
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

STUBS = """
void ggml_abort(const char *f, int l, const char *m, ...) { __builtin_trap(); }
unsigned long ggml_row_size(int t, long n) { __builtin_trap(); }
const char *ggml_type_name(int t) { return ""; }
unsigned long ggml_type_size(int t) { __builtin_trap(); }
"""
HERE = Path(__file__).parent
ggml = Path(sys.argv[1], "ggml")
rng = np.random.default_rng(21)
drawn = [rng.standard_normal((4, 2048)), rng.laplace(size=(4, 2048)), rng.uniform(-1, 1, (4, 2048))]
weights = (0.02 * np.concatenate(drawn)).astype(np.float16)
np.save(HERE / "weights.npy", weights)
rows = weights.astype(np.float32)
with tempfile.TemporaryDirectory() as scratch:
    stubs, library = Path(scratch, "stubs.c"), Path(scratch, "quants.so")
    stubs.write_text(STUBS)
    command = ["gcc", "-O2", "-ffp-contract=off", "-fPIC", "-shared", f"-I{ggml}/include", f"-I{ggml}/src"]
    subprocess.run([*command, ggml / "src/ggml-quants.c", stubs, "-o", library, "-lm"], check=True)
    quants = ctypes.CDLL(str(library))
    for name, size in (("q4_K", 144), ("q5_K", 176), ("q6_K", 210)):
        blocks = np.zeros((len(rows), rows.shape[1] // 256 * size), np.uint8)
        pointers = ctypes.c_void_p(rows.ctypes.data), ctypes.c_void_p(blocks.ctypes.data)
        getattr(quants, f"quantize_row_{name}_ref")(*pointers, ctypes.c_int64(rows.size))
        np.save(HERE / f"{name.lower()}.npy", blocks)
