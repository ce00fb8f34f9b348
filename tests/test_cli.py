"""The command line: the whole path on a tiny pair, one line for every wrong input, nothing heavy for --help."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Pair

from crosscoders import cli as crosscoders_cli
from crosscoders.common import files
from diffing import cli as diffing_cli
from sae_lora import cli as sae_lora_cli

HEAVY = (
    "torch",
    "transformers",
    "transformer_lens",
    "sae_lens",
    "peft",
    "datasets",
    "pandas",
    "plotly",
    "scipy",
    "pydantic",
)
TRAIN = (
    "--crosscoder.dict-size 24 --crosscoder.k 4 --n-tokens 3200 --batch-size 64 --lr 1e-2 --lr-warmup-steps 5 "
    "--log-every 10 --checkpoint-every 20 --threshold-start-step 5 --input-norm sqrt_d"
).split()


@pytest.fixture(scope="module")
def trained(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; do not write to it."""
    run = tmp_path_factory.mktemp("cli") / "run"
    assert (
        crosscoders_cli.main(
            ["train", "--cache", str(cache_folder), "--out", str(run), "--holdout-tokens", "88", *TRAIN]
        )
        == 0
    )
    return run


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr; there must be no traceback."""
    text = capsys.readouterr().err
    assert "Traceback" not in text
    last = text.strip().splitlines()[-1]
    assert last.startswith("error: ")
    return last


def test_the_whole_path_from_models_to_report(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache, run = str(tmp_path / "cache"), str(tmp_path / "run")
    assert crosscoders_cli.main([
        "cache", "--base", pair.base, "--tuned", pair.tuned, "--hook-point", "blocks.1.hook_resid_post",
        "--data", pair.data, "--n-tokens", "600", "--batch-rows=4", "--out", cache,
    ]) == 0  # fmt: skip
    assert crosscoders_cli.main(["train", "--cache", cache, "--out", run, "--eval-cache", cache, *TRAIN]) == 0
    assert diffing_cli.main(["scale", run]) == 0
    capsys.readouterr()
    assert crosscoders_cli.main(["eval", run, "--cache", cache, "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert set(evaluated) == {"name", "config", "environment", "rows"}
    names = {"fve.base", "fve.tuned", "fve_rest.base", "fve_rest.tuned", "l0", "dead"}
    assert {r["name"] for r in evaluated["rows"]} == {f"eval.{name}" for name in names}
    assert all(r["n"] == 600 for r in evaluated["rows"])
    assert diffing_cli.main(["report", run]) == 0
    page = Path(run, "report.html").read_text()
    assert "<html" in page and len(page) < 8_000_000
    table = json.loads(Path(run, "latents.json").read_text())
    assert len(table["columns"]["verdict"]) == 24 and table["n_tokens"] == 600
    assert sorted(table["columns"]["rank"]) == list(range(1, 25))
    shares = [table["columns"][name] for name in ("share_raw", "share_describe", "template_share")]
    for latent, n in enumerate(table["columns"]["n_active"]):
        assert abs(sum(column[latent] for column in shares) - (n > 0)) < 1e-9
    examples = json.loads(Path(run, "examples.json").read_text())["latents"]
    for rows in examples.values():
        assert [r["value"] for r in rows] == sorted((r["value"] for r in rows), reverse=True)
        assert len({r["document"] for r in rows}) == len(rows)
        for r in rows:
            assert r["values"][r["peak"]] == r["value"] == max(r["value"], *r["values"][r["peak"] : r["peak"] + 1])


def test_a_run_again_with_the_same_settings_changes_nothing(trained: Path, cache_folder: Path) -> None:
    before = (trained / "model.safetensors").read_bytes()
    assert (
        crosscoders_cli.main(
            ["train", "--cache", str(cache_folder), "--out", str(trained), "--holdout-tokens", "88", *TRAIN]
        )
        == 0
    )
    assert (trained / "model.safetensors").read_bytes() == before


def test_a_run_that_recorded_the_groups_of_its_cache_is_the_same_run(
    trained: Path, cache_folder: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    described = json.loads((run / "run.json").read_text())
    assert "groups" not in described["inputs"]["cache"]
    described["inputs"]["cache"]["groups"] = ["raw", "describe"]
    files.write_json(run / "run.json", described)
    assert (
        crosscoders_cli.main(
            ["train", "--cache", str(cache_folder), "--out", str(run), "--holdout-tokens", "88", *TRAIN]
        )
        == 0
    )


def test_settings_come_from_the_file_then_from_flags(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("preset: demo\ncrosscoder:\n  k: 7\nlr: 3e-4\ncache: x\nout: y\n")
    with pytest.raises(SystemExit) as stop:
        crosscoders_cli.main(["train", "--config", str(file), "--lr", "0.5", "--print-config"])
    assert stop.value.code == 0
    found = yaml.safe_load(capsys.readouterr().out)
    assert (found["lr"], found["crosscoder"]["k"], found["crosscoder"]["dict_size"]) == (0.5, 7, 1024)
    assert (found["batch_size"], found["cache"]) == (1024, "x")
    with pytest.raises(SystemExit):
        crosscoders_cli.main(["train", "--config", str(file), "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["lr"] == 3e-4


@pytest.mark.parametrize(
    "argv, force",
    [
        ([], False), (["--force"], True), (["--force", "--lr", "1"], True), (["--force", "false"], False),
        (["--force=false"], False), (["--force", "true"], True),
    ],
)  # fmt: skip
def test_a_switch_may_stand_alone(argv: list[str], force: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        crosscoders_cli.main(["train", "--cache", "x", "--out", "y", *argv, "--print-config"])
    assert yaml.safe_load(capsys.readouterr().out)["force"] is force


@pytest.mark.parametrize(
    "yaml_text, argv, line",
    [
        ("", ["--crosscoder.dictsize", "3"], r"unknown key 'dictsize' in [crosscoder]; did you mean 'dict_size'?"),
        ("", ["--learning-rat", "3"], "unknown key 'learning_rat'. --help lists all."),
        ("", ["--batchsize", "3"], "unknown key 'batchsize'; did you mean 'batch_size'?"),
        ("crosscoder:\n  dictsize: 3\n", [], "unknown key 'dictsize' in [crosscoder]; did you mean 'dict_size'?"),
        ("batch_sise: 3\n", [], "unknown key 'batch_sise'; did you mean 'batch_size'?"),
        ("", ["--lr", "fast"], "setting 'lr' is wrong: Expected a float. Got value: fast"),
        ("crosscoder:\n  k: many\n", [], "setting 'crosscoder.k' is wrong"),
        ("", ["--crosscoder.activation", "topk"], "setting 'crosscoder.activation' is wrong"),
        ("", ["--crosscoder.k", "0"], "crosscoder.k is 0; it must lie between 1 and dict_size = 16384"),
        ("", ["--crosscoder.k", "99999"], "crosscoder.k is 99999; it must lie between 1 and dict_size"),
        ("", ["--k-start", "500"], "k_start = 500 differs from crosscoder.k = 100 but k_anneal_steps is 0"),
        ("", ["--preset", "papr-l1"], "unknown preset 'papr-l1'; did you mean 'paper-l1'?"),
        ("a: [\n", [], "is not YAML"),
        ("- a\n", [], "holds no settings"),
    ],
)
def test_a_wrong_setting_is_one_line_with_status_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], yaml_text: str, argv: list[str], line: str
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml_text)
    config = ["--config", str(file)] if yaml_text else []
    assert crosscoders_cli.main(["train", "--cache", "x", "--out", "y", *config, *argv]) == 2
    assert line in error_line(capsys)


def test_missing_settings_commands_and_files_are_one_line(
    cache_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    cached = str(cache_folder)
    for argv, line in [
        (["train", "--cache", "x"], "out must be given"),
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train", "--config", "/no.yaml", "--cache", "x", "--out", "y"], "config file '/no.yaml' does not exist"),
        (["train", "--cache", str(tmp_path), "--out", str(tmp_path / "y")], "is not an activation cache"),
        (["eval", str(tmp_path), "--cache", cached], "holds no crosscoder"),
    ]:
        assert crosscoders_cli.main(argv) == 2
        assert line in error_line(capsys)
    assert diffing_cli.main(["scale", str(tmp_path)]) == 2
    assert "is not a run folder (no run.json), so its cache is unknown" in error_line(capsys)
    assert diffing_cli.main(["report", str(tmp_path)]) == 2
    assert "has no latents.json. Run: diffing scale" in error_line(capsys)


def test_exit_status_3_and_4_for_environment_and_corrupt_data(
    trained: Path, cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders.common import files

    with files.exclusive(tmp_path / "run"):
        assert (
            crosscoders_cli.main(["train", "--cache", str(cache_folder), "--out", str(tmp_path / "run"), *TRAIN]) == 3
        )
    assert "is being written by process" in error_line(capsys)
    shutil.copytree(cache_folder, tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 8
    shard.write_bytes(bytes(data))
    assert crosscoders_cli.main(["eval", str(trained), "--cache", str(tmp_path / "cache")]) == 4
    assert "shard-00000.safetensors does not match its checksum" in error_line(capsys)


def test_a_cache_of_another_width_or_pair_is_refused(
    trained: Path, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders import cache_activations

    other = cache_activations(pair.config(tmp_path / "other", hook_point="blocks.0.hook_resid_post", n_tokens=200))
    argv = ["train", "--cache", str(other.path), "--out", str(tmp_path / "r"), *TRAIN]
    assert crosscoders_cli.main([*argv, "--crosscoder.d-model", "17"]) == 2
    assert "the activations have d_model = 16 but the crosscoder config has 17" in error_line(capsys)
    assert crosscoders_cli.main([*argv, "--holdout-tokens", "190"]) == 2
    assert "holdout_tokens = 190 leaves 10 of 200 tokens" in error_line(capsys)


def test_help_and_config_errors_load_nothing_heavy() -> None:
    script = (
        "import sys\nfrom crosscoders import cli as a\nfrom diffing import cli as b\n"
        "for argv in ([], ['--help']): assert a.main(argv) == 0 and b.main(argv) == 0\n"
        "for main, name in ((a.main, 'cache'), (a.main, 'train'), (b.main, 'scale'), (b.main, 'demo')):\n"
        "    try: main([name, '--help'])\n"
        "    except SystemExit as stop: assert stop.code == 0\n"
        "assert a.main(['train', '--cache', 'x', '--out', 'y', '--crosscoder.k', '0']) == 2\n"
        f"print(sorted(set({HEAVY}) & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_says_of_every_command_what_must_be_given_and_no_word_of_the_parser(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for cli in (crosscoders_cli, sae_lora_cli, diffing_cli):
        for command in cli.COMMANDS:
            with pytest.raises(SystemExit):
                cli.main([*command.name.split(), "--help"])
            shown = capsys.readouterr().out
            assert not [word for word in ("SUPPRESS", ".help", "|VALUE", "TEXT|TEXT", "[[") if word in shown]
            for field in dataclasses.fields(command.settings):
                needed = field.default is field.default_factory is dataclasses.MISSING
                flag = f"--{field.name.replace('_', '-')} "
                assert not needed or flag in shown.split("must be given:")[1].split("\n\n")[0]


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import diffing.report.command

    def broken(settings: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(diffing.report.command, "report", broken)
    with pytest.raises(ZeroDivisionError):
        diffing_cli.main(["report", str(tmp_path)])


def test_wandb_gets_every_line_and_its_absence_is_one_line(
    cache_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import types

    logged: list[tuple[int, dict[str, float]]] = []
    asked: list[object] = []
    run = types.SimpleNamespace(log=lambda line, step: logged.append((step, line)), id="r1")
    init = lambda **settings: (asked.append(settings.get("id")), run)[1]  # noqa: E731
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    argv = ["train", "--cache", str(cache_folder), "--wandb", "project", *TRAIN]
    assert crosscoders_cli.main([*argv, "--out", str(tmp_path / "a")]) == 0
    lines = (tmp_path / "a" / "train.jsonl").read_text().splitlines()
    assert [step for step, _ in logged] == [json.loads(line)["step"] for line in lines]
    assert crosscoders_cli.main([*argv, "--out", str(tmp_path / "a")]) == 0
    assert asked == [None, "r1"], "the same command goes on with its run"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert crosscoders_cli.main([*argv, "--out", str(tmp_path / "b")]) == 3
    assert "--wandb needs the package wandb. Run: pip install" in error_line(capsys)


def test_a_cache_of_another_pair_or_hook_point_is_not_scaled_or_evaluated(
    trained: Path, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from crosscoders import cache_activations

    cache_activations(pair.config(tmp_path / "hook", hook_point="blocks.0.hook_resid_post", n_tokens=200))
    cache_activations(pair.config(tmp_path / "pair", base=pair.tuned, tuned=pair.base, n_tokens=200))
    for name, key in (("hook", "hook_point"), ("pair", "base")):
        for main, argv in ((crosscoders_cli.main, ["eval"]), (diffing_cli.main, ["scale"])):
            assert main([*argv, str(trained), "--cache", str(tmp_path / name)]) == 2
            assert f"has another {key} (" in error_line(capsys)


@pytest.mark.parametrize(
    "argv, line",
    [
        (["--clip-norm", "-1"], "clip_norm is -1"),
        (["--aux-coefficient", "-1"], "aux_coefficient is -1"),
        (["--threshold-beta", "5"], "threshold_beta is 5"),
        (["--adam-beta1", "2"], "adam_beta1 is 2"),
        (["--seed", "99999999999999999999999"], "seed is 99999999999999999999999"),
        (["--holdout-tokens", "1"], "holdout_tokens = 1 is too few"),
    ],
)
def test_numbers_out_of_range_are_refused(
    cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], line: str
) -> None:
    start = ["train", "--cache", str(cache_folder), "--out", str(tmp_path / "r")]
    assert crosscoders_cli.main([*start, *TRAIN, *argv]) == 2
    assert line in error_line(capsys)


def test_a_folder_as_the_file_of_results_is_refused_before_the_work(
    trained: Path,
    cache_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("crosscoders.training.command.load_crosscoder", lambda *a, **k: pytest.fail("it was loaded"))
    argv = ["eval", str(trained), "--cache", str(cache_folder), "--out", str(tmp_path)]
    assert crosscoders_cli.main(argv) == 2
    assert f"--out {str(tmp_path)!r} is a folder; the results are one JSON file" in error_line(capsys)


def test_next_lines_quote_odd_paths(cache_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(tmp_path / "a run; rm")
    assert crosscoders_cli.main(["train", "--cache", str(cache_folder), "--out", run, *TRAIN]) == 0
    assert f"next: diffing scale '{run}' --cache {cache_folder}" in capsys.readouterr().err
