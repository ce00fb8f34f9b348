"""Cost of Latent Scaling, all latents and targets, relative to the encoder pass alone.

Both run on the same batches in one loop, in turn; the ratio is taken batch by batch. `encode` gives dense latents with
the inference gate; `scale` is `ScalingSums.add`, encoder included. Inputs are random, the threshold is set so that k
latents per token are active.
"""

import statistics
import time
from typing import Any

import torch

from crosscoders import Crosscoder, CrosscoderConfig
from diffing.latent_scaling import ScalingSums

SHAPES = [(128, 512, 16), (128, 768, 24), (256, 4096, 32), (512, 16384, 64)]
"""(d_model, dict_size, k)"""
BATCH = 1024


def run(quick: bool) -> dict[str, Any]:
    """Rows `latent-scaling.<d_model>x<dict_size>.ratio_to_encode`: median over batches, low and high: quartiles."""
    rows = []
    for d_model, dict_size, k in SHAPES[: 2 if quick else None]:
        ratios = time_shape(d_model, dict_size, k, n_rounds=5 if quick else 21)
        low, middle, high = statistics.quantiles(ratios, n=4)
        rows.append(
            {
                "name": f"latent-scaling.{d_model}x{dict_size}.ratio_to_encode",
                "value": middle,
                "unit": "encoder passes (CPU time)",
                "n": len(ratios),
                "low": low,
                "high": high,
            }
        )
    return {"name": "latent-scaling", "rows": rows}


@torch.no_grad()
def time_shape(d_model: int, dict_size: int, k: int, *, n_rounds: int) -> list[float]:
    """Ratio of the two CPU times, one per round, after a warm-up."""
    generator = torch.Generator().manual_seed(0)
    crosscoder = Crosscoder(CrosscoderConfig(dict_size=dict_size, k=k, d_model=d_model))
    crosscoder.init_weights_(norm=1.0, generator=generator)
    x = torch.randn(BATCH, 2, d_model, generator=generator)
    scaled = crosscoder.encode(x, gate="relu") * crosscoder.code_norm
    crosscoder.threshold.copy_(scaled.flatten().topk(k * BATCH).values[-1])
    sums = ScalingSums(crosscoder)
    ratios = []
    for i in range(n_rounds + 2):
        start = time.process_time()
        crosscoder.encode(x)
        encoded = time.process_time()
        sums.add(x)
        if i >= 2:
            ratios.append((time.process_time() - encoded) / (encoded - start))
    return ratios
