"""End-to-end training of a TopK SAE equals a straightforward loop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import POINT, D, F, fit_config, gemma_scope, opened
from torch import Tensor

from crosscoders import InputError
from crosscoders.models import hooks
from sae_lora.fitting.end_to_end import train_end_to_end, trainable


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma_scope(tmp_path_factory.mktemp("hub"))


def training_sae(**changes: object) -> Any:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    torch.manual_seed(0)
    settings: dict[str, Any] = {"d_in": D, "d_sae": F, "k": 6, "apply_b_dec_to_input": True, **changes}
    return TopKTrainingSAE(TopKTrainingSAEConfig(**settings))


def with_weak_latents() -> Any:
    sae = training_sae()
    with torch.no_grad():
        sae.W_enc[:, : F // 2] *= 0.1  # often positive, hardly ever among the k largest
    return sae


@pytest.mark.parametrize("auxiliary", [0.0, 0.5])
def test_end_to_end_training_equals_a_straightforward_loop(pair: Any, scope: Path, auxiliary: float) -> None:
    plan, model, _, batches = opened(fit_config(pair, scope))
    make = with_weak_latents if auxiliary else training_sae
    dictionary, sae = trainable(make(), POINT), make()
    known = {"lr_at": lambda step: 1e-2 / (1 + step), "aux_coefficient": auxiliary, "dead_after_tokens": 1}
    steps = list(train_end_to_end(dictionary, model, batches, plan.keep_ids, **known))
    since_fired, n_revived = torch.zeros(F), 0
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    layer = hooks.decoder_layers(model)[1]
    for number, batch in enumerate(batches):
        p = model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits.detach().softmax(-1)
        special = torch.isin(batch.ids, torch.tensor([0, 1, 2]))[..., None]
        seen: list[Tensor] = []

        def put(_m: Any, _a: Any, x: Tensor, special: Tensor = special, seen: list[Tensor] = seen) -> Tensor:
            f = sae.encode(x)
            seen.extend((x[~special[..., 0]], f[~special[..., 0]]))
            return torch.where(special, x, sae.decode(f))

        handle = layer.register_forward_hook(put)
        q = model(input_ids=batch.ids, attention_mask=batch.attention_mask).logits.log_softmax(-1)
        handle.remove()
        kl = torch.nn.functional.kl_div(q, p, reduction="none").sum(-1)[batch.attention_mask.bool()].mean()
        assert steps[number].kl == pytest.approx(float(kl.detach()), rel=1e-4)
        optimizer.param_groups[0]["lr"] = 1e-2 / (1 + number)
        optimizer.zero_grad()
        loss, dead = kl, (since_fired >= 1).nonzero()[:, 0].tolist()
        if auxiliary and dead:
            x, f = seen
            err = (x - sae.decode(f)).detach()
            pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
            if sae.cfg.rescale_acts_by_decoder_norm:
                pre = pre * sae.W_dec.norm(dim=1)
            missed = torch.zeros(())
            for t in range(len(x)):
                first = sorted(dead, key=lambda j, t=t: -pre[t, j].item())[: D // 2]
                z = torch.zeros(F).index_put((torch.tensor(first),), pre[t, first].relu())
                missed = missed + (err[t] - (sae.decode(z[None]) - sae.decode(0 * z[None]))[0]).square().sum()
                n_revived += int((z > 0).sum())
            loss = kl + auxiliary * missed / (err - err.mean(dim=0)).square().sum()
        since_fired = torch.where((seen[1] > 0).any(dim=0), 0, since_fired + len(seen[0]))
        loss.backward()
        assert all(w.grad is not None and float(w.grad.abs().max()) > 0 for w in sae.parameters())
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
    assert len(steps) == len(batches)
    start = dict(make().named_parameters())
    for (name, found), wanted in zip(dictionary.sae.named_parameters(), sae.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=2e-4)
        assert float((found - start[name]).abs().max().detach()) > 1e-3  # every parameter moves
    assert (n_revived > 100) == bool(auxiliary)
    assert all(weight.grad is None for weight in model.parameters())


def test_end_to_end_training_lowers_the_kl(pair: Any, scope: Path) -> None:
    plan, model, _, batches = opened(fit_config(pair, scope))
    dictionary = trainable(training_sae(), POINT)
    steps = list(train_end_to_end(dictionary, model, batches[:1] * 30, plan.keep_ids, lr_at=lambda _: 1e-2))
    assert steps[-1].kl < 0.7 * steps[0].kl


def test_an_sae_whose_sparsity_needs_a_term_is_not_trained_end_to_end() -> None:
    from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig

    with pytest.raises(InputError, match="only 'topk' is"):
        trainable(StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D, d_sae=F)), POINT)
