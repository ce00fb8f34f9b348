"""Adapters: which layers get one, on and off, the folder and its sidecar, what is refused."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from fits import POINT, Identity, fit_config, gemma_scope, opened
from transformers import AutoModelForCausalLM

from crosscoders import CorruptData, InputError
from crosscoders.models import resume
from sae_lora import fit, splice
from sae_lora.cli import main
from sae_lora.dictionaries.loading import load_dictionary
from sae_lora.lora.adapter import add_lora, choose_layers, load_adapter, lora_off
from sae_lora.lora.sidecar import SIDECAR, read_sidecar


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma_scope(tmp_path_factory.mktemp("hub"))


def test_lora_is_off_inside_and_on_again_after_nesting_and_errors(pair: Any, scope: Path) -> None:
    _, model, _, (batch, *_) = opened(fit_config(pair, scope))
    plain = resume.logits(model, batch)
    adapted = add_lora(model, [0, 2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    on = resume.logits(adapted, batch)
    assert not torch.allclose(on, plain, atol=1e-3)
    with pytest.raises(ValueError, match="planted"), lora_off(adapted):
        with lora_off(adapted):
            torch.testing.assert_close(resume.logits(adapted, batch), plain)
        torch.testing.assert_close(resume.logits(adapted, batch), plain)  # the inner one does not end the outer
        raise ValueError("planted")
    assert torch.equal(resume.logits(adapted, batch), on)
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}


def test_only_layers_after_the_dictionary_are_adapted_unless_asked(pair: Any, scope: Path) -> None:
    plan, *_ = opened(fit_config(pair, scope))
    assert choose_layers("after", plan.infos, 3) == [2] and choose_layers("all", plan.infos, 3) == [0, 1, 2]
    assert choose_layers([2, 0], plan.infos, 3) == [0, 2]
    with pytest.raises(InputError, match="layers has 3"):
        choose_layers([3], plan.infos, 3)
    with pytest.raises(InputError, match="no layer is after"):
        choose_layers("after", plan.infos, 2)


@pytest.fixture(scope="module")
def fitted(pair: Any, scope: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fit(fit_config(pair, scope), tmp_path_factory.mktemp("fit") / "run")


def copied(fitted: Path, to: Path) -> Path:

    return Path(shutil.copytree(fitted, to))


def test_plain_peft_reads_the_adapter_to_equal_logits(pair: Any, scope: Path, fitted: Path) -> None:
    load = lambda: AutoModelForCausalLM.from_pretrained(pair.tuned, dtype=torch.float32).eval()  # noqa: E731
    ids = torch.tensor([[2, 7, 8, 9, 11]])
    dictionary = load_dictionary(scope)
    ours, plain = load_adapter(load(), fitted, [dictionary]), peft.PeftModel.from_pretrained(load(), fitted).eval()
    with splice(ours, dictionary), splice(plain, dictionary):
        assert torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)
        with ours.disable_adapter():
            assert not torch.equal(ours(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_the_sidecar_names_dictionary_positions_and_model(scope: Path, fitted: Path) -> None:
    sidecar = read_sidecar(fitted.parent)
    (entry,) = sidecar["dictionaries"]
    assert entry["hash"] == load_dictionary(scope).content_hash()
    assert (entry["hook_point"], entry["dtype"], sidecar["layers"]) == (POINT, "float32", [2])
    assert sidecar["kept_positions"] == {"padding": True, "token_ids": [0, 1, 2]}


def test_adapters_without_their_dictionary_are_refused(pair: Any, scope: Path, fitted: Path, tmp_path: Path) -> None:
    model, dictionary = torch.nn.Linear(1, 1), load_dictionary(scope)
    with pytest.raises(InputError, match="needs a dictionary at"):
        load_adapter(model, fitted, [])
    with pytest.raises(InputError, match="was fitted around"):
        load_adapter(model, fitted, [Identity()])
    with pytest.raises(InputError, match="knows no dictionary at"):
        load_adapter(model, fitted, [dictionary, Identity("blocks.0.hook_resid_post")])
    bare = copied(fitted, tmp_path / "bare")
    (bare / SIDECAR).unlink()
    with pytest.raises(InputError, match=r"an adapter without splice\.json"):
        load_adapter(model, bare, [dictionary])
    changed = copied(fitted, tmp_path / "changed")
    data = bytearray((changed / "adapter_model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "adapter_model.safetensors").write_bytes(data)
    with pytest.raises(CorruptData, match="is not the file that"):
        load_adapter(model, changed, [dictionary])
    with pytest.raises(InputError, match="holds no adapter"):
        read_sidecar(tmp_path)


def test_wrong_input_is_one_line_before_the_model_loads(
    pair: Any, scope: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)
    narrow = tmp_path / "narrow.npz"
    np.savez(
        narrow, W_enc=np.ones((3, 4)), W_dec=np.ones((4, 3)), b_enc=np.ones(4), b_dec=np.ones(3), threshold=np.ones(4)
    )
    fits = ["fit", "--model", pair.tuned, "--data", pair.data, "--n-tokens", "100", "--out", str(tmp_path / "o")]
    at = ["--hook-point", POINT]
    for flags, said in (
        ([*fits, "--dictionary", str(narrow), *at], "d_model 3 but model"),
        ([*fits, "--dictionary", str(narrow)], "does not say its hook point"),
        ([*fits, "--dictionary", str(scope), "--layers", "[7]"], "layers has 7"),
        ([*fits, "--dictionary", str(scope), "--rank", "0"], "rank is 0"),
        ([*fits, "--dictionary", str(scope), "--store", "disk"], "disk needs a folder"),
        ([*fits, "--dictionary", f'["{scope}", "{scope}"]'], "two dictionaries sit at"),
        ([*fits, "--dictionary", str(scope), "--hook-point", f'["{POINT}", "{POINT}"]'], "1 dictionaries and 2 hook"),
        ([*fits, "--dictionary", str(scope), "--side", "base"], "is for crosscoders"),
        ([*fits, "--dictionary", str(tmp_path / "none")], "there is no dictionary"),
        (["eval", str(tmp_path), "--data", pair.data], "holds no adapter"),
        (["eval", str(fitted), "--data", pair.data, "--n-tokens", "100", "--model", pair.base], "is not the one that"),
    ):
        assert main(flags) == 2
        captured = capsys.readouterr().err.strip().splitlines()
        assert said in captured[-1] and captured[-1].startswith("error: "), captured
