"""The faults that scripts/mutants.py plants are faults of the kernels as they are."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def mutants(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("mutants")


def test_each_fault_is_in_one_place_of_its_file(mutants: ModuleType) -> None:
    faults = list(mutants.read_faults())
    assert len(faults) > 100
    for fault in faults:
        text = (mutants.KERNELS / f"{fault.file}.hip").read_text()
        assert text.count(fault.old) == 1, f"{fault.file}.hip: {fault.name}: {fault.old}"
        assert fault.new != fault.old


def test_each_kernel_file_has_faults_and_tests(mutants: ModuleType) -> None:
    files = {str(path.relative_to(mutants.KERNELS).with_suffix("")) for path in mutants.KERNELS.rglob("*.hip")}
    # The contract and the tiles' interface hold no code, and only the harness' own implementation runs in the tests.
    files = {name for name in files if not re.match(r"include/(prelude|tile$|platform_)", name)}
    assert all((ROOT / place).exists() for place in mutants.PLACES)
    assert mutants.TESTS.keys() == files == {fault.file for fault in mutants.read_faults()}
