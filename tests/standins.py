"""A small language model whose layers return a tensor or a tuple: both forms that transformers has had."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.Module):
    """x + tanh(W mean of x up to each position)."""

    def __init__(self, d_model: int, as_tuple: bool) -> None:
        super().__init__()
        self.W, self.as_tuple = nn.Linear(d_model, d_model), as_tuple

    def forward(self, x: Tensor) -> Any:
        places = torch.arange(1, x.shape[1] + 1)[:, None]
        out = x + torch.tanh(self.W(x.cumsum(dim=1) / places))
        return (out, "state") if self.as_tuple else out


class Stack(nn.Module):
    """Embedding, layers, last norm."""

    def __init__(self, d_model: int, n_layers: int, as_tuple: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(60, d_model)
        self.layers = nn.ModuleList(Layer(d_model, as_tuple) for _ in range(n_layers))
        self.norm = nn.LayerNorm(d_model)

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embed(input_ids)
        for layer in self.layers:
            out = layer(x)
            x = out if isinstance(out, Tensor) else out[0]
        return SimpleNamespace(last_hidden_state=self.norm(x))


class LanguageModel(nn.Module):
    """A stack and a head, called as a Hugging Face model is."""

    def __init__(self, *, as_tuple: bool, d_model: int = 16, n_layers: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model, self.head = Stack(d_model, n_layers, as_tuple), nn.Linear(d_model, 60)
        self.device = torch.device("cpu")

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.head(self.model(input_ids).last_hidden_state))
