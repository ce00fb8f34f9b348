"""The Triton programs equal dense products."""

import os
import subprocess
import sys

import pytest
import torch

from crosscoders.kernels import gpu

TRITON = """
import torch
from crosscoders.dictionary import selection, sparse
from crosscoders.kernels import gpu
device = "cuda" if torch.cuda.is_available() else "cpu"
pre = torch.randn(13, 29, device=device)
found = selection.active(pre, torch.full((29,), 0.8, device=device))
f = torch.zeros(13, 29, device=device).index_put((found.tokens, found.latents), found.values)
for width in (4, 256, 600):
    W, bias, y = (torch.randn(*shape, device=device) for shape in ((29, width), (width,), (13, width)))
    torch.testing.assert_close(gpu.bags(found.latents, found.values, found.starts, W, bias), f @ W + bias)
    torch.testing.assert_close(gpu.bags(found.latents, found.values, found.starts, W), f @ W)
    for n_parts in (1, 2):
        expected = (y[found.tokens] * W[found.latents]).view(-1, n_parts, width // n_parts).sum(dim=2).T
        torch.testing.assert_close(gpu.dots(found.tokens, found.latents, y, W, n_parts), expected)
"""


@pytest.mark.skipif(not gpu.is_available(), reason="Triton is not installed")
def test_triton_programs_equal_dense_products() -> None:
    """On a GPU where there is one, else in Triton's interpreter, which has to be chosen before it is imported."""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TRITON], env={**os.environ, **interpreter}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
