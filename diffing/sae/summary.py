"""What `diffing sae` prints: quality, the first latents of each order with a context, what the null has of them."""

from typing import Any

from crosscoders.common.results import legend

_SHOWN = 8
_WORDS = {
    "change": "by change of mean activation, up or down",
    "attribution": "by attribution: KL closed to first order",
    "kl": "by KL closed when patched alone",
    "twin": "by how far the twin turned what they write",
}
_QUALITY = f"{'':<12}{'model':<8}{'FVE':>7}{'L0':>8}{'CE added by splice':>22}"
_HEADER = f"  {'latent':>7}{'change':>9}{'rate base':>11}{'tuned':>8}{'attrib.':>9}{'KL closed':>11}   where, strongest"

_MEANINGS = {
    "latent": "its number", "change": "of its mean activation from base to tuned, times the length that it writes",
    "rate base": "share of tokens on which it fires in the base", "tuned": "the same in the tuned model",
    "attrib.": "KL that its change closes, to first order, nats/token",
    "KL closed": "when patched alone, base to tuned, nats/token (- where it was not)",
    "where, strongest": "main context, its share of the activation, and the strongest >>token<<",
}  # fmt: skip


def sae_summary(described: dict[str, Any]) -> str:
    """Return the results as lines for people."""
    values = {entry["name"]: entry for entry in described["rows"]}
    lines = ["", _QUALITY]
    for key in values:
        if key.endswith(".l0"):
            start, (_, dictionary, model, _) = key.removesuffix(".l0"), key.split(".")
            fve, added = (values.get(f"{start}.{name}") for name in ("fve", "splice_ce"))
            shown = ["-" if entry is None else f"{entry['value']:.3f}" for entry in (fve, added)]
            lines.append(f"{dictionary:<12}{model:<8}{shown[0]:>7}{values[key]['value']:>8.1f}{shown[1]:>22}")
    meanings = {
        "model": "whose activations the dictionary reads", "FVE": "fraction of variance explained",
        "L0": "active latents per token", "CE added by splice": "to the cross-entropy of responses, nats/token",
    }  # fmt: skip
    lines += legend(_QUALITY, meanings)
    if "sae.twins.aligned" in values:
        share, permuted = (values[f"sae.twins.{key}"]["value"] for key in ("aligned", "aligned_permuted"))
        cosine = values["sae.twins.cosine_median"]["value"]
        lines.append(
            f"twins: {share:.1%} of latents match by number, {permuted:.1%} permuted; median cosine {cosine:.2f}"
        )
    for order, rows in described["orders"].items():
        lines += ["", f"First latents {_WORDS[order]}:", *_null_words(values, order, len(rows))]
        lines.append(_HEADER)
        lines += [_line(latent, described["examples"]) for latent in rows[:_SHOWN]]
    return "\n".join([*lines, "", *legend(_HEADER, _MEANINGS)])


def _null_words(values: dict[str, Any], order: str, n: int) -> list[str]:
    start = f"sae.{order}"
    words = []
    if f"{start}.null_at_threshold" in values:
        at, beyond = (values[f"{start}.{key}"]["value"] for key in ("null_at_threshold", "beyond_null"))
        words.append(
            f"  the null has {at} latents as large as the last of these {n}; {beyond} of the pair's are above all of it"
        )
    if f"{start}.split_at_threshold" in values:
        words.append(f"  two halves of the base's documents have {values[f'{start}.split_at_threshold']['value']}")
    return words


def _line(row: dict[str, Any], examples: dict[str, Any]) -> str:
    def number(key: str, form: str) -> str:
        return "-" if row.get(key) is None else format(row[key], form)

    best = (examples.get(str(row["latent"])) or [None])[0]
    text = ""
    if best is not None:
        tokens, peak = best["tokens"], best["peak"]
        text = f"{''.join(tokens[max(0, peak - 8) : peak])}>>{tokens[peak]}<<{''.join(tokens[peak + 1 : peak + 4])}"
    where = f"{row['main_context_share']:.0%} {row['main_context']}" if row["main_context"] else "-"
    return (
        f"  {row['latent']:>7}{row['change']:>+9.3f}{row['rate_base']:>11.4f}{row['rate_tuned']:>8.4f}"
        f"{number('attribution', '+.4f'):>9}{number('kl_closed', '+.4f'):>11}   {where:<18} "
        + text.replace("\n", "\u21b5")
    )
