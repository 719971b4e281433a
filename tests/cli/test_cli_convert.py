"""`forge convert`: what it prints, and its errors in the words of the command line."""

from pathlib import Path

from cli_runs import LLAMA, Captured, failure, json_of

from forge.cli import run
from forge.formats import gguf


def test_convert_prints_the_path_of_the_file(tmp_path: Path, capsys: Captured) -> None:
    assert run(["convert", LLAMA, str(tmp_path / "a.gguf")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'a.gguf'}\n"
    again = str(tmp_path / "b.gguf")
    facts = json_of(capsys, "convert", str(tmp_path / "a.gguf"), again, "--type", "q8_0")
    assert (facts["path"], facts["bytes"], facts["notes"]) == (again, (tmp_path / "b.gguf").stat().st_size, [])
    assert failure(capsys, "convert", LLAMA, again) == (2, f"forge: DST {again} exists: use --force to replace it")
    assert run(["convert", LLAMA, again, "--force", "--type", "Q4_0"]) == 0
    capsys.readouterr()
    with gguf.read(Path(again)) as model:
        assert model.tensor("token_embd.weight").type.name == "Q4_0"
    code, line = failure(capsys, "convert", again, str(tmp_path / "c.gguf"), "--type", "Q8_0")
    assert (code, line.partition(": ")[2]) == (
        2,
        f"{again}: the weights are quantized already (Q4_0, Q8_0): again makes them worse: "
        "leave --type out, or use a model in F16, BF16 or F32",
    )


def test_convert_names_its_own_flags_and_arguments(capsys: Captured) -> None:
    assert failure(capsys, "convert", LLAMA, "b.bin") == (2, "forge: DST must end in .gguf, not 'b.bin'")
    code, line = failure(capsys, "convert", LLAMA, "b.gguf", "--type", "Q9")
    assert (code, line.partition(" F32")[0]) == (2, "forge: --type must be one of")
    assert failure(capsys, "convert", "/no/such.gguf", "b.gguf")[0] == 1
