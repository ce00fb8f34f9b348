"""`--help` of every command: an example that is taken, what must be given, plain words, 80 columns."""

import shlex

import pytest

from crosscoders import cli as crosscoders_cli
from crosscoders.common.command_line import Command, parse
from crosscoders.common.help import plain
from diffing import cli as diffing_cli
from sae_lora import cli as sae_lora_cli

PROGRAMS = {"crosscoders": crosscoders_cli, "diffing": diffing_cli, "sae-lora": sae_lora_cli}
COMMANDS = [(program, command) for program, cli in PROGRAMS.items() for command in cli.COMMANDS]


def help_of(program: str, command: Command, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(program, command, ["--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("program, command", COMMANDS, ids=[f"{p}-{c.name}" for p, c in COMMANDS])
def test_help_has_an_example_that_the_command_takes_and_fits_a_terminal(
    program: str, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(program, command, capsys)
    assert max(map(len, text.splitlines())) <= 80
    words = shlex.split(text.split("example: ")[1].split("\n\n")[0].replace("\\\n", " "))
    assert words[: 1 + len(command.name.split())] == [program, *command.name.split()]
    parse(program, command, words[1 + len(command.name.split()) :])


def test_help_shows_positionals_topics_and_flags_as_they_are_typed(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of("diffing", next(c for _, c in COMMANDS if c.name == "causal"), capsys)
    assert text.startswith("usage: diffing causal RUN [--SETTING VALUE ...]\n")
    for line in ("must be given:", "  RUN, or --run TEXT", "settings:", "  --n-latents N ...", "of every command:"):
        assert line in text.splitlines()
    assert "Optional" not in text and "<class" not in text and "--n_" not in text


def test_types_are_in_words() -> None:
    assert [plain(kind) for kind in (int, float | None, str | list[str], list[int], bool)] == [
        "N", "NUMBER", "TEXT ...", "N ...", ""
    ]  # fmt: skip
