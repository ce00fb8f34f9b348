"""A batch with BOS, EOS and padding, and a dictionary whose output is known, for tests of splices."""

import torch
from torch import Tensor

from sae_lora.dictionaries.frozen import DictionaryInfo, FrozenDictionary

POINT = "blocks.1.hook_resid_post"
BOS, EOS, PAD = 2, 1, 0
IDS = torch.tensor([[BOS, 7, 8, EOS, 9], [BOS, 5, 6, PAD, PAD]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
KEPT = torch.tensor([[1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()


class Shift(FrozenDictionary):
    """x_hat = scale * x + shift, in a type of its own."""

    def __init__(self, scale: float, shift: float, hook_point: str = POINT, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(DictionaryInfo("constant", "", hook_point, 16, 16, {}))
        self.register_buffer("numbers", torch.tensor([scale, shift], dtype=dtype))

    def encode(self, x: Tensor) -> Tensor:
        assert x.dtype == self.dtype
        return x

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.numbers[0] + self.numbers[1]
