"""The command line on tiny models: what it prints where, and how it ends when something is wrong."""

import errno
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cli_runs import LLAMA, Captured, failure, forge_process, json_of, llama_metadata, start
from gguf_files import write_gguf

import forge
from forge import hub
from forge.cli import options, output, run
from forge.config import EngineConfig
from forge.devtools import verify
from forge.devtools.cases import CASES
from forge.formats import gguf
from forge.ops.op import REGISTRY


@pytest.fixture
def vocabulary(tmp_path: Path) -> Path:
    """A file with a tokenizer and no tensors."""
    return write_gguf(tmp_path / "vocabulary.gguf", llama_metadata())


def test_tokenize_writes_long_texts_as_short_ones(
    vocabulary: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, shown = "Hello wörld, a b c 'd'", []
    for block in (1 << 12, 2, 1):
        monkeypatch.setattr("forge.cli.tokenize._BLOCK", block)
        assert run(["tokenize", text, "-m", str(vocabulary)]) == 0
        shown.append(capsys.readouterr().out)
        assert json_of(capsys, "tokenize", text, "-m", str(vocabulary))["ids"] == forge.load_tokenizer(LLAMA).encode(
            text
        )
    assert shown[1:] == [shown[0]] * 2


def test_tokenize_says_that_a_text_begins_with_bos(tmp_path: Path, capsys: Captured) -> None:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "a"]
    keys = {"general.architecture": "llama", "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": tokens}
    keys |= {"tokenizer.ggml.scores": [0.0] * 260, "tokenizer.ggml.add_space_prefix": False}
    keys |= {"tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1]}
    model = str(write_gguf(tmp_path / "model.gguf", keys))
    for flags, ids, is_said in (
        (["<s>a", "--parse-special"], [1, 1, 259], True),
        (["<s>a", "--parse-special", "--no-add-special"], [1, 259], False),
        (["a", "--parse-special"], [1, 259], False),
        (["<s>"], [1, 63, 118, 65], False),
    ):
        assert run(["tokenize", *flags, "-m", model, "--json"]) == 0
        out, err = capsys.readouterr()
        assert json.loads(out)["ids"] == ids
        assert ("begins with the BOS token" in err) == is_said
        assert err.count("\n") == is_said


def test_tokenize_needs_no_weights(vocabulary: Path, capsys: Captured) -> None:
    tokenizer = forge.load_tokenizer(LLAMA)
    control = tokenizer.token_text(316)
    text = f"a{control} é"
    plain = json_of(capsys, "tokenize", text, "-m", str(vocabulary))
    assert plain["ids"] == tokenizer.encode(text)
    special = json_of(capsys, "tokenize", text, "-m", str(vocabulary), "--parse-special", "--no-add-special")
    assert special["ids"] == tokenizer.encode(text, add_special=False, parse_special=True)
    assert 316 in special["ids"]
    assert 316 not in plain["ids"][1:]
    assert run(["tokenize", "é", "-m", str(vocabulary)]) == 0
    assert r"'\xc3'" in capsys.readouterr().out
    assert run(["tokenize", " ", "-m", str(vocabulary), "--no-add-special"]) == 0
    assert capsys.readouterr().out == " 1 token\n id  text\n220  ' '\n".removeprefix(" ")


def test_inspect_describes_the_file(capsys: Captured) -> None:
    found = json_of(capsys, "inspect", LLAMA)
    with gguf.read(LLAMA) as model:
        infos = list(model.tensors.values())
    assert found["architecture"] == "llama"
    assert (found["path"], found["version"], found["remark"]) == (LLAMA, 3, None)
    assert (found["format"], found["files"]) == ("GGUF", [LLAMA])
    assert found["metadata"]["llama.embedding_length"] == 64
    assert found["metadata"]["tokenizer.ggml.tokens"] == {"type": "string", "length": 320}
    assert found["metadata"]["tokenizer.ggml.token_type"] == {"type": "int32", "length": 320}
    assert found["parameters"] == sum(int(np.prod(info.shape)) for info in infos)
    assert found["bytes"] == sum(info.nbytes for info in infos)
    first = infos[0]
    assert found["tensors"][0] == {
        "name": first.name,
        "shape": list(first.shape),
        "type": first.type.name,
        "bytes": first.nbytes,
    }
    assert run(["inspect", LLAMA]) == 0
    shown = capsys.readouterr()
    assert "blk.*.attn_q.weight" in shown.out
    assert "window" not in shown.out
    assert shown.err == ""


def test_inspect_shows_what_the_experts_of_a_layer_take(capsys: Captured) -> None:
    assert run(["inspect", LLAMA.replace("llama", "qwen3moe")]) == 0
    of_layer = 3 * 6 * 16 * 48 * 2  # gates, ups and downs of 6 experts in float16
    assert of_layer == 27_648
    shown = capsys.readouterr().out
    assert "2 of 6 of width 16, in 2 layers of up to 27.65 kB" in shown
    assert "feed-forward" not in shown  # no layer has one beside the experts
    found = json_of(capsys, "inspect", LLAMA.replace("llama", "qwen3moe"))["experts"]
    assert (found["count"], found["used"], found["width"], found["shared_width"]) == (6, 2, 16, 0)
    assert found["layer_bytes"] == {"0": of_layer, "1": of_layer}
    assert json_of(capsys, "inspect", LLAMA)["experts"] is None


def test_inspect_shows_the_heads_of_each_kind_of_layer(capsys: Captured) -> None:
    assert run(["inspect", LLAMA.replace("llama", "gemma4")]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "4 query and 2 KV heads of 8 in 2 layers, 4 query and 1 KV head of 16 in 2 layers" in shown


def test_inspect_shows_what_a_token_and_a_sequence_take_of_each_kind_of_layer_state(capsys: Captured) -> None:
    """Against the arrays of a model that is loaded with the same context: a token is one of 64 of a page."""
    path = LLAMA.replace("llama", "gemma3")
    state = json_of(capsys, "inspect", path)["state"]
    assert [(kind["holds"], kind["layers"]) for kind in state] == [("all positions", 1), ("window of 16", 6)]
    with forge.load(path, max_sequences=1, device="cpu") as llm:
        pages = [[array[:, 0].nbytes for array in cache.arrays] for cache in llm.engine.runner.state.caches]
        counts = [pool.num_pages for pool in llm.engine.pools]
    assert counts[0] * 64 == llm.context
    assert state[0]["bytes_per_token"] * 64 == sum(pages[0])
    assert state[1]["bytes_per_token"] == 0
    assert [kind["bytes_per_sequence"] for kind in state] == [
        count * sum(of_page) for count, of_page in zip(counts, pages, strict=True)
    ]
    assert run(["inspect", path]) == 0
    shown = capsys.readouterr().out
    assert "per token of context" in shown
    assert "per sequence (6 layers, window of 16, float32)" in shown


def test_inspect_shows_what_it_cannot_run(tmp_path: Path, capsys: Captured) -> None:
    hostile = "\x1b]0;owned\x07"
    metadata = {"general.architecture": "mamba9", "general.name": hostile, "value": float("nan"), "few": [1, 2]}
    path = str(write_gguf(tmp_path / "m.gguf", metadata, {"x": np.ones(4, np.float32)}))
    found = json_of(capsys, "inspect", path)
    assert "'mamba9' is not supported" in found["remark"]
    assert found["metadata"]["few"] == [1, 2]
    assert found["metadata"]["value"] is None
    assert run(["inspect", path]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err
    assert r"\x1b]0;owned\x07" in shown.out
    assert "'mamba9' is not supported" in shown.err


def test_logits_are_the_library_s_best(capsys: Captured) -> None:
    found = json_of(capsys, "logits", "a b", "-m", LLAMA, "--top", "5")
    with forge.load(LLAMA) as llm:
        last = llm.logits("a b")[-1]
    assert found["prompt_ids"] == forge.load_tokenizer(LLAMA).encode("a b")
    assert [id for id, _ in found["top"]] == sorted(range(len(last)), key=lambda id: (-last[id], id))[:5]
    assert [value for _, value in found["top"]] == [float(last[id]) for id, _ in found["top"]]
    assert run(["logits", "a b", "-m", LLAMA, "--top", "320"]) == 0
    shares = [float(share) for share in re.findall(r"([\d.]+)%", capsys.readouterr().out)]
    assert len(shares) == 320
    assert sum(shares) == pytest.approx(100, abs=1.7)


def test_perplexity_of_a_file_equals_its_definition(tmp_path: Path, capsys: Captured) -> None:
    text = "the quick brown fox\n" * 40
    (tmp_path / "text").write_text(text)
    found = json_of(capsys, "perplexity", str(tmp_path / "text"), "-m", LLAMA, "--context", "100")
    with forge.load(LLAMA) as llm:
        ids = llm.tokenizer.encode(text)
        nll, count = 0.0, 0
        for start in range(0, len(ids) // 100 * 100, 100):
            chunk = ids[start : start + 100]
            logits = llm.logits(chunk)[:-1].astype(np.float64)
            nll += float((np.log(np.exp(logits).sum(1)) - logits[np.arange(99), chunk[1:]]).sum())
            count += 99
    assert (found["tokens"], found["remainder"]) == (count, len(ids) % 100)
    assert found["ppl"] == pytest.approx(np.exp(nll / count), rel=1e-5)


def test_perplexity_says_how_much_of_the_end_it_leaves_out(tmp_path: Path, capsys: Captured) -> None:
    text = "a b c d e f g"
    (tmp_path / "text").write_text(text)
    length = len(forge.load_tokenizer(LLAMA).encode_prompt(text))
    for context, left in ((length - 1, 1), (length - 2, 2), (length, 0), (length + 1, 0)):
        assert run(["perplexity", str(tmp_path / "text"), "-m", LLAMA, "--context", str(context)]) == 0
        err = capsys.readouterr().err
        remark = f"forge: not scored: {output.count(left, 'token')} at the end of the text, too few for a chunk"
        assert (remark in err) == bool(left)


def test_bench_measures_all_batch_sizes(capsys: Captured) -> None:
    args = ("bench", "-m", LLAMA, "--prompt-tokens", "20", "--gen-tokens", "4", "--batch", "2,1", "--repetitions", "2")
    found = json_of(capsys, *args)
    assert [row["batch"] for row in found["decode"]] == [2, 1]
    both, alone = found["decode"]
    assert both["speedup"] == pytest.approx(both["tokens_per_s"] / alone["tokens_per_s"])
    assert alone["ratio_to_bound"] == pytest.approx(alone["tokens_per_s"] / found["bound_tokens_per_s"])
    assert min(found["prefill_tokens_per_s"], found["load_ms"]) > 0
    assert found["peak_rss_bytes"] > 20e6
    assert run([*args, "--timings"]) == 0
    shown = capsys.readouterr()
    assert "decode, batch 2" in shown.out
    rows = [line.split() for line in shown.err.splitlines() if re.search(r" \d+ +\d+$", line)]
    assert [row[0] for row in rows] == [
        "imports",
        "device",
        "file",
        "header",
        "tokenizer",
        "weights",
        "KV",
        "kernels",
        "prompt",
    ]
    assert sum(int(row[-2]) for row in rows) == pytest.approx(int(rows[-1][-1]), abs=len(rows))
    assert found["load_parts_ms"].keys() >= {"imports", "weights"}


@pytest.mark.parametrize(("name", "share"), [("llama", 1.0), ("qwen3moe", 2 / 6)])
def test_bench_bound_covers_every_matrix_of_the_file(name: str, share: float) -> None:
    """Of experts it covers those that a token reads, 2 of 6."""
    from forge.devtools.speed import bound_sweep

    path = LLAMA.replace("/llama/", f"/{name}/")
    with forge.load(path) as llm:
        matrices = [(matrix.size, part) for matrix, part in llm.engine.runner.model.matrices()]
        assert bound_sweep(llm.engine.runner)() > 0
    with gguf.read(path) as model:
        stored = {name: info for name, info in model.tensors.items() if len(info.shape) > 1}
        if "output.weight" in stored:
            del stored["token_embd.weight"]  # a row of it is read, not multiplied
        assert sum(size for size, _ in matrices) == sum(int(np.prod(info.shape)) for info in stored.values())
    assert min(part for _, part in matrices) == share


def test_verify_finds_no_error_and_sees_one(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    norm, cases = REGISTRY["norm"], CASES["norm"]
    monkeypatch.setattr(verify, "all_cases", lambda: [(norm, case) for case in cases])
    good = json_of(capsys, "verify")
    assert good["passed"]
    assert len(good["cases"]) == len(cases)
    monkeypatch.setattr(norm, "run_cpu", lambda *args, **given: norm.reference(*args, **given) * np.float32(1.001))
    assert run(["verify"]) == 1
    captured = capsys.readouterr()
    assert "FAILED" in captured.out
    assert "cases failed" in captured.err


def test_verify_takes_infinities_for_errors() -> None:
    tolerances = 1e-5, 1e-6
    inf, nan = np.array([np.inf, 1.0]), np.array([np.nan, 1.0])
    assert verify.compare(inf, inf, *tolerances) == (0.0, 0.0)
    assert verify.compare(nan, nan, *tolerances) == (0.0, 0.0)
    for got, want in ((inf, nan), (inf, -inf), (np.ones(2), inf), (inf, np.ones(2)), (np.ones(3), np.ones(2))):
        assert verify.compare(got, want, *tolerances)[1] == np.inf
    assert verify.compare(np.array([1, 2]), np.array([1, 3]), *tolerances) == (1.0, np.inf)


def test_doctor_names_the_fix_of_each_problem(
    capsys: Captured, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from forge.backend import threads
    from forge.cli import doctor

    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(doctor, "_LOW_MEMORY_BYTES", 0)
    monkeypatch.setattr(threads.Threads, "current", 1)
    assert run(["doctor"]) == 0
    assert "not in the cache: forge pull smollm2" in capsys.readouterr().out
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setattr(threads.Threads, "current", 10_000)
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "OPENBLAS_NUM_THREADS" in out
    assert "FORGE_CACHE" in out


@pytest.mark.parametrize(
    ("path", "mode", "cupy", "problem", "fix"),
    [
        ("/dev/kfd", 0o600, None, "CuPy", "there is an AMD GPU: pip install cupy-rocm-7-0"),
        ("/dev/nvidia0", 0o600, None, "CuPy", "there is an NVIDIA GPU: pip install 'cupy-cuda13x[ctk]'"),
        ("/dev/kfd", 0, "cupy-rocm-7-0 14.2.0", "driver", "usermod -aG render,video"),
        ("/dev/kfd", 0o600, "cupy-cuda13x 14.2.0", "device", "cannot use the AMD GPU: install ROCm 7"),
        (None, 0, None, None, ""),
    ],
)
def test_doctor_says_what_keeps_a_gpu_from_being_used(
    path: str | None, mode: int, cupy: str | None, problem: str | None, fix: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:  # fmt: skip
    from forge.backend import rocm
    from forge.cli import doctor

    file = tmp_path / "device"
    if path:
        file.touch()
    monkeypatch.setattr(doctor, "_GPU_FILES", {str(file): doctor._GPU_FILES[path or "/dev/kfd"]})
    monkeypatch.setattr(doctor.os, "access", lambda asked, _: asked != str(file) or mode != 0)
    monkeypatch.setattr(rocm, "installed_cupy", lambda: cupy)
    found = {finding.what: finding for finding in doctor._gpu()}
    assert list(found) == ["device", "driver", "CuPy"]
    assert [what for what, finding in found.items() if finding.fix] == ([problem] if problem else [])
    assert not problem or fix in found[problem].fix
    assert found["CuPy"].found == (cupy or "not installed")
    assert found["driver"].found == (str(file) if path else f"none: there is no {file}")


def test_doctor_does_not_repair_the_nvidia_gpu_where_an_amd_one_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from forge.backend import rocm
    from forge.cli import doctor

    monkeypatch.setattr(doctor, "_GPU_FILES", {str(tmp_path): doctor._GPU_FILES["/dev/nvidia0"]})
    monkeypatch.setattr(rocm, "installed_cupy", lambda: "cupy-cuda13x 14.2.0")
    fixes = {finding.what: finding.fix for finding in doctor._gpu("hip")}
    assert fixes == {"device": "there is no hip to be used here, and --device asked for it", "driver": "", "CuPy": ""}


class StubGpu:
    is_gpu, arch, device, has_blas = True, "sm_90", "cuda:0 (stub)", True
    cache = Path()
    free = 10**10

    def free_bytes(self) -> int:
        return self.free

    def facts(self) -> list[tuple[str, str]]:
        names = ("device", "waves", "device memory", "driver, runtime", "CuPy", "BLAS")
        return [*((name, f"some {name}") for name in names), ("kernel cache", str(self.cache))]


def test_doctor_fixes_what_is_wrong_with_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from forge import backend
    from forge.cli import doctor
    from forge.errors import DeviceError
    from forge.tuning import store

    monkeypatch.setenv("FORGE_CACHE", str(tmp_path))
    gpu = StubGpu()
    gpu.cache = tmp_path / "cache"
    monkeypatch.setattr(backend, "select", lambda _: gpu)
    found = list(doctor._gpu())
    assert [f.what for f in found] == [*(what for what, _ in gpu.facts()), "tuning"]
    assert not any(f.fix for f in found)
    assert found[-1].found.startswith("forge's table")
    assert found[-2].found == f"{gpu.cache} (made when the first kernel is compiled)"
    (tmp_path / "file").touch()
    gpu.cache, gpu.free, gpu.has_blas, gpu.arch = tmp_path / "file" / "cache", 10**8, False, "gfx1103"
    fixes = {f.what: f.fix for f in doctor._gpu() if f.fix and f.what != "kernels"}
    assert fixes.keys() == {"device memory", "BLAS", "kernel cache"}
    assert "--device cpu" in fixes["device memory"]
    assert "gfx1103" in fixes["BLAS"]
    assert "FORGE_CACHE" in fixes["kernel cache"]  # CuPy's is for what CuPy compiles

    values = {"MAX_THREADS": 512}
    path = store.save(gpu.arch, "a GPU", "0.1", [store.Measured("norm", {"width": 4096}, values, 2.0, 1.0)])
    assert f"({path})" in doctor._tuning(gpu.arch).found
    assert "1 measured " in doctor._tuning(gpu.arch).found
    path.write_text("no table")
    assert doctor._tuning(gpu.arch).found == f"{path} is no JSON"
    assert "forge tune --reset" in doctor._tuning(gpu.arch).fix

    def fails() -> int:
        raise DeviceError("the GPU failed: hipErrorUnknown")

    monkeypatch.setattr(gpu, "free_bytes", fails)
    (only,) = doctor._gpu()
    assert only.found == gpu.device
    assert "hipErrorUnknown" in only.fix


@pytest.mark.slow
def test_doctor_counts_the_threads_of_blas() -> None:
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "forge", "doctor"]
    out = subprocess.run(command, capture_output=True, text=True, env=environment).stdout
    line = next(line for line in out.splitlines() if line.startswith("NumPy"))
    assert line.endswith(", 1 thread") or "openblas" not in line


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["conjure"], "conjure"),
        (["generate"], "PROMPT"),
        (["generate", "a", "--colour"], "--colour"),
        (["generate", "a", "--max-tokens", "many"], "--max-tokens"),
        (["generate", "a", "--max-tokens", "0"], "--max-tokens must be at least 1, not 0"),
        (["generate", "a", "--max-tokens=0"], "--max-tokens"),
        (["generate", "a", "--temperature", "-1"], "--temperature"),
        (["generate", "a", "--temperature", "nan"], "--temperature"),
        (["generate", "a", "--top-k", "-1"], "--top-k"),
        (["generate", "a", "--top-p", "0"], "--top-p"),
        (["generate", "a", "--min-p", "2"], "--min-p"),
        (["generate", "a", "--seed", "-1"], "--seed"),
        (["generate", "a", "--stop", ""], "--stop"),
        (["generate", "a", "--device", "tpu", "-m", LLAMA], "--device"),
        (["generate", "a", "--context", "0", "-m", LLAMA], "--context"),
        (["generate", "\udcff", "-m", LLAMA], "PROMPT"),
        (["logits", "a", "--top", "0"], "--top"),
        (["bench", "--batch", "1,x"], "--batch"),
        (["bench", "-m", LLAMA, "--prompt-tokens", "512"], "--prompt-tokens"),
        (["verify", "--device", "cpu:1"], "--device"),
        (["chat", "--max-tokens", "-5"], "--max-tokens"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(args: list[str], names: str, capsys: Captured) -> None:
    code, line = failure(capsys, *args)
    assert code == 2
    assert names in line


@pytest.mark.parametrize(
    ("args", "names"),
    [
        (["generate", "a", "-m", "smolm2"], "smollm2"),
        (["generate", "a", "-m", "{here}/none.gguf"], "none.gguf"),
        (["generate", "a", "-m", "{here}"], "is a directory"),
        (["generate", "a", "-m", "{empty}"], "is empty"),
        (["generate", "a", "-m", LLAMA, "--device", "cuda"], "--device cpu"),
        (["generate", "a " * 600, "-m", LLAMA], "512"),
        (["tokenize", "a", "-m", "{empty}"], "is empty"),
        (["inspect", "{empty}"], "is empty"),
        (["inspect", "/dev/null"], "not a regular file"),
        (["perplexity", "{here}/none", "-m", LLAMA], "No such file"),
        (["perplexity", "{here}", "-m", LLAMA], "directory"),
        (["perplexity", LLAMA, "-m", LLAMA], "not UTF-8"),
        (["perplexity", "/dev/zero", "-m", LLAMA], "longer than"),
        (["pull", "nothing"], "smollm2"),
        (["chat", "-m", LLAMA, "--chat-template", "{here}/none"], "none"),
    ],
)
def test_other_failures_are_one_line_and_exit_code_1(
    args: list[str], names: str, capsys: Captured, tmp_path: Path
) -> None:
    empty = tmp_path / "empty.gguf"
    empty.touch()
    code, line = failure(capsys, *(arg.format(here=tmp_path, empty=empty) for arg in args))
    assert code == 1
    assert names in line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (KeyError("x\ny"), "forge: internal error: KeyError: 'x\\ny' (run with --debug for the traceback)"),
        (MemoryError("no 5 GB"), "forge: out of memory (no 5 GB): close other programs, or use a smaller model"),
        (OSError(errno.EIO, "Input/output error"), "forge: Input/output error"),
        (OSError(errno.EACCES, "Permission denied", "/x"), "forge: /x: Permission denied"),
    ],
)
def test_unexpected_errors_are_one_line(
    error: Exception, line: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(forge.hub, "pull", fail)
    assert run(["pull", "smollm2"]) == 1
    assert capsys.readouterr().err.startswith(line)
    assert run(["pull", "--debug", "smollm2"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_that_a_library_wrapped_is_one(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def fail(*_: object, **__: object) -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy") from error

    monkeypatch.setattr(forge.hub, "pull", fail)
    assert run(["pull", "smollm2"]) == 130
    assert capsys.readouterr().err == ""


def test_debug_after_two_dashes_is_text(capsys: Captured) -> None:
    assert run(["tokenize", "-m", LLAMA, "--json", "--", "--debug"]) == 0
    assert json.loads(capsys.readouterr().out)["ids"] == forge.load_tokenizer(LLAMA).encode("--debug")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from forge.cli import run; run(['--help']); print('\\n', *sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    modules = set(out.splitlines()[-1].split())
    assert "forge.cli.generate" in modules
    heavy = {"numpy", "tokenizers", "jinja2", "huggingface_hub", "gguf", "platformdirs"}
    assert not heavy & modules


def test_no_command_prints_the_help(capsys: Captured) -> None:
    for args in ([], ["--quiet"], ["--debug", "--quiet"]):
        assert run(args) == 0
        assert "generate" in capsys.readouterr().out
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"forge {forge.__version__}\n"


def test_defaults_of_options_are_those_of_what_they_stand_for() -> None:
    assert options.DEFAULT_MODEL == hub.DEFAULT_MODEL
    assert EngineConfig().memory_fraction == options.DEFAULT_MEMORY_FRACTION


def test_a_reader_that_leaves_ends_it_silently() -> None:
    with start("generate", "a b", "-m", LLAMA, "--max-tokens", "400", "--ignore-eos") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.stdout.close()
        noise = process.stderr.read()
    assert process.returncode == 141
    assert [line for line in noise.splitlines() if b"forge: device" not in line] == []


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        *(pytest.param(args, marks=pytest.mark.slow) for args in (["inspect", LLAMA], ["inspect", LLAMA, "--json"])),
    ],
)
def test_a_closed_or_full_output_is_no_traceback(args: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        code, _, err = forge_process(*args, stdout=write)
    finally:
        os.close(write)
    assert (code, err) == (141, b"")
    with open("/dev/full", "wb") as full:
        code, _, err = forge_process(*args, stdout=full)
    assert code == 1
    assert re.fullmatch(rb"forge: (standard output: )?No space left on device\n", err)


def test_ctrl_c_while_it_waits_for_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "text")
    with start("perplexity", str(tmp_path / "text"), "-m", LLAMA) as process:
        assert process.stderr
        with open(tmp_path / "text", "wb"):  # waits until the process reads
            process.send_signal(signal.SIGINT)
            assert process.stderr.read() == b""
    assert process.returncode == 130


def test_a_terminal_gets_no_control_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    output.write("a\x1b[31m\tb\r\n\x9bé\x07")
    assert screen.getvalue() == "a�[31m\tb�\n�é�"
    pipe = io.StringIO()
    monkeypatch.setattr(sys, "stdout", pipe)
    output.write("a\x1b[31m")
    assert pipe.getvalue() == "a\x1b[31m"


@pytest.mark.parametrize(
    ("environment", "code", "is_sent"), [({}, b"\x1b[1m", True), ({"NO_COLOR": "1"}, b"\x1b[3", False)]
)
def test_tables_are_bold_on_a_terminal_and_not_coloured_with_no_color(
    environment: dict[str, str], code: bytes, is_sent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TERM": "xterm"} | environment).items():
        monkeypatch.setenv(name, value)
    controller, terminal = pty.openpty()
    try:
        with open(terminal, "w", encoding="utf-8") as screen:
            monkeypatch.setattr(sys, "stdout", screen)
            assert run(["inspect", LLAMA]) == 0
            shown = os.read(controller, 1 << 16)
    finally:
        os.close(controller)
    assert b"llama" in shown
    assert (code in shown) == is_sent


def test_tables_are_plain_in_a_pipe_whatever_the_environment_says(
    capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run(["inspect", LLAMA]) == 0
    out = capfdbinary.readouterr().out
    assert b"llama" in out
    assert b"\x1b" not in out


def test_output_survives_an_encoding_without_the_character(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    assert run(["tokenize", "é", "--no-add-special", "-m", LLAMA]) == 0
    assert b"2 tokens" in written.getvalue()
    assert written.getvalue().isascii()


def test_progress_says_a_line_where_a_download_starts(capsys: Captured) -> None:
    with output.ProgressDisplay() as progress:
        for done in (0, 1, 2):
            progress("downloading x", done, 2_000_000)
        progress("loading weights", 1, 2)
        progress("waiting for another pull of x", 0, None)
    assert capsys.readouterr().err == ("forge: downloading x (2 MB)\nforge: waiting for another pull of x\n")


def test_a_warning_of_the_library_is_one_line(tmp_path: Path) -> None:
    metadata = llama_metadata()
    del metadata["tokenizer.ggml.pre"]
    path = write_gguf(tmp_path / "m.gguf", metadata)
    code, _, err = forge_process("tokenize", "a", "-m", str(path))
    assert code == 0
    assert err.startswith(f"forge: {path}: tokenizer.ggml.pre is missing".encode())
    assert err.count(b"\n") == 1


@pytest.mark.parametrize(
    ("text", "shown"), [(" ", "' '"), ("", "''"), ("\n", r"'\n'"), ("it's", '"it\'s"'), ("\u200b", r"'\u200b'")]
)
def test_what_cannot_be_seen_is_quoted(text: str, shown: str) -> None:
    assert output.quoted(text) == shown


def test_counts_of_one_are_singular() -> None:
    assert [output.count(n, "token") for n in (0, 1, 2)] == ["0 tokens", "1 token", "2 tokens"]
    assert [output.num_bytes(n) for n in (1, 2, 1500)] == ["1 byte", "2 bytes", "1.5 kB"]


@pytest.mark.parametrize("command", ["generate", "chat", "tokenize", "verify", "doctor", "kernels", "tune", ""])
def test_short_option_h_shows_help_for_every_command(command: str, capsys: Captured) -> None:
    assert run([*command.split(), "-h"]) == 0
    assert "Show this message" in capsys.readouterr().out


def test_the_environment_chooses_model_and_device(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setenv("FORGE_MODEL", LLAMA)
    monkeypatch.setenv("FORGE_DEVICE", "")  # as if it were not there
    assert json_of(capsys, "tokenize", "a")["ids"] == forge.load_tokenizer(LLAMA).encode("a")
    assert json_of(capsys, "generate", "a", "--max-tokens", "1")["finish_reason"] == "length"
    monkeypatch.setenv("FORGE_DEVICE", "tpu")
    code, line = failure(capsys, "generate", "a")
    assert (code, line.endswith("not 'tpu' (from FORGE_DEVICE)")) == (2, True)
    code, line = failure(capsys, "generate", "a", "--device", "cpu:3")
    assert "FORGE_DEVICE" not in line
    monkeypatch.setenv("FORGE_MODEL", "smolm2")
    monkeypatch.delenv("FORGE_DEVICE")
    code, line = failure(capsys, "generate", "a")
    assert (code, line.endswith("(from FORGE_MODEL)")) == (1, True)
    code, line = failure(capsys, "generate", "a", "-m", "smolm2")
    assert "FORGE_MODEL" not in line
    assert run(["generate", "--help"]) == 0
    out = capsys.readouterr().out
    assert "FORGE_MODEL" in out
    assert "FORGE_DEVICE" in out


def test_the_remark_on_the_device_is_made_when_it_is_news(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Captured
) -> None:
    def remarks(*args: str) -> list[str]:
        assert run(["generate", "a", "-m", LLAMA, "--max-tokens", "1", *args]) == 0
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("forge: device:")]

    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "cache"))
    assert remarks("--quiet") == []
    (line,) = remarks()
    assert len(line) <= 100
    assert remarks() == []
    note = tmp_path / "cache" / "device-note.txt"
    note.write_bytes(b"\xff another machine")
    assert len(remarks()) == 1
    note.unlink()
    note.mkdir()
    assert len(remarks()) == 1
    assert len(remarks("--device", "cpu")) == 0
    (tmp_path / "file").touch()
    monkeypatch.setenv("FORGE_CACHE", str(tmp_path / "file"))
    assert len(remarks()) == 1


@pytest.mark.parametrize("place", [0, 1, 4])
def test_quiet_leaves_failures_alone_on_stderr(place: int, capsys: Captured) -> None:
    args = ["generate", "a b", "-m", LLAMA, "--max-tokens", "2"]
    args.insert(place, "--quiet")
    assert run(args) == 0
    assert capsys.readouterr().err == ""
    assert run([*args, "--temperature", "-1"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    args.remove("--quiet")
    assert run(args) == 0  # it is not remembered
    assert "generated 2 tokens" in capsys.readouterr().err


def test_shells_complete_commands_options_and_models(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    def completions(*words: str) -> list[str]:
        monkeypatch.setenv("_FORGE_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", " ".join(words))
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        assert run([]) == 0
        return capsys.readouterr().out.split()

    assert completions("forge", "gen") == ["generate"]
    assert completions("forge", "generate", "--presence") == ["--presence-penalty"]
    assert completions("forge", "chat", "-m", "smol") == ["smollm2"]
    assert completions("forge", "chat", "-m", LLAMA[:-3]) == [LLAMA]
    assert completions("forge", "verify", "--device", "c") == ["cpu", "cuda"]
    monkeypatch.delenv("_FORGE_COMPLETE")
    assert run(["-h"]) == 0
    assert "--show-completion" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["file", "pipe", "dangling", "loop"])
@pytest.mark.parametrize("below", ["", "new/cache"])
def test_doctor_finds_a_cache_that_cannot_be_made(
    kind: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    {
        "file": place.touch,
        "pipe": lambda: os.mkfifo(place),
        "dangling": lambda: place.symlink_to("nowhere"),
        "loop": lambda: place.symlink_to("place"),
    }[kind]()
    monkeypatch.setenv("FORGE_CACHE", str(place / below))
    from forge.cli import doctor

    (found,) = [finding for finding in doctor.findings("cpu") if finding.what == "cache"]
    assert found.fix == f"make {place} writable, or set FORGE_CACHE to a directory that is"
