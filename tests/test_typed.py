"""What people type and see: lists in several forms, the version, the command that is proposed next, what is printed."""

import shlex
import typing
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
import torch

from benchmarks.throughput.reading import write_plain_cache
from crosscoders import Crosscoder, CrosscoderConfig
from crosscoders import cli as crosscoders_cli
from crosscoders.activations.command import next_command
from crosscoders.common.command_line import parse
from crosscoders.common.words import as_parsed, with_lists
from diffing import cli as diffing_cli


class Lists(NamedTuple):
    latents: list[int] | None
    strengths: list[float]
    hook_point: str | list[str]
    layers: Literal["after", "all"] | list[int]
    n_latents: int | list[int]
    runs: list[str]
    out: str


@pytest.mark.parametrize(
    "typed, expected",
    [
        ("--latents 6 939", "--latents [6,939]"), ("--latents 6,939", "--latents [6,939]"),
        ("--latents=6,939", "--latents [6,939]"), ("--latents [6,939]", "--latents [6,939]"),
        ("--latents 6 --out a,b", "--latents [6] --out a,b"), ("--strengths -1 0.5,2", "--strengths [-1,0.5,2]"),
        ("--hook_point A", "--hook_point A"), ("--hook_point A B", '--hook_point ["A","B"]'),
        ("--hook_point A,B", '--hook_point ["A","B"]'),
        ("--layers all", "--layers all"), ("--layers 3", "--layers [3]"),
        ("--layers 3 4", "--layers [3,4]"), ("--n_latents 8", "--n_latents 8"),
        ("--n_latents 8 32", "--n_latents [8,32]"),
        ("--runs ./a,b c", '--runs ["./a,b","c"]'), ("RUN --latents 1", "RUN --latents [1]"),
    ],
)  # fmt: skip
def test_lists_are_taken_as_people_type_them(typed: str, expected: str) -> None:
    hints = typing.get_type_hints(Lists)
    assert [word.replace(", ", ",") for word in with_lists(typed.split(), hints)] == expected.split()


def test_a_command_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert crosscoders_cli.main(["--version"]) == diffing_cli.main(["--version"]) == 0
    assert capsys.readouterr().out == "crosscoders 0.1.0\ndiffing 0.1.0\n"


@pytest.mark.parametrize("n_tokens, preset, n_train", [(40_000, "demo", 2_000_000), (200_000, "demo", 2_457_600),
                                                       (20_000_000, "paper-batchtopk", 40_000_000),
                                                       (100_000_000, "paper-batchtopk", 200_000_000)])  # fmt: skip
def test_the_command_after_a_cache_is_one_that_its_tokens_can_feed(n_tokens: int, preset: str, n_train: int) -> None:
    words = next_command("my cache", n_tokens).split("train ")[1]
    train = next(command for command in crosscoders_cli.COMMANDS if command.name == "train")
    settings = parse("crosscoders", train, shlex.split(words)).settings
    assert settings.cache == "my cache" and settings.n_tokens == n_train and f"--preset {preset}" in words


def test_a_crosscoder_and_a_cache_say_what_they_are(tmp_path: Path) -> None:
    cc = Crosscoder(CrosscoderConfig(dict_size=2048, d_model=16, k=24))
    assert str(cc) == "Crosscoder(2,048 latents of 2 models, d_model=16, batchtopk, k=24)"
    assert "normaliser folded in" in str(cc.fold())
    said = str(write_plain_cache(tmp_path / "cache", torch.ones(1500, 2, 6).bfloat16()))
    assert said == (
        f"ActivationCache({str(tmp_path / 'cache')!r}: 1,500 tokens of none and none at blocks.0.hook_resid_post, "
        "d_model=6, bfloat16)"
    )


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("--n-tokens 10k", "--n_tokens 10000"),
        ("--n-tokens=1.5M", "--n_tokens=1500000"),
        ("--n-tokens 1e6", "--n_tokens 1000000"),
        ("--n_tokens 10,000", "--n_tokens 10000"),
        ("--n-tokens 10x", "--n_tokens 10x"),
        ("--lr 1e-3", "--lr 1e-3"),
        ("--latent 3,4", "--latents [3, 4]"),
        ("--l 3", "--l 3"),
        ("--methods pca", '--methods ["pca"]'),
    ],
)
def test_numbers_and_short_flags_are_taken_as_people_type_them(typed: str, expected: str) -> None:
    hints = {"n_tokens": int | None, "lr": float, "latents": list[int], "methods": list[str]}
    assert " ".join(as_parsed(typed.split(), hints, list(hints))) == expected
