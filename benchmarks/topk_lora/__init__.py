r"""TopKLoRA against dense LoRA on the embedded pair: held-out KL, internal faithfulness, dead directions, sets.

Every arm is distilled from the same batches with its own rate, probed on seed 0; the first three have three seeds, the
others one; sets are searched in all seeds of the first and in seed 0 of the others. A row is a mean over seeds, low and
high its 95% interval (Student's t over seeds, null for one), n the seeds. A ratio is of the seeds that both arms have.
`quick`: one seed, three arms, few steps.
"""

from pathlib import Path
from typing import Any

from benchmarks.planted import over_seeds
from benchmarks.topk_lora.arms import ARMS, arm_config, opened, probed_rate, trained
from benchmarks.topk_lora.behaviours import BASES, set_rows_of

SEEDS, STEPS, QUICK_STEPS = range(3), 450, 40
QUICK_ARMS = ("topk-64-8", "dense-8", "dense-64")


def run(quick: bool, work: Path) -> dict[str, Any]:
    """Return rows `topk-lora.distil.<arm>.*`; `work`: folder in which finished adapters are kept."""
    setting, base = opened(QUICK_STEPS if quick else STEPS)
    work = work / ("quick" if quick else "full")
    rows: list[dict[str, Any]] = []
    values: dict[str, list[dict[str, tuple[float | None, str]]]] = {}
    sets: dict[str, list[dict[str, tuple[float | None, str]]]] = {}
    for name in QUICK_ARMS if quick else ARMS:
        lr = 5e-3 if quick else probed_rate(setting, work, name, base)
        for seed in SEEDS if name in QUICK_ARMS and not quick else SEEDS[:1]:
            adapter, measured = trained(setting, work, name, seed, arm_config(name, base, lr))
            adapter.detach()
            of_seed = {entry["name"].removeprefix("topk-lora."): (entry["value"], entry["unit"]) for entry in measured}
            values.setdefault(name, []).append(of_seed)
            if name in BASES and (name == QUICK_ARMS[0] or (seed == 0 and not quick)):
                of_sets = set_rows_of(setting, work / name / f"seed-{seed}", name, seed, quick=quick)
                sets.setdefault(name, []).append({e["name"]: (e["value"], e["unit"]) for e in of_sets})
        rows += over_seeds(f"topk-lora.distil.{name}", values[name])
        rows += over_seeds(f"topk-lora.{name}", sets.get(name, []))
    for name, reference, words in (
        ("topk-64-8", "dense-8", "equal_rank"), ("topk-64-8", "dense-64", "equal_parameters"),
        ("topk-64-4", "dense-4", "equal_rank"), ("topk-64-4", "dense-64", "equal_parameters"),
    ):  # fmt: skip
        if name in values and reference in values:
            ratios = [
                {f"kl_ratio_to_dense_{words}": (a["kl"][0] / b["kl"][0], "ratio")}  # type: ignore[operator]
                for a, b in zip(values[name], values[reference], strict=False)
            ]
            rows += over_seeds(f"topk-lora.distil.{name}", ratios)
    return {"name": "topk-lora", "rows": rows}
