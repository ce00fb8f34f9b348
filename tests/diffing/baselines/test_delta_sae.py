"""Delta SAEs: differences as a stream, what explains them, how dense latents are."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import Pair

from crosscoders import ActivationCache, InputError
from crosscoders.models.loading import load_model
from diffing.baselines.delta_sae import affine_fve, densities, local_deltas, omp, one_model_stream, preset_config
from sae_lora.lora.adapter import add_lora


def test_the_stream_holds_tuned_minus_base_of_the_cache(cache_folder: Path) -> None:
    cache = ActivationCache(cache_folder)
    config = preset_config(1, cache.d_model, n_tokens=100_000, seed=0)
    stream = one_model_stream(cache, replace(config, batch_size=len(cache)))
    batch = next(stream.batches(0, 1))
    x = cache.read(0, len(cache)).activations.float()
    assert batch.shape == (len(cache), 1, cache.d_model)
    assert torch.allclose(batch.sum(dim=0)[0], (x[:, 1] - x[:, 0]).sum(dim=0), atol=1e-4)
    assert stream.n_models == 1


def test_affine_fve_knows_neither_scale_nor_shift_and_is_the_best_of_all_scalars() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=generator)
    x_hat = x + torch.randn(200, 4, generator=generator)
    found = affine_fve(x, x_hat)
    assert affine_fve(x, -0.01 * x_hat + 5) == pytest.approx(found)
    centred, other = x - x.mean(dim=0), x_hat - x_hat.mean(dim=0)
    tried = [
        1 - float((centred - a * other).square().sum() / centred.square().sum()) for a in torch.linspace(0, 1, 201)
    ]
    assert found == pytest.approx(max(tried), abs=1e-4)
    assert affine_fve(x, torch.ones(200, 4)) == 0


def test_matching_pursuit_finds_a_sparse_sum_and_equals_least_squares_on_its_support() -> None:
    directions = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    x = torch.stack([3 * directions[2] - 2 * directions[7], directions[4]])
    assert torch.allclose(omp(x, directions, 8), x, atol=1e-4)
    one = omp(x, directions, 1)
    best = (x[0] @ directions.T).abs().argmax()
    assert torch.allclose(one[0], (x[0] @ directions[best]) * directions[best], atol=1e-5)
    noise = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    errors = [float((noise - omp(noise, directions, k)).norm()) for k in range(1, 9)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-4 < errors[-2]


def test_densities_count_tokens_on_which_latents_are_active() -> None:
    latents = torch.zeros(20, 4)
    latents[:10, 0], latents[0, 1] = 1.0, 2.0
    assert densities(latents) == pytest.approx({"density": (0.5 + 0.05) / 2, "alive": 0.5, "dense": 0.25, "l0": 0.55})


def test_a_local_delta_is_what_the_merged_weights_add_to_the_map_and_has_the_rank(pair: Pair) -> None:
    model = add_lora(load_model(pair.base, torch.float32), [1, 2], rank=2, alpha=6)
    module = model.get_base_model().model.layers[1].mlp.down_proj
    module.lora_B["default"].weight.data.normal_(generator=torch.Generator().manual_seed(0))
    read = []
    handle = module.register_forward_pre_hook(lambda _m, args: read.append(args[0]))
    with torch.no_grad(), local_deltas(model, 1) as terms:
        model(input_ids=torch.arange(2, 12)[None])
    handle.remove()
    added = module.get_delta_weight("default")
    assert torch.allclose(terms[0], read[0] @ added.T, atol=1e-5)
    assert torch.linalg.matrix_rank(terms[0][0]) == 2
    with pytest.raises(InputError, match="layer 0 has no LoRA at"), local_deltas(model, 0):
        pass
