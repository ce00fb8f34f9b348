"""What each column of the report means, in a sentence. `definitions` fills in the run's thresholds, here and in the
definitions of the verdicts."""

from diffing.latents.verdict import RANKED, VERDICTS
from diffing.report.data import Latents
from diffing.report.text import number

COLUMNS = {
    "rank": (
        "Place among alive latents that are at least as strong in the tuned model as in the base model "
        f"(relative_decoder_norm from 0.5): by verdict ({', '.join(RANKED)}), then by specificity; all others follow. "
        "1 is the strongest sign of something new in the tuned model."
    ),
    "latent": "Number of the latent in the dictionary.",
    "verdict": "What the evidence says; the words are explained below.",
    "specificity": (
        "(1 - min(1, max(|nu_error|, |nu_reconstruction|))) (1 - decoder_cosine) / 2: high where "
        "the base model lacks the tuned decoder's direction and encodes the latent along another one."
    ),
    "nu_error": (
        "beta_base / beta_tuned, where beta_m = sum f (e_m . d) / (|d|^2 sum f^2) over tokens, f is the activation, d "
        "the tuned decoder, and e_m the error of model m with the latent's own part added back. Near 0: what the "
        "dictionary misses of the base model holds none of d. ± is one standard error, a jackknife over {n_blocks} "
        "blocks of tokens, here and in every other column: it covers the choice of tokens and not another training, "
        "whose spread (diffing stability RUN RUN) is the error that matters. With BatchTopK nu_error is low by up to "
        "0.02 on planted features of known gain, which ± does not cover."
    ),
    "nu_reconstruction": (
        "The same ratio with the reconstruction of model m, bias and the latent's own part included, in place of e_m. "
        "Near 0: what the dictionary rebuilds of the base model holds none of d."
    ),
    "relative_decoder_norm": (
        "0.5 (1 + (tuned - base) / max(tuned, base)) of the two decoder norms: 0 base only, 0.5 equal, 1 tuned only."
    ),
    "decoder_cosine": "Cosine of the latent's base decoder and its tuned decoder; 0 where one of them is 0.",
    "n_active": "Tokens on which the latent is active, of {n_tokens}.",
    "frequency": "n_active / {n_tokens}.",
    "template_share": "Share of the latent's summed activation that falls on tokens of the chat template.",
    "main_context": (
        "Where most of the latent's summed activation falls: tokens of the chat template, or a group of documents "
        "outside it; the share stands in brackets."
    ),
    "max_activation": "Largest activation over the {n_tokens} tokens.",
    "decoder_norm_base": "Norm of the decoder into the base model.",
    "decoder_norm_tuned": "Norm of the decoder into the tuned model.",
    "norm_class": (
        "By relative_decoder_norm alone: base-only up to {base_only}, shared from 0.4 to 0.6, tuned-only from "
        "{tuned_only}, other in between."
    ),
    "nu_error_mirror": "nu_error with the two models exchanged: beta_tuned / beta_base on the base decoder.",
    "nu_reconstruction_mirror": "nu_reconstruction with the two models exchanged.",
}
"""The columns of the table in their order."""

FAMILIES = {
    "beta_": "The betas behind the ratios, by model and target; mirror: on the base decoder.",
    "nu_activation": "The same ratio on the activation itself, with or without the decoder bias.",
    "came_back": "Number of the other training runs in which a latent with a cosine of 0.7 or more was found "
    "(diffing stability).",
    "same_verdict": "Number of those in which it has this verdict too.",
    "share_": "Share of the latent's summed activation in this group of documents, outside the chat template.",
}
"""Further columns that begin alike."""


def definitions(latents: Latents) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (column, meaning) and (verdict, meaning) with the numbers of this run."""
    values = {name: f"{value:g}" for name, value in latents.thresholds.items()}
    values |= {"n_tokens": number(latents.n_tokens), "n_blocks": number(latents.n_blocks)}
    columns = [(name, text.format(**values)) for name, text in COLUMNS.items()]
    others = latents.extra
    if latents.n_folded_groups:
        folded = f"The same share, in the {number(latents.n_folded_groups)} groups that have no column of their own."
        columns.append(("share_other", folded))
        others = [name for name in others if name != "share_other"]
    for start, text in FAMILIES.items():
        if any(name.startswith(start) for name in others):
            columns.append((f"{start}…", text))
            others = [name for name in others if not name.startswith(start)]
    columns += [(name, "A further column of latents.json, as it stands there.") for name in others]
    return columns, [(name, text.format(**values)) for name, text in VERDICTS.items()]
