"""Runs to the hub and back, on a stand-in of its file API that keeps repositories as folders; and their cards."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import sae_lens.loading.pretrained_saes_directory as directory
import torch
from conftest import Pair
from explorer_runs import explorer_run
from fits import fit_config, gemma_scope
from huggingface_hub.errors import LocalEntryNotFoundError
from shared_saes import jumprelu
from transformers import AutoModelForCausalLM

from crosscoders import EnvironmentFault, InputError, load_crosscoder
from crosscoders.common.files import hash_file, write_json
from diffing import push_to_hub
from diffing.cli import main
from diffing.sharing.cards import LOADING, card, read_sharing
from sae_lora import fit, load_corrector, load_dictionary
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.topk import TopKLoRA

REPO = "someone/thing"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Repositories as folders OWNER/NAME; `private` lists those that were made so."""
    root = tmp_path / "hub"

    class Api:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            if repo_id.startswith("forbidden/"):
                raise PermissionError("403 Forbidden\nsecond line")
            (root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
            (root / repo_id / ".private").write_text(str(private))
            return f"https://hub.invalid/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True)

    def download(repo_id: str, filename: str) -> str:
        if not (root / repo_id / filename).is_file():
            raise LocalEntryNotFoundError(f"no {filename}")
        return str(root / repo_id / filename)

    def snapshot(repo_id: str, *, allow_patterns: list[str]) -> str:
        if not (root / repo_id).is_dir():
            raise OSError("no such repository")
        return str(root / repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(directory, "get_pretrained_saes_directory", dict)
    return root


@pytest.fixture(scope="module")
def run(cache_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = explorer_run(tmp_path_factory.mktemp("push") / "run", cache_folder)
    share = {"value": 0.5, "unit": "fraction", "n": 60, "low": 0.25, "high": 0.75}
    rows = [{"name": f"causal.base_to_tuned.{name}", **share} for name in ("all.share_closed", "all.kl")]
    write_json(folder / "causal.json", {"rows": rows, "latents": hash_file(folder / "latents.json")})
    write_json(folder / "run.json", {
        "format_version": 1, "command": "train",
        "config": {"crosscoder": {"dict_size": 24}, "lr": 0.01, "out": "/home/x/y"},
        "inputs": {"cache": {"path": "/home/x/cache", "n_tokens": 600, "hook_point": "blocks.1.hook_resid_post",
                             "base": {"name": "google/gemma-9"}, "tuned": {"name": "/home/x/my-tune"}}},
    })  # fmt: skip
    return folder


def written(hub: Path) -> str:
    return (hub / REPO / "README.md").read_text()


def test_a_crosscoder_comes_back_equal_with_a_private_card_made_from_its_run(run: Path, hub: Path) -> None:
    assert push_to_hub(run, REPO) == f"https://hub.invalid/{REPO}"
    assert (hub / REPO / ".private").read_text() == "True"
    loaded, original = load_crosscoder(REPO), load_crosscoder(run)
    for name, value in original.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    text = written(hub)
    assert "# Crosscoder of google/gemma-9 and my-tune" in text
    assert "base_model:\n- google/gemma-9\n" in text
    assert f'load_crosscoder("{REPO}")' in text and "at blocks.1.hook_resid_post" in text
    assert "| causal.base_to_tuned.all.share_closed | 0.5 | 0.25 to 0.75 | 60 | fraction |" in text
    assert "all.kl" not in text
    words = json.loads((run / "latents.json").read_text())["columns"]["verdict"]
    for word in set(words):
        assert f"| verdict.{word} | {words.count(word)} |  | 24 | latents |" in text


def test_no_path_of_this_machine_is_pushed(run: Path, hub: Path) -> None:
    push_to_hub(run, REPO)
    for path in (hub / REPO).iterdir():
        if path.suffix in (".md", ".json"):
            assert "/home/x" not in path.read_text() and str(run) not in path.read_text(), path.name


def test_causal_figures_of_an_earlier_table_are_left_out(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    write_json(tmp_path / "run" / "causal.json", {**json.loads((run / "causal.json").read_text()), "latents": "other"})
    assert "share_closed" in card(read_sharing(run), REPO)
    assert "share_closed" not in card(read_sharing(tmp_path / "run"), REPO)


def test_a_finetuned_sae_comes_back_equal(hub: Path, tmp_path: Path) -> None:
    folder = jumprelu(tmp_path / "twin")
    figure = {"name": "finetune-sae.after.fve", "value": 0.875, "unit": "fraction", "n": 500}
    write_json(folder / "finetune.json", {
        "config": {"sae": "google/scope/layer_1", "data": ["/home/x/text.jsonl"], "lr": 0.1},
        "model": {"name": "google/gemma-9"}, "rows": [figure],
    })  # fmt: skip
    push_to_hub(folder, REPO)
    loaded, original = load_dictionary(REPO), load_dictionary(folder)
    assert loaded.hook_point == original.hook_point
    x = torch.randn(5, 16)
    assert torch.equal(loaded.encode(x), original.encode(x))
    assert "| finetune-sae.after.fve | 0.875 |  | 500 | fraction |" in written(hub)
    assert '"text.jsonl"' in written(hub) and "/home/x" not in written(hub)


def test_an_adapter_around_a_dictionary_comes_back_equal(pair: Pair, hub: Path, tmp_path: Path) -> None:
    scope = gemma_scope(tmp_path / "scope")
    run = fit(fit_config(pair, scope), tmp_path / "fit")
    push_to_hub(run, REPO)
    load = lambda: AutoModelForCausalLM.from_pretrained(pair.tuned, dtype=torch.float32).eval()  # noqa: E731
    dictionary = load_dictionary(scope)
    here, there = (load_corrector(load(), folder, [dictionary]).model for folder in (run, REPO))
    ids = torch.tensor([[2, 7, 8, 9, 11]])
    with torch.no_grad():
        assert torch.equal(here(ids).logits, there(ids).logits)
    assert f'load_corrector(model, "{REPO}", dictionaries)' in written(hub)


def test_a_topk_lora_comes_back_equal(pair: Pair, hub: Path, tmp_path: Path) -> None:
    load = lambda: AutoModelForCausalLM.from_pretrained(pair.base, dtype=torch.float32).eval()  # noqa: E731
    adapter = TopKLoRA.attach(load(), TopKLoRAConfig(rank=4, k=2))
    generator = torch.Generator().manual_seed(0)
    for site in adapter.sites.values():
        site.W_out.data.copy_(torch.randn(site.W_out.shape, generator=generator))
    adapter.save(tmp_path / "run" / "adapter")
    write_json(tmp_path / "run" / "topk-run.json", {"config": {"base": pair.base, "tuned": pair.tuned, "rank": 4}})
    push_to_hub(tmp_path / "run", REPO)
    loaded = TopKLoRA.load(load(), REPO)
    for name, site in adapter.sites.items():
        assert torch.equal(loaded.sites[name].A, site.A) and torch.equal(loaded.sites[name].W_out, site.W_out)
    assert "Figures\n\nNone: the run has not been evaluated." in written(hub)


def test_loading_takes_three_lines() -> None:
    assert {kind: len(text.splitlines()) for kind, text in LOADING.items()} == dict.fromkeys(LOADING, 3)


def test_a_folder_to_look_at_uploads_nothing(run: Path, hub: Path, tmp_path: Path) -> None:
    assert main(["push", str(run), "--repo", REPO, "--out", str(tmp_path / "look")]) == 0
    assert not hub.exists()
    files = {path.name for path in (tmp_path / "look").iterdir()}
    assert files == {"README.md", "config.json", "model.safetensors", "latents.parquet"}
    assert load_crosscoder(tmp_path / "look").config.dict_size == 24


def test_what_cannot_be_pushed_is_one_line(
    run: Path, hub: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(EnvironmentFault, match=r"nothing was pushed to 'forbidden/x': 403 Forbidden Log in with"):
        push_to_hub(run, "forbidden/x")
    with pytest.raises(InputError, match="holds nothing to push"):
        push_to_hub(tmp_path, REPO)
    assert main(["push", str(run), "--repo", "thing"]) == 2
    assert "expected OWNER/NAME" in capsys.readouterr().err
    with pytest.raises(InputError, match="neither a folder nor a repository"):
        load_crosscoder("no/such")
