"""Cost of Latent Scaling, all latents and targets, relative to the encoder pass alone.

Both run on the same batch in turn. `encode` gives dense latents with the inference gate; `scale` is `ScalingSums.add`,
encoder included. Inputs are random, and the threshold is set so that k latents per token are active.
"""

from typing import Any

import torch

from benchmarks.timing import interleaved, ratio_row
from crosscoders import Crosscoder, CrosscoderConfig
from diffing.latent_scaling import ScalingSums

SHAPES = [(128, 1024, 24), (256, 4096, 32), (512, 16384, 64)]
"""(d_model, dict_size, k)"""
BATCH = 1024


def run(quick: bool) -> dict[str, Any]:
    """Rows `latent-scaling.<d_model>x<dict_size>.ratio_to_encode`."""
    rows = [time_shape(*shape, n_rounds=5 if quick else 21) for shape in SHAPES[: 1 if quick else None]]
    return {"name": "latent-scaling", "rows": rows}


@torch.no_grad()
def time_shape(d_model: int, dict_size: int, k: int, *, n_rounds: int) -> dict[str, Any]:
    """One row."""
    generator = torch.Generator().manual_seed(0)
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=dict_size, k=k, d_model=d_model))
    crosscoder.init_weights_(norm=1.0, generator=generator)
    x = torch.randn(BATCH, 2, d_model, generator=generator)
    scaled = crosscoder.encode(x, gate="relu") * crosscoder.code_norm
    crosscoder.threshold.copy_(scaled.flatten().topk(k * BATCH).values[-1])
    sums = ScalingSums(crosscoder)
    seconds = interleaved({"encode": lambda: crosscoder.encode(x), "scale": lambda: sums.add(x)}, n_rounds=n_rounds)
    name = f"latent-scaling.{d_model}x{dict_size}.ratio_to_encode"
    return ratio_row(name, seconds["scale"], seconds["encode"], "encoder passes")
