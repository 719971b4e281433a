"""Who imports whom: the direction of ARCHITECTURE.md, read from the source."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from source_trees import tree_of

ROOT = Path(__file__).parents[1]

# Each room may import those before it.
CHAIN = [
    *("errors", "keywords", "config", "_files", "tuning", "backend", "ops", "state", "models", "engine", "hooks"),
    *("outputs", "runtime", "llm", "planning", "loading", "memory"),
]
# Rooms beside the chain, with what they may import.
BESIDE = {
    "display": "errors config",
    "formats": "errors config",
    "checkpoints": "errors keywords config _files display formats tokenizer hub backend ops models",
    "tokenizer": "errors keywords config",
    "hub": "errors config _files",
    "devtools": "errors config _files checkpoints formats tuning backend ops state models engine planning loading",
    "lab": "errors config backend devtools ops tuning",
    "contrib": "errors keywords tokenizer ops.philox llm loading",
    "viz": "errors keywords display engine hooks runtime llm",
    "server": "forge errors config display engine outputs runtime llm loading tokenizer",
    "cli": f"forge server display checkpoints formats tokenizer hub devtools {' '.join(CHAIN)}",
    "__main__": "cli",
    "__init__": "",  # names types for type checkers, and imports when a name is first used
}
# What rooms of the chain read beside it.
ALSO = {
    "tuning": "formats.ggml",
    "ops": "formats.ggml formats.quantize",
    "models": "formats",
    "hooks": "formats",
    "runtime": "display formats.safetensors formats.safetensors_writer tokenizer",
    "outputs": "display",
    "llm": "display tokenizer",
    "planning": "formats",
    "loading": "checkpoints display formats tokenizer hub",
    "memory": "checkpoints display formats",
}
ALLOWED = {room: [*CHAIN[:place], *ALSO.get(room, "").split()] for place, room in enumerate(CHAIN)}
ALLOWED |= {room: names.split() for room, names in BESIDE.items()}

# Packages that are not Python's own, and the modules that may import them.
# Not on NumPy's list: settings, downloads, and the part of the engine that holds integers and no arrays.
THIRD_PARTY = {
    "IPython": "display lab.magics",  # only where it runs already
    "cupy": "backend.cupy backend.cupy_blas backend.cupy_driver backend.cupy_memory backend.cupy_modules "
    "backend.cupy_plans backend.cupy_steps backend.cupy_trace",
    "cupy_backends": "backend.cupy backend.cupy_blas backend.cupy_driver backend.cupy_modules backend.cupy_plans",
    "fastapi": "server",
    "gguf": "formats.ggml",
    "httpx2": "hub",
    "h11": "server",
    "huggingface_hub": "hub",
    "lm_eval": "contrib.lm_eval",  # of the extra `lm-eval`
    "jinja2": "tokenizer",
    "numpy": "backend ops models engine.batch engine.pipeline engine.model_runner engine.processors "
    "engine.request_table engine.sampler engine.hooked engine.recorded_hooks engine.stored_pages hooks "
    "runtime.hooks_front runtime.likelihoods runtime.prompts runtime.scoring runtime.scoring_front "
    "runtime.state_files runtime.states runtime.unembedding "
    "formats checkpoints tokenizer devtools contrib viz cli",
    "matplotlib": "viz",  # of the extra `viz`
    "platformdirs": "_files",
    "prompt_toolkit": "cli.chat",
    "prometheus_client": "server",
    "psutil": "backend",
    "pydantic": "server",
    "rich": "cli display",
    "threadpoolctl": "backend",
    "tokenizers": "tokenizer",
    "tqdm": "contrib.lm_eval",  # the harness'
    "starlette": "server",
    "typer": "cli",
    "uvicorn": "server",
}
# The part of the engine that holds integers: the model runner is its only way to a device.
WITHOUT_A_DEVICE = ("engine.engine", "engine.scheduler", "engine.passes", "engine.sequence", "engine.page_pool")
DEVICE = [
    *("backend", "ops", "models", "numpy", "cupy", "engine.batch", "engine.pipeline", "engine.graph_cache"),
    *("engine.processors", "engine.request_table", "engine.sampler"),
    *("state.model_state", "state.paged_kv", "state.window_kv"),
]
NOT_CODE = {
    "py.typed",
    "devtools/harness/runtime.cpp",
    "server/chat_page.html",
    *(str(path.relative_to(ROOT / "forge")) for path in (ROOT / "forge/raw_kernels").rglob("*.hip")),
}


def breaches(root: Path) -> list[str]:
    """What in root/forge breaks the rules, one line each."""
    files = [
        path.relative_to(root / "forge")
        for path in sorted((root / "forge").rglob("*"))
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in path.parts)
    ]
    modules = {module_name(path): path for path in files if path.suffix == ".py"}
    found = [f"forge/{path}: no rule covers this file" for path in files if not has_rule(path)]
    for module, path in modules.items():
        room = module.partition(".")[0]
        for line, target in imports(root / "forge" / path, module, set(modules)):
            if room in ALLOWED and not is_allowed(module, room, target):
                found.append(f"forge/{path}:{line}: {room} may not import {target}")
            elif module in WITHOUT_A_DEVICE and is_within(target.removeprefix("forge."), DEVICE):
                found.append(f"forge/{path}:{line}: {module} may not import {target}")
    return found


def module_name(path: Path) -> str:
    """Of a file within forge/: "llm", "cli.chat", "cli" for its __init__.py."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def has_rule(path: Path) -> bool:
    return module_name(path).partition(".")[0] in ALLOWED if path.suffix == ".py" else str(path) in NOT_CODE


def imports(path: Path, module: str, modules: set[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute name of every module imported anywhere in a file, within functions and for types alone, too."""
    package = "forge" if module == "__init__" else f"forge.{module}"
    if path.name != "__init__.py":
        package = package.rpartition(".")[0]
    for node in importing(path.read_text(encoding="utf-8"), is_door=module == "__init__"):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:  # a module of the package, or a name that the package holds
                whole = f"{base}.{alias.name}"
                yield node.lineno, whole if whole.removeprefix("forge.") in modules else base
        else:
            name = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else None
            yield node.lineno, name if isinstance(name, str) else "a module by a computed name"


@cache
def importing(text: str, *, is_door: bool) -> list[ast.Import | ast.ImportFrom | ast.Call]:
    """Statements and calls that import something; in forge/__init__.py those that run when forge is imported."""
    statements = [node for node in tree_of(text).body if not (is_door and is_for_type_checkers(node))]
    kinds = (ast.Import, ast.ImportFrom) if is_door else (ast.Import, ast.ImportFrom, ast.Call)
    return [
        node
        for statement in statements
        for node in ast.walk(statement)
        if isinstance(node, kinds)
        if not isinstance(node, ast.Call) or called(node) in ("import_module", "__import__")
    ]


def is_for_type_checkers(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def is_allowed(module: str, room: str, target: str) -> bool:
    top = target.partition(".")[0]
    if top != "forge":
        return top in sys.stdlib_module_names or is_within(module, THIRD_PARTY.get(top, "").split())
    return is_within(target.removeprefix("forge."), [room, *ALLOWED[room]])


def is_within(name: str, rooms: list[str]) -> bool:
    return any(name == room or name.startswith(f"{room}.") for room in rooms)


def cycle(root: Path) -> list[str]:
    """Modules of root/forge of which each imports the next, and the last the first; imports for types alone count."""
    paths = {module_name(path.relative_to(root / "forge")): path for path in (root / "forge").rglob("*.py")}
    imported = {
        module: {target.removeprefix("forge.") for _, target in imports(path, module, set(paths))} - {module}
        for module, path in paths.items()
    }
    while ends := {module for module, targets in imported.items() if not targets & imported.keys()}:
        imported = {
            module: targets & imported.keys() - ends for module, targets in imported.items() if module not in ends
        }
    walk = list(imported)[:1]  # each that is left imports another that is left
    while walk:
        following = min(imported[walk[-1]])
        if following in walk:
            return walk[walk.index(following) :]
        walk.append(following)
    return []


def test_imports_point_one_way() -> None:
    assert breaches(ROOT) == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert cycle(ROOT) == []


def test_every_rule_has_a_file() -> None:
    rooms = {path.stem if path.suffix == ".py" else path.name for path in (ROOT / "forge").iterdir()}
    assert set(ALLOWED) <= rooms


def test_dependencies_are_the_packages_that_are_imported() -> None:
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    listed = {re.split(r"[^\w-]", text)[0].replace("-", "_") for text in dependencies}
    imported = {
        target.partition(".")[0]
        for path in (ROOT / "forge").rglob("*.py")
        for _, target in imports(path, module_name(path.relative_to(ROOT / "forge")), set())
    }
    extras = {"IPython", "matplotlib", "lm_eval", "tqdm", "cupy", "cupy_backends"}
    extras |= {"fastapi", "h11", "prometheus_client", "pydantic", "starlette", "uvicorn"}  # of the extra `serve`
    assert listed == imported & set(THIRD_PARTY) - extras


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / "forge" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path) -> None:
    files = {
        "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from forge.llm import LLM\n",
        "py.typed": "",
        "errors.py": "",
        "config.py": "from forge.errors import ForgeError",
        "backend/__init__.py": "import numpy as np\nfrom forge.backend import cupy",
        "backend/cupy.py": "import cupy",
        "formats/ggml.py": "from ..errors import FormatError",
        "ops/quant.py": "import os.path\nfrom forge.formats import ggml",
        "engine/scheduler.py": "from .page_pool import PagePool",
        "engine/page_pool.py": "",
        "llm.py": "def f():\n    from forge.tokenizer import Tokenizer",
        "cli/app.py": "import typer\nimport forge\nfrom forge import __version__",
    }
    assert breaches(tree(tmp_path, files)) == []


def test_a_cycle_within_a_package_is_found(tmp_path: Path) -> None:
    files = {
        "ops/__init__.py": "from forge.ops import norm",
        "ops/a.py": "from forge.ops.b import x",
        "ops/b.py": "def f():\n    from forge.ops import c",
        "ops/c.py": "if TYPE_CHECKING:\n    from forge.ops.b import x",
        "ops/norm.py": "import forge.ops.a",
    }
    assert sorted(cycle(tree(tmp_path, files))) == ["ops.b", "ops.c"]
    (tmp_path / "forge/ops/c.py").write_text("")
    assert cycle(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "source", "message"),
    [
        ("errors.py", "import forge.config", ":1: errors may not import forge.config"),
        ("config.py", "from forge.backend import select", ":1: config may not import forge.backend"),
        ("ops/norm.py", "\nfrom forge.models import Linear", ":2: ops may not import forge.models"),
        ("models/arch.py", "def f():\n    from forge import engine", ":2: models may not import forge.engine"),
        ("models/arch.py", "from ..engine import x", ":1: models may not import forge.engine"),
        ("models/arch.py", "from .. import engine", ":1: models may not import forge.engine"),
        (
            "state/paged_kv.py",
            "if TYPE_CHECKING:\n    from forge.models import D",
            ":2: state may not import forge.models",
        ),
        ("state/paged_kv.py", "import forge", ":1: state may not import forge"),
        ("state/paged_kv.py", "from forge import load", ":1: state may not import forge"),
        ("ops/quant.py", "from forge.formats import gguf", ":1: ops may not import forge.formats.gguf"),
        ("ops/quant.py", "from forge.formats.gguf import read", ":1: ops may not import forge.formats.gguf"),
        ("formats/gguf.py", "from forge.tokenizer import T", ":1: formats may not import forge.tokenizer"),
        ("tokenizer/spm.py", "import forge.formats.gguf", ":1: tokenizer may not import forge.formats.gguf"),
        ("hub/cache.py", "import numpy", ":1: hub may not import numpy"),
        ("llm.py", "from forge.hub import pull", ":1: llm may not import forge.hub"),
        ("loading.py", "from forge.cli import output", ":1: loading may not import forge.cli"),
        ("loading.py", "import rich.console", ":1: loading may not import rich.console"),
        ("backend/numpy.py", "def f():\n    import cupy", ":2: backend may not import cupy"),
        ("cli/doctor.py", "import importlib\nimportlib.import_module('cupy.cuda')", ":2: cli may not import cupy.cuda"),
        ("cli/doctor.py", "__import__(name)", ":1: cli may not import a module by a computed name"),
        ("engine/scheduler.py", "import numpy as np", ":1: engine may not import numpy"),
        (
            "engine/engine.py",
            "from forge.models.decoder import Hook",
            ":1: engine.engine may not import forge.models.decoder",
        ),
        ("engine/scheduler.py", "import forge.backend", ":1: engine.scheduler may not import forge.backend"),
        ("engine/engine.py", "from forge.engine import batch", ":1: engine.engine may not import forge.engine.batch"),
        ("state/paged_kv.py", "import torch", ":1: state may not import torch"),
        ("__init__.py", "from forge.llm import LLM", ":1: __init__ may not import forge.llm"),
        ("__init__.py", "import numpy", ":1: __init__ may not import numpy"),
        ("helpers.py", "", ": no rule covers this file"),
        ("utils/text.py", "", ": no rule covers this file"),
        ("ops/norm.bin", "", ": no rule covers this file"),
    ],
)
def test_a_breach_is_found(tmp_path: Path, name: str, source: str, message: str) -> None:
    others = ["engine/__init__.py", "engine/batch.py", "models/__init__.py", "models/decoder.py"]
    others += ["formats/__init__.py", "formats/gguf.py", "ops/__init__.py"]
    assert breaches(tree(tmp_path, dict.fromkeys(others, "") | {name: source})) == [f"forge/{name}{message}"]
