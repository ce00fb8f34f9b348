"""At which share of active latents the sparse path of an L1 step stops paying: the dense path over it, by share.

Forward and backward of the objective, without the optimiser, which both share. The encoder bias is set so that the
wanted share of the batch's latents is active.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from benchmarks.throughput.steps import Shape, planted, start_model
from benchmarks.timing import Clock, cpu_seconds, interleaved, ratio_row
from crosscoders.dictionary import selection
from crosscoders.training import objective

SHARES = (0.0005, 0.001, 0.002, 0.004, 0.01, 0.02, 0.05, 0.1)


def rows(
    shape: Shape,
    *,
    name: str,
    n_rounds: int,
    shares: tuple[float, ...] = SHARES,
    device: str = "cpu",
    clock: Clock = cpu_seconds,
    products: torch.dtype = torch.float32,
) -> list[dict[str, Any]]:
    """Return the rows `<name>.dense_over_sparse.<share>`: above 1 the sparse path is the faster one."""
    config = shape.config()
    config = replace(
        config,
        crosscoder=replace(config.crosscoder, activation="relu", k=None),
        l1_coefficient=0.1,
        aux_coefficient=0.0,
    )
    model = start_model(config.crosscoder).to(device)
    x = planted(shape, 1)[0].to(device)
    none_dead = torch.zeros(shape.dict_size, dtype=torch.bool, device=device)
    with torch.no_grad():
        pre_acts = model.pre_acts(x).flatten()
        sample = pre_acts[torch.randperm(len(pre_acts), device=device)[:1_000_000]].sort().values
    measured = []
    for share in shares:
        with torch.no_grad():
            model.b_enc.fill_(-float(sample[int((1 - share) * (len(sample) - 1))]))

        def step(cut: float) -> Callable[[], None]:
            def run() -> None:
                held, objective.SPARSE_DENSITY = objective.SPARSE_DENSITY, {device: cut}
                try:
                    result = objective.forward(
                        model, config, x, dead=none_dead, k=None, step=0, select=selection.WarmSelection(),
                        products=products,
                    )  # fmt: skip
                finally:
                    objective.SPARSE_DENSITY = held
                torch.stack(list(result.terms.values())).sum().backward()
                model.zero_grad(set_to_none=True)

            return run

        seconds = interleaved({"sparse": step(1.0), "dense": step(-1.0)}, n_rounds=n_rounds, clock=clock)
        measured.append(ratio_row(f"{name}.dense_over_sparse.{share:g}", seconds["dense"], seconds["sparse"], "times"))
    return measured
