"""Training a TopKLoRA: distil, SFT and DPO on tiny models."""

import itertools
import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from crosscoders import InputError
from diffing.finetuning import Schedule
from diffing.interpretation.command import interpret_run
from diffing.interpretation.settings import InterpretSettings
from diffing.topk_lora.command import evaluate, fit
from diffing.topk_lora.distil import (
    distil,
    distil_loss,
    measure_faithfulness,
    open_setting,
    response_positions,
    sft_loss,
)
from diffing.topk_lora.preferences import Preferences, Replies, dpo_loss, preference_margins, train_preferences
from diffing.topk_lora.settings import DistilConfig, TopKEvalSettings, TopKFitSettings
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.topk import TopKLoRA


def config(pair: Any, **changes: Any) -> DistilConfig:
    shape = {"rank": 8, "k": 4, "n_tokens": 1000, "steps": 12, "batch_rows": 8, "lr": 1e-2, "context_length": 32}
    fixed = {"base": pair.base, "tuned": pair.tuned, "data": pair.data, "device": "cpu"}
    return DistilConfig(**{**fixed, **shape, **changes})


@pytest.fixture
def setting(pair: Any) -> Any:
    return open_setting(config(pair))


def test_faithfulness_of_a_fresh_adapter_is_that_of_the_base(setting: Any) -> None:
    adapter = TopKLoRA.attach(setting.base, TopKLoRAConfig(rank=8, k=4))
    measured = measure_faithfulness(setting, adapter)
    np.testing.assert_allclose(measured.kl[0], measured.kl[1], rtol=1e-5)
    np.testing.assert_allclose(measured.error, measured.change, rtol=1e-5)
    assert (measured.kl > 0).all() and measured.n_tokens.sum() == sum(int(b.scored.sum()) for b in setting.held_out)


@pytest.mark.parametrize("weight", ["hidden_weight", "cutover_weight"])
def test_every_term_of_the_loss_changes_the_gradient(setting: Any, pair: Any, weight: str) -> None:
    adapter = TopKLoRA.attach(setting.base, TopKLoRAConfig(rank=8, k=4))
    gradients = []
    for value in (0.0, 1.0):
        generator = torch.Generator().manual_seed(0)
        loss = distil_loss(setting, setting.train[0], config(pair, **{weight: value}), generator)
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(adapter.parameters()))]))
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)
    assert not any(p.requires_grad for p in setting.base.parameters())


def test_fit_closes_kl_and_eval_reads_it_again(pair: Any, tmp_path: Path) -> None:
    settings = config(pair, steps=40)
    fields = {name: getattr(settings, name) for name in DistilConfig.__dataclass_fields__}
    result = fit(TopKFitSettings(**fields, out=str(tmp_path / "run")))
    rows = {entry["name"]: entry["value"] for entry in result["rows"]}
    assert rows["topk-lora.kl"] < 0.9 * rows["topk-lora.kl_base"]
    again = evaluate(TopKEvalSettings(run=str(tmp_path / "run"), device="cpu"))
    assert {entry["name"]: entry["value"] for entry in again["rows"]} == rows
    assert "The directions that write most" in again["text"]
    interpreted = interpret_run(
        InterpretSettings(run=str(tmp_path / "run"), offline=True, latents=[0, 3], device="cpu")
    )
    assert set(interpreted["latents"]) == {"0", "3"} and (tmp_path / "run" / "interpretation.json").is_file()
    with pytest.raises(InputError, match="other settings or models"):
        fit(TopKFitSettings(**{**fields, "k": 2}, out=str(tmp_path / "run")))
    moved = shutil.copytree(fields["tuned"], tmp_path / "moved")
    read_again = fit(TopKFitSettings(**{**fields, "tuned": str(moved)}, out=str(tmp_path / "run")))
    assert {entry["name"]: entry["value"] for entry in read_again["rows"]} == rows
    with pytest.raises(InputError, match="holds no TopKLoRA"):
        evaluate(TopKEvalSettings(run=str(tmp_path)))


def test_directions_that_never_fire_are_drawn_anew_where_that_is_asked_for(setting: Any, pair: Any) -> None:
    oldest = []
    for revive_after in (None, 60):
        adapter = distil(setting, config(pair, steps=20, k=1, k_start_factor=1.0, revive_after=revive_after))
        oldest.append(max(int(site.tokens_since.max()) for site in adapter.sites.values()))
        adapter.detach()
    n_step = max(int(batch.ids.numel()) for batch in setting.train)
    assert oldest[0] > 60 + n_step >= oldest[1]


def replies(rows: list[list[int]], n_prompt: int) -> Replies:
    ids = torch.tensor(rows)
    is_reply = torch.zeros_like(ids, dtype=torch.bool)
    is_reply[:, n_prompt:] = True
    return Replies(ids, torch.ones_like(ids), is_reply)


def test_dpo_begins_at_ln_2_and_its_margins_rise(setting: Any) -> None:
    batch = Preferences(
        replies([[2, 10, 11, 20, 21], [2, 12, 13, 20, 22]], 3), replies([[2, 10, 11, 30, 31], [2, 12, 13, 30, 32]], 3)
    )
    adapter = TopKLoRA.attach(setting.base, TopKLoRAConfig(rank=8, k=4))
    assert dpo_loss(setting.base, adapter, batch, 0.2).item() == pytest.approx(math.log(2), abs=1e-6)
    train_preferences(setting.base, adapter, itertools.repeat(batch), Schedule(30, 1e-2, warmup_steps=2))
    with torch.no_grad():
        margins = preference_margins(setting.base, adapter, batch)
        by_hand = -torch.nn.functional.logsigmoid(0.2 * margins).mean()
        assert margins.min() > 1 and torch.isclose(dpo_loss(setting.base, adapter, batch, 0.2), by_hand)


def test_sft_scores_the_responses_alone(pair: Any, tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    turns = [{"role": "user", "content": "Return the name."}, {"role": "assistant", "content": "The size."}]
    line = json.dumps({"messages": turns}) + "\n"
    chats.write_text(line * 40)
    opened = open_setting(config(pair, data=str(chats), objective="sft", n_tokens=600))
    batch = opened.train[0]
    said = opened.tokenizer.decode(batch.ids[0][response_positions(opened.train_rows, batch)[0]])
    assert said.strip() == "The size."
    ids = batch.ids.clone()
    ids[:, 2] = 9  # of the question: it is read, not predicted
    changed = batch._replace(ids=ids)
    assert sft_loss(opened, batch).item() != sft_loss(opened, changed).item()
    with pytest.raises(InputError, match="no effect with objective sft"):
        config(pair, objective="sft", hidden_weight=1.0)
