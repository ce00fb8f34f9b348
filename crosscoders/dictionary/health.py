"""Whether a dictionary may be read: what its figures on held-out tokens say against it, and what to change.

The bounds are ours: published dictionaries explain 0.8 and more of the variance with a tenth of their latents dead.
"""

from collections.abc import Mapping

MIN_FVE = 0.6
MAX_FVE_GAP = 0.1
MAX_DEAD = 0.5
MAX_L0_ERROR = 0.2
UNREADABLE = "this dictionary must not be read yet"


def complaints(
    metrics: Mapping[str, float],
    *,
    k: int | None = None,
    training: Mapping[str, float] | None = None,
    tokens: str = "held-out tokens",
) -> list[str]:
    """Return what speaks against a dictionary, a phrase with its cause and mend for each; empty where nothing does.

    metrics: `fve_<model>`, `fve_rest_<model>`, `l0`, `dead` on `tokens` (the columns of train.jsonl); entries that are
    missing are not judged. training: the same of the last training batch. k: active latents per token that
    were asked for.
    """
    reasons = []
    rest = {name: value for name, value in metrics.items() if name.startswith("fve_rest_")}
    fve = [value for name, value in metrics.items() if name.startswith("fve_") and name not in rest]
    trained = [value for name, value in (training or {}).items() if name.startswith("fve_")]
    if fve and min(fve) < MIN_FVE:
        reasons.append(
            f"it explains {min(fve):.2f} of the variance on {tokens} (below {MIN_FVE}): train longer, on more "
            "tokens, or with a larger k; --input-norm centred helps where activations have a large mean"
        )
    elif fve and trained and min(trained) - min(fve) > MAX_FVE_GAP:
        reasons.append(
            f"it explains {min(fve):.2f} of the variance on {tokens} and {min(trained):.2f} on its own: it has "
            "learned its tokens by heart. Cache more tokens, or lower dict_size or the number of epochs"
        )
    if fve and rest and max(fve) - min(rest.values()) > MAX_FVE_GAP:
        reasons.append(
            f"it explains {max(fve):.3f} of the variance, but {min(rest.values()):.2f} on tokens of ordinary norm: a "
            "few of massive norm carry the figure. Cache without them: --skip-first or --max-norm-multiple"
        )
    if metrics.get("dead", 0.0) > MAX_DEAD:
        reasons.append(
            f"{metrics['dead']:.0%} of its latents never fire on {tokens}: lower dict_size or "
            "dead_after_tokens, train longer, or use --input-norm centred"
        )
    if k is not None and "l0" in metrics and abs(metrics["l0"] - k) > MAX_L0_ERROR * k:
        reasons.append(
            f"{metrics['l0']:.1f} latents are active per token where k is {k}: the tokens differ from those of training"
        )
    return reasons


def warning(reasons: list[str]) -> str:
    """Return one line that names the reasons."""
    return f"warning: {UNREADABLE}: {'; '.join(reasons)}."
