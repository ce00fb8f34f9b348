"""Cards: histograms against numpy, neighbours against all pairs, and what `diffing scale` writes of them."""

from pathlib import Path

import numpy as np
import pandas
import torch

from crosscoders import ActivationCache, Crosscoder, CrosscoderConfig
from crosscoders.common import files
from crosscoders.common.records import Record
from crosscoders.training.feed import cache_inputs
from diffing.latents.cards import N_BINS, CardRecord, Histograms, neighbours
from diffing.latents.table import scale_run


def test_histograms_of_batches_are_those_of_all_tokens() -> None:
    values = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 5.0, 0.0])
    values[values < 0.4] = 0.0
    largest = values.max(dim=0).values.tolist()
    spread = Histograms(largest)
    for part in values.split(64):
        spread.add(part)
    for j in range(2):
        active = values[:, j][values[:, j] > 0].double().numpy()
        expected, _ = np.histogram(active, bins=N_BINS, range=(0.0, largest[j]))
        assert spread.counts[j].tolist() == expected.tolist()
    assert spread.counts[2].sum() == 0


def test_neighbours_are_the_nearest_alive_decoders_without_the_latent_itself() -> None:
    made = Crosscoder(CrosscoderConfig(dict_size=30, k=2, d_model=8)).requires_grad_(False)
    made.W_dec.copy_(torch.randn(made.W_dec.shape, generator=torch.Generator().manual_seed(0)))
    table = pandas.DataFrame({"n_active": [99] * 25 + [0] * 5})
    rows = torch.nn.functional.normalize(made.decoder().flatten(1), dim=1).numpy()
    for latent, listed in neighbours(made, table, [3, 27, 11]).items():
        cosines = rows[:25] @ rows[int(latent)]
        order = [j for j in np.argsort(-cosines) if j != int(latent)][:4]
        assert [int(j) for j, _ in listed] == order
        assert np.allclose([cosine for _, cosine in listed], cosines[order], atol=1e-3)


def test_scale_writes_the_histogram_of_every_latent_that_has_examples(cache_folder: Path, tmp_path: Path) -> None:
    cache = ActivationCache(cache_folder)
    made = Crosscoder(CrosscoderConfig(dict_size=12, activation="relu", d_model=16)).requires_grad_(False)
    made.init_weights_(norm=1.0, generator=torch.Generator().manual_seed(0))
    made.save(tmp_path, provenance=cache_inputs(cache))
    table = scale_run(tmp_path, cache, n_examples=5)
    cards = files.read_model(tmp_path / "cards.json", CardRecord)
    examples = files.read_model(tmp_path / "examples.json", Record)["latents"]
    assert list(cards["histograms"]) == list(examples)
    for latent, counts in cards["histograms"].items():
        assert sum(counts) == table.loc[int(latent), "n_active"] and counts[-1] >= 1
