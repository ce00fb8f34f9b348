"""What each direction of an adapter does on held-out tokens: how often, where, for which documents, and what it writes.

`read_directions` runs the adapted base over the held-out batches once and returns a table with a row per direction.
"""

import functools
from typing import Any

import numpy as np
import pandas
import torch
from jaxtyping import Float, Int
from torch import Tensor

from crosscoders.text.padding import Batch
from diffing.topk_lora.distil import Setting
from sae_lora.lora.layer import SparseLoRA
from sae_lora.lora.topk import TopKLoRA

BEFORE, AFTER = 8, 3
"""Tokens of a context."""
WRITERS = ("o_proj", "down_proj", "c_proj", "dense", "dense_4h_to_h", "embed_tokens", "wte", "out_proj", "fc2")
"""Modules that write to the residual stream, for which there is a logit lens."""


class _SiteSums:
    """Sums over tokens of the activations at one site."""

    def __init__(self, site: SparseLoRA, n_labels: int) -> None:
        self.fires, self.total = (torch.zeros(site.rank, dtype=torch.float64) for _ in range(2))
        self.by_label = torch.zeros(n_labels, site.rank, dtype=torch.float64)
        self.largest = torch.full((site.rank,), -torch.inf)
        self.where = torch.zeros(site.rank, 2, dtype=torch.int64)
        """Document and position of the largest activation."""

    def add(self, a: Tensor, batch: Batch, labels: Tensor) -> None:
        if a.shape[:2] != batch.ids.shape:  # an embedding is also asked for ids alone
            return
        scored = batch.scored
        values = a[scored].detach().float().cpu()
        places = scored.nonzero().cpu()
        documents = torch.from_numpy(batch.numbers)[places[:, 0]]
        self.fires += (values > 0).sum(dim=0)
        self.total += values.double().sum(dim=0)
        self.by_label.index_add_(0, labels[documents], values.double())
        top = values.max(dim=0)
        better = top.values > self.largest
        self.largest = torch.where(better, top.values, self.largest)
        found = torch.stack([documents[top.indices], places[top.indices, 1]], dim=1)
        self.where = torch.where(better[:, None], found, self.where)


@torch.inference_mode()
def read_directions(setting: Setting, adapter: TopKLoRA) -> pandas.DataFrame:
    """Return one row per direction, those that write most first.

    Columns: site, direction; firing_rate (share of the held-out scored tokens); mean_activation; write_share (its share
    of sum_j a_j ||s B_j|| over all directions); main_label and main_label_share (of its activation); context, with the
    token of the largest activation in >><<; lens (three tokens that it writes for, where it writes to the residual
    stream).
    """
    labels = torch.from_numpy(setting.rows.groups)
    sums = {name: _SiteSums(site, len(setting.rows.group_names)) for name, site in adapter.sites.items()}
    n_tokens = 0
    for batch in setting.held_out:
        with adapter.observed(
            {name: functools.partial(of.add, batch=batch, labels=labels) for name, of in sums.items()}
        ):
            setting.base(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        n_tokens += int(batch.scored.sum())
    parts = [_table(setting, adapter.sites[name], of_site, n_tokens) for name, of_site in sums.items()]
    table = pandas.concat(parts, ignore_index=True)
    table["write_share"] = table["written"] / max(float(table["written"].sum()), 1e-30)
    return table.drop(columns="written").sort_values("write_share", ascending=False, ignore_index=True)


@torch.inference_mode()
def read_activations(
    setting: Setting, adapter: TopKLoRA, chosen: list[tuple[str, int]]
) -> tuple[
    Int[np.ndarray, " tokens"],
    Int[np.ndarray, " tokens"],
    Int[np.ndarray, " tokens"],
    Float[np.ndarray, "tokens chosen"],
]:
    """Return ids, documents, labels and the activations of chosen directions (site, number).

    On the held-out scored tokens, document by document.
    """
    by_site: dict[str, list[int]] = {}
    for place, (name, _) in enumerate(chosen):
        by_site.setdefault(name, []).append(place)
    parts: list[tuple[np.ndarray[Any, Any], ...]] = []
    for batch in setting.held_out:
        values = torch.zeros(int(batch.scored.sum()), len(chosen))

        def add(name: str, a: Tensor, batch: Batch = batch, values: Tensor = values) -> None:
            if a.shape[:2] == batch.ids.shape:
                places = by_site[name]
                values[:, places] = a[batch.scored][:, [chosen[place][1] for place in places]].float().cpu()

        with adapter.observed({name: functools.partial(add, name) for name in by_site}):
            setting.base(input_ids=batch.ids, attention_mask=batch.attention_mask, use_cache=False)
        documents = batch.numbers[batch.scored.nonzero()[:, 0].cpu().numpy()]
        parts.append((batch.ids[batch.scored].cpu().numpy(), documents, setting.rows.groups[documents], values.numpy()))
    ids, documents, labels, activations = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(documents, kind="stable")
    return ids[order], documents[order], labels[order], activations[order]


def _table(setting: Setting, site: SparseLoRA, sums: _SiteSums, n_tokens: int) -> pandas.DataFrame:
    share = sums.by_label / sums.by_label.sum(dim=0).clamp_min(1e-30)
    best = share.max(dim=0)
    names = setting.rows.group_names
    written = sums.total * (site.scale * site.W_out.detach().norm(dim=1).double().cpu())
    return pandas.DataFrame(
        {
            "site": site.name,
            "direction": np.arange(site.rank),
            "firing_rate": (sums.fires / n_tokens).numpy(),
            "mean_activation": (sums.total / sums.fires.clamp_min(1)).numpy(),
            "written": written.numpy(),
            "main_label": [names[i] for i in best.indices.tolist()],
            "main_label_share": best.values.numpy(),
            "context": [context_of(setting, *place) for place in sums.where.tolist()],
            "lens": _lens(setting, site),
        }
    )


def context_of(setting: Setting, document: int, position: int) -> str:
    """Return the text around a token of a held-out document, the token in >><<."""
    start = int(setting.rows.offsets[document])
    ids = setting.rows.ids[start : int(setting.rows.offsets[document + 1])].tolist()
    before, at, after = ids[max(0, position - BEFORE) : position], ids[position : position + 1], ids[position + 1 :]
    read = setting.tokenizer.decode
    return f"{read(before)}>>{read(at)}<<{read(after[:AFTER])}".replace("\n", "↵")


def _lens(setting: Setting, site: SparseLoRA) -> list[str]:
    """Return the tokens with the largest products of unembedding and write direction; empty off the residual stream."""
    if site.name.rsplit(".", 1)[-1] not in WRITERS:
        return [""] * site.rank
    logits = site.W_out.detach().float() @ setting.base.get_output_embeddings().weight.detach().float().T
    top = logits.topk(3, dim=1).indices.tolist()
    return [" ".join(repr(setting.tokenizer.decode([token])) for token in tokens) for tokens in top]
