"""A shared prefix and stored states: the same bits as computing everything anew, damage found."""

from pathlib import Path
from typing import Any

import pytest
import torch
from fits import POINT, D, adapter_weights, fit_config, gemma_scope, opened

from crosscoders import CorruptData, InputError
from crosscoders.models import resume
from sae_lora import fit
from sae_lora.dictionaries.frozen import Constant
from sae_lora.fitting import objective
from sae_lora.lora.adapter import add_lora


@pytest.fixture(scope="module")
def scope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gemma_scope(tmp_path_factory.mktemp("hub"))


@pytest.mark.parametrize(
    "points",
    [[POINT], ["blocks.1.hook_resid_pre"], ["blocks.0.hook_resid_pre"], ["blocks.0.hook_resid_post", POINT]],
)
def test_a_shared_prefix_and_stored_states_give_equal_bits(pair: Any, scope: Path, points: list[str]) -> None:
    plan, model, _, batches = opened(fit_config(pair, scope))
    adapted = add_lora(model, [2], rank=2, alpha=1.0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    found = []
    chosen = [Constant(point, torch.full((D,), 1.0 + i)) for i, point in enumerate(points)]
    prefix = resume.find_prefix(adapted, points[0], batches[0])
    stored = objective.states(adapted, chosen[0], batches[0], plan.keep_ids)
    assert prefix is not None
    for known in ({}, {"prefix": prefix}, {"prefix": prefix, "stored": stored}, {"stored": stored}):
        adapted.zero_grad()
        total = objective.batch_kl(adapted, chosen, batches[0], plan.keep_ids, **known)
        total.backward()
        found.append([total.detach(), *(w.grad for w in adapted.parameters() if w.requires_grad)])
    for values in zip(*found, strict=True):
        assert all(torch.equal(values[0], value) for value in values[1:])
    assert float(found[0][0]) > 0


@pytest.mark.parametrize("layers", ["after", "all"])
def test_stored_states_change_no_bit_of_a_fit_and_serve_other_fits(
    pair: Any, scope: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers: str
) -> None:
    common: dict[str, object] = {"epochs": 2, "layers": layers, "lr_decay_fraction": 0.5}
    wanted = adapter_weights(fit(fit_config(pair, scope, **common), tmp_path / "none"))
    disk = common | {"store": "disk", "store_folder": str(tmp_path / "states")}
    for name, how in (("memory", common | {"store": "memory"}), ("disk", disk)):
        found = adapter_weights(fit(fit_config(pair, scope, **how), tmp_path / name))
        assert all(torch.equal(found[key], value) for key, value in wanted.items()), name
    monkeypatch.setattr("sae_lora.fitting.stored.states", None)  # the model is not run for them again
    fit(fit_config(pair, scope, **disk, rank=2), tmp_path / "other")
    with monkeypatch.context() as patched, pytest.raises(InputError, match="states that differ in bits"):
        patched.setattr("sae_lora.fitting.stored.final_states", lambda *given: resume.final_states(*given) + 1)
        fit(fit_config(pair, scope, **disk, rank=3), tmp_path / "unlike")
    damaged = next((tmp_path / "states").glob("*/00000001.safetensors"))
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with pytest.raises(CorruptData, match="00000001"):
        fit(fit_config(pair, scope, **disk, rank=3), tmp_path / "third")
