"""Partners: correlations by numpy, a planted pair of latents that only their firing gives away, and its controls."""

import numpy as np
import pandas
import pytest
import torch
from torch import Tensor

from crosscoders import Crosscoder, CrosscoderConfig
from diffing import latent_table, scale_latents, with_partners


def planted(together: float, n: int = 6000) -> tuple[Crosscoder, Tensor]:
    """Latents 0 and 1: one concept along axis 0 in the tuned model and axis 1 in the base, on the same tokens with
    chance `together`; 2: tuned-only by itself; 3: base-only by itself."""
    g = torch.Generator().manual_seed(0)
    f = (0.5 + torch.rand(n, 4, generator=g)) * (torch.rand(n, 4, generator=g) < 0.2)
    f[:, 1] = torch.where(torch.rand(n, generator=g) < together, f[:, 0], f[:, 1])
    cc = Crosscoder(CrosscoderConfig(dict_size=4, d_model=4, activation="relu")).requires_grad_(False)
    side = torch.tensor([1, 0, 1, 0])
    for weight in (cc.W_enc, cc.W_dec, cc.b_dec):
        weight.zero_()
    cc.b_enc.fill_(-0.1)
    cc.W_dec[range(4), side, range(4)] = cc.W_enc[side, range(4), range(4)] = 1.0
    return cc, torch.einsum("nj,jmd->nmd", f, cc.W_dec) + 0.01 * torch.randn(n, 2, 4, generator=g)


def partnered(cc: Crosscoder, x: Tensor) -> tuple[pandas.DataFrame, pandas.DataFrame]:
    """The table before and after."""
    table = latent_table(cc, scale_latents(cc, x.split(200)))
    return table, with_partners(cc, table, x.split(700))


def test_a_concept_that_each_model_writes_along_its_own_axis_is_not_specific() -> None:
    cc, x = planted(together=1.0)
    before, found = partnered(cc, x)
    assert before["verdict"].tolist() == ["tuned-specific", "base-specific"] * 2  # the ratios cannot tell
    assert found["verdict"].tolist() == ["decoupled", "decoupled", "tuned-specific", "base-specific"]
    assert found["partner"].tolist()[:2] == [1, 0]
    f = cc.encode(x).numpy()
    expected = np.corrcoef(f.T)
    for latent, others in ((0, [1, 3]), (1, [0, 2]), (2, [1, 3]), (3, [0, 2])):
        assert found["partner_correlation"][latent] == pytest.approx(expected[latent, others].max(), abs=1e-5)


def test_latents_that_fire_apart_stay_specific() -> None:
    before, found = partnered(*planted(together=0.5))
    assert found["verdict"].tolist() == before["verdict"].tolist()
    assert 0.3 < found["partner_correlation"][0] < 0.6


def test_no_token_is_read_where_nothing_looks_specific_or_nothing_is_on_the_other_side() -> None:
    cc, x = planted(together=1.0)
    table = latent_table(cc, scale_latents(cc, x.split(200)))

    def unread() -> Tensor:
        raise AssertionError("read")
        yield

    for changed in (table.assign(verdict="shared"), table.assign(n_active=[500, 5, 500, 5])):
        found = with_partners(
            cc, changed.assign(verdict=changed["verdict"].replace("base-specific", "shared")), unread()
        )
        assert found["partner"].isna().all() and found["partner_correlation"].isna().all()


def test_a_weak_or_dead_latent_of_the_other_model_is_no_partner() -> None:
    cc, x = planted(together=1.0)
    table = latent_table(cc, scale_latents(cc, x.split(200)))
    found = with_partners(cc, table.assign(n_active=[500, 10, 500, 500]), x.split(700))
    assert found["partner"][0] == 3 and found["verdict"][0] == "tuned-specific"
