"""Sets of directions, on a model in which it is known which direction makes which reply."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from crosscoders import InputError
from crosscoders.models.names import load_auto
from crosscoders.text.settings import DataSource
from diffing.topk_lora import sets
from diffing.topk_lora.curves import curves, ranked
from diffing.topk_lora.prompts import given, margins, read_prompts, with_replies
from sae_lora.lora.settings import TopKLoRAConfig
from sae_lora.lora.topk import TopKLoRA

VOCABULARY, RANK = 12, 6
FIRST, SECOND, ANSWER, OTHER = 3, 4, 8, 9


class Planted(nn.Module):
    """Logits are a linear map of which tokens a prompt has held so far; without an adapter token 1 is said."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="planted")
        self.layers = nn.ModuleList([nn.ModuleDict({"map": nn.Linear(VOCABULARY, VOCABULARY, bias=False)})])
        nn.init.zeros_(self.layers[0]["map"].weight)  # type: ignore[index]

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        seen = torch.nn.functional.one_hot(input_ids, VOCABULARY).float().cumsum(dim=1).clamp_max(1)
        logits = self.layers[0]["map"](seen)  # type: ignore[index]
        return SimpleNamespace(logits=logits + torch.nn.functional.one_hot(torch.tensor(1), VOCABULARY))


@pytest.fixture
def planted() -> tuple[Planted, TopKLoRA]:
    """Directions 0 and 2 make the answer to FIRST, either alone is enough; 1 makes that to SECOND; others do little."""
    model = Planted()
    adapter = TopKLoRA.attach(model, TopKLoRAConfig(rank=RANK, k=None, gate="relu", alpha=RANK))
    (site,) = adapter.sites.values()
    with torch.no_grad():
        site.A.zero_()
        site.A[[0, 2], FIRST], site.A[1, SECOND] = 1.0, 1.0
        site.A[3:, FIRST] = site.A[3:, SECOND] = 0.5
        site.W_out.zero_()
        site.W_out[[0, 2], ANSWER], site.W_out[1, OTHER] = 4.0, 4.0
        site.W_out[3:, 5] = 0.2
    return model, adapter


def prompts(model: Any) -> Any:
    rows = [[2, FIRST, 5 + i] for i in range(3)] + [[2, SECOND, 5 + i, 6] for i in range(3)]
    return with_replies(model, rows, ["first"] * 3 + ["second"] * 3)


def test_the_planted_set_is_found_and_nothing_more(planted: tuple[Planted, TopKLoRA]) -> None:
    model, adapter = planted
    directions, read = sets.Directions(adapter), prompts(model)
    assert sorted(sets.find_set(model, directions, read, "first").tolist()) == [0, 2]  # type: ignore[union-attr]
    assert sets.find_set(model, directions, read, "second").tolist() == [1]  # type: ignore[union-attr]
    audit = sets.audit(model, directions, np.array([0, 2]), read, "first")
    assert (audit.left, audit.n, audit.kept, audit.kept_label) == (0, 3, 1, "second") and 0.5 < audit.left_high < 0.6
    assert sets.audit(model, directions, np.array([0]), read, "first").left == 1  # the other one is enough
    both = sets.audit(model, directions, np.array([0, 1, 2]), read, "first")
    assert both.left == 0 and both.kept == 0
    assert sets.find_set(model, directions, read, "first", max_directions=1, step=1) is None


def test_curves_fall_and_rise_with_the_planted_directions(planted: tuple[Planted, TopKLoRA]) -> None:
    model, adapter = planted
    directions, read = sets.Directions(adapter), prompts(model)
    assert set(ranked(model, directions, read, "first")[:2].tolist()) == {0, 2}
    points = {(p.curve, p.n_directions): p for p in curves(model, directions, read, read, "first", sizes=(1, 2))}
    assert [points["necessity", n].share for n in (1, 2)] == [1, 0]  # one of the two is enough
    assert [points["sufficiency", n].share for n in (1, 2)] == [1, 1]
    assert points["necessity", 2].random == 1 and points["necessity", 2].difference == -1


def test_replies_are_those_of_greedy_decoding(planted: tuple[Planted, TopKLoRA]) -> None:
    model, adapter = planted
    read = prompts(model)
    assert read.ids[0].tolist() == [2, FIRST, 5, *[ANSWER] * 6, 0] and read.ids[3].tolist() == [
        2,
        SECOND,
        5,
        6,
        *[OTHER] * 6,
    ]
    assert given(model, read).all()
    with adapter.disabled():
        assert not given(model, read).any()


def test_random_sets_write_as_much_and_are_others(planted: tuple[Planted, TopKLoRA]) -> None:
    mass = np.linspace(1, 2, 200)
    chosen = np.array([10, 100, 150])
    drawn = sets.matched(chosen, mass, np.random.default_rng(0))
    assert not set(drawn) & set(chosen) and len(set(drawn)) == 3
    assert np.abs(mass[np.sort(drawn)] - mass[chosen]).max() < 0.12
    model, adapter = planted
    written = sets.Directions(adapter).mass(model, prompts(model).take([0]))
    assert written[:3].tolist() == [4.0 * 7, 0, 4.0 * 7]  # one token that predicts, then six of the reply


def test_log_odds_have_a_gradient_where_a_reply_is_certain() -> None:
    logits = torch.zeros(1, 1, 5, requires_grad=True)
    certain = logits + 200.0 * torch.nn.functional.one_hot(torch.tensor(2), 5)
    odds = margins(certain, torch.tensor([[2]]))
    assert odds.item() == pytest.approx(200 - np.log(4), abs=1e-3)
    (of_odds,) = torch.autograd.grad(odds.sum(), logits, retain_graph=True)
    (of_log,) = torch.autograd.grad(certain.log_softmax(-1)[0, 0, 2], logits)
    assert of_odds.abs().max() > 0.9 and of_log.abs().max() == 0


def test_a_search_whose_objective_has_no_gradient_is_refused(
    planted: tuple[Planted, TopKLoRA], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, adapter = planted

    def clamped(logits: Tensor, tokens: Tensor) -> Tensor:  # as log odds that are cut off where a reply is certain
        return margins(logits, tokens).clamp(max=0.5)

    monkeypatch.setattr(sets, "margins", clamped)
    with pytest.raises(InputError, match="have no gradient"):
        sets.find_set(model, sets.Directions(adapter), prompts(model), "first")


@pytest.mark.parametrize("kind", ["svd", "random"])
def test_another_basis_computes_the_same(kind: str) -> None:
    model = Planted()
    adapter = TopKLoRA.attach(model, TopKLoRAConfig(rank=RANK, k=None, gate="none", alpha=RANK))
    (site,) = adapter.sites.values()
    nn.init.normal_(site.W_out, generator=torch.Generator().manual_seed(0))
    x = torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(1))
    before, basis = site.delta(x).detach(), site.W_out.detach().clone()
    sets.rotate_(adapter, kind, torch.Generator().manual_seed(2))
    torch.testing.assert_close(site.delta(x), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(site.W_out, basis)
    if kind == "svd":
        gram = site.W_out @ site.W_out.T
        torch.testing.assert_close(gram, gram.diagonal().diag(), rtol=0, atol=1e-4)


def test_a_gated_adapter_has_one_basis_only(planted: tuple[Planted, TopKLoRA]) -> None:
    with pytest.raises(InputError, match="one basis only"):
        sets.rotate_(planted[1], "svd", torch.Generator())


def test_a_prompt_is_a_chat_up_to_its_first_user_message(tmp_path: Path, pair: Any) -> None:
    system, asked, answer = (
        {"role": role, "content": text} for role, text in (("system", "Be"), ("user", "the"), ("assistant", "a"))
    )
    chats = [[system, asked, answer, asked], [asked, answer], [asked, answer, asked, answer], [answer]]
    rows = [json.dumps({"messages": chat, "group": "x"}) for chat in chats]
    (tmp_path / "chats.jsonl").write_text("\n".join(rows))
    tokenizer = load_auto(pair.base, "tokenizer")
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }} {{ m['content'] }}]{% endfor %}"
    ids, labels = read_prompts([DataSource(path=str(tmp_path / "chats.jsonl"))], tokenizer, per_label=5)
    expected = [
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("[system Be][user the]", "[user the]")
    ]
    assert ids == expected
    assert labels == ["x", "x"]
