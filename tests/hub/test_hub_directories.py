"""Models that are directories: which files of a repository are fetched, and what lies in the cache; local ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub, Reply
from hf_models import unpacked
from hub_servers import Recorder
from safetensors_files import ones, safetensors_bytes, split

import forge
from forge import hub
from forge.cli import run
from forge.cli.about import about
from forge.errors import DownloadError, ModelNotFoundError
from forge.hub import directories

Captured = pytest.CaptureFixture[str]
REPO = "good/model"
NAME = f"hf:{REPO}"
SHARDS = [f"model-{n:05}-of-000002.safetensors" for n in (1, 2)]
INDEX = "model.safetensors.index.json"
BESIDE = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b'\n {"a": 1}',
    "special_tokens_map.json": b'{"b": 2}',
    "chat_template.jinja": b"<s>{{ messages }}",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }}",
    INDEX: json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}).encode(),
}
WEIGHTS = {name: safetensors_bytes({name[6:11]: ones(50, 50)}) for name in SHARDS}
OTHERS = {
    "README.md": b"#",
    "tokenizer.model": b"\x0a",
    "vocab.json": b"{}",
    "merges.txt": b"a b",
    ".gitattributes": b"*",
    "pytorch_model-00001-of-00001.bin": b"\x80\x02",
    "consolidated.safetensors": b"x",
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x",
    "sub/model.safetensors": b"x",
    "flax_model.msgpack": b"x",
    "training_args.bin": b"x",
    "adapter_model.safetensors": b"x",
}


def publish(the_hub: FakeHub, files: dict[str, bytes], revision: str = "main") -> None:
    tree = the_hub.repos.setdefault(REPO, {}).setdefault(revision, {})
    tree |= files
    the_hub.in_git |= {file for file in files if file.endswith((".json", ".jinja")) and file != "tokenizer.json"}


@pytest.fixture
def model(the_hub: FakeHub, cache: Path) -> FakeHub:
    """A repository as `save_pretrained` makes it, with what others put there, too."""
    (cache / "models" / "other.gguf").unlink()
    publish(the_hub, BESIDE | WEIGHTS | OTHERS)
    return the_hub


def hf() -> Path:
    return hub.caches()[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def left() -> list[str]:
    return sorted(str(path.relative_to(hf())) for path in hf().rglob("*") if path.is_symlink() or not path.is_dir())


# ---- what is fetched


def test_the_files_of_a_model_are_fetched_and_no_others(model: FakeHub) -> None:
    seen = Recorder()
    folder = hub.resolve(NAME, progress=seen)
    assert folder == hf() / "models--good--model" / "snapshots" / COMMIT
    assert contents(folder) == BESIDE | WEIGHTS
    assert {path.partition("/resolve/")[2][41:] for path in model.asked("GET", "/resolve/")} == {*BESIDE, *WEIGHTS}
    seen.check(f"downloading {SHARDS[1]}", len(WEIGHTS[SHARDS[1]]))
    count = len(model.asked("GET", "/resolve/"))
    assert hub.pull(NAME) == hub.resolve(f"https://huggingface.co/{REPO}") == folder
    assert len(model.asked("GET", "/resolve/")) == count
    assert hub.resolve(NAME, download=False) == folder


def test_one_file_is_preferred_to_shards(model: FakeHub) -> None:
    publish(model, {"model.safetensors": WEIGHTS[SHARDS[0]]})
    folder = hub.resolve(NAME)
    assert contents(folder) == {k: v for k, v in BESIDE.items() if k != INDEX} | {
        "model.safetensors": WEIGHTS[SHARDS[0]]
    }


def test_onnx_with_its_external_data(the_hub: FakeHub, cache: Path) -> None:
    files = {
        "genai_config.json": b"{}",
        "tokenizer.json": b"{}",
        "model.onnx": b"\x08\x0a",
        "model.onnx.data": b"<data",
    }
    publish(the_hub, files | {"README.md": b"#", "amd/logs.txt": b"x"})
    assert contents(hub.resolve(NAME)) == files
    assert hub.resolve(NAME, download=False).name == COMMIT
    assert [(item.name, item.state) for item in hub.stored()] == [(NAME, "complete")]


@pytest.mark.parametrize("form", ["hf:{}/{}", "hf:{}@main/{}", "https://huggingface.co/{}/blob/main/{}"])
def test_one_graph_of_several_by_the_name_of_its_file(form: str, the_hub: FakeHub, cache: Path) -> None:
    """With its data, and the tokenizer at the top; safetensors stay where they are."""
    beside = {"config.json": b"{}", "tokenizer.json": b"{}"}
    wanted = {"onnx/model_q4.onnx": b"\x08\x0a", "onnx/model_q4.onnx_data": b"x", "onnx/model_q4.onnx_data_1": b"yy"}
    others = {"onnx/model.onnx": b"\x08", "onnx/model_q4f16.onnx": b"\x08", "onnx/model_q4f16.onnx_data": b"z"}
    publish(the_hub, beside | wanted | others | {"model.safetensors": WEIGHTS[SHARDS[0]]})
    name = form.format(REPO, "onnx/model_q4.onnx")
    path = hub.resolve(name)
    folder = hf() / "models--good--model" / "snapshots" / COMMIT
    assert path == folder / "onnx/model_q4.onnx"
    assert contents(folder) == beside | wanted
    assert hub.resolve(name, download=False) == path
    assert [(item.name, item.bytes) for item in hub.stored()] == [(f"{NAME}/onnx/model_q4.onnx", 5)]
    with pytest.raises(DownloadError, match=r"the repository has no file 'onnx/model_q8\.onnx'"):
        hub.resolve(f"hf:{REPO}/onnx/model_q8.onnx")


def test_graphs_are_listed_and_removed_by_name(the_hub: FakeHub, cache: Path) -> None:
    files = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "onnx/model.onnx": b"\x08\x0a",
        "onnx/model.onnx_data": b"x",
    }
    more = {"onnx/model_fp16.onnx": b"\x08", "onnx/model_fp16.onnx_data": b"yy"}
    publish(the_hub, files | more)
    folder = hub.resolve(NAME)
    fp16 = f"{NAME}/onnx/model_fp16.onnx"
    hub.resolve(fp16)
    assert contents(folder) == files | more
    assert {item.name: item.bytes for item in hub.stored() if item.name == fp16} == {fp16: 3}
    assert hub.remove(fp16) == 3
    assert contents(folder) == files


def test_onnx_in_a_folder_of_its_own(the_hub: FakeHub, cache: Path) -> None:
    """In one type of several."""
    files = {
        "config.json": b"{}",
        "tokenizer.json": b"{}",
        "onnx/model.onnx": b"\x08\x0a",
        "onnx/model.onnx_data": b"x",
    }
    publish(the_hub, files | {"onnx/model_q4.onnx": b"\x08", "onnx/model_fp16.onnx": b"\x08", "onnx/README.md": b"#"})
    folder = hub.resolve(NAME)
    assert contents(folder) == files
    assert hub.resolve(NAME, download=False) == folder
    hashes = about("cpu", folder)["model_sha256"]
    assert hashes == [hashlib.sha256(files[name]).hexdigest() for name in ("onnx/model.onnx", "onnx/model.onnx_data")]
    assert [(item.name, item.state) for item in hub.stored()] == [(NAME, "complete")]
    hub.remove(NAME)
    assert left() == []


def test_a_gguf_file_is_preferred_and_a_quantization_names_one(model: FakeHub) -> None:
    with pytest.raises(ModelNotFoundError, match=f"^{NAME}:Q8_0: the repository has no GGUF file: leave out :Q8_0$"):
        hub.resolve(f"{NAME}:Q8_0")
    folder = hub.resolve(NAME)
    model.add(REPO, "m-Q8_0.gguf")
    assert hub.resolve(f"{NAME}:Q8_0") == hub.resolve(NAME) == folder / "m-Q8_0.gguf"
    assert {item.name for item in hub.stored()} == {NAME, f"{NAME}/m-Q8_0.gguf"}


def test_a_revision_has_its_own_directory(model: FakeHub) -> None:
    config = {"config.json": b'{"model_type": "qwen3"}'}
    publish(model, BESIDE | WEIGHTS | config, "feat/x")
    model.commits["feat/x"] = "f" * 40
    folder = hub.resolve(f"{NAME}@feat/x")
    assert folder.name == "f" * 40
    assert contents(folder) == BESIDE | WEIGHTS | config
    assert hub.resolve(f"{NAME}@feat%2Fx", download=False) == folder
    with pytest.raises(DownloadError, match=r"not in the Hugging Face cache: run `forge pull` first"):
        hub.resolve(NAME, download=False)
    assert hub.resolve(f"{NAME}@{'f' * 40}", download=False) == folder


def test_a_branch_that_moves_meanwhile(model: FakeHub) -> None:
    """All files are those of one commit."""
    publish(model, {"config.json": b'{"new": 1}'} | {k: v for k, v in BESIDE.items() if k != "config.json"}, "later")

    def move(method: str, path: str, reply: Reply) -> None:
        if method == "GET" and path.endswith("/config.json"):
            model.commits |= {"main": "f" * 40, COMMIT: COMMIT}
            model.repos[REPO] = {COMMIT: model.repos[REPO]["main"], "main": model.repos[REPO]["later"]}

    model.spoil = move
    folder = hub.resolve(NAME)
    assert folder.name == COMMIT
    assert contents(folder) == BESIDE | WEIGHTS


def test_without_the_hub_the_cached_directory_is_used_if_it_is_whole(
    model: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = hub.resolve(NAME)
    model.spoil = lambda method, path, reply: setattr(reply, "status", 503)
    assert hub.resolve(NAME) == folder
    (folder / SHARDS[1]).unlink()
    with pytest.raises(DownloadError, match="check the network"):
        hub.resolve(NAME)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="HF_HUB_OFFLINE is set"):
        hub.resolve(NAME)


# ---- bytes that are not right


def test_a_download_that_breaks_off_goes_on(model: FakeHub) -> None:
    def cut(method: str, path: str, reply: Reply) -> None:
        if method == "GET" and path.endswith(SHARDS[1]):
            reply.send = 1000

    model.spoil = cut
    with pytest.raises(DownloadError, match=f"^{NAME}: cannot get it"):
        hub.resolve(NAME)
    assert [(item.name, item.state) for item in hub.stored()] == [
        (f"{NAME}@{COMMIT}", "partial"),  # a branch means the last commit that was whole
        (NAME, "partial"),
    ]
    model.spoil = lambda method, path, reply: None
    model.log.clear()
    assert contents(hub.resolve(NAME)) == BESIDE | WEIGHTS
    assert [path.rpartition("/")[2] for path in model.asked("GET", "/resolve/")] == [SHARDS[1]]
    assert model.ranges() == ["bytes=5000-"]


@pytest.mark.parametrize(
    ("file", "body", "message"),
    [
        ("config.json", b"<!DOCTYPE html>", "an HTML page instead of a JSON file"),
        ("config.json", b"version https://git", "something that is no JSON file: it begins with b'version h'"),
        ("config.json", b"[]", "something that is no JSON file"),
        ("config.json", b"{", "is no JSON file: it has 1 bytes"),
        ("chat_template.jinja", b"<!DOCTYPE html>", "an HTML page instead of this file"),
        (SHARDS[0], b"<!DOCTYPE html>", "an HTML page instead of a safetensors file"),
        (SHARDS[0], b"version https://git", "something that is no safetensors file: it begins with b'version h'"),
        (SHARDS[0], b"\x80\x02}q\x00.", "is no safetensors file: it has 6 bytes"),
        (SHARDS[0], WEIGHTS[SHARDS[0]][:-1] + b"x", "SHA-256 of what came is"),
    ],
)
def test_bytes_that_are_not_those_of_the_file(model: FakeHub, file: str, body: bytes, message: str) -> None:
    announced = len(body) == len(BESIDE.get(file) or WEIGHTS[file])
    if not announced:
        publish(model, {file: body})

    def change(method: str, path: str, reply: Reply) -> None:
        if announced and method == "GET" and path.endswith(file):
            reply.body = body

    model.spoil = change
    with pytest.raises(DownloadError, match=f"^{NAME}: .*{message}") as caught:
        hub.resolve(NAME)
    assert str(caught.value).isprintable()
    assert not any(file in path for path in left())


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (b"{}", "names no shards"),
        (b'{"a": "../../x.safetensors", "b": "/etc/x.safetensors", "c": "d/x.safetensors"}', "names no shards"),
        (json.dumps({"a": SHARDS[0], "b": "gone.safetensors"}).encode(), "names gone.safetensors, which is not there"),
        (
            json.dumps([{"a": f"{n}.safetensors"} for n in range(1001)]).encode().join([b'{"a":', b"}"]),
            "names more than 1000 shards",
        ),
    ],
)
def test_an_index_that_is_none_fetches_no_weights(model: FakeHub, index: bytes, message: str) -> None:
    publish(model, {INDEX: index})
    with pytest.raises(DownloadError, match=f"^{NAME}: {INDEX} .*{message}"):
        hub.resolve(NAME)
    assert not any(".safetensors" in path for path in model.asked("GET") if not path.endswith(INDEX))


def test_a_file_beside_the_weights_that_is_too_long(model: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(directories, "MAX_BESIDE_BYTES", 20)
    with pytest.raises(DownloadError, match=f"^{NAME}: config.json has 23 bytes, allowed are 20"):
        hub.resolve(NAME)
    assert not any("config.json" in path for path in left())


def test_room_for_all_shards_is_asked_for_before_the_first(model: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    free = len(WEIGHTS[SHARDS[0]]) + 100
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, free))  # type: ignore[attr-defined]
    with pytest.raises(DownloadError, match=r"MB are missing, and .* MB are free in .*: free some space"):
        hub.resolve(NAME)
    assert not any(".safetensors" in path for path in model.asked("GET") if not path.endswith(INDEX))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_a_repository_of_pickles_is_refused(the_hub: FakeHub, file: str) -> None:
    publish(the_hub, {"config.json": b"{}", file: b"\x80\x02"})
    message = (
        rf"^{NAME}: the repository has no GGUF file and no safetensors, but '{re.escape(file)}': a pickle of PyTorch, "
    )
    with pytest.raises(ModelNotFoundError, match=f"{message}which runs code when it is opened: look for"):
        hub.resolve(NAME)
    assert the_hub.asked("GET", "/resolve/") == []


def test_a_repository_without_a_tokenizer_is_refused_before_its_weights_are_fetched(model: FakeHub) -> None:
    del model.repos[REPO]["main"]["tokenizer.json"]
    model.repos[REPO]["main"].pop("tokenizer.model", None)
    with pytest.raises(DownloadError, match=f"^{NAME}: the repository has no tokenizer.json: take one that has, or"):
        hub.resolve(NAME)
    assert model.asked("GET", "/resolve/") == []


def test_a_tokenizer_model_is_fetched_where_there_is_no_tokenizer_json(model: FakeHub) -> None:
    files = model.repos[REPO]["main"]
    del files["tokenizer.json"]
    files |= {"tokenizer.model": b"\x0a", "added_tokens.json": b"{}"}
    folder = hub.resolve(NAME)
    assert {"tokenizer.model", "added_tokens.json"} <= {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_is_no_model(the_hub: FakeHub, tmp_path: Path, weights: str) -> None:
    publish(the_hub, {"adapter_config.json": b"{}", weights: b"x", "tokenizer.json": b"{}"})
    with pytest.raises(ModelNotFoundError, match=f"^{NAME}: the repository holds a LoRA adapter and not a model: down"):
        hub.resolve(NAME)
    (tmp_path / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(
        ModelNotFoundError, match="is a LoRA adapter and not a model: give it as an adapter of what it was made for"
    ):
        hub.resolve(tmp_path)


# ---- list and rm


def test_a_directory_is_listed_and_removed(model: FakeHub, capsys: Captured) -> None:
    folder = hub.resolve(NAME)
    size = sum(map(len, (BESIDE | WEIGHTS).values()))
    (folder / "pytorch_model.bin").write_bytes(b"theirs")
    assert [(item.name, item.path, item.bytes, item.state) for item in hub.stored()] == [
        (NAME, folder, size, "complete")
    ]
    assert run(["list", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["models"] == [{"name": NAME, "path": str(folder), "bytes": size, "state": "complete"}]
    assert run(["rm", NAME]) == 0
    assert capsys.readouterr().out == f"{NAME}: removed, 20.41 kB freed\n"
    assert contents(hf()) == {
        f"models--good--model/snapshots/{COMMIT}/pytorch_model.bin": b"theirs",
        "models--good--model/refs/main": COMMIT.encode(),
    }
    with pytest.raises(ModelNotFoundError, match="is not in the Hugging Face cache"):
        hub.remove(NAME)


def test_a_quantization_never_means_a_directory(model: FakeHub) -> None:
    folder = hub.resolve(NAME)
    with pytest.raises(ModelNotFoundError, match=f"^{NAME}:Q8_0 is not in the Hugging Face cache"):
        hub.remove(f"{NAME}:Q8_0")
    assert contents(folder) == BESIDE | WEIGHTS


@pytest.mark.parametrize("file", ["chat_template.jinja", SHARDS[0]])
def test_what_a_broken_download_left_is_removed(model: FakeHub, file: str) -> None:
    model.spoil = lambda method, path, reply: setattr(reply, "send", 2) if path.endswith(file) else None
    with pytest.raises(DownloadError):
        hub.resolve(NAME)
    assert {item.state for item in hub.stored()} == {"partial"}
    hub.remove(NAME)
    assert left() == []


def test_the_files_of_gguf_models_stay_when_the_directory_goes(model: FakeHub) -> None:
    hub.resolve(NAME)
    model.add(REPO, "m-F16.gguf", "m-BF16.gguf")
    for file in ("m-F16.gguf", "m-BF16.gguf"):
        hub.resolve(f"{NAME}/{file}")
    hub.remove(NAME)  # which GGUF file were meant nobody could say, and it is the directory that has this name
    assert {item.name for item in hub.stored()} == {f"{NAME}/m-F16.gguf", f"{NAME}/m-BF16.gguf"}
    with pytest.raises(ModelNotFoundError, match="several files may be meant"):
        hub.remove(NAME)


def test_an_adapter_or_a_lone_tokenizer_is_no_model(the_hub: FakeHub, cache: Path) -> None:
    folder = hf() / "models--a--b" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "adapter_model.safetensors"):
        (folder / name).write_bytes(b"{}")
    assert hub.stored() == []
    with pytest.raises(ModelNotFoundError, match="is not in the Hugging Face cache"):
        hub.remove("hf:a/b")


# ---- directories of the user


def test_a_directory_with_a_configuration_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "genai_config.json"):
        (tmp_path / name[:3]).mkdir()
        (tmp_path / name[:3] / name).write_bytes(b"{}")
        assert hub.resolve(str(tmp_path / name[:3])) == hub.resolve(tmp_path / name[:3]) == tmp_path / name[:3]
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("con") == Path("con")
    with pytest.raises(ModelNotFoundError, match=r"^'con' is a directory that is here: use it as the model, without"):
        hub.pull("con")


def test_a_directory_without_a_configuration_says_what_one_holds(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelNotFoundError) as caught:
        hub.resolve(tmp_path)
    message = str(caught.value)
    assert message.isprintable()
    assert message.startswith(
        f"{os.fspath(tmp_path)!r} is a directory without config.json, and not a model's, which has"
    )
    assert message.endswith("or the path of a GGUF file in it")


# ---- from the Hub to an answer


@pytest.mark.slow
def test_a_model_of_the_hub_is_pulled_run_and_inspected(
    the_hub: FakeHub, cache: Path, tmp_path: Path, capsys: Captured
) -> None:
    """In shards and through the links of the cache: the same ids as of one file."""
    mine, shards = unpacked("qwen3", tmp_path / "mine"), unpacked("qwen3", tmp_path / "shards")
    split(shards)
    publish(the_hub, {path.name: path.read_bytes() for path in shards.iterdir()} | OTHERS)
    assert run(["pull", NAME]) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert contents(folder) == contents(shards)
    answers = []
    for model in (NAME, str(mine), str(mine / "model.safetensors")):
        assert run(["generate", "a", "-m", model, "--max-tokens", "3", "--json", "--device", "cpu"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["ids"] == answers[1]["ids"] == answers[2]["ids"]
    assert [answer["model"] for answer in answers] == [REPO, "mine", "model.safetensors"]
    assert len(answers[0]["model_sha256"]) == 2
    assert answers[1]["model_sha256"] == answers[2]["model_sha256"]
    assert run(["inspect", NAME, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["architecture"], found["path"], found["version"]) == ("qwen3", str(folder), None)
    assert found["files"] == [str(folder / f"model-0000{n}-of-00002.safetensors") for n in (1, 2)]
    assert run(["inspect", NAME]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "format safetensors, 2 files" in shown
    assert "F16 99" in shown
    with forge.load(NAME, device="cpu") as llm:
        assert repr(llm).startswith(f"<forge.LLM {REPO}: qwen3, ")


def test_pickles_alone_are_refused_by_load(tmp_path: Path) -> None:
    directory = unpacked("qwen3", tmp_path / "m")
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(60))
    why = "pickles run code when they are opened: take the model's safetensors, or save_pretrained it anew"
    for path in (directory, directory / "pytorch_model.bin"):
        with pytest.raises(forge.FormatError, match=why) as caught:
            forge.load(path)
        assert str(caught.value).isprintable()
