"""What other programs call things is answered with what forge calls them."""

import pytest
import typer
from cli_runs import Captured, failure

from forge.cli import usage
from forge.cli.app import app


@pytest.mark.parametrize(
    ("args", "line"),
    [
        ("run smollm2", "No such command 'run': use forge chat (see forge --help)"),
        ("ls", "No such command 'ls': use forge list (see forge --help)"),
        ("kernels ls", "No such command 'ls': use forge kernels list (see forge kernels --help)"),
        ("kernels run", "No such command 'run'. (see forge kernels --help)"),
        ("genrate a", "No such command 'genrate'. Did you mean 'generate'? (see forge --help)"),
        ("inspect -m x", "No such option: -m: it is an argument: forge inspect FILE (see forge inspect --help)"),
        ("rm --model x", "No such option: --model: it is an argument: forge rm NAME (see forge rm --help)"),
        ("generate -p a", "No such option: -p: it is an argument: forge generate PROMPT (see forge generate --help)"),
        ("chat --prompt a", "No such option: --prompt: it is an argument: forge chat QUESTION (see forge chat --help)"),
        ("generate a -n 5", "No such option: -n: use --max-tokens (see forge generate --help)"),
        ("generate a -ncmoe 1", "No such option: -ncmoe: use --cpu-experts (see forge generate --help)"),
        ("generate a -n5 -ngl 1", "No such option: -n: use --max-tokens (see forge generate --help)"),
        ("generate a -ngl 1", "No such option: -ngl (see forge generate --help)"),
        ("chat a -sys b", "No such option: -sys: use --system (see forge chat --help)"),
        ("chat a --ctx-size 5", "No such option: --ctx-size: use --context (see forge chat --help)"),
        ("pull a --ctx-size 5", "No such option: --ctx-size (see forge pull --help)"),
        ("generate a --colour", "No such option: --colour (see forge generate --help)"),
    ],
)
def test_wrong_usage_is_answered_with_what_there_is(args: str, line: str, capsys: Captured) -> None:
    assert failure(capsys, *args.split()) == (2, f"forge: {line}")


def test_every_name_of_other_programs_leads_to_one_of_forge() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    assert set(usage._ELSEWHERE.values()) <= set(commands)
    assert not set(usage._ELSEWHERE) & set(commands)
    params = [param for command in commands.values() for param in command.params]
    flags = {flag for param in params for flag in param.opts}
    assert set(usage._OPTIONS_ELSEWHERE.values()) <= flags | {"--debug"}
    assert {name for names in usage._ARGUMENTS.values() for name in names} <= {
        param.metavar for param in params if param.param_type_name == "argument"
    }


def test_every_command_gives_its_errors_in_its_own_words() -> None:
    groups = [typer.main.get_command(app)]
    commands = [command for group in groups for command in group.commands.values()]  # type: ignore[attr-defined]
    nested = [command for group in commands if hasattr(group, "commands") for command in group.commands.values()]
    for command in [*commands, *nested]:
        assert isinstance(command, usage.Group if hasattr(command, "commands") else usage.Command), command.name
