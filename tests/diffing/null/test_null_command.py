"""Null models that are made, `diffing null` on tiny models, its file, and what it refuses."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Pair, make_model, make_tokenizer
from safetensors.torch import load_file
from test_cli import TRAIN, error_line

from crosscoders import (  # fmt: skip
    CorruptData,
    InputError,
    cache_activations,
)
from crosscoders import cli as crosscoders_cli
from crosscoders.common import files, memory
from crosscoders.text.documents import Document
from crosscoders.text.settings import DataSource
from diffing import cli as diffing_cli
from diffing.latents.nulls import counts_beside, read_nulls
from diffing.null import models
from diffing.null.settings import NullSettings


def test_rounding_to_8_bits_is_bfloat16() -> None:
    weight = torch.randn(5000, generator=torch.Generator().manual_seed(0)) * 10 ** torch.linspace(-6, 6, 5000)
    assert torch.equal(models.round_to_bits(weight, 8), weight.bfloat16().float())
    half = weight[1500:3500].half()
    assert models.round_to_bits(half, 8).dtype == torch.float16
    assert torch.equal(models.round_to_bits(half, 11), half)  # float16 has 11


@pytest.fixture(scope="module")
def scaled_run(pair: Pair, cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and scaled run on the tiny pair."""
    run = tmp_path_factory.mktemp("null") / "run"
    assert crosscoders_cli.main(["train", "--cache", str(cache_folder), "--out", str(run), *TRAIN]) == 0
    assert diffing_cli.main(["scale", str(run), "--n-tokens", "500"]) == 0
    return run


@pytest.fixture(scope="module")
def placebo(pair: Pair) -> str:
    """A null model: the base, moved less than the tuned one, without a chat template."""
    folder = pair.folder / "placebo"
    make_tokenizer(folder, template=False)
    make_model(folder, seed=2)
    return str(folder)


def null(run: Path, out: Path, *argv: str) -> int:
    return diffing_cli.main(["null", str(run), "--out", str(out), *argv])


def change_by_hand(base: str | Path, other: str | Path) -> float:
    """From the files themselves."""
    first, second = (load_file(Path(folder) / "model.safetensors") for folder in (base, other))
    before, after = (torch.cat([w[name].flatten().double() for name in sorted(first)]) for w in (first, second))
    return float((after - before).norm() / before.norm())


def test_the_command_on_tiny_models(
    pair: Pair, scaled_run: Path, placebo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    bar_labels: list[str],
) -> None:  # fmt: skip
    argv = ["--placebo", placebo, "--rounded-bits", "4", "--n-seeds", "2", "--rates", "[0, 0.2]"]
    out = tmp_path / "nulls"
    bar_labels.clear()
    assert null(scaled_run, out, *argv, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    # No two bars have the same words.
    assert len(set(bar_labels)) == len(bar_labels)
    assert {"cache, placebo", "cache, rounded", "train, tuned, seed 1", "scale, rounded, seed 0"} < set(bar_labels)
    found = json.loads((scaled_run / "null.json").read_text())
    kinds = [(entry["kind"], entry["seed"]) for entry in found["crosscoders"]]
    assert kinds == [("tuned", 0), ("tuned", 1), ("placebo", 0), ("placebo", 1), ("rounded", 0)]
    assert set(found["weight_change"]) == {"tuned", "placebo", "rounded"}
    assert found["weight_change"]["tuned"] == pytest.approx(change_by_hand(pair.base, pair.tuned), rel=1e-5)
    assert 0 < found["weight_change"]["rounded"] < 2**-4
    assert {row["rate"] for row in found["thresholds"]} == {0.0, 0.2} and found["n_tokens"] == 500
    rows = {row["name"]: row for row in printed["rows"]}
    assert rows["null.placebo.larger_ratio.zero.count"]["unit"] == "latents"
    assert rows["null.placebo.nu_error.percent_20.false_positive_rate"]["n"] == found["thresholds"][2]["n"]
    # The null crosscoder has the run's own settings, and its cache the run's tokens.
    settings = [json.loads((f / "run.json").read_text())["config"] for f in (scaled_run, out / "placebo" / "seed-0")]
    assert settings[0] == settings[1]
    tokens = [json.loads((out / kind / "cache" / "manifest.json").read_text()) for kind in ("placebo", "rounded")]
    assert tokens[0]["token_hash"] == tokens[1]["token_hash"] and tokens[0]["tokenizer_hash"]
    # Again: nothing is made twice, and the result is the same.
    before = (scaled_run / "null.json").read_bytes()
    weights = [file.stat().st_mtime_ns for file in sorted(out.rglob("*.safetensors"))]
    assert null(scaled_run, out, *argv) == 0
    assert "Thresholds that no null decided" in capsys.readouterr().out
    assert (scaled_run / "null.json").read_bytes() == before
    assert [file.stat().st_mtime_ns for file in sorted(out.rglob("*.safetensors"))] == weights
    # Scaling again gives the same table, and the counts of the nulls stand beside its own.
    assert diffing_cli.main(["scale", str(scaled_run), "--n-tokens", "500"]) == 0
    said = capsys.readouterr().err
    assert "no false-positive rate yet" not in said
    # The report: rate and null counts beside each count, until the table is made again.
    assert diffing_cli.main(["report", str(scaled_run)]) == 0
    page = (scaled_run / "report.html").read_text()
    assert "The same counts on null pairs" in page and "Against null pairs" in page
    count = found["thresholds"][0]["counts"]["tuned"][0]["count"]
    assert f"{count} latent" in page.split("Against null pairs")[1][:200]
    assert json.loads((scaled_run / "report.json").read_text())["nulls"]["seed"] == 0
    assert diffing_cli.main(["scale", str(scaled_run), "--n-tokens", "400"]) == 0
    assert f"no false-positive rate yet: diffing null {scaled_run}" in capsys.readouterr().err
    assert diffing_cli.main(["report", str(scaled_run)]) == 0
    assert "No count on this page has a false-positive rate" in (scaled_run / "report.html").read_text()
    assert diffing_cli.main(["scale", str(scaled_run), "--n-tokens", "500"]) == 0


@pytest.fixture(scope="module")
def raw_text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"The size of a table is the sum of line {i} and the word." for i in range(200)))
    return str(file)


def test_more_memory_than_there_is_is_refused_but_for_force(
    scaled_run: Path, placebo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(memory, "ram_room", lambda: memory.Room(50_000_000, 100_000_000))
    argv = ["--format-only", placebo, "--n-seeds", "1"]
    assert null(scaled_run, tmp_path, *argv) == 3
    assert error_line(capsys).endswith("--force goes on all the same.")
    assert null(scaled_run, tmp_path, *argv, "--force") == 0


def test_a_placebo_with_all_weights_learns_its_text_and_is_made_once(pair: Pair, raw_text: str, tmp_path: Path) -> None:
    def train(lr: float, text: str = raw_text) -> Path:
        recipe = models.Placebo(text, steps=12, lr=lr, rows=4)
        return models.train_placebo(pair.base, tmp_path / "model", recipe, context_length=64, seed=0, device="cpu")

    made = train(1e-2)
    assert mean_loss(pair.base, made, raw_text) < mean_loss(pair.base, None, raw_text) - 0.3
    before = (made / "model.safetensors").stat().st_mtime_ns
    assert train(1e-2) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"made with placebo_lr = 0\.01, now 0\.02\. Choose another --out"):
        train(2e-2)
    moved, other = Path(shutil.copy(raw_text, tmp_path / "moved.txt")), tmp_path / "other.txt"
    assert train(1e-2, str(moved)) == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before
    other.write_text(moved.read_text().replace("e", "a"))
    with pytest.raises(InputError, match=r"made with train_placebo = .*, now .*other\.txt"):
        train(1e-2, str(other))


def test_a_placebo_that_is_matched_moved_as_far_as_it_is_told(pair: Pair, raw_text: str, tmp_path: Path) -> None:
    recipe = models.Placebo(raw_text, steps=4, lr=1e-3, rows=2, change=0.25)
    made = models.train_placebo(pair.base, tmp_path / "model", recipe, context_length=64, seed=0, device="cpu")
    assert change_by_hand(pair.base, made) == pytest.approx(0.25, rel=1e-4)


def test_a_placebo_with_lora_is_a_null_of_the_pair(pair: Pair, scaled_run: Path, raw_text: str, tmp_path: Path) -> None:
    argv = ["--train-placebo", raw_text, "--placebo-steps", "6", "--placebo-lr", "3e-2", "--placebo-rows", "1"]
    assert null(scaled_run, tmp_path / "out", *argv, "--placebo-rank", "2", "--n-seeds", "1") == 0
    folder = tmp_path / "out" / "placebo" / "model"
    assert (folder / "adapter_config.json").is_file() and not (folder / "model.safetensors").exists()
    assert mean_loss(pair.base, folder, raw_text) < mean_loss(pair.base, None, raw_text) - 0.05
    manifest = json.loads((tmp_path / "out" / "placebo" / "cache" / "manifest.json").read_text())
    assert manifest["tuned"]["name"] == str(folder)
    found = json.loads((scaled_run / "null.json").read_text())
    assert not found["thresholds"][0]["held_out"]  # one seed: the rate is that of the crosscoder it was fixed on


def test_own_samples_are_drawn_from_the_base_itself_past_any_end(pair: Pair) -> None:
    model, tokenizer = models.load_base(pair.base, "float32")
    rows = models.sampled_rows(model, tokenizer, 3000, 3, seed=0)
    assert rows.shape == (3000, 3) and (rows[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(rows[:300], models.sampled_rows(model, tokenizer, 3000, 3, seed=0)[:300])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[2], [1]])).logits[:, 0]
    p, n = logits[0].softmax(dim=0).numpy(), len(rows)
    drawn = np.bincount(rows[:, 1].numpy(), minlength=len(p)) / n
    assert ((drawn - p) ** 2 / (p * (1 - p) / n)).mean() == pytest.approx(1, abs=0.4)  # chi-squared of 320 tokens
    for weight in model.parameters():
        weight.data.zero_()
    model.lm_head.weight.data[tokenizer.eos_token_id] = 0  # uniform, EOS among the rest
    after = models.sampled_rows(model, tokenizer, 3000, 3, seed=1)
    assert len(after[after[:, 1] == tokenizer.eos_token_id, 2].unique()) > 3  # goes on after EOS


def test_a_placebo_of_its_own_samples_keeps_the_loss_on_text(pair: Pair, raw_text: str, tmp_path: Path) -> None:
    recipe = models.Placebo(models.SELF, steps=12, lr=1e-3, rows=4)
    made = models.train_placebo(pair.base, tmp_path / "model", recipe, context_length=32, seed=0, device="cpu")
    assert json.loads((made / "made.json").read_text())["train_placebo"] == "self"
    assert mean_loss(pair.base, made, raw_text) == pytest.approx(mean_loss(pair.base, None, raw_text), abs=0.1)


def mean_loss(base: str, tuned: Path | None, text: str) -> float:
    """Next-token loss of a model on the first 512 tokens of a text."""
    import peft
    from transformers import AutoModelForCausalLM, AutoTokenizer

    adapter = tuned is not None and (tuned / "adapter_config.json").is_file()
    model: Any = AutoModelForCausalLM.from_pretrained(base if adapter or tuned is None else tuned)
    model = peft.PeftModel.from_pretrained(model, str(tuned)) if adapter else model
    ids = models.text_rows(AutoTokenizer.from_pretrained(base), text, 512, 1)
    with torch.no_grad():
        return float(model.eval()(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize(
    "argv, line",
    [
        ([], "no null is named that fixes a threshold. Give placebo, format_only or train_placebo"),
        (["--rounded-bits", "8"], "no null is named that fixes a threshold"),
        (["--placebo", "x", "--rates", "[1.5]"], "rates hold 1.5; give false-positive rates from 0 to below 1"),
        (["--placebo", "x", "--rates", "[]"], "rates are empty; give"),
        (["--placebo", "x", "--rounded-bits", "60"], "rounded_bits is 60; give a number from 2 to 24."),
        (["--placebo", "x", "--n-seeds", "0"], "n_seeds is 0; give a number from 1 to 1000."),
        (["--placebo", "x", "--train-placebo", "y"], "placebo and train_placebo name the same null. Give one"),
        (["--placebo", "x", "--placebo-lr", "1"], "placebo_lr has no effect without text. Give --train-placebo TEXT"),
        (["--placebo", "x", "--placebo-match", "true"], "placebo_match has no effect without text"),
        (
            ["--train-placebo", "y", "--placebo-match", "true", "--placebo-rank", "2"],
            "placebo_match scales a change of all weights, but placebo_rank makes an adapter",
        ),
        (["--train-placebo", "y"], "train_placebo needs placebo_steps. Take the value with which the tuned model"),
        (["--placebo", "./nowhere"], "model folder './nowhere' does not exist."),
    ],
)
def test_wrong_settings_are_one_line(
    argv: list[str], line: str, scaled_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert null(scaled_run, tmp_path, *argv) == 2
    assert line in error_line(capsys)
    assert not any(tmp_path.iterdir())


def test_models_that_are_no_null_of_the_pair_are_one_line(
    pair: Pair, scaled_run: Path, placebo: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    wide, other, words = (tmp_path / name for name in ("wide", "gpt2", "words"))
    for folder in (wide, other):
        make_tokenizer(folder)
    make_model(wide, seed=3, d_model=32)
    GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=16, n_layer=3, n_head=2)).save_pretrained(other)
    make_tokenizer(words, words=["entirely different words are in this text"] * 4)
    make_model(words, seed=3)
    for model, line in (
        (wide, "has d_model 16 but tuned"),
        (other, "is a gpt2 but the base"),
        (words, "the tokenizers differ"),
        (pair.tuned, "is the tuned model itself. Give another tune, without the behaviour."),
        (pair.base, "is the base itself"),
    ):
        assert null(scaled_run, tmp_path / "out", "--placebo", str(model)) == 2
        assert line in error_line(capsys)
    text = Path(pair.data).read_text()
    Path(pair.data).write_text(text.replace("must not be", "should never be"))
    status = null(scaled_run, tmp_path / "changed", "--placebo", placebo)
    Path(pair.data).write_text(text)
    assert status == 2 and "the data of cache" in error_line(capsys)
    # A null cache of another hook point, and a run that was never scaled or was scaled on something else.
    cache_activations(pair.config(tmp_path / "out2" / "placebo" / "cache", tuned=placebo, tokenizer=pair.tuned,
                                  hook_point="blocks.0.hook_resid_post"))  # fmt: skip
    assert null(scaled_run, tmp_path / "out2", "--placebo", placebo) == 2
    assert "holds a cache with another hook_point" in error_line(capsys)
    cache_activations(pair.config(tmp_path / "fewer", n_tokens=300))
    assert null(scaled_run, tmp_path / "out3", "--placebo", placebo, "--cache", str(tmp_path / "fewer")) == 2
    assert "was scaled on cache" in error_line(capsys)


def test_a_chat_or_too_little_text_is_no_placebo_text(pair: Pair, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    with pytest.raises(InputError, match="is a chat; a placebo is tuned on raw text only"):
        models.text_rows(tokenizer, pair.data, 16, 1000)
    (tmp_path / "short.txt").write_text("Return the name.")
    with pytest.raises(InputError, match=r"less than one row of 1,024\. Give more text"):
        models.text_rows(tokenizer, str(tmp_path / "short.txt"), 1024, 9)


def test_rows_of_a_placebo_text_that_cannot_be_read_are_left_out_and_counted(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    good = [json.dumps({"text": f"Return the name of file {i}."}) for i in range(60)]
    clean, broken, bad = (tmp_path / f"{name}.jsonl" for name in ("clean", "broken", "bad"))
    clean.write_text("\n".join(good))
    broken.write_text("\n".join([*good[:9], "{", '{"text": 3}', *good[9:]]))
    rows = models.text_rows(tokenizer, str(broken), 16, 1000)
    assert torch.equal(rows, models.text_rows(tokenizer, str(clean), 16, 1000))
    assert "left out 2 of 62 rows: 1 broken_json, 1 no_text" in capsys.readouterr().err
    bad.write_text("\n".join([*good, *["{"] * 8]))
    with pytest.raises(InputError, match=r"8 of 68 rows cannot be read, more than max_refused = 0\.1 admits"):
        models.text_rows(tokenizer, str(bad), 16, 1000)


def test_a_placebo_text_is_read_no_further_than_its_rows_need(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    tokenizer, n_read = AutoTokenizer.from_pretrained(pair.base), 0

    def endless(_: DataSource) -> Iterator[Document]:
        nonlocal n_read
        while n_read < 10_000:  # a stream that nobody reads to its end
            n_read += 1
            yield Document(f"Return the name of file {n_read}.", "text", "here")

    monkeypatch.setattr(models, "read_source", endless)
    rows = models.text_rows(tokenizer, "a stream", 16, 5)
    assert rows.shape == (5, 16) and n_read <= 5 * 16 + 1
    n_read = 0
    assert torch.equal(models.text_rows(tokenizer, "a stream", 16, 9)[:5], rows)


def test_rounding_that_changes_nothing_is_refused(pair: Pair, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has more than 24 significant bits\. Lower --rounded-bits"):
        models.round_model(pair.base, tmp_path / "rounded", 24)
    assert not (tmp_path / "rounded").exists()


def test_a_null_file_that_lacks_a_part_is_named(tmp_path: Path) -> None:
    counts = {kind: [{"seed": 0, "count": 2, "n": 90}] for kind in ("tuned", "placebo")}
    rate = {"false_positive_rate": 0.1, "low": 0.0, "high": 0.2, "n": 90}
    threshold = {
        **rate, "null": "placebo", "score": "larger_ratio", "rate": 0.01, "threshold": 0.2, "words": "below {}",
        "counts": counts, "held_out": True, "expected_false": 0.2, "expected_false_high": 4.0, "contexts": {"raw": 2},
        "latents": [4, 7],
    }  # fmt: skip
    (tmp_path / "latents.json").write_text("{}")
    whole: dict[str, Any] = {
        "format_version": 1, "latents": files.hash_file(tmp_path / "latents.json"), "seed": 0,
        "crosscoders": [{"kind": "tuned", "seed": 0}, {"kind": "placebo", "seed": 0}], "thresholds": [threshold],
        "fixed": [{"words": "verdict rotated", "counts": counts, "rates": {"placebo": rate}}],
        "curves": [{"score": "larger_ratio", "thresholds": [0.1, 0.2], "shares": {"tuned": [0.0, 0.1]}}],
    }  # fmt: skip
    (tmp_path / "null.json").write_text(json.dumps(whole))
    assert read_nulls(tmp_path) == whole
    unnamed = {key: value for key, value in threshold.items() if key != "score"}
    uncounted = threshold | {"counts": {"tuned": counts["tuned"]}}
    for changes, line in (
        ({"format_version": None}, "has format_version = None"),
        ({"format_version": 2}, "has format_version 2; this version reads 1"),
        ({"seed": "0"}, "has seed = '0'"),
        ({"thresholds": []}, "has thresholds = .* Restore it, or run diffing null again"),
        ({"thresholds": [unnamed]}, "has no 'thresholds.0.score'"),
        ({"thresholds": [uncounted]}, "not every crosscoder of the list is counted"),
        ({"fixed": [whole["fixed"][0] | {"counts": {"tuned": []}}]}, "has fixed.0.counts.tuned = "),
        ({"curves": []}, "no curve is of 'larger_ratio'"),
        ({"crosscoders": [{"kind": "<b>", "seed": 0}]}, "has crosscoders.0.kind = '<b>'"),
    ):
        (tmp_path / "null.json").write_text(json.dumps(whole | changes))
        with pytest.raises((InputError, CorruptData), match=line):
            read_nulls(tmp_path)


def test_a_verdict_that_calls_a_latent_specific_has_its_null_counts_beside_it() -> None:
    one = {"seed": 0, "n": 90}
    counts = {"tuned": [{**one, "count": 9}], "placebo": [{**one, "count": 2}, {**one, "seed": 1, "count": 5}]}
    found = {
        "crosscoders": [{"kind": "tuned"}, {"kind": "placebo"}, {"kind": "placebo"}],
        "fixed": [{"words": "verdict rotated", "counts": counts}, {"words": "something else", "counts": counts}],
    }
    assert counts_beside(found) == {"rotated": "placebo 2"}
    assert counts_beside({}) == {}


def test_settings_hold_what_the_command_needs() -> None:
    settings = NullSettings(run="a", out="b", placebo="c")
    assert settings.rates == [0.0, 0.01] and settings.n_seeds == 3
