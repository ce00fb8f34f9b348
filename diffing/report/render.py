"""A run in memory -> the bytes of report.html and the object of report.json: the second half of step 5.

Every string from a file is attacker text: the template escapes all of it, `visible` shows its invisible characters, and
the page's policy forbids every load. Equal runs give equal bytes: ids are fixed and nothing holds a time.

Reading order: `render_json`, `render_html`, `figure_json`, `table_rows`, `best_latents`, `shown_examples`.
"""

import base64
import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from crosscoders.dictionary.health import warning
from diffing.latents.nulls import NULL, counts_beside, kinds_of
from diffing.latents.verdict import VERDICTS
from diffing.report import causes, figures, findings, nulls, samples, summary
from diffing.report.cards import Details, details_of
from diffing.report.curves import training_figures
from diffing.report.data import MADE_BY, Example, Run, command_for
from diffing.report.definitions import COLUMNS, definitions
from diffing.report.sections import Section, absent
from diffing.report.text import NONE, Part, clip, fixed, flat, highlight, html_length, number, numbers, visible

HERE = Path(__file__).parent
FIXED = ("nu_", "beta_", "share_", "template_share", "specificity", "decoder_cosine", "relative_decoder_norm")
"""Beginnings of columns that are read with three decimals."""
TABLE_ROWS = 2_000
TABLE_CHARACTERS = 2_000_000
BEST_LATENTS, NEAREST_LATENTS = 12, 5
EXAMPLES_OF_A_LATENT = 20
EXAMPLE_CHARACTERS = 5_000_000
# The two budgets are of HTML and keep the page below 8 MB beside plotly.js, which has 2 MB as it is packed.


class Row(NamedTuple):
    """A latent in the table."""

    place: int
    """Where it stands in the columns of the file."""
    latent: int
    verdict: str
    cells: list[str]


class Context(NamedTuple):
    """An example as it is shown."""

    source: str
    """Group, document, position and activation in words."""
    parts: list[Part]


class Card(NamedTuple):
    """A latent with its examples."""

    latent: int
    verdict: str
    rank: str
    facts: str
    where: str
    """The main context in words; empty where there is none."""
    contexts: list[Context]
    n_contexts: int
    """Examples in the file, of which the contexts are the first."""
    details: Details


def render_json(run: Run, rows: list[Row]) -> dict[str, Any]:
    """Return the report as plain data: counts and measures with their n, and the latents of the table."""
    columns = run.latents.columns
    return {
        "name": "report",
        "config": run.look("config"),
        "environment": run.look("environment"),
        "inputs": run.look("inputs"),
        "rows": summary.result_rows(run),
        "n_latents": len(run.latents),
        "n_tokens": run.latents.n_tokens,
        "n_blocks": run.latents.n_blocks,
        "thresholds": run.latents.thresholds,
        "n_folded_groups": run.latents.n_folded_groups,
        "warnings": summary.reasons_against(run),
        "nulls": run.nulls or None,
        "causal": [row for entry in run.causal.values() for patched in entry["sets"] for row in patched[1:] if row]
        or None,
        "say": {key: run.say[key] for key in ("phrases", "top_samples")} if run.say else None,
        "replies": run.replies.get("rows"),
        "latents": [{name: values[i] for name, values in columns.items()} for i in [row.place for row in rows]],
    }


def render_html(run: Run, rows: list[Row]) -> bytes:
    """Return the page: one file, with plotly.js, style and data inside."""
    curves, curves_caption = training_figures(run.training, run.heldout)
    norms = [figures.norm_figure(run.latents), figures.cosine_figure(run.latents)]
    nu = figures.nu_figure(run.latents)
    null_figure = [nulls.null_figure(run)] if run.nulls else []
    causal_figure = [causes.causal_figure(run)] if run.causal else []
    columns, verdicts = definitions(run.latents)
    cards, cards_sentence = shown_examples(run)
    linked = {card.latent for card in cards}
    base, tuned = summary.pair_names(run)
    of_sections = [figure for section in run.sections for figure in section.figures]
    page = page_template().render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        plotly=packed_plotly(),
        specs=figure_json([*curves, *norms, nu, *null_figure, *causal_figure, *of_sections]),
        base=base,
        tuned=tuned,
        summary=summary,
        warning=warning(against) if (against := summary.reasons_against(run)) else "",
        run=run,
        missing={name: command_for(name, run.path) for name in MADE_BY if not (run.path / name).is_file()},
        findings=findings,
        best=best_latents(run),
        nearest=nearest_latents(run),
        curves=curves,
        curves_caption=curves_caption,
        norms=norms,
        nu=nu,
        nulls=nulls,
        kinds_of=kinds_of,
        beside=counts_beside(run.nulls),
        null_figure=null_figure,
        causes=causes,
        causal_figure=causal_figure,
        causal_command=causes.CAUSAL.format(run=run.path),
        sections=run.sections,
        absent_methods=absent(run.path, run.sections),
        samples=samples,
        say_command=samples.SAY.format(run=run.path),
        replies_command=samples.REPLIES.format(run=run.path),
        null_command=NULL.format(run=run.path),
        table_columns=table_columns(run),
        rows=rows,
        linked=linked,
        cards=cards,
        cards_sentence=cards_sentence,
        column_definitions=columns,
        verdict_definitions=verdicts,
        flat=flat,
        number=number,
        verdicts=list(VERDICTS),
    )
    return page.encode()


def render_methods(sections: list[Section]) -> bytes:
    """Return the page of a folder without a crosscoder: the sections of other methods alone."""
    base, tuned = sections[0].pair
    page = page_template("methods.html.j2").render(
        style=Markup((HERE / "style.css").read_text(encoding="utf-8")),
        script=Markup((HERE / "page.js").read_text(encoding="utf-8")),
        plotly=packed_plotly(),
        specs=figure_json([figure for section in sections for figure in section.figures]),
        base=base,
        tuned=tuned,
        sections=sections,
    )
    return page.encode()


@cache
def page_template(name: str = "template.html.j2") -> Template:
    """Return a template, compiled once: every expression is escaped, an unknown name is an error."""
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: visible(value) if type(value) is str and not value.isprintable() else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


@cache
def packed_plotly() -> str:
    """Return plotly.js, gzipped, as text; the page unpacks it."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), mtime=0)).decode()


def figure_json(shown: list[figures.Figure]) -> Markup:
    """Return figures by id, in the form that may stand inside a script element."""
    text = json.dumps({figure.name: figure.spec for figure in shown}, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


# -------------------------------------------------------------------------------------------------------------- table


def table_columns(run: Run) -> list[tuple[str, str]]:
    """Return (name, `number` or `text`) of each column of the table; both kinds decide how it is sorted."""
    words = {"verdict", "norm_class", "main_context"}
    shown = [(name, "text" if name in words else "number") for name in COLUMNS]
    for name in run.latents.extra:
        is_text = any(isinstance(value, str) for value in run.latents.columns[name])
        shown.append((name, "text" if is_text else "number"))
    return shown


def table_rows(run: Run) -> list[Row]:
    """Return the best-ranked latents, as many as page and report.json hold."""
    columns, indices = run.latents.columns, run.latents.order[:TABLE_ROWS]
    texts = [cells(run, name, indices) for name, _ in table_columns(run)]
    rows: list[Row] = []
    size = 0
    for place, *row in zip(indices, *texts, strict=True):
        size += 160 + 10 * len(row) + html_length("".join(row))
        if size > TABLE_CHARACTERS:
            break
        rows.append(Row(place, columns["latent"][place], columns["verdict"][place], row))
    return rows


def cells(run: Run, name: str, indices: list[int]) -> list[str]:
    """Write the values of a column as text; their error or share stands in the same cell."""
    column, within = run.latents.columns[name], run.latents.inside(name)
    values = [column[i] for i in indices]
    inside = [None] * len(indices) if within is None else [run.latents.columns[within][i] for i in indices]
    if name in ("latent", "rank"):
        return [NONE if value is None else str(value) for value in values]
    if name == "main_context":
        shares = ["" if share is None else f" ({share:.0%})" for share in inside]
        return [f"{clip(value)}{share}" if value else NONE for value, share in zip(values, shares, strict=True)]
    if set(map(type, values)) <= {int, float, type(None)}:
        texts = fixed(values) if name.startswith(FIXED) else numbers(values)
        errors = ["" if e is None else " ± <0.001" if 0 < e < 0.0005 else f" ± {e:.3f}" for e in inside]
        return [NONE if v is None else f"{t}{e}" for v, t, e in zip(values, texts, errors, strict=True)]
    return [NONE if v is None else clip(v if isinstance(v, str) else json.dumps(v)) for v in values]


# ----------------------------------------------------------------------------------------------------------- examples


def best_latents(run: Run) -> list[Card]:
    """Return cards of the first latents that are specific to a model, with one context each."""
    return [card(run, i, 1) for i in findings.specific_latents(run)[:BEST_LATENTS]]


def nearest_latents(run: Run) -> list[Card]:
    """Return cards of the best-ranked latents that are not specific, where none is."""
    if findings.specific_latents(run):
        return []
    ranked = [i for i in run.latents.order if run.latents.alive[i] and run.latents.columns["rank"][i] is not None]
    return [card(run, i, 1) for i in ranked[:NEAREST_LATENTS]]


def shown_examples(run: Run) -> tuple[list[Card], str]:
    """Return the examples of the best-ranked latents that have any, as many as the page can hold, and a sentence with
    counts."""
    having = [i for i in run.latents.order if run.examples.get(run.latents.columns["latent"][i])]
    cards: list[Card] = []
    size = 0
    for i in having:
        shown = card(run, i, EXAMPLES_OF_A_LATENT)
        size += 500 + len(shown.details.path) + 60 * len(shown.details.neighbours) + 40 * len(shown.details.lens)
        for context in shown.contexts:
            marks = sum(1 for part in context.parts if part.level)
            size += 150 + 65 * marks + html_length("".join(part.text for part in context.parts))
        if size > EXAMPLE_CHARACTERS:
            break
        cards.append(shown)
    sentence = (
        f"Examples of {number(len(cards))} latents of the {number(len(having))} that have any, best rank first, at "
        f"most {EXAMPLES_OF_A_LATENT} each. Active tokens have a background in proportion to the activation, on one "
        "scale for each latent; the outlined token is the peak."
    )
    return cards, sentence


def card(run: Run, i: int, n_contexts: int) -> Card:
    columns = run.latents.columns
    latent, rank = columns["latent"][i], columns["rank"][i]
    examples = run.examples.get(latent, [])
    top = max((value for example in examples for value in example.values), default=0.0)
    contexts = [Context(source(example), highlight(example, top)) for example in examples[:n_contexts]]
    facts = [f"{name} {cells(run, name, [i])[0]}" for name in ("nu_error", "nu_reconstruction")]
    facts += [
        f"decoder cosine {cells(run, 'decoder_cosine', [i])[0]}",
        f"relative norm {cells(run, 'relative_decoder_norm', [i])[0]}",
    ]
    facts.append(f"active on {number(columns['n_active'][i])} of {number(run.latents.n_tokens)} tokens")
    partner, together = (columns.get(name, {i: None})[i] for name in ("partner", "partner_correlation"))
    if partner is not None and columns["verdict"][i] == "decoupled":
        facts.append(f"fires with latent {partner} of the other model (correlation {together:.2f})")
    sibling = columns.get("sibling", {i: None})[i]
    if sibling is not None and columns["verdict"][i] == "split":
        facts.append(f"in one model it writes the direction of latent {sibling}")
    passed = nulls.beyond(run, latent)
    facts += [f"stands out where {', '.join(passed)} has next to none"] if passed else []
    where = f"mostly {cells(run, 'main_context', [i])[0]}" if columns["main_context"][i] else ""
    rank_text = NONE if rank is None else str(rank)
    details = details_of(run.details, latent, columns["max_activation"][i])
    return Card(latent, columns["verdict"][i], rank_text, " · ".join(facts), where, contexts, len(examples), details)


def source(example: Example) -> str:
    words = [clip(example.group, 40)] if example.group is not None else []
    numbers = {"document": example.document, "token": example.position}
    words += [f"{name} {value}" for name, value in numbers.items() if value is not None]
    if example.value is not None:
        words.append(f"activation {number(float(example.value))}")
    return " · ".join(words)
