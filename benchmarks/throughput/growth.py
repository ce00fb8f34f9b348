"""What doubling one size does to the cost of a step and of caching; everything else is held.

A step grows with the encoder's product, 2 batch n_models d_model dict_size operations, plus what does not depend on the
batch (Adam, 28 bytes a parameter) or not on dict_size (active entries, k batch n_models d_model). Caching runs the
layers up to the hook point and no head, so it grows with tokens and not with the vocabulary.
"""

from collections.abc import Callable
from typing import Any

from benchmarks.throughput import caching
from benchmarks.throughput.steps import Shape, our_step, planted, start_model, turns
from benchmarks.timing import interleaved, ratio_row

BASE = Shape(256, 4096, 1024, 32)


def step_rows(base: Shape, *, n_rounds: int) -> list[dict[str, Any]]:
    """Return the rows `throughput.step.growth.<size>_x2`: time of a step over that of the base shape, in one loop."""
    shapes = {field: base._replace(**{field: 2 * getattr(base, field)}) for field in Shape._fields}
    parts: dict[str, Callable[[], object]] = {}
    for name, shape in {"base": base, **shapes}.items():
        config = shape.config()
        parts[name] = turns(our_step(start_model(config.crosscoder), config), planted(shape))
    seconds = interleaved(parts, n_rounds=n_rounds)
    note = f"of a step at {base}, {base.n_models} models"
    return [
        ratio_row(f"throughput.step.growth.{field}_x2", seconds[field], seconds["base"], "times", note)
        for field in shapes
    ]


def cache_rows(size: caching.Size, *, n_rounds: int) -> list[dict[str, Any]]:
    """Return the rows `throughput.cache.growth.{tokens_x2,vocabulary_x4}`."""
    sizes = {
        "base": size,
        "tokens_x2": size._replace(n_rows=2 * size.n_rows),
        "vocabulary_x4": size._replace(vocabulary=4 * size.vocabulary),
    }
    parts = {name: caching.make_pair(changed).read for name, changed in sizes.items()}
    seconds = interleaved(dict(parts), n_rounds=n_rounds, n_warmup=1)
    return [
        ratio_row(f"throughput.cache.growth.{name}", seconds[name], seconds["base"], "times")
        for name in list(sizes)[1:]
    ]


def rows(quick: bool) -> list[dict[str, Any]]:
    """Return the rows `throughput.step.growth.*` and `throughput.cache.growth.*`."""
    n_rounds = 3 if quick else 9
    return step_rows(BASE, n_rounds=n_rounds) + cache_rows(caching.SMALL, n_rounds=n_rounds)
