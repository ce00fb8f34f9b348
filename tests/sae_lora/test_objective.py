"""The objective of a fit: identities, KL by independent routes, the published recipe, what is refused."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fits import POINT, D, Identity, adapter_weights, fit_config, gemma_scope, opened
from torch import Tensor

from crosscoders import InputError
from crosscoders.models import resume
from sae_lora import fit, splice
from sae_lora.fitting import objective
from sae_lora.lora.adapter import add_lora, lora_off


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma_scope(tmp_path_factory.mktemp("hub"))


def test_an_identity_dictionary_gives_no_kl_and_no_gradient(pair: Any, scope: Path) -> None:
    plan, model, dictionaries, batches = opened(fit_config(pair, scope))
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    for chosen, is_zero in (([Identity()], True), (dictionaries, False)):
        adapted.zero_grad()
        total = objective.batch_kl(adapted, chosen, batches[0], plan.keep_ids)
        total.backward()
        total = total.detach()
        largest = max(float(w.grad.abs().max()) for w in adapted.parameters() if w.grad is not None)
        assert (abs(float(total)) < 1e-6 and largest < 1e-6) == is_zero


def test_kl_in_chunks_equals_kl_at_once_and_torch() -> None:
    draw = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 11, D, generator=draw).unbind()
    W = torch.randn(D, 30, generator=draw)
    student.requires_grad_(True)

    def head(x: Tensor) -> Tensor:
        return torch.tanh(x @ W / 3) * 3

    wanted = torch.nn.functional.kl_div(head(student).log_softmax(1), head(teacher).softmax(1), reduction="sum")
    (gradient,) = torch.autograd.grad(wanted * 2, student)
    for chunk in (1, 4, 100):
        found = objective.kl_total(teacher, student, head, chunk)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(torch.autograd.grad(found * 2, student)[0], gradient)


def test_the_kl_of_a_batch_equals_that_of_whole_logits_without_padding(pair: Any, scope: Path) -> None:
    """Soft caps, padding and splice included; and never the logits of more than a chunk."""
    plan, model, dictionaries, batches = opened(fit_config(pair, scope))
    batch = next(batch for batch in batches if not batch.attention_mask.all())
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    used = batch.attention_mask.bool()
    with torch.no_grad(), lora_off(adapted):
        p = resume.logits(adapted, batch)[used]
    with splice(adapted, dictionaries, keep_ids=plan.keep_ids):
        q = resume.logits(adapted, batch)[used]
    wanted = torch.nn.functional.kl_div(q.log_softmax(1), p.softmax(1), reduction="sum")
    weights = [w for w in adapted.parameters() if w.requires_grad]
    slopes = torch.autograd.grad(wanted, weights)
    widths: list[int] = []
    head = adapted.get_base_model().lm_head
    handle = head.register_forward_hook(lambda _m, _a, out: widths.append(out.shape[0] * out.shape[1]))
    found = objective.batch_kl(adapted, dictionaries, batch, plan.keep_ids, chunk_tokens=5)
    handle.remove()
    torch.testing.assert_close(found, wanted)
    for slope, other in zip(torch.autograd.grad(found, weights), slopes, strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-4, atol=1e-6)
    assert max(widths) == 5 and float(wanted.detach()) > 0


def test_a_model_whose_logits_need_more_than_final_states_is_refused(
    pair: Any, scope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = fit_config(pair, scope)
    _, model, _, batches = opened(settings)
    resume.require_head(model, batches[0])
    real = type(model).forward

    def shifted(self: Any, input_ids: Tensor, **given: Any) -> Any:
        out = real(self, input_ids=input_ids, **given)
        out.logits = out.logits + input_ids.shape[1]
        return out

    monkeypatch.setattr(type(model), "forward", shifted)
    with pytest.raises(InputError, match="Gemma2ForCausalLM does not make its logits from its final hidden states"):
        fit(settings, tmp_path / "run")


def test_a_bfloat16_model_is_fitted_with_float32_weights_and_kl(pair: Any, scope: Path, tmp_path: Path) -> None:
    """What a GPU runs by default."""
    settings = fit_config(pair, scope, model_dtype="bfloat16")
    plan, model, dictionaries, batches = opened(settings)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    trained = [weight for weight in adapted.parameters() if weight.requires_grad]
    prefix = resume.find_prefix(adapted, POINT, batches[0])
    stored = objective.states(adapted, dictionaries[0], batches[0], plan.keep_ids)
    assert prefix is not None and {weight.dtype for weight in trained} == {torch.float32}
    found = []
    for known in ({}, {"prefix": prefix}, {"prefix": prefix, "stored": stored}):
        total = objective.batch_kl(adapted, dictionaries, batches[0], plan.keep_ids, **known)
        found.append([total.detach(), *torch.autograd.grad(total, trained)])
    for values in zip(*found, strict=True):
        assert all(torch.equal(values[0], value) for value in values[1:])
    exact_plan, exact, *_ = opened(fit_config(pair, scope))
    wanted = float(objective.batch_kl(exact, dictionaries, batches[0], exact_plan.keep_ids))
    assert found[0][0].dtype == torch.float32 and float(found[0][0]) == pytest.approx(wanted, rel=0.05)
    same = objective.batch_kl(adapted, [Identity()], batches[0], plan.keep_ids)
    assert float(same.detach()) == 0
    fit(settings, tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "train.jsonl").read_text().splitlines()]
    assert lines[-1]["kl"] < lines[0]["kl"]


def test_the_paper_recipe_equals_a_straightforward_loop(pair: Any, scope: Path, tmp_path: Path) -> None:
    """Published objective, step by step: batchmean KL over packed sequences, clip 1, AdamW; no dropout."""
    settings = fit_config(
        pair, scope, pack=True, batch_rows=2, loss="sum", alpha=2.0, n_tokens=320, lr=1e-3, clip_norm=1.0
    )
    folder = fit(settings, tmp_path / "run")
    _, model, (dictionary,), batches = opened(settings)
    assert {batch.ids.shape for batch in batches} == {(2, 40)} and len(batches) == 4
    target = re.compile(r"model\.layers\.2\..*_proj")
    loop_config = peft.LoraConfig(r=4, lora_alpha=2.0, target_modules=target.pattern, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    student = peft.get_peft_model(model, loop_config).eval()
    optimizer = torch.optim.AdamW([w for w in student.parameters() if w.requires_grad], lr=1e-3, weight_decay=0.01)
    layer = student.get_base_model().model.layers[1]
    for batch in batches:
        with torch.no_grad(), student.disable_adapter():
            p = student(input_ids=batch.ids).logits.softmax(-1)
        special = torch.isin(batch.ids, torch.tensor([0, 1, 2]))[..., None]
        handle = layer.register_forward_hook(
            lambda _m, _a, x, special=special: torch.where(special, x, dictionary(x.flatten(0, 1)).view_as(x))
        )
        q = student(input_ids=batch.ids).logits.log_softmax(-1)
        handle.remove()
        loss = torch.nn.functional.kl_div(q, p, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
    wanted = {name: w for name, w in student.state_dict().items() if "lora_" in name}
    found = {name.replace(".weight", ".default.weight"): w for name, w in adapter_weights(folder).items()}
    assert found.keys() == wanted.keys() and len(found) == 14
    for name, weight in wanted.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-3, atol=2e-5)
    assert max(float(w.abs().max()) for name, w in found.items() if "lora_B" in name) > 1e-3
