"""Shares of activation by context where there are many groups of documents, and the text of examples."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Pair

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig, cache_activations
from crosscoders.activations.scored import Tokens
from crosscoders.dictionary import selection
from crosscoders.training.feed import cache_inputs
from diffing.demo.command import context_text
from diffing.latents.command import scale
from diffing.latents.contexts import ContextSums, n_folded
from diffing.latents.settings import ScaleSettings
from diffing.latents.table import scale_run


def tokens_of(groups: list[int]) -> Tokens:
    n = len(groups)
    whole = torch.zeros(n, dtype=torch.int64)
    roles = torch.zeros(n, dtype=torch.uint8)  # plain text
    return Tokens(torch.zeros(n, 2, 3), whole, whole, whole, roles, torch.tensor(groups))


def summed(names: list[str], groups: list[int]) -> ContextSums:
    """Latent 0 is active with value 1 on every token."""
    counts = torch.bincount(torch.tensor(groups), minlength=len(names)).tolist()
    sums = ContextSums(2, names, counts)
    n = len(groups)
    latents = selection.Active(torch.arange(n), torch.zeros(n, dtype=torch.int64), torch.ones(n), n, 2)
    sums.add(latents, tokens_of(groups))
    return sums


def test_twelve_groups_keep_their_names() -> None:
    names = [f"g{i}" for i in range(12)]
    sums = summed(names, [*range(12), 3])
    assert sums.names == [*names, "template"] and sums.n_folded == 0
    assert float(sums.shares()[0, 3]) == pytest.approx(2 / 13)


@pytest.mark.parametrize("n_groups", [13, 40, 400])
def test_the_twelve_largest_of_more_groups_keep_their_names(n_groups: int) -> None:
    names = [f"g{i}" for i in range(n_groups)]
    large = list(range(1, 13))
    groups = [*range(n_groups), *large, *large]  # three tokens each, all others one
    sums = summed(names, groups)
    assert sums.names == [*(f"g{i}" for i in large), "other", "template"]
    assert sums.mass.shape == (2, 14) and sums.n_folded == n_groups - 12
    shares = dict(zip(sums.names, sums.shares()[0].tolist(), strict=True))
    assert shares["g1"] == pytest.approx(3 / len(groups))
    assert shares["other"] == pytest.approx((n_groups - 12) / len(groups)) and shares["template"] == 0


def test_a_group_that_is_called_other_is_among_the_others() -> None:
    names = ["other", *(f"g{i}" for i in range(12))]
    sums = summed(names, [0] * 50 + list(range(1, 13)))
    assert sums.names.count("other") == 1
    assert dict(zip(sums.names, sums.shares()[0].tolist(), strict=True))["other"] == pytest.approx(50 / 62)


def test_equal_groups_are_kept_in_their_order() -> None:
    assert summed([f"g{i}" for i in range(20)], list(range(20))).names[:12] == [f"g{i}" for i in range(12)]
    assert n_folded([f"g{i}" for i in range(20)]) == 8


# ------------------------------------------------------------------------------------------------ a cache of many files


@pytest.fixture(scope="module")
def many(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 latents, scaled on a cache of thirty text files; the first twelve are longest."""
    folder = tmp_path_factory.mktemp("many")
    (folder / "docs").mkdir()
    for i in range(30):
        text = "Return the sum \U0001f44d of a file. " * (3 if i < 12 else 1)
        (folder / f"docs/page_{i:02d}.txt").write_text(f"{text}{i}")
    cache_activations(pair.config(folder / "cache", data=str(folder / "docs"), n_tokens=806))  # all of them
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    crosscoder.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    cache = ActivationCache(folder / "cache")
    crosscoder.save(folder / "run", provenance=cache_inputs(cache))
    (folder / "run/eval.json").write_text(json.dumps({"rows": rows(0.9)}))
    scale_run(folder / "run", cache)
    return folder


def rows(fve: float) -> list[dict[str, Any]]:
    values = {"fve.base": fve, "l0": 6.0, "dead": 0.1}
    return [{"name": f"eval.{name}", "value": value, "unit": "fraction", "n": 88} for name, value in values.items()]


def test_a_file_is_a_column_only_where_it_is_one_of_twelve(many: Path) -> None:
    table = json.loads((many / "run/latents.json").read_text())
    shares = [name for name in table["columns"] if name.startswith("share_")]
    assert sorted(shares) == ["share_other", *(f"share_page_{i:02d}" for i in range(12))]
    assert table["n_folded_groups"] == 18
    for latent, n in enumerate(table["columns"]["n_active"]):
        mass = sum(table["columns"][name][latent] for name in [*shares, "template_share"])
        assert mass == pytest.approx(1.0 if n else 0.0)


def test_names_of_groups_stand_in_the_manifest_alone(many: Path) -> None:
    assert len(json.loads((many / "cache/manifest.json").read_text())["groups"]) == 30
    for name in ("run/config.json", "run/latents.json"):
        assert "page_29" not in (many / name).read_text()


def test_examples_show_characters_of_several_tokens_and_keep_an_entry_for_each(many: Path) -> None:
    by_latent = json.loads((many / "run/examples.json").read_text())["latents"]
    found = [example for examples in by_latent.values() for example in examples]
    assert found
    for example in found:
        text = "".join(example["tokens"])
        assert "\ufffd" not in text and len(example["tokens"]) == len(example["values"])
        assert text in "".join((many / f"docs/{example['group']}.txt").read_text())
        assert example["values"][example["peak"]] == example["value"]
    assert any("\U0001f44d" in example["tokens"] for example in found)


@pytest.mark.parametrize("fve, is_said", [(0.9, False), (0.3, True)])
def test_scale_says_of_a_bad_dictionary_that_it_must_not_be_read(
    many: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fve: float, is_said: bool
) -> None:
    run = shutil.copytree(many / "run", tmp_path / "run")
    (run / "eval.json").write_text(json.dumps({"rows": rows(fve)}))
    scale(ScaleSettings(run=str(run), cache=str(many / "cache")))
    said = capsys.readouterr().err
    assert ("warning: this dictionary must not be read yet" in said) is is_said
    assert "18 groups of documents are counted together as 'other'" in said


def test_the_demo_marks_a_character_whole() -> None:
    best = {"tokens": ["a", " \U0001f44d", "", "", " b", "\n"], "peak": 3}
    assert context_text([best]) == "a>> \U0001f44d<< b\u21b5"
    assert context_text([best | {"peak": 0}]) == ">>a<< \U0001f44d"  # three tokens follow
    assert context_text([]) == ""
