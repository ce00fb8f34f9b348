"""What the embedded models do, on every held-out prompt.

A rate counts greedy replies that start with the fixed answer, with Wilson's 95% interval over prompts; the loss is in
nats per scored token of held-out raw text, with 1.96 standard errors over documents. One pair, one seed.
"""

from typing import Any

from benchmarks.embedded_pair.behaviour import evaluate
from diffing.demo import MODELS

QUICK_PROMPTS = 20
QUICK_DOCUMENTS = 100


def run(quick: bool) -> dict[str, Any]:
    """Return rows `demo-pair.<model>.<behaviour>`; `quick` takes 20 prompts a behaviour and 100 texts."""
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        measurements = evaluate(
            model, prompts=QUICK_PROMPTS if quick else None, documents=QUICK_DOCUMENTS if quick else None
        )
        rows.extend(row._replace(name=f"demo-pair.{model}.{row.name}")._asdict() for row in measurements)
    return {"name": "demo-pair", "rows": rows}
