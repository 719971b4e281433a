"""Quick tests run first; the models that tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import forge
from forge import hub

DATA = Path(__file__).parent / "data"
REAL_MODELS = {"smollm2_path", "gemma3_path"}


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests last; a test that needs a real model, by whatever fixture, must say that it is slow."""
    unmarked = [
        item.nodeid
        for item in items
        if REAL_MODELS.intersection(getattr(item, "fixturenames", ())) and not item.get_closest_marker("slow")
    ]
    if unmarked:
        raise pytest.UsageError(f"these tests load a real model: mark them slow: {', '.join(unmarked)}")
    items.sort(key=lambda item: item.get_closest_marker("slow") is not None)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2 135M Instruct, Q4_1: fetched into the user's cache once."""
    return hub.pull("smollm2")


@pytest.fixture(scope="session")
def gemma3_path() -> Path:
    """Gemma 3 270M, Q4_K_M: fetched into the user's cache once."""
    return hub.pull("gemma3-270m")


@pytest.fixture(scope="session")
def smollm2(smollm2_path: Path) -> Iterator[forge.LLM]:
    with forge.load(smollm2_path, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="session")
def gemma3(gemma3_path: Path) -> Iterator[forge.LLM]:
    """1.1 GB of float32 weights."""
    with forge.load(gemma3_path, device="cpu") as llm:
        yield llm


@pytest.fixture(scope="session")
def arch_path() -> Callable[[str], Path]:
    """The GGUF of a tiny random model, by the name of its folder; its reference logits lie beside it."""

    def find(name: str) -> Path:
        path = DATA / "arch" / name / "model.gguf"
        assert path.is_file(), f"no such model: {path}"
        return path

    return find
