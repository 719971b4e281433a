"""What `import forge` offers, and what it costs."""

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from source_trees import tree_of

import forge
from forge import errors, lab, viz
from forge.cli.app import app
from forge.hub import MODELS
from forge.keywords import RENAMED
from forge.models.arch import ARCHS
from forge.ops.op import REGISTRY

FORGE = Path(forge.__file__).parent
HEAVY = ["numpy", "tokenizers", "jinja2", "huggingface_hub", "gguf", "psutil", "rich", "cupy"]
ERRORS = [value for value in vars(errors).values() if inspect.isclass(value)]


def modules() -> list[ModuleType]:
    not_here = [] if importlib.util.find_spec("lm_eval") else ["forge.contrib.lm_eval"]
    names = [
        info.name
        for info in pkgutil.walk_packages(forge.__path__, "forge.")
        if not info.name.endswith("__main__") and not info.name.startswith(("forge.backend.cupy", *not_here))
    ]
    return [forge, *map(importlib.import_module, names)]


def public_objects() -> dict[str, Any]:
    """Public modules' public classes and functions, and the public methods and properties of those classes."""
    found: dict[str, Any] = {}
    for module in modules():
        if "._" in module.__name__:
            continue
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value) or inspect.isfunction(value):
                found[f"{module.__name__}.{name}"] = value
    return found


def loaded_after(statement: str) -> set[str]:
    """The heavy packages that a fresh interpreter has loaded after a statement."""
    code = f"import json, sys\n{statement}\nprint(json.dumps(sorted(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    loaded = {name.partition(".")[0] for name in json.loads(output.splitlines()[-1])}
    return loaded & set(HEAVY)


def test_all_is_what_type_checkers_see() -> None:
    """The lazy names, `__all__` and the imports under TYPE_CHECKING are written by hand: they must agree."""
    tree = ast.parse(inspect.getsource(forge))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [(node.module, a.name) for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names]
    typed = {name: module for module, name in imports if name != "*"} | dict.fromkeys(errors.__all__, "forge.errors")
    assert ("forge.errors", "*") in imports
    assert typed == forge._HOME_OF
    assert sorted(typed) == sorted(forge.__all__)
    assert len(set(forge.__all__)) == len(forge.__all__)


def test_every_public_name_is_the_object_of_its_module() -> None:
    for name in forge.__all__:
        home = importlib.import_module(forge._HOME_OF[name])
        assert getattr(forge, name) is getattr(home, name)
        assert name in dir(forge)


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="no attribute 'laod'"):
        forge.laod  # noqa: B018


def test_a_packages_all_names_what_it_has() -> None:
    named = [(module, name) for module in modules() for name in getattr(module, "__all__", ())]
    assert [f"{module.__name__}.{name}" for module, name in named if not hasattr(module, name)] == []


def has_docstring(value: Any) -> bool:
    text = inspect.getdoc(value) or ""
    return bool(text) and not text.startswith(f"{getattr(value, '__name__', None)}(")  # what dataclasses make up


def test_every_module_class_and_function_has_a_docstring() -> None:
    documented = {module.__name__: module for module in modules()} | public_objects()
    assert {"forge", "forge.loading.load", "forge.llm.LLM"} <= set(documented)
    assert [name for name, value in documented.items() if not has_docstring(value)] == []


def test_every_op_has_a_docstring() -> None:
    assert "norm" in REGISTRY
    assert [name for name, op in REGISTRY.items() if not has_docstring(op.reference)] == []


def test_every_method_of_the_public_classes_has_a_docstring() -> None:
    classes = [getattr(forge, name) for name in forge.__all__ if inspect.isclass(getattr(forge, name))]
    missing = [
        f"{cls.__name__}.{name}"
        for cls in classes
        for base in cls.__mro__
        if base.__module__.startswith("forge")
        for name, value in vars(base).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property | classmethod))
        if not has_docstring(value)
    ]
    assert missing == []


@pytest.mark.parametrize("name", [n for n in forge.__all__ if dataclasses.is_dataclass(getattr(forge, n))])
def test_help_explains_every_field_of_a_public_dataclass(name: str) -> None:
    """`help()` shows a class's docstring, not strings under its fields."""
    described = dict(re.findall(r"^    (\w+): (\S.*)$", inspect.getdoc(getattr(forge, name)) or "", re.MULTILINE))
    assert list(described) == [field.name for field in dataclasses.fields(getattr(forge, name))]


@pytest.mark.parametrize("error", ERRORS)
def test_every_error_is_a_public_forge_error(error: type[Exception]) -> None:
    assert issubclass(error, forge.ForgeError)
    assert error.__name__ in forge.__all__
    assert error.__doc__


def test_every_public_module_lists_what_it_offers() -> None:
    """docs/api.md names the public modules; every other one is internal by that statement."""
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    statement = page[: page.index("```")]
    assert re.findall(r"`(forge(?:\.\w+)*)`", statement) == [
        "forge",
        "forge.errors",
        "forge.lab",
        "forge.viz",
        "forge.contrib",
    ]
    assert sorted(errors.__all__) == sorted(error.__name__ for error in ERRORS)
    assert set(errors.__all__) < set(forge.__all__)
    assert list(errors.__all__) == sorted(errors.__all__)


def test_the_api_reference_holds_every_public_name_and_no_other() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    documented = re.findall(r"^\.\. auto(?:function|class):: (\w+)$", page, re.MULTILINE)
    modules = re.findall(r"^\.\. automodule:: (\S+)$", page, re.MULTILINE)
    assert modules == ["forge.errors"]
    assert sorted([*documented, *errors.__all__]) == sorted(forge.__all__)
    of_the_lab = re.findall(r"^\.\. auto(?:function|class):: forge\.lab\.(\w+)$", page, re.MULTILINE)
    assert {*of_the_lab, "load_ipython_extension", "unload_ipython_extension"} == set(lab.__all__)  # IPython calls two
    of_pictures = re.findall(r"^\.\. auto(?:function|class):: forge\.viz\.(\w+)$", page, re.MULTILINE)
    assert sorted(of_pictures) == sorted(viz.__all__)


def test_the_table_of_former_names_is_the_one_that_works() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
    assert dict(re.findall(r"^\| `(\w+)` of .* \| `(\w+)` \|$", page, re.MULTILINE)) == RENAMED


@cache
def nodes_of_the_package() -> list[tuple[str, ast.AST]]:
    """Every call, raise, attribute and keyword of the package's source, with its file and line."""
    return [
        (f"{name}:{node.lineno}", node)
        for path, name in ((path, path.relative_to(FORGE)) for path in sorted(FORGE.rglob("*.py")))
        for node in ast.walk(tree_of(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call | ast.Raise | ast.Attribute | ast.keyword)
    ]


def test_the_package_itself_uses_no_former_name() -> None:
    """As attribute or keyword: users would be warned of what they did not write."""
    used = [
        place
        for place, node in nodes_of_the_package()
        if (isinstance(node, ast.Attribute) and node.attr in RENAMED)
        or (isinstance(node, ast.keyword) and node.arg in RENAMED)
    ]
    assert used == []


def test_every_parameter_error_names_its_parameter() -> None:
    nameless = [
        place
        for place, node in nodes_of_the_package()
        if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "ParameterError"
        if "parameter" not in [keyword.arg for keyword in node.keywords]
    ]
    assert nameless == []


def test_no_error_or_warning_of_the_library_names_a_flag_of_the_command_line() -> None:
    """A whole command within backticks, or of pip, may: it is for a shell wherever it is read."""
    found = []
    for place, node in nodes_of_the_package():
        called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
        is_message = isinstance(node, ast.Raise) or "Error" in called or called == "warnings.warn"
        if place.startswith("cli/") or not is_message:
            continue
        texts = " ".join(str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))
        flags = re.findall(r"--[a-z][a-z-]+", re.sub(r"`[^`]*`|pip install.*", "", texts))
        found += [f"{place}: {flag}" for flag in flags]
    assert found == []


def test_no_error_class_is_defined_elsewhere() -> None:
    classes = {name: value for name, value in public_objects().items() if inspect.isclass(value)}
    found = [name for name, value in classes.items() if issubclass(value, Exception)]
    assert [name for name in found if not name.startswith("forge.server.")] == [  # where statuses of HTTP are raised
        f"forge.errors.{error.__name__}" for error in ERRORS
    ]


def test_importing_forge_loads_nothing_heavy() -> None:
    assert loaded_after("import forge") == set()


def test_building_the_command_line_loads_nothing_heavy() -> None:
    """--help and wrong usage must answer at once."""
    statement = "from forge.cli.app import app\nimport typer\ntyper.main.get_command(app)"
    assert loaded_after(statement) == set()


def test_help_loads_nothing_heavy() -> None:
    assert loaded_after("from forge.cli import run\nassert run(['generate', '--help']) == 0") == set()


def test_the_heavy_list_can_be_seen() -> None:
    """The checks above look at sys.modules: this shows that they would see a package that is loaded."""
    assert loaded_after("import forge\nforge.SamplingParams\nimport numpy, jinja2") == {"numpy", "jinja2"}


def test_python_m_forge_is_the_command_line() -> None:
    done = subprocess.run([sys.executable, "-m", "forge", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"forge {forge.__version__}\n", "")


def test_the_readme_names_what_there_is() -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    table = dict(re.findall(r"^\| `([^`]+)` \| (.+) \|$", readme, re.MULTILINE))
    commands = [row.split()[1] for row in table if row.startswith("forge ")]
    assert sorted(commands) == sorted(c.name for c in (*app.registered_commands, *app.registered_groups))
    for model in MODELS.values():
        assert f"{model.size / 1e6:.0f} MB" in table[model.name]
        assert re.split(r" \(|$", model.licence)[0] in table[model.name]
    (number,) = re.findall(r"^Architectures: the (\d+) of", readme, re.MULTILINE)
    models = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
    (rows,) = re.findall(r"^\| architecture \|.+\n\| ---.+\n((?:\|.+\n)+)", models, re.MULTILINE)
    architectures = [name for row in rows.splitlines() for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    assert sorted(architectures) == sorted(ARCHS)
    assert int(number) == len(ARCHS)


def test_every_public_function_refuses_a_keyword_that_it_does_not_know() -> None:
    """Those that take keywords. What else `render_chat` is given is the template's."""
    functions: list[Any] = [forge.load, forge.load_tokenizer, forge.SamplingParams, forge.EngineConfig]
    functions += [forge.Tokenizer.encode, forge.Tokenizer.decode]
    methods = [value for name, value in inspect.getmembers(forge.LLM, inspect.isfunction) if name[0] != "_"]
    functions += [m for m in methods if len(inspect.signature(m).parameters) > 1 and m.__name__ != "render_chat"]
    assert {forge.LLM.generate, forge.LLM.agenerate, forge.LLM.encode_chat} < set(functions)
    for function in functions:
        with pytest.raises(forge.ParameterError, match=f"^xyz is no parameter of {function.__name__}: "):
            function(xyz=1)


def test_a_misspelled_keyword_of_load_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(forge.ParameterError, match=r"^devise is no parameter of load: did you mean device\?$"):
        forge.load("x", devise="cpu")  # type: ignore[call-arg]
    assert list(inspect.signature(forge.load).parameters)[:2] == ["model", "device"]
