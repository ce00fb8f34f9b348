r"""LoRA whose rank dimension is sparse: TopKLoRA, beside a module that stays as it is.

    a = gate(A x)                    (.., rank)   the directions of a token
    y = W0 x + s B (m * a + i)       s = alpha / rank

`m` (multiplier) and `i` (injection) are 1 and 0 unless somebody intervenes. Gates: `none` is plain LoRA; `relu`;
`topk` keeps the k largest ReLU(A x) of each token; `batchtopk` the k * tokens largest of a batch in training, and in
evaluation those above a threshold that training has tracked. `_Map` does this for a linear map, `_Table` for an
embedding, whose x is the one-hot token.

Source: the TopKLoRA line of the interpretable-finetuning repository. Differs: the plain gradient of the selected
entries is the default, and B is applied to the selected directions alone.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import embedding_bag

from sae_lora.lora.settings import Estimator, Gate


class SparseLoRA(nn.Module):
    """The adapter of one module; `k` may be lowered while it is trained.

    Args:
        d_in, d_out: widths of the map; of an embedding, its number of ids and its width.
        rank, k: directions, and how many of them a token may use (None: all).
        gate: as in the module's docstring.
        scale: s.
        estimator: `straight-through` gives the gradient of k softmax(z / temperature) z in place of the plain one; it
            is for reproduction.
    """

    threshold: Tensor
    tokens_since: Tensor

    def __init__(
        self, name: str, d_in: int, d_out: int, *, rank: int, k: int | None, gate: Gate, scale: float,
        estimator: Estimator = "plain", temperature: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.name, self.rank, self.k, self.gate, self.scale = name, rank, k, gate, scale
        self.estimator, self.temperature = estimator, temperature
        self.A = nn.Parameter(torch.zeros(rank, d_in))
        self.W_out = nn.Parameter(torch.zeros(rank, d_out))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("tokens_since", torch.zeros(rank, dtype=torch.int64))
        self.multiplier: Tensor | None = None
        """What post-gate activations are multiplied with, (rank,) or (rows, seq, rank)."""
        self.injection: Tensor | None = None
        """What is added to them, of the same shapes."""
        self.observer: Callable[[Tensor], None] | None = None
        """Receives the post-gate activations, before multiplier and injection."""

    @property
    def B(self) -> Float[Tensor, "d_out rank"]:
        """What the directions write; a view of `W_out`, in which a direction is a row."""
        return self.W_out.T

    def init_weights_(self, std: float, generator: torch.Generator) -> None:
        """Draw A from N(0, std^2); B stays 0, so that the model is the base at first."""
        with torch.no_grad():
            self.A.normal_(0, std, generator=generator)

    def pre_acts(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch rank"]:
        """Return z = A x."""
        return x.to(self.A.dtype) @ self.A.T

    def activations(self, x: Any) -> Float[Tensor, "*batch rank"]:
        """Return a, dense, before multiplier and injection."""
        return self._gated(self.pre_acts(x))

    def delta(self, x: Any) -> Float[Tensor, "*batch d_out"]:
        """Return s B (m * a + i), what is added to the module's output."""
        z = self.pre_acts(x)
        if self.gate != "topk" or self.k is None or self._is_watched():
            a = self._gated(z)
            if self.training:
                self._count(a > 0)
            if self.observer is not None:
                self.observer(a)
            if self.multiplier is not None:
                a = a * self.multiplier.to(a.dtype)
            if self.injection is not None:
                a = a + self.injection.to(a.dtype)
            return self.scale * (a @ self.W_out)
        values, chosen = torch.relu(z).topk(self.k, dim=-1, sorted=False)
        if self.training:
            self._count(torch.zeros_like(z, dtype=torch.bool).scatter_(-1, chosen, values > 0))
        return self.scale * self.decode(values, chosen)

    def _is_watched(self) -> bool:
        somebody = self.multiplier is not None or self.injection is not None or self.observer is not None
        return somebody or self.estimator != "plain"

    def decode(
        self, values: Float[Tensor, "*batch k"], chosen: Int[Tensor, "*batch k"]
    ) -> Float[Tensor, "*batch d_out"]:
        """Return sum over the chosen directions j of values_j B_j; the others are not read."""
        k = values.shape[-1]
        weights = values.reshape(-1, k)
        out = embedding_bag(chosen.reshape(-1, k), self.W_out, mode="sum", per_sample_weights=weights)
        return out.view(*values.shape[:-1], -1)

    def _gated(self, z: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch rank"]:
        """Return gate(z)."""
        if self.gate == "none":
            return z
        a = torch.relu(z)
        if self.gate == "relu" or self.k is None:
            return a
        with torch.no_grad():
            mask = self._mask(a)
        if self.estimator == "plain":
            return a * mask
        soft = self.k * torch.softmax(a / self.temperature, dim=-1)
        return a * (mask + soft - soft.detach())

    def _mask(self, a: Float[Tensor, "*batch rank"]) -> Float[Tensor, "*batch rank"]:
        """Return 1 where an activation is selected."""
        assert self.k is not None
        if self.gate == "topk":
            return torch.zeros_like(a).scatter_(-1, a.topk(self.k, dim=-1, sorted=False).indices, 1.0)
        if not self.training:
            return (a > self.threshold).to(a.dtype)
        flat = a.flatten()
        n = min(self.k * (flat.numel() // self.rank), flat.numel())
        top = flat.topk(n, sorted=False)
        smallest = top.values.min()
        self.threshold.copy_(smallest if self.threshold == 0 else 0.99 * self.threshold + 0.01 * smallest)
        return torch.zeros_like(flat).scatter_(0, top.indices, 1.0).view_as(a)

    @torch.no_grad()
    def _count(self, fires: Tensor) -> None:
        """Count the tokens since each direction fired."""
        per_token = fires.reshape(-1, self.rank)
        self.tokens_since += len(per_token)
        self.tokens_since[per_token.any(dim=0)] = 0

    def dead(self, n_tokens: int) -> Tensor:
        """Return which directions have not fired on the last `n_tokens` tokens of training, (rank,)."""
        return self.tokens_since >= n_tokens

    @torch.no_grad()
    def revive_(self, n_tokens: int, generator: torch.Generator) -> int:
        """Draw dead directions anew, with the mean norm of the others and nothing written; return their number."""
        dead = self.dead(n_tokens)
        n = int(dead.sum())
        if n and n < self.rank:
            fresh = torch.randn(n, self.A.shape[1], generator=generator).to(self.A)
            self.A[dead] = fresh / fresh.norm(dim=1, keepdim=True) * self.A[~dead].norm(dim=1).mean()
            self.W_out[dead] = 0
            self.tokens_since[dead] = 0
        return n

    def attach(self, module: nn.Module, is_enabled: Callable[[], bool]) -> list[Any]:
        """Add `delta` to what `module` puts out while `is_enabled`; return the handles that take it off again."""

        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output + self.delta(inputs[0]).to(output.dtype) if is_enabled() else None

        return [module.register_forward_hook(add)]


class SparseLoRATable(SparseLoRA):
    """The adapter of an embedding: x is the one-hot token, so A x is a column of A.

    Where the head is tied to the embedding, the same rows are added there: logits gain s (B^T h) . a(v).
    """

    heads: Sequence[nn.Module] = ()
    """The head, where it is tied; in a list, so that it is no part of the adapter."""

    def pre_acts(self, x: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch rank"]:
        return torch.nn.functional.embedding(x, self.A.T)

    def attach(self, module: nn.Module, is_enabled: Callable[[], bool]) -> list[Any]:
        scale = getattr(module, "embed_scale", 1.0)

        def add(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            return output + (self.delta(inputs[0]) * scale).to(output.dtype) if is_enabled() else None

        def add_to_logits(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not is_enabled():
                return None
            with self._unwatched():
                a = self._gated(self.A.T)  # of every id
            if self.multiplier is not None and self.multiplier.ndim == 1:
                a = a * self.multiplier
            read = inputs[0].to(self.W_out.dtype) @ self.W_out.T
            return output + (self.scale * (read @ a.T)).to(output.dtype)

        handles = [module.register_forward_hook(add)]
        return handles + [head.register_forward_hook(add_to_logits) for head in self.heads]

    @contextmanager
    def _unwatched(self) -> Iterator[None]:
        """Gate as in evaluation: ids that stand in no text take no part in a batch's selection."""
        was = self.training
        self.training = False
        try:
            yield
        finally:
            self.training = was
