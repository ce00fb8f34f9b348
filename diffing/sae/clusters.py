r"""Means per token and their standard errors over documents, for many latents at once, without keeping documents.

With v_d the sum of a quantity over document d, n_d its tokens, N = sum n_d, D documents and r = sum v_d / N,

    stderr(r) = sqrt(D / (D - 1) sum_d (v_d - r n_d)^2) / N

the linearised error of a ratio, which the delete-one-document jackknife equals to first order. A paired difference of
two models is the same with v_d the difference of their sums.
"""

import torch
from jaxtyping import Float
from torch import Tensor


class DocumentSums:
    """Sums over documents of one quantity per latent, float64."""

    def __init__(self, dict_size: int) -> None:
        self.value = torch.zeros(dict_size, dtype=torch.float64)
        self.square = torch.zeros_like(self.value)
        self.cross = torch.zeros_like(self.value)
        self.n = self.n_square = 0.0
        self.n_documents = 0

    def add(self, values: Float[Tensor, "documents dict_size"], counts: Float[Tensor, " documents"]) -> None:
        """Add documents: the sum of each, and its number of tokens; documents without a token count for nothing."""
        values, counts = values.double().cpu(), counts.double().cpu()
        self.value += values.sum(dim=0)
        self.square += values.square().sum(dim=0)
        self.cross += counts @ values
        self.n += float(counts.sum())
        self.n_square += float(counts.square().sum())
        self.n_documents += int((counts > 0).sum())

    def mean(self) -> Float[Tensor, " dict_size"]:
        """Return the mean per token; 0 where there is none."""
        return self.value / max(self.n, 1.0)

    def stderr(self) -> Float[Tensor, " dict_size"]:
        """Return its standard error over documents; inf below two documents."""
        if self.n_documents < 2:
            return torch.full_like(self.value, torch.inf)
        mean = self.mean()
        squares = (self.square - 2 * mean * self.cross + mean.square() * self.n_square).clamp_min(0)
        return (self.n_documents / (self.n_documents - 1) * squares).sqrt() / self.n
