"""The Triton programs equal dense products."""

import os
import subprocess
import sys

import pytest
import torch

from crosscoders.kernels import gpu

TRITON = """
import torch
from crosscoders.dictionary import selection
from crosscoders.kernels import gpu
device = "cuda" if torch.cuda.is_available() else "cpu"
pre = torch.randn(13, 29, device=device)
entries = selection.active(pre, torch.full((29,), 0.8, device=device))
f = torch.zeros(13, 29, device=device).index_put((entries.tokens, entries.latents), entries.values)
for width in (4, 256, 600):
    W, y = (torch.randn(*shape, device=device) for shape in ((29, width), (13, width)))
    torch.testing.assert_close(gpu.bags(entries.latents, entries.values, entries.starts, W), f @ W)
    expected = (y[entries.tokens] * W[entries.latents]).sum(dim=1)
    torch.testing.assert_close(gpu.dots(entries.tokens, entries.latents, y, W), expected)
"""


@pytest.mark.skipif(not gpu.is_available(), reason="Triton is not installed")
def test_triton_programs_equal_dense_products() -> None:
    """On a GPU where there is one, else in Triton's interpreter, which has to be chosen before it is imported."""
    interpreter = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", TRITON], env={**os.environ, **interpreter}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
