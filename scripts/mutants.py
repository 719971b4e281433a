#!/usr/bin/env python3
"""Plant faults in the kernels, one at a time, and say which test finds each: what lives needs a case.

scripts/mutants.py [PART ...] plants those of `mutants.txt` whose file or text holds one of the parts; it needs clang++.
A fault is a line `file.hip: name`, the text as it is behind `- `, and the text with the fault behind `+ `.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests" / "data" / "mutants.txt"
KERNELS = ROOT / "forge" / "raw_kernels"
PLACES = ("tests/kernels", "tests/ops/test_split_k.py", "tests/tuning/test_tuned.py")
"""Where tests run kernels on the harness."""
TESTS = {  # by kernel file: what names of these tests hold, the likeliest to find a fault first
    "activation": "act_and_mul-|gelu-|gelu_erf|xielu|as_operand|soft_cap|[add-|[add_and_scale|[sigmoid_gate",
    "attention_decode": "heads of|in_most_parts|adds_partials|page edges|window|splits|decode",
    "attention_prefill": "test_attention_prefill|prefill|mixed|paged_attention",
    "attention_wgmma": "attention_wgmma",
    "attention_split_kv": "deterministic,|launches|sequences",
    "embed": "embed|take_rows",
    "linear": "[linear-M|M70|M257",
    "logprobs": "logprobs",
    "lora": "[lora",
    "norm": "norm|order_that",
    "kv_cache": "copy_page|take_slots",
    "penalize": "penalize",
    "dequantize": "embed|M257|apart",
    "matvec_quant": "M1 K2048|T1 E2048|T1|M1 |stack|matvec_quant",
    "qkv": "clamp|rmsnorm_whole|rotate_heads",
    "per_layer": "[per_layer",
    "quantize": "[quantize",
    "include/quantize_formats": "[quantize",
    "include/quantize_lines": "[quantize-Q",
    "rope": "rope_append_kv|rope_queries|layernorm_heads",
    "sample": "[sample-|[argmax-|edge|test_ids|draw",
    "bfloat16": "bf16_to_f16",
    "decode_state": "decode_inputs|scatter|store_in_ring|copy_rows|clear|advance",
    "matmul_wgmma": "groups|matmul_wgmma|wave_groups|further_rows",
    "matmul_mma_quant": "each_format|Q6_K 16|groups",
    "matmul_wgmma_quant": "each_format|Q6_K 32|groups",
    "matmul_tma": "groups|matmul_tma",
    "matmul_wgmma_quant_many": "each_format|quant_many",
    "reorder_x": "each_format|quant_many|groups|experts_by_tiles_of_many",
    "split_k_reduce": "M40 K2552|M5 |M8 |T40|linear-glu|linear-|tile",
    "matmul": "M5 K1024|linear-M|linear-glu|linear-split-K|linear-|test_tiles|matmul",
    "matvec_f16": "linear-rms T1|linear-M1 |linear-rms glu silu T1|linear-rms|matvec_f16",
    "route": "route-",
    "expert_fetch": "fetch_experts",
    "route_rows": "route-|lists_the_tiles",
    "route_row": "route-",
    "include/router_weights": "route-",
    "expert_gate": "gate_rows",
    "expert_groups": "experts-T",
    "expert_act": "apart",
    "expert_mma_quant": "experts_by_tiles",
    "expert_wgmma_quant": "experts_by_tiles_of_many",
    "expert_up_quant": "experts-Q",
    "expert_down_quant": "experts-Q",
    "expert_up_f16": "experts-T4|experts-T1",
    "expert_down_f16": "experts-T4|experts-T1",
    "expert_matmul": "experts-T",
    "include/expert_activation": "experts-T",
    "include/expert_row": "experts-T1|experts-Q",
    "include/matmul_loop": "M5 K1024|linear-M|linear-glu|linear-split-K|linear-|test_tiles|matmul",
    "include/quant_digits": "M1 K2048|T1 E2048|T1|M1 |stack|matvec_quant",
    "include/device_functions": "chunks|by hand: far|norm-rms|gelu|logprobs|argmax|[sample-|linear-rms|linear-",
    "include/prefill_kv": "test_attention_prefill|prefill|mixed|paged_attention",
    "include/prefill_softmax": "test_attention_prefill|prefill|mixed|paged_attention",
    "include/decode_kv": "heads of|in_most_parts|page edges|window|splits|decode",
    "include/decode_heads": "heads of|adds_partials|page edges|window|splits|decode",
    "include/decode_softmax": "heads of|in_most_parts|page edges|window|splits|decode",
    "include/decode_merge": "heads of|in_most_parts|page edges|window|splits|decode",
    "include/sample_state": "[sample-|[argmax-|edge|test_ids|draw",
    "include/sample_limits": "[sample-|edge|test_ids|draw",
    "include/sample_cut": "[sample-|edge|test_ids|draw",
    "include/sample_math": "[sample-|edge|draw|test_ids",
    "include/sample_bins": "[sample-|[argmax-|edge|test_ids|draw",
    "include/rope_pairs": "rope_append_kv|decode_attention",
    "include/quant_blocks": "embed|linear-rms Q|linear-rms I|linear-",
    "include/codebooks": "embed|linear-IQ",
    "include/matmul_epilogue": "linear-M2 K96|linear-M|orders_that|linear-glu|linear-split-K|test_tiles|further_rows",
    "include/matvec_row": "linear-rms|linear-M1 |vector",
    "include/tile_mma": "test_tiles|test_attention_prefill|linear-M",
    "include/tile_mfma": "test_tiles|test_attention_prefill|linear-M",
    "include/tile_wmma": "test_tiles|test_attention_prefill",
    "include/tile_scalar": "test_tiles|test_attention_prefill",
    "include/x_order": "order_that|orders_that|each_format",
    "include/quant_roles": "each_format|quant_many|experts_by_tiles_of_many",
    "include/mma_quant": "each_format|Q6_K 16|experts_by_tiles|groups",
    "include/quant_lines": "each_format|Q6_K 32|groups",
    "include/tile_lines": "groups|attention_wgmma",
    "include/tile_phases": "wait_for_each_other|attention_wgmma",
    "include/tile_bits": "groups|each_format",
    "include/tile_wgmma": "groups|matmul_wgmma|matmul_tma",
    "include/tile_wgmma_wide": "behind_the_wait|attention_wgmma",
}


@dataclass(frozen=True)
class Fault:
    file: str
    name: str
    old: str
    new: str


def read_faults() -> Iterator[Fault]:
    for text in FAULTS.read_text().strip().split("\n\n"):
        head, *lines = text.split("\n")
        file, _, name = head.partition(": ")
        old, new = ("\n".join(line[2:] for line in lines if line[0] == sign) for sign in "-+")
        yield Fault(file.removesuffix(".hip"), name, old, new)


class Planter:
    """A plugin of pytest's: for each fault a child process runs the tests of its file, the quick ones first, up to the
    first that fails."""

    def __init__(self, faults: list[Fault]) -> None:
        self.faults, self.living, self.failed = faults, 0, ""

    def pytest_runtestloop(self, session: Any) -> bool:
        for fault in self.faults:
            start = time.monotonic()
            read_end, write_end = os.pipe()
            if not os.fork():
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # no dots
                os.write(write_end, self._found_by(fault, session).encode())
                os._exit(0)
            os.close(write_end)
            with open(read_end) as pipe:
                found = pipe.read()
            os.wait()
            self.living += not found
            seconds = time.monotonic() - start
            print(f"{fault.file}.hip: {fault.name} | {found or 'LIVES'} | {seconds:.0f} s", flush=True)
        print(f"{len(self.faults)} faults, {self.living} live")
        return True

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = report.nodeid.partition("::")[2]

    def _found_by(self, fault: Fault, session: Any) -> str:
        """The test that fails with the fault planted, or ""; the process is of no more use afterwards."""
        from forge.backend import sources

        with tempfile.TemporaryDirectory() as directory:
            sources._DIRECTORY = Path(directory) / "raw_kernels"
            shutil.copytree(KERNELS, sources._DIRECTORY)
            path = sources._DIRECTORY / f"{fault.file}.hip"
            text = path.read_text()
            if text.count(fault.old) != 1:
                return f"STALE: the text is there {text.count(fault.old)} times"
            path.write_text(text.replace(fault.old, fault.new))
            items, session.items = session.items, []  # too few for kernels to be compiled ahead
            parts = TESTS[fault.file].split("|")
            chosen = [item for item in items if any(part in item.nodeid for part in parts)]
            chosen.sort(key=lambda item: next(n for n, part in enumerate(parts) if part in item.nodeid))
            chosen.sort(key=lambda item: item.get_closest_marker("slow") is not None)
            for item in chosen:
                if not self.failed:
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        return self.failed


def main() -> int:
    os.chdir(ROOT)
    faults = [fault for fault in read_faults() if not sys.argv[1:] or any(p in str(fault) for p in sys.argv[1:])]
    planter = Planter(faults)
    pytest.main(["-q", "-s", "-p", "no:cacheprovider", *PLACES], plugins=[planter])
    return 1 if planter.living else 0


if __name__ == "__main__":
    raise SystemExit(main())
