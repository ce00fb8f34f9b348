"""Verdicts do not change where a constant is added to one model or one model is scaled: for a crosscoder written in the
new units, and after training anew on centred inputs."""

from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from crosscoders import Crosscoder, CrosscoderConfig, TrainConfig, tensor_stream, train
from diffing import latent_table, scale_latents, with_partners

N, D = 6_000, 12
SHARED, TUNED_ONLY, BASE_ONLY, ROTATED = range(6), range(6, 9), range(9, 11), range(11, 13)


def planted(n: int = N) -> tuple[Tensor, Tensor]:
    """Vectors of 13 features, (13, 2, D), and tokens."""
    g = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(13, 1, D, generator=g), dim=2).repeat(1, 2, 1)
    vectors[list(TUNED_ONLY), 0] = vectors[list(BASE_ONLY), 1] = 0
    vectors[list(ROTATED), 0] = torch.nn.functional.normalize(torch.randn(2, D, generator=g), dim=1)
    f = (0.5 + torch.rand(n, 13, generator=g)) * (torch.rand(n, 13, generator=g) < 0.08)
    return vectors, torch.einsum("nj,jmd->nmd", f, vectors) + 0.01 * torch.randn(n, 2, D, generator=g)


def moved(x: Tensor, *, scale: tuple[float, float], shift: tuple[float, float]) -> Tensor:
    direction = torch.nn.functional.normalize(torch.arange(1.0, D + 1), dim=0)
    return x * torch.tensor(scale)[:, None] + torch.tensor(shift)[:, None] * direction


def table_of(cc: Crosscoder, x: Tensor) -> pandas.DataFrame:
    table = latent_table(cc, scale_latents(cc, x.split(200)))
    return with_partners(cc, table, x.split(1000))


MOVES = [
    {"scale": (1.0, 3.0), "shift": (0.0, 0.0)},
    {"scale": (4.0, 1.0), "shift": (0.0, 0.0)},
    {"scale": (1.0, 1.0), "shift": (0.0, 5.0)},
    {"scale": (1.0, 1.0), "shift": (5.0, 0.0)},
]


@pytest.mark.parametrize("move", MOVES)
def test_the_same_crosscoder_in_other_units_has_the_same_verdicts(
    move: dict[str, tuple[float, float]],
) -> None:
    vectors, x = planted()
    cc = Crosscoder(CrosscoderConfig(dict_size=13, d_model=D, activation="relu")).requires_grad_(False)
    other = Crosscoder(CrosscoderConfig(dict_size=13, d_model=D, activation="relu")).requires_grad_(False)
    cc.W_dec.copy_(vectors)
    cc.W_enc.copy_(torch.linalg.pinv(vectors.flatten(1)).T.unflatten(1, (2, D)).permute(1, 2, 0))
    cc.b_enc.fill_(-0.1)
    cc.b_dec.zero_()
    scale, shift = torch.tensor(move["scale"]), moved(torch.zeros(1, 2, D), **move)[0]
    other.W_dec.copy_(cc.W_dec * scale[:, None])
    other.W_enc.copy_(cc.W_enc / scale[:, None, None])
    other.b_dec.copy_(cc.b_dec * scale[:, None] + shift)
    other.b_enc.copy_(cc.b_enc - torch.einsum("md,mdj->j", shift, other.W_enc))
    before, after = table_of(cc, x), table_of(other, moved(x, **move))
    assert set(before["verdict"]) >= {"shared", "tuned-specific", "base-specific"}
    assert after["verdict"].tolist() == before["verdict"].tolist()
    assert np.allclose(after["norm_ratio"] * scale[1].item() / scale[0].item(), before["norm_ratio"], rtol=1e-3)


def test_without_common_units_a_scale_of_the_tuned_model_calls_what_both_share_new() -> None:
    """What the units are for: by the plain norms and ratios the same latents of both models would lean."""
    vectors, x = planted()
    cc = Crosscoder(CrosscoderConfig(dict_size=13, d_model=D, activation="relu")).requires_grad_(False)
    cc.W_dec.copy_(vectors * torch.tensor([1.0, 12.0])[:, None])
    cc.W_enc.copy_(torch.linalg.pinv(cc.W_dec.flatten(1)).T.unflatten(1, (2, D)).permute(1, 2, 0))
    cc.b_enc.fill_(-0.1)
    cc.b_dec.zero_()
    found = table_of(cc, moved(x, scale=(1.0, 12.0), shift=(0.0, 0.0)))
    assert (found["relative_decoder_norm"][list(SHARED)] > 0.9).all()
    assert (found["verdict"][list(SHARED)] == "shared").all()


def test_trained_anew_on_centred_inputs_a_moved_model_gives_the_same_verdicts(tmp_path: Path) -> None:
    _, x = planted(12_000)
    config = TrainConfig(
        crosscoder=CrosscoderConfig(dict_size=20, activation="batchtopk", k=2), n_tokens=250 * 256, batch_size=256,
        lr=1e-2, lr_warmup_steps=10, input_norm="centred", dead_after_tokens=20_000, log_every=250,
        checkpoint_every=250, reconstruction="squared", decoder_init_norm=0.3, threshold_start_step=60, device="cpu",
    )  # fmt: skip

    def verdicts_on(x: Tensor, folder: str) -> list[str]:
        cc = train(config, tensor_stream(x, batch_size=256, seed=0), tmp_path / folder)
        return list(table_of(cc, x)["verdict"])

    before = verdicts_on(x, "before")
    assert before.count("tuned-specific") >= 2 and before.count("shared") >= 4
    for i, move in enumerate(({"scale": (1.0, 4.0), "shift": (0.0, 0.0)}, {"scale": (1.0, 1.0), "shift": (3.0, 0.0)})):
        after = verdicts_on(moved(x, **move), f"moved{i}")
        assert sum(a == b for a, b in zip(after, before, strict=True)) >= 19
