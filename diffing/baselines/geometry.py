r"""How alike two sets of directions are, and two representations of the same tokens.

With unit rows D (F1, d) and E (F2, d), centred X (n, F1) and Y (n, F2), Gram matrices K = X X^T and L = Y Y^T, and Kt,
Lt the Gram matrices of uncentred data with zeros on the diagonal:

    max cosine of i    max_j <D_i, E_j>, or of its absolute value
    linear CKA         ||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F)
    HSIC_1(K, L)       [tr(Kt Lt) + (1^T Kt 1)(1^T Lt 1) / ((n-1)(n-2)) - 2/(n-2) 1^T Kt Lt 1] / (n (n-3))
    debiased CKA       HSIC_1(K, L) / sqrt(HSIC_1(K, K) HSIC_1(L, L)); over minibatches each of the three terms is
                       averaged before the ratio is formed

Debiased CKA may be a little below 0. Source: Kornblith et al. 2019; Song et al. 2012, eq. 5; Nguyen et al. 2021.
Reading order: `max_cosine`, `one_to_one`, `principal_angles`; `linear_cka`, `hsic`, `debiased_cka`, `minibatch_cka`.
"""

from collections.abc import Iterable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from crosscoders.common.errors import InputError

LEAST_TOKENS = 4
"""Tokens that the debiased estimator of HSIC needs."""
_CHUNK = 4096


def max_cosine(
    one: Float[Tensor, "rows d_model"], other: Float[Tensor, "candidates d_model"], *, absolute: bool = False
) -> Float[Tensor, " rows"]:
    """Return the largest cosine of each row of `one` with any of `other`; `absolute`: whatever its sign."""
    candidates = normalize(other.float(), dim=1)
    found = []
    for rows in normalize(one.float(), dim=1).split(_CHUNK):
        cosines = rows @ candidates.T
        found.append((cosines.abs() if absolute else cosines).amax(dim=1))
    return torch.cat(found)


def one_to_one(
    one: Float[Tensor, "rows d_model"], other: Float[Tensor, "candidates d_model"]
) -> Float[Tensor, " matched"]:
    """Return the cosines of the matching of largest sum in which no row is used twice; as many as the smaller set."""
    from scipy.optimize import linear_sum_assignment

    cosines = (normalize(one.double(), dim=1) @ normalize(other.double(), dim=1).T).cpu().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return torch.from_numpy(cosines[rows, columns])


def principal_angles(
    one: Float[Tensor, "rows d_model"], other: Float[Tensor, "others d_model"]
) -> Float[np.ndarray, " angles"]:
    """Return the angles between the spans of two sets of rows, degrees, smallest first."""
    from scipy.linalg import subspace_angles

    angles = subspace_angles(one.double().cpu().numpy().T, other.double().cpu().numpy().T)
    return np.rad2deg(angles)[::-1].copy()


def linear_cka(x: Float[Tensor, "tokens features"], y: Float[Tensor, "other_tokens others"]) -> float:
    """Return linear CKA; with fewer tokens than features it is near 1 even for independent data.

    Raises:
        InputError: another number of tokens in y, or values that do not vary.
    """
    _require_tokens(x, y, 2)
    x, y = (values.double() - values.double().mean(dim=0) for values in (x, y))
    if len(x) < min(x.shape[1], y.shape[1]):
        k, other = x @ x.T, y @ y.T
        return _ratio(float((k * other).sum()), float(k.square().sum()), float(other.square().sum()))
    cross, own, others = (a.T @ b for a, b in ((y, x), (x, x), (y, y)))
    return _ratio(*(float(product.square().sum()) for product in (cross, own, others)))


def hsic(k: Float[Tensor, "tokens tokens"], other: Float[Tensor, "tokens tokens"]) -> float:
    """Return the unbiased estimate HSIC_1 of two Gram matrices, whose diagonals do not count."""
    n = len(k)
    k, other = (gram - torch.diag(gram.diagonal()) for gram in (k, other))
    traces = (k * other).sum() + k.sum() * other.sum() / ((n - 1) * (n - 2))
    return float((traces - 2 / (n - 2) * (k.sum(dim=0) @ other.sum(dim=1))) / (n * (n - 3)))


def debiased_cka(x: Float[Tensor, "tokens features"], y: Float[Tensor, "other_tokens others"]) -> float:
    """Return debiased linear CKA over all tokens at once.

    Raises:
        InputError: fewer than 4 tokens, another number of them in y, or values that do not vary.
    """
    return minibatch_cka([(x, y)])


def minibatch_cka(batches: Iterable[tuple[Float[Tensor, "_ features"], Float[Tensor, "_ others"]]]) -> float:
    """Return debiased linear CKA from batches of the same tokens: terms averaged first, one ratio at the end.

    Raises:
        InputError: a batch with fewer than 4 tokens, or with different numbers of them; values that do not vary.
    """
    sums = np.zeros(3)
    for x, y in batches:
        _require_tokens(x, y, LEAST_TOKENS)
        k, other = ((centred := values.double() - values.double().mean(dim=0)) @ centred.T for values in (x, y))
        sums += np.array([hsic(k, other), hsic(k, k), hsic(other, other)])
    return _ratio(*sums.tolist())


def _require_tokens(x: Tensor, y: Tensor, least: int) -> None:
    if len(x) != len(y):
        raise InputError(f"CKA compares the same tokens; got {len(x):,} and {len(y):,} of them. Give both the same.")
    if len(x) < least:
        raise InputError(f"CKA got {len(x)} tokens; it needs at least {least}. Give more tokens.")


def _ratio(cross: float, own: float, others: float) -> float:
    if not (own > 0 and others > 0):
        raise InputError("CKA is undefined where one of the two does not vary over tokens. Give other features.")
    return float(cross / (own * others) ** 0.5)
