"""`sae-lora finetune-sae`: what it writes loads in SAELens, is a better fit, and keeps every latent's number."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair
from shared_saes import POINT, SIZE, jumprelu

from crosscoders import Crosscoder, CrosscoderConfig, InputError
from diffing.sae.twins import alignment
from sae_lora import load_dictionary
from sae_lora.cli import main
from sae_lora.finetuning.layout import as_sae_lens
from sae_lora.finetuning.settings import FinetuneSaeSettings
from sae_lora.finetuning.training import finetune_sae


def run(pair: Pair, sae: Path, out: Path, *others: str) -> int:
    return main([
        "finetune-sae", "--model", pair.tuned, "--sae", str(sae), "--data", pair.data, "--out", str(out),
        "--n-tokens", "900", "--batch-tokens", "64", "--buffer-tokens", "256", "--lr", "1e-3", *others,
    ])  # fmt: skip


@pytest.fixture(scope="module")
def folders(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An SAE and its twin; do not write to them."""
    root = tmp_path_factory.mktemp("twins")
    sae = jumprelu(root / "sae")
    assert run(pair, sae, root / "twin") == 0
    return sae, root / "twin"


def test_the_twin_loads_in_sae_lens_and_in_our_reader_alike(folders: tuple[Path, Path]) -> None:
    from sae_lens import SAE

    theirs, ours = SAE.load_from_disk(folders[1], device="cpu"), load_dictionary(folders[1])
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    assert theirs.cfg.metadata.hook_name == POINT == ours.hook_point
    torch.testing.assert_close(theirs.decode(theirs.encode(x)), ours(x))


def test_a_fine_tune_lowers_the_error_on_tokens_that_it_did_not_see(folders: tuple[Path, Path]) -> None:
    described = json.loads((folders[1] / "finetune.json").read_text())
    value = {row["name"]: row["value"] for row in described["rows"]}
    assert value["finetune-sae.after.fve"] > value["finetune-sae.before.fve"]
    assert described["sae"]["hash"] == load_dictionary(folders[0]).identity()["hash"]


def test_latents_keep_their_numbers_and_thresholds(folders: tuple[Path, Path]) -> None:
    one, other = (load_dictionary(folder).sae for folder in folders)
    assert torch.equal(one.threshold, other.threshold)
    assert not torch.equal(one.W_dec, other.W_dec)
    assert alignment(one.W_dec.data, other.W_dec.data, 0).aligned == 1.0
    assert alignment(one.W_dec.data, other.W_dec.data.roll(1, dims=0), 0).aligned < 0.2


def test_sparsity_stays_what_it_was() -> None:
    """A ReLU SAE with many more latents than dimensions gains active latents if only reconstruction counts."""
    from sae_lens import StandardSAE, StandardSAEConfig

    generator = torch.Generator().manual_seed(0)
    W = torch.randn(60, 8, generator=generator)
    truth = torch.relu(torch.randn(6000, 60, generator=generator) - 2)
    x = truth @ W
    sae: Any = StandardSAE(StandardSAEConfig(d_in=8, d_sae=60, apply_b_dec_to_input=False))
    sae.load_state_dict({"W_enc": W.T * 0.2, "b_enc": -torch.ones(60), "W_dec": W * 0.5, "b_dec": torch.zeros(8)})
    from sae_lora.dictionaries.frozen import DictionaryInfo, SaeLens

    dictionary = SaeLens(DictionaryInfo("sae-lens", "", POINT, 8, 60, {"architecture": "standard"}), sae)
    settings = FinetuneSaeSettings(model="m", sae="s", out="o", data="d", batch_tokens=32, lr=3e-3)
    tuned = finetune_sae(as_sae_lens(dictionary), iter([x] * 5), 30_000, settings)
    assert tuned.after.l0 == pytest.approx(tuned.before.l0, rel=0.15)


def test_a_crosscoder_of_one_model_becomes_an_sae_with_the_same_numbers(tmp_path: Path) -> None:
    made = Crosscoder(CrosscoderConfig(dict_size=SIZE, k=4, d_model=16, n_models=1)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    made.threshold.fill_(0.3)
    made.input_scale.fill_(1.7)
    made.input_mean.fill_(0.2)
    made.save(tmp_path / "cc")
    source = load_dictionary(tmp_path / "cc", hook_point=POINT)
    converted = as_sae_lens(source)
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(converted.encode(x), source.encode(x))
    torch.testing.assert_close(converted(x), source(x))


def test_a_crosscoder_of_two_models_is_no_sae(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = Crosscoder(CrosscoderConfig(dict_size=SIZE, k=4, d_model=16))
    made.save(tmp_path / "cc")
    assert run(pair, tmp_path / "cc", tmp_path / "out", "--hook-point", POINT) == 2
    assert "reads two models" in capsys.readouterr().err


def test_a_folder_that_is_there_is_not_overwritten_unless_asked(
    pair: Pair, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    assert run(pair, folders[0], out) == 2
    assert "is there already" in capsys.readouterr().err and (out / "mine").exists()
    assert run(pair, folders[0], out, "--overwrite") == 0
    assert sorted(path.name for path in out.iterdir()) == ["cfg.json", "finetune.json", "sae_weights.safetensors"]


def test_an_sae_of_another_width_is_one_line(pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(pair, jumprelu(tmp_path / "sae", d_model=6), tmp_path / "out") == 2
    assert "has d_model 6 but model" in capsys.readouterr().err


def test_fewer_tokens_than_a_step_are_one_line(
    pair: Pair, folders: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(pair, folders[0], tmp_path / "out", "--batch-tokens", "2000") == 2
    assert "less than one step of 2000" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="lr"):
        FinetuneSaeSettings(model="m", sae="s", out="o", data="d", lr=0.0)
