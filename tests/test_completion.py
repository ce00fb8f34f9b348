"""Completion of the three programs, asked of a real bash."""

import shutil
import subprocess

import pytest

import crosscoders.cli
import diffing.cli
import sae_lora.cli

PROGRAMS = {"crosscoders": crosscoders.cli, "sae-lora": sae_lora.cli, "diffing": diffing.cli}
BASH = shutil.which("bash")


@pytest.fixture
def bash() -> str:
    pytest.importorskip("shtab", reason="shtab is not installed: pip install 'model-diffing[completion]'")
    if BASH is None:
        pytest.skip("no bash on this machine")
    return BASH


def completed(bash: str, script: str, words: list[str]) -> set[str]:
    """What bash offers for the last of the words."""
    asked = (
        f"COMP_WORDS=({' '.join(repr(word) for word in words)}); COMP_CWORD={len(words) - 1}\n"
        "compopt() { :; }\n"
        f"function=$(complete -p {words[0]} | sed 's/.*-F \\([^ ]*\\) .*/\\1/')\n"
        f'"$function" {words[0]} "${{COMP_WORDS[COMP_CWORD]}}" "${{COMP_WORDS[COMP_CWORD-1]}}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run([bash, "--norc", "-c", script + "\n" + asked], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "words, offered",
    [
        (["crosscoders", "tr"], {"train"}),
        (["sae-lora", "co"], {"compare"}),
        (["diffing", "topk-lora", ""], {"fit", "eval", "sets"}),
        (["diffing", "explore", "--mod"], {"--model-dtype"}),
        (["diffing", "explore", "--model-dtype", ""], {"auto", "float32", "bfloat16"}),
        (["diffing", "decompose", "--preset", ""], {"vpd-paper"}),
    ],
)
def test_bash_completes_commands_settings_and_choices(
    bash: str, capsys: pytest.CaptureFixture[str], words: list[str], offered: set[str]
) -> None:
    assert PROGRAMS[words[0]].main(["--print-completion", "bash"]) == 0
    assert completed(bash, capsys.readouterr().out, words) >= offered


def test_another_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert diffing.cli.main(["--print-completion", "fish"]) == 2
    assert "no completion for 'fish'; there is bash, zsh, tcsh." in capsys.readouterr().err
