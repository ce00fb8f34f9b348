"""Cells of an evaluation: an independent route for every number, shares and intervals on paper."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import POINT, fit_config, gemma_scope, opened
from torch import Tensor

from crosscoders.models import hooks
from sae_lora.evaluation import cells
from sae_lora.lora.adapter import add_lora


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma_scope(tmp_path_factory.mktemp("hub"))


def test_every_cell_equals_a_plain_loop(pair: Any, scope: Path) -> None:
    plan, model, (dictionary,), batches = opened(fit_config(pair, scope))
    adapted = add_lora(model, [0, 2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.05)
    n = len(plan.rows.offsets) - 1
    found = cells.measure(adapted, [dictionary], lambda: iter(batches), n, plan.keep_ids)
    spliced = lambda x: dictionary(x.flatten(0, 1)).view_as(x)  # noqa: E731
    xs = []
    for i in range(n):
        ids = torch.from_numpy(plan.rows.ids[plan.rows.offsets[i] : plan.rows.offsets[i + 1]]).long()[None]
        with torch.no_grad(), adapted.disable_adapter(), hooks.capture(adapted, [POINT]) as seen:
            adapted(input_ids=ids)
        xs.append(seen[POINT][~torch.isin(ids, torch.tensor([0, 1, 2]))])
    mean = torch.cat(xs).mean(dim=0)
    edits = {"zero_ablated": torch.zeros_like, "mean_ablated": mean.expand_as}
    for i in (0, 5, n - 1):
        ids = torch.from_numpy(plan.rows.ids[plan.rows.offsets[i] : plan.rows.offsets[i + 1]]).long()[None]
        special = torch.isin(ids, torch.tensor([0, 1, 2]))[..., None]
        assert found.n_tokens[i] == ids.shape[1] - 1
        log_p = None
        for c, cell in enumerate(cells.CELLS):
            edit = (lambda x: x) if cell in ("plain", "adapted") else edits.get(cell, spliced)

            def keep(x: Tensor, edit: Any = edit, special: Tensor = special) -> Tensor:
                return torch.where(special, x, edit(x))

            with torch.no_grad(), hooks.replace(adapted, POINT, keep):
                if cell.startswith("adapted"):
                    loss = adapted(input_ids=ids, labels=ids).loss
                    log_q = adapted(input_ids=ids).logits[0, :-1].log_softmax(-1)
                else:
                    with adapted.disable_adapter():
                        loss = adapted(input_ids=ids, labels=ids).loss
                        log_q = adapted(input_ids=ids).logits[0, :-1].log_softmax(-1)
            log_p = log_q if log_p is None else log_p
            kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
            top1 = (log_p.argmax(-1) == log_q.argmax(-1)).sum()
            wanted = [float(loss) * (ids.shape[1] - 1), float(kl), float(top1)]
            np.testing.assert_allclose(found.sums[c, :, i], wanted, rtol=2e-4, atol=2e-4, err_msg=cell)


def test_an_adapter_with_b_zero_leaves_both_cells_as_they_are(pair: Any, scope: Path) -> None:
    plan, model, dictionaries, batches = opened(fit_config(pair, scope))
    n = len(plan.rows.offsets) - 1
    adapted = add_lora(model, [0, 1, 2], rank=2, alpha=1.0)
    found = cells.measure(adapted, dictionaries, lambda: iter(batches), n, plan.keep_ids)
    cell = {name: found.sums[i] for i, name in enumerate(cells.CELLS)}
    assert np.array_equal(cell["adapted"], cell["plain"])
    assert np.array_equal(cell["adapted_spliced"], cell["spliced"])
    values = {row["name"]: row["value"] for row in cells.eval_rows(found)}
    assert values["eval.kl_closed"] == 0 and values["eval.kl.spliced"] > 0


def test_shares_and_intervals_on_paper() -> None:
    """Two sequences of 1 and 3 tokens. Means: plain 1, spliced 2, adapted 1.1, both 1.4, zero 5, mean 3."""
    sums = np.zeros((6, 3, 2))
    for c, value in enumerate((1.0, 2.0, 1.1, 1.4, 5.0, 3.0)):
        sums[c, 0] = value * np.array([1, 3])
        sums[c, 1] = (value - 1) * np.array([1, 3])
    values = {row["name"]: row for row in cells.eval_rows(cells.Measured(sums, np.array([1, 3]), {}))}
    wanted = {
        "ce.spliced": 2.0, "ce_gap.adapted": 0.1, "gap_closed": 0.6, "kl_closed": 0.6,
        "loss_recovered.zero.spliced": 0.75, "loss_recovered.zero.adapted_spliced": 0.9,
        "loss_recovered.mean.spliced": 0.5,
    }  # fmt: skip
    for name, value in wanted.items():
        row = values[f"eval.{name}"]
        np.testing.assert_allclose([row["value"], row["low"], row["high"]], value)  # every resample has this mean
        assert row["n"] == 4
    sums[1, 0] = sums[0, 0] - 1  # the splice helps: no gap, so no share of it
    assert "eval.gap_closed" not in {r["name"] for r in cells.eval_rows(cells.Measured(sums, np.array([1, 3]), {}))}
