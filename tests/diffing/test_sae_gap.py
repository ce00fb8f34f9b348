"""`diffing sae-gap`: classes and sums by an independent route, differences on paper, and one run end to end."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import archive, pair_crosscoder

from crosscoders import Crosscoder, CrosscoderConfig, InputError
from crosscoders.models import hooks
from crosscoders.models.names import hash_model
from diffing import cli
from diffing.sae_gap.classes import CLASSES
from diffing.sae_gap.command import CELLS, gap_rows, gap_run, gap_summary, measure_gaps, roles_of
from diffing.sae_gap.settings import SaeGapSettings
from sae_lora.evaluation import cells
from sae_lora.fitting.inputs import load_dictionaries, load_model, make_plan
from sae_lora.lora.adapter import add_lora

POINT = "blocks.1.hook_resid_post"
CPU = torch.device("cpu")


def settings(pair: Any, dictionary: Path | str, **changes: object) -> SaeGapSettings:
    found: dict[str, object] = {
        "base": pair.base, "tuned": pair.tuned, "dictionary": str(dictionary), "data": pair.data, "heldout": pair.data,
        "n_tokens": 400, "eval_tokens": 500, "context_length": 60, "batch_rows": 4, "rank": 2, "lr": 1e-2, "out": "-",
    }  # fmt: skip
    return SaeGapSettings(**{**found, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def both(pair: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pair_crosscoder(tmp_path_factory.mktemp("cc") / "cc", pair)


def sae(folder: Path, model: str) -> Path:
    made = Crosscoder(CrosscoderConfig(dict_size=24, activation="relu", d_model=16, n_models=1)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    made.save(folder, provenance={"cache": {"hook_point": POINT, "base": {"name": model, "hash": hash_model(model)}}})
    return folder


def test_sums_by_class_equal_a_loop_over_tokens(pair: Any, tmp_path: Path) -> None:
    chosen = settings(pair, archive(tmp_path / "a.npz"), hook_point=POINT)
    config = chosen.fit_config(pair.tuned)
    plan = make_plan(chosen.eval_config(), pair.tuned, [(config.dictionary, POINT)])  # type: ignore[list-item]
    (dictionary,) = load_dictionaries(plan, config, CPU)
    adapted = add_lora(load_model(plan, config, CPU), [2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    measured = measure_gaps(adapted, [dictionary], plan, batch_rows=4, device=CPU)
    parts = [cells.Sums(measured.sums, measured.n_tokens), *measured.classes.values()]
    sums, n_tokens = np.stack([part.sums[:, :2] for part in parts]), np.stack([part.n_tokens for part in parts])
    words = ("text", "template", "user", "assistant", "system")
    wanted = np.zeros_like(sums)
    counts = np.zeros_like(n_tokens)
    has_answer = [bool((plan.rows.roles[a:b] == 3).any()) for a, b in spans(plan)]
    text, chat = has_answer.index(False), has_answer.index(True)
    for i in (text, chat):
        start, stop = spans(plan)[i]
        ids = torch.from_numpy(plan.rows.ids[start:stop]).long()[None]
        kept = torch.isin(ids, torch.tensor([0, 1, 2]))[..., None]

        def put(x: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            return torch.where(kept, x, dictionary(x.flatten(0, 1)).view_as(x))

        log_probs = []
        for cell in CELLS:
            with torch.no_grad(), hooks.replace(adapted, POINT, put if "spliced" in cell else lambda x: x):
                if cell.startswith("adapted"):
                    log_probs.append(adapted(input_ids=ids).logits[0].log_softmax(-1))
                else:
                    with adapted.disable_adapter():
                        log_probs.append(adapted(input_ids=ids).logits[0].log_softmax(-1))
        for t in range(1, ids.shape[1]):
            role = words[plan.rows.roles[start + t]]
            for c, names in enumerate((words, *CLASSES.values())):
                if role in names and int(ids[0, t]) != 2:
                    counts[c, i] += 1
                    for cell, log_q in enumerate(log_probs):
                        wanted[c, cell, 0, i] -= float(log_q[t - 1, ids[0, t]])
                        p = log_probs[0][t - 1]
                        wanted[c, cell, 1, i] += float((p.exp() * (p - log_q[t - 1])).sum())
        np.testing.assert_allclose(sums[..., i], wanted[..., i], rtol=1e-3, atol=1e-4)
        assert (n_tokens[:, i] == counts[:, i]).all()
    assert (counts[1:, chat] > 0).sum() == 3 and counts[4, text] == counts[0, text] > 0
    assert (n_tokens[0] == n_tokens[1:].sum(axis=0)).all()


def spans(plan: Any) -> list[tuple[int, int]]:
    return list(zip(plan.rows.offsets[:-1].tolist(), plan.rows.offsets[1:].tolist(), strict=True))


def test_differences_are_paired_over_sequences_and_right_on_paper() -> None:
    """Two classes of tokens. Every sequence of the tuned model has KL 0.3 above the base's, which varies a lot."""
    n = np.array([2, 4, 6, 8])
    level = np.array([1.0, 5.0, 0.5, 2.0])

    def gaps(extra: float) -> cells.Measured:
        sums = np.zeros((4, 3, 4))
        for cell, (ce, kl) in enumerate([(1.0, 0.0), (3.0, 2.0), (1.1, 0.1), (1.5, 0.5)]):
            sums[cell, :2] = np.array([[ce], [kl]]) * level * n + np.array([[0.0], [extra * (cell == 3)]]) * n
        classes = {name: cells.Sums(0 * sums, 0 * n) for name in CLASSES} | {"response": cells.Sums(sums, n)}
        return cells.Measured(sums, n, {}, classes=classes)

    found = {r["name"]: r for r in gap_rows({"base": gaps(0), "tuned": gaps(0.3), "placebo": gaps(0.1)})}
    mean = float((level * n).sum() / 20)
    base = found["sae-gap.base.response.kl.left"]
    assert base["value"] == pytest.approx(0.5 * mean) and base["n"] == 20 and base["low"] < base["value"] < base["high"]
    assert found["sae-gap.base.all.ce_gap.spliced"]["value"] == pytest.approx(2 * mean)
    assert found["sae-gap.base.all.kl.closed"]["value"] == pytest.approx(0.75)
    for name, value in (("tuned_minus_base", 0.3), ("placebo_minus_base", 0.1), ("tuned_minus_placebo", 0.2)):
        row = found[f"sae-gap.{name}.response.kl.left"]
        assert [row[key] for key in ("value", "low", "high")] == pytest.approx([value] * 3)  # the pairing shows
        assert found[f"sae-gap.{name}.response.kl.spliced"]["value"] == pytest.approx(0)
    assert not any(".text." in name or ".template." in name for name in found)  # no such tokens
    assert "tuned minus placebo" in gap_summary(list(found.values()))


def test_a_run_compares_base_tuned_and_placebo_on_the_same_tokens(
    pair: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = sae(tmp_path / "sae", pair.base)
    flags = ["sae-gap", "--base", pair.base, "--tuned", pair.tuned, "--placebo", pair.base, "--dictionary", str(made)]
    flags += ["--data", pair.data, "--heldout", pair.data, "--n-tokens", "300", "--eval-tokens", "400"]
    flags += ["--context-length", "60", "--rank", "2", "--lr", "1e-2", "--out", str(tmp_path / "out")]
    assert cli.main([*flags, "--json"]) == 0
    found = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert json.loads((tmp_path / "out" / "sae-gap.json").read_text())["rows"] == list(found.values())
    # The placebo here is the base itself: every difference is 0, every number equal.
    assert found["sae-gap.placebo_minus_base.all.kl.left"]["value"] == 0
    assert found["sae-gap.tuned_minus_base.all.kl.left"]["value"] != 0
    for role in ("base", "tuned"):
        closed = found[f"sae-gap.{role}.all.kl.closed"]
        assert 0 < closed["value"] < 1 and closed["n"] > 300
    sidecars = {
        role: json.loads((tmp_path / "out" / role / "adapter" / "splice.json").read_text())
        for role in ("base", "tuned")
    }
    assert [sidecars[role]["foreign_dictionary"] for role in ("base", "tuned")] == [False, True]
    assert cli.main(flags) == 0  # the fits are complete
    said = capsys.readouterr()
    assert "is complete already" in said.err and "tuned minus base" in said.out


def test_a_control_stands_in_every_model_in_the_fit_and_in_what_is_measured(pair: Any, tmp_path: Path) -> None:
    chosen = settings(
        pair, sae(tmp_path / "sae", pair.base), control="no-latents", out=str(tmp_path / "out"), layers=[2]
    )
    found = gap_run(chosen)["tuned"]
    sidecar = json.loads((tmp_path / "out" / "tuned" / "adapter" / "splice.json").read_text())
    assert sidecar["dictionaries"][0]["control"]["kind"] == "no-latents"
    plan = make_plan(chosen.eval_config(), pair.tuned, [(chosen.dictionary, None)], foreign=True)
    (dictionary,) = load_dictionaries(plan, chosen.fit_config(pair.tuned), CPU)
    constant = dictionary.decode(torch.zeros(1, 24))[0]
    model, total = load_model(plan, chosen.fit_config(pair.tuned), CPU), 0.0
    for start, stop in spans(plan):
        ids = torch.from_numpy(plan.rows.ids[start:stop]).long()[None]
        kept = torch.isin(ids, torch.tensor([0, 1, 2]))[..., None]

        def put(x: torch.Tensor, kept: torch.Tensor = kept) -> torch.Tensor:
            return torch.where(kept, x, constant)

        with torch.no_grad():
            p = model(input_ids=ids).logits[0].log_softmax(-1)
            with hooks.replace(model, POINT, put):
                q = model(input_ids=ids).logits[0].log_softmax(-1)
        kl = (p.exp() * (p - q)).sum(dim=1)[:-1]
        total += float(kl[torch.from_numpy(plan.rows.scored[start + 1 : stop])].double().sum())
    spliced = found.sums[CELLS.index("spliced"), 1].sum()
    assert spliced == pytest.approx(total, rel=1e-4) and spliced > 0


def test_a_crosscoder_gives_each_model_its_side_with_the_other_beside_it(
    pair: Any,
    both: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    configs = roles_of(settings(pair, both))
    assert {role: (c.side, c.model, c.other_model) for role, c in configs.items()} == {
        "base": ("base", pair.base, pair.tuned),
        "tuned": ("tuned", pair.tuned, pair.base),
    }
    flags = ["sae-gap", "--base", pair.base, "--tuned", pair.tuned, "--dictionary", str(both), "--data", pair.data]
    flags += ["--heldout", pair.data, "--n-tokens", "200", "--eval-tokens", "200", "--rank", "2", "--lr", "1e-2"]
    assert cli.main([*flags, "--out", str(tmp_path / "out"), "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)["rows"]}
    assert "sae-gap.tuned_minus_base.all.kl.left" in names


def test_wrong_dictionaries_are_one_line_before_any_fit(pair: Any, both: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no side for a placebo"):
        roles_of(settings(pair, both, placebo=pair.base))
    with pytest.raises(InputError, match="was not trained on the base model"):
        roles_of(settings(pair, sae(tmp_path / "of-tuned", pair.tuned)))
    with pytest.raises(InputError, match="rank is 0"):
        settings(pair, both, rank=0)
