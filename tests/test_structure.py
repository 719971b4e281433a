"""How large rooms, files and functions of forge may be: a reader holds each in the head, and finds it by its name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from source_trees import tree_of

FORGE = Path(__file__).parents[1] / "forge"
MAX_ROOMS = 36
MAX_FILE_LINES = 350
MAX_FUNCTION_LINES = 80
MAX_HIP_FUNCTION_LINES = 120

# What is larger for now, with the part of issue 17 that makes it smaller. A line that nothing needs fails.
EXCEPTIONS = {}


def rooms(forge: Path) -> set[str]:
    """Modules and packages directly in forge/, and the packages directly in these; `__init__` and `__main__` are doors.

    Modules of a package are its files, which a reader of the room finds by their names.
    """
    packages = {path for path in forge.iterdir() if is_package(path)}
    within = {path for package in packages for path in package.iterdir() if is_package(path)}
    modules = {path for path in forge.glob("*.py") if not path.stem.startswith("__")}
    return {str(path.relative_to(forge)) for path in packages | within | modules}


def is_package(path: Path) -> bool:
    return path.is_dir() and path.name != "__pycache__" and any(path.rglob("*.*"))


def too_large(forge: Path) -> dict[str, str]:
    """By file or `file: function`: how many lines it has, and how many it may have."""
    found = {}
    for path in sorted(forge.rglob("*.py")):
        name, text = str(path.relative_to(forge)), path.read_text(encoding="utf-8")
        sizes = [(name, len(text.splitlines()), MAX_FILE_LINES)]
        sizes += [(f"{name}: {function}", lines, MAX_FUNCTION_LINES) for function, lines in python_functions(text)]
        found |= {where: f"{lines} lines, at most {most}" for where, lines, most in sizes if lines > most}
    for path in sorted(forge.rglob("*.hip")):
        for function, lines in hip_functions(path.read_text(encoding="utf-8")):
            if lines > MAX_HIP_FUNCTION_LINES:
                found[f"{path.relative_to(forge)}: {function}"] = f"{lines} lines, at most {MAX_HIP_FUNCTION_LINES}"
    return found


def python_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and lines, from `def` to the last line of the body; decorators are not counted, docstrings are."""
    for node in ast.walk(tree_of(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno
            yield node.name, node.end_lineno - node.lineno + 1


def hip_functions(text: str) -> Iterator[tuple[str, int]]:
    """Name and lines, from the first line of the signature to the closing brace. Macros are no functions."""
    not_code = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*"
    code = re.sub(not_code, lambda match: re.sub(r"[^\n]", " ", match[0]), text, flags=re.MULTILINE | re.DOTALL)
    blocks: list[tuple[str, int]] = []  # that are open: the function, or "", and where its signature begins
    start = 0
    for match in re.finditer(r"[{};]", code):
        before = code[start : match.start()]
        start = match.end()
        if match[0] == "{":
            is_function = re.search(r"\)\s*(const\s*)?$", before) and not any(name for name, _ in blocks)
            called = re.search(r"(\w+)\s*\(", re.sub(r"KERNEL\([^)]*\)", "", before)) if is_function else None
            blocks.append((called[1] if called else "", match.start() - len(before.lstrip())))
        elif match[0] == "}":
            name, first = blocks.pop()
            if name:
                yield name, code.count("\n", first, match.end()) + 1
    assert not blocks, "a brace is not closed"


def test_there_are_few_rooms() -> None:
    assert len(rooms(FORGE)) <= MAX_ROOMS, sorted(rooms(FORGE))


def test_files_and_functions_are_short() -> None:
    found = too_large(FORGE)
    assert {name: found[name] for name in found.keys() - EXCEPTIONS} == {}
    assert EXCEPTIONS.keys() - found.keys() == set(), "these are small enough now: delete their lines from EXCEPTIONS"


def test_rooms_are_two_levels_of_packages_and_one_of_modules(tmp_path: Path) -> None:
    for name in ("__init__", "__main__", "llm", "cli/__init__", "cli/bench", "cli/chat/__init__", "cli/chat/deep/a"):
        (tmp_path / f"{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.py").touch()
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "left_over").mkdir()
    assert rooms(tmp_path) == {"llm.py", "cli", "cli/chat"}


HIP = """
#define EACH(n) { \\
    n; }
struct Numbers { float v[4]; };
template <u32 N>
DEVICE float sum(Numbers x) { // }
    return x.v[0] + f("}");
}
KERNEL(THREADS) add(
    const float *x, // (T, E)
    float *y) {
    if (x[0] > 0) {
        y[0] = x[0];
    }
}
"""


def test_functions_of_hip_are_counted() -> None:
    assert list(hip_functions(HIP)) == [("sum", 4), ("add", 7)]


@pytest.mark.parametrize(("lines", "is_found"), [(80, False), (81, True)])
def test_a_long_function_is_found(tmp_path: Path, lines: int, is_found: bool) -> None:
    body = "\n".join(f"        x = {i}" for i in range(lines - 1))
    (tmp_path / "a.py").write_text(f"class A:\n    @property\n    def f(self):\n{body}\n")
    assert too_large(tmp_path) == ({"a.py: f": f"{lines} lines, at most 80"} if is_found else {})


def test_a_long_file_and_a_long_kernel_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n" * 351)
    (tmp_path / "a.hip").write_text("KERNEL(64) f() {" + "\n" * 120 + "}\n")
    assert too_large(tmp_path) == {"a.py": "351 lines, at most 350", "a.hip: f": "121 lines, at most 120"}


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names alone: the second of a name would end the whole run."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
