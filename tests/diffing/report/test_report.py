"""The report: a synthetic run folder in, one page and one JSON file out."""

import json
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffing import write_report
from diffing.latents.verdict import VERDICTS, Thresholds
from diffing.report import figures
from diffing.report.curves import thin
from diffing.report.data import COLUMNS, MADE_BY, read_run
from diffing.report.definitions import COLUMNS as DEFINED
from diffing.report.figures import nu_figure
from diffing.report.render import cells
from diffing.report.summary import pair_names
from diffing.report.text import number, visible

HARMLESS = ["<start_of_turn>", "model", "\n", "I", " cannot", " help", " with", " that", " request", "."]
PAYLOADS = [
    "</script><img src=x onerror=alert(1)>", "<script>alert(1)</script>", "\"><svg onload=alert(1)>", "{{7*7}}",
    "{% raw %}", "' onmouseover='alert(1)", "\" style=\"background:url(http://evil.example)", "javascript:alert(1)",
    "\x00", "\x1b[31m", "\u202e\u2066", "\u2028\u2029", "\ud800", "<!--", "-->", "]]>",
    "&lt;img src=x onerror=alert(1)&gt;", "</style><link rel=stylesheet href=//evil.example>", "</mark></span>",
    "<base href=//evil.example>",
]  # fmt: skip
ROTATED = (
    "tuned-specific",
    "rotated",
    "shared",
    "shared",
    "shared",
    "shrunk",
    "decoupled",
    "base-specific",
    "undetermined",
    "dead",
)


def write_run(
    folder: Path, n: int = 40, *, n_examples: int = 6, tokens: list[str] = HARMLESS, top: float = 0.8
) -> Path:
    """A run folder whose first latents by number are the best by rank; no relative decoder norm is above `top`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    verdict = [ROTATED[i % len(ROTATED)] for i in range(n)]
    alive = [word != "dead" for word in verdict]

    def floats(values: Any) -> list[float | None]:
        return [v if live else None for v, live in zip(np.round(values, 4).tolist(), alive, strict=True)]

    norm = np.clip(rng.normal(0.5, 0.12, n), 0.15, top)
    classes = ["tuned-only" if v > 0.9 else "shared" if 0.4 <= v <= 0.6 else "other" for v in norm]
    n_active = [30 + int(v) if live else 0 for v, live in zip(rng.lognormal(6, 1.5, n), alive, strict=True)]
    columns: dict[str, list[Any]] = {
        "latent": list(range(n)),
        "verdict": verdict,
        "norm_class": classes,
        "relative_decoder_norm": floats(norm),
        "decoder_norm_base": floats(rng.uniform(0.5, 1, n)),
        "decoder_norm_tuned": floats(rng.uniform(0.5, 1, n)),
        "decoder_cosine": floats(
            [rng.normal(0.02, 0.1) if word == "rotated" else 1 - rng.gamma(2, 0.06) for word in verdict]
        ),
        "nu_error": floats(rng.normal(0.7, 0.4, n)),
        "nu_error_stderr": floats(rng.uniform(0, 0.1, n)),
        "nu_reconstruction": floats(rng.normal(0.8, 0.3, n)),
        "nu_reconstruction_stderr": [None] * n,
        "nu_error_mirror": floats(rng.normal(0.8, 0.2, n)),
        "nu_reconstruction_mirror": floats(rng.normal(0.8, 0.2, n)),
        "n_active": n_active,
        "frequency": [round(v / 250_000, 8) for v in n_active],
        "max_activation": floats(rng.uniform(1, 60, n)),
        "specificity": floats(np.linspace(1, 0, n)),
        "rank": [i + 1 if live else None for i, live in enumerate(alive)],
        "template_share": floats(rng.uniform(0, 1, n)),
        "main_context": [("refusal", "identity", "raw text")[i % 3] for i in range(n)],
        "main_context_share": floats(rng.uniform(0.3, 1, n)),
        "nu_error_mirror_stderr": floats(rng.uniform(0, 0.1, n)),
        **{f"beta_{name}": floats(rng.uniform(0, 1, n)) for name in ("base_error", "base_error_stderr", "tuned_error")},
        "share_refusal": floats(rng.uniform(0, 1, n)),
    }
    thresholds = {
        "nu_error": 0.2,
        "nu_reconstruction": 0.5,
        "tuned_only": 0.9,
        "base_only": 0.1,
        "rotated_cosine": 0.5,
        "tuned_leaning": 0.7,
        "base_leaning": 0.3,
        "partner_correlation": 0.7,
        "min_active": 30,
    }
    put(
        folder,
        "latents.json",
        {"format_version": 1, "n_tokens": 250_000, "n_blocks": 32, "thresholds": thresholds, "columns": columns},
    )
    put(folder, "run.json", setup(n))
    rows = [
        ("fve.base", 0.9634, "fraction"),
        ("fve.tuned", 0.9581, "fraction"),
        ("l0", 15.9, "latents/token"),
        ("dead", 0.1, "fraction"),
    ]
    rows_json = [
        {"name": f"eval.{a}", "value": b, "unit": c, "n": 40_000, "low": None, "high": None} for a, b, c in rows
    ]
    put(folder, "eval.json", {"name": "eval", "rows": rows_json})
    write_training(folder, 160)
    write_examples(folder, [i for i in range(n) if alive[i]][:n_examples], tokens)
    return folder


def setup(dict_size: int) -> dict[str, Any]:
    config = {
        "crosscoder": {"dict_size": dict_size, "activation": "batchtopk", "k": 16},
        "batch_size": 1024,
        "lr": 0.004,
        "l1": None,
    }
    cache = {
        "path": "cache", "hash": "c0ffee" * 8, "n_tokens": 250_000, "hook_point": "blocks.2.hook_resid_post",
        "base": {"name": "demo-base", "hash": "aa" * 20}, "tuned": {"name": "demo-chat", "hash": "bb" * 20},
        "tokenizer_hash": "cc" * 20, "template_hash": "dd" * 20, "groups": ["refusal", "identity", "raw text"],
    }  # fmt: skip
    environment = {"python": "3.11.7", "torch": "2.13.0", "numpy": "2.4.6", "platform": "Linux", "git_commit": "0" * 40}
    return {
        "format_version": 1,
        "command": "train",
        "config": config,
        "environment": environment,
        "inputs": {"cache": cache},
    }


def write_training(folder: Path, n: int) -> None:
    lines: list[dict[str, Any]] = []
    for i in range(n):
        fve, step = 0.97 - 0.9 * np.exp(-i / 12), 50 * (i + 1)
        line = {
            "step": step,
            "tokens": step * 1024,
            "loss": 40 * np.exp(-i / 10) + 2,
            "reconstruction": 2.0,
            "lr": 4e-3,
        }
        line |= {
            "fve_base": fve,
            "fve_tuned": fve - 0.01,
            "l0": 16 + 8 * np.exp(-i / 20),
            "dead": 0.3 * np.exp(-i / 15),
        }
        lines.append(line)
        if i % 40 == 39:
            heldout = {"event": "eval", "step": step, "fve_base": fve - 0.02, "fve_tuned": fve - 0.03, "l0": 16.2}
            lines.append(heldout | {"dead": 0.02, "n_tokens": 40_000})
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_examples(folder: Path, latents: list[int], tokens: list[str]) -> None:
    rng = np.random.default_rng(1)
    examples: dict[str, Any] = {}
    for latent in latents:
        examples[str(latent)] = []
        for i in range(10):
            text = [tokens[(i + j) % len(tokens)] for j in range(40)]
            values = np.where(rng.random(40) < 0.3, rng.random(40) * 5, 0).round(3)
            values[20] = 6.0
            examples[str(latent)].append({"document": i, "group": "refusal", "position": 20, "value": 6.0, "peak": 20,
                                          "tokens": text, "values": values.tolist()})  # fmt: skip
    put(folder, "examples.json", {"format_version": 1, "latents": examples})


def put(folder: Path, name: str, value: Any) -> None:
    (folder / name).write_text(json.dumps(value))


def change_latents(folder: Path, change: Any) -> None:
    table = json.loads((folder / "latents.json").read_text())
    change(table)
    put(folder, "latents.json", table)


class Inventory(HTMLParser):
    """Counts elements with their attribute names, and keeps attribute values and the text outside script and style."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: Counter[tuple[str, ...]] = Counter()
        self.values: list[tuple[str, str]] = []
        self.words: list[str] = []
        self.comments = 0
        self.raw = False
        self.feed(page)
        self.close()
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[(tag, *(name for name, _ in attrs))] += 1
        self.values += [(name, value or "") for name, value in attrs]
        self.raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.elements[("/" + tag,)] += 1
        self.raw = False

    def handle_data(self, data: str) -> None:
        if not self.raw:
            self.words.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments += 1


def page_of(folder: Path) -> Inventory:
    return Inventory(write_report(folder).html.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered run of 40 latents; do not change it."""
    made = write_run(tmp_path_factory.mktemp("report") / "run")
    write_report(made)
    return made


@pytest.fixture(scope="module")
def page(run: Path) -> Inventory:
    return Inventory((run / "report.html").read_text(encoding="utf-8"))


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads(write_report(folder).json.read_text())
    return {row["name"]: row for row in report["rows"]}


# ------------------------------------------------------------------------------------------------------------ the files


def test_two_renders_of_a_run_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    first = [(run / name).read_bytes() for name in ("report.html", "report.json")]
    other = write_report(run, html=tmp_path / "a.html", json=tmp_path / "b.json")
    assert other == (tmp_path / "a.html", tmp_path / "b.json")
    assert [path.read_bytes() for path in other] == first
    assert sorted(path.name for path in run.glob("*report*")) == ["report.html", "report.json"]


def test_a_page_of_a_large_dictionary_stays_below_8_megabytes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 70_000, n_examples=64, tokens=['"<b>&"', " the", "\n"])
    files = write_report(run)
    assert files.html.stat().st_size < 8_000_000
    page = Inventory(files.html.read_text(encoding="utf-8"))
    assert "The table holds the 2,000 best-ranked of 70,000 latents" in page.text
    assert "points are the 500 best-ranked" in page.text
    assert page.elements[("tr", "id", "data-verdict")] + page.elements[("tr", "id", "data-verdict", "class")] == 2_000
    assert len(json.loads(files.json.read_text())["latents"]) == 2_000


def test_many_examples_are_cut_to_what_the_page_can_hold_and_the_page_says_so(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 200, n_examples=150, tokens=['"' * 60])
    files = write_report(run)
    assert files.html.stat().st_size < 8_000_000
    page = Inventory(files.html.read_text(encoding="utf-8"))
    shown = sum(name == "id" and bool(re.fullmatch(r"latent-\d+", value)) for name, value in page.values)
    assert 3 < shown < 150
    assert f"Examples of {shown} latents of the 150 that have any" in page.text


def test_json_is_strict_where_the_run_has_nan(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    def change(table: dict[str, Any]) -> None:
        table["columns"]["nu_error"][3] = float("nan")
        table["columns"]["share_refusal"][4] = float("inf")

    change_latents(run, change)
    put(run, "run.json", setup(40) | {"config": {"lr": float("nan")}})

    def refuse(word: str) -> None:
        raise AssertionError(word)

    report = json.loads(write_report(run).json.read_text(), parse_constant=refuse)
    assert report["latents"][3]["nu_error"] is None and report["latents"][4]["share_refusal"] is None
    assert report["config"] == {"lr": None}
    assert list(report)[:5] == ["name", "config", "environment", "inputs", "rows"]


def test_importing_the_report_does_not_import_torch() -> None:
    code = "import sys, diffing.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# ------------------------------------------------------------------------------------------------------ safe and closed


def test_payload_tokens_create_no_element_and_no_attribute(tmp_path: Path) -> None:
    harmless = write_run(tmp_path / "a", tokens=["x"] * len(PAYLOADS))
    hostile = write_run(tmp_path / "b", tokens=PAYLOADS)
    put(
        hostile, "run.json", json.loads(json.dumps(setup(40)).replace("demo-chat", "</title><script>alert(1)</script>"))
    )
    expected, found = page_of(harmless), page_of(hostile)
    assert found.elements == expected.elements
    assert (found.comments, expected.comments) == (0, 0)
    for payload in PAYLOADS:
        assert visible(payload) in found.text or not payload.isprintable()
    assert not any(character in found.text for character in "\x00\u202e\u2066\u2028\ud800\x1b")
    assert "[U+0000]" in found.text and "[U+202E][U+2066]" in found.text and "49" not in visible("{{7*7}}")


def test_payloads_in_contexts_and_extra_columns_create_no_element(tmp_path: Path) -> None:
    pages = []
    for name, words in (("a", ["x"]), ("b", PAYLOADS)):
        run = write_run(tmp_path / name)

        def change(table: dict[str, Any], words: list[str] = words) -> None:
            table["columns"]["main_context"] = [words[i % len(words)] for i in range(40)]
            table["columns"]["note" if len(words) == 1 else "<img src=x>"] = [words[-i % len(words)] for i in range(40)]

        change_latents(run, change)
        pages.append(page_of(run))
    assert pages[0].elements == pages[1].elements


def test_the_inventory_can_tell_an_injected_element() -> None:
    assert Inventory("<p>&lt;img src=x&gt;</p>").elements != Inventory("<p><img src=x></p>").elements


def test_the_page_loads_nothing_and_its_policy_forbids_loads(tmp_path: Path) -> None:
    page = page_of(write_run(tmp_path / "run", tokens=PAYLOADS))
    links = [
        value for name, value in page.values if name in ("src", "href", "action", "data", "poster", "srcset", "srcdoc")
    ]
    assert links and all(link.startswith("#") for link in links)
    ids = [value for name, value in page.values if name == "id"]
    assert len(set(ids)) == len(ids) and {link[1:] for link in links} <= set(ids)
    policies = [value for _, value in page.values if "default-src" in value]
    assert len(policies) == 1 and "default-src 'none'" in policies[0] and "http" not in policies[0]
    assert not any("url(" in value for name, value in page.values if name == "style")
    assert not any(name.startswith("on") for name, _ in page.values)


def test_figures_offer_no_button_that_sends_data_away() -> None:
    # plotly.js 4 shows by default a button that opens a page of its maker with the data of the figure.
    script = (Path(figures.__file__).parent / "page.js").read_text(encoding="utf-8")
    assert "showSendToCloud: false" in script and '[["zoom2d", "pan2d", "resetScale2d"]]' in script


def test_figures_hold_no_text_from_files(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokens=PAYLOADS)
    source = write_report(run).html.read_text(encoding="utf-8")
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', source, re.DOTALL)
    assert found and not set("<>&") & set(found[1])
    assert {"fve", "l0", "loss", "dead", "decoder-norm", "decoder-cosine", "nu"} == set(json.loads(found[1]))
    assert not any(word in found[1] for word in ("demo-chat", "refusal", "onerror", "alert"))


# ---------------------------------------------------------------------------------------------------- words and numbers


def test_an_empty_tuned_only_class_is_said_in_words(page: Inventory) -> None:
    text = page.text
    assert (
        "The published class of tuned-only latents (relative decoder norm above 0.9) is empty (0 of 36 alive latents)"
        in text
    )
    assert "appear as 4 tuned-specific latents and 4 rotated latents instead: both decoder norms are alive" in text


def test_a_tuned_only_class_with_latents_is_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"]["norm_class"].__setitem__(slice(0, 3), ["tuned-only"] * 3))
    text = page_of(run).text
    assert "(relative decoder norm above 0.9) holds 3 of 36 alive latents" in text and "instead" not in text


def test_an_empty_class_without_rotated_latents_claims_no_rotation(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"].update(verdict=["shared"] * 40))
    assert "and no latent is rotated either" in page_of(run).text


def test_the_headline_states_the_pair_the_dictionary_and_the_fit_with_n(page: Inventory) -> None:
    text = page.text
    assert "demo-base (base) against demo-chat (tuned) at blocks.2.hook_resid_post: a crosscoder of 40 latents" in text
    assert "trained on 8.19M tokens; on held-out tokens (n = 40,000) it has 15.9 active latents per token (L0)" in text
    assert "0.963 of the base model's and 0.958 of the tuned model's variance (FVE)" in text


def test_counts_in_json_equal_a_hand_count(run: Path) -> None:
    rows = {row["name"]: row for row in json.loads((run / "report.json").read_text())["rows"]}
    # 40 latents repeat a pattern of ten verdicts four times: three shared of ten, one of every other word.
    for verdict in VERDICTS:
        count = {"shared": 12}.get(verdict, 4)
        row = {
            "name": f"report.verdict.{verdict}.count",
            "value": count,
            "unit": "latents",
            "n": 40,
            "low": None,
            "high": None,
        }
        assert rows[row["name"]] == row
    assert rows["report.alive.count"]["value"] == 36
    assert (
        sum(rows[f"report.norm_class.{name}.count"]["value"] for name in ("base-only", "shared", "tuned-only", "other"))
        == 36
    )
    assert (rows["report.fve.tuned"]["value"], rows["report.fve.tuned"]["n"]) == (0.9581, 40_000)


def test_a_latent_below_the_bound_of_tokens_is_not_alive_and_in_no_figure(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"]["n_active"].__setitem__(slice(1, 3), [29, 30]))
    assert rows_of(run)["report.alive.count"]["value"] == 35
    assert "n = 35 alive latents" in page_of(run).text
    assert "Left out: 5 not alive (active on fewer than 30 tokens)" in page_of(run).text


def test_measures_come_from_the_last_heldout_line_without_eval_json(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "eval.json").unlink()
    rows = rows_of(run)
    assert (rows["report.l0"]["value"], rows["report.l0"]["n"]) == (16.2, 40_000)


def test_the_table_follows_the_rank_and_puts_unranked_latents_last(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    change_latents(run, lambda table: table["columns"]["rank"].reverse())
    latents = [row["latent"] for row in json.loads(write_report(run).json.read_text())["latents"]]
    assert latents[0] == 39 and latents[-4:] == [0, 10, 20, 30]


def test_extra_columns_stand_at_the_end_of_the_table(run: Path) -> None:
    page = (run / "report.html").read_text(encoding="utf-8")
    heads = re.findall(r'<th scope="col" data-kind="(\w+)" aria-sort="\w+"><button type="button">(.*?)</button>', page)
    names = [name.replace("<wbr>", "") for _, name in heads]
    assert names[: len(DEFINED)] == list(DEFINED)
    assert names[len(DEFINED) :] == ["beta_base_error", "beta_tuned_error", "share_refusal"]


def test_every_column_and_verdict_is_defined() -> None:
    inside = {"nu_error_stderr", "nu_reconstruction_stderr", "main_context_share"}
    assert set(DEFINED) | inside == set(COLUMNS)
    for words in VERDICTS.values():
        assert "{" not in words.format(**Thresholds()._asdict())


def test_the_heat_map_counts_every_latent_once(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", 8_000, n_examples=0))
    z = nu_figure(run.latents).spec["data"][0]["z"]
    counts = [10 ** (value - 0.3) for row in z for value in row if value is not None]
    assert sum(counts) == pytest.approx(7_200, rel=1e-3)  # nine of ten are alive; z is rounded to four digits


def test_thinning_keeps_the_mean() -> None:
    assert thin(np.array([1.0, 3.0, np.nan, 7.0, 9.0]), 2).tolist() == [2.0, 7.0, 9.0]


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0.0, "0.000"), (0.12345, "0.123"), (-0.5, "-0.500"), (0.00123, "0.00123"), (123.45, "123.5"),
     (1e-7, "1e-07"), (12_345, "12,345"), (12_345.6, "12,346")],
)  # fmt: skip
def test_numbers_are_short_and_keep_their_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_ratio_is_shown_with_its_standard_error_in_one_cell(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 3)

    def change(table: dict[str, Any]) -> None:
        table["columns"].update(nu_error=[0.17512, -0.0001, None], nu_error_stderr=[1e-9, 0.0312, None])

    change_latents(run, change)
    assert cells(read_run(run), "nu_error", [0, 1, 2]) == ["0.175 ± <0.001", "0.000 ± 0.031", "–"]


def test_a_local_model_is_called_by_the_name_of_its_folder(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    text = (run / "run.json").read_text().replace("demo-base", "/models/some-base").replace("demo-chat", "org/tuned")
    (run / "run.json").write_text(text)
    assert pair_names(read_run(run)) == ("some-base", "org/tuned")


# ------------------------------------------------------------------------------------------------------- what is absent


def test_a_run_without_optional_files_still_renders_and_names_the_commands(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for name in MADE_BY:
        if name != "latents.json":
            (run / name).unlink()
    page = page_of(run)
    evaluate = f"crosscoders eval {run} --cache CACHE --out {run}/eval.json"
    for command in (f"crosscoders train --cache CACHE --out {run}", evaluate, f"diffing scale {run} --cache CACHE"):
        assert command in page.text
    assert "The base model against the tuned model: a crosscoder of 40 latents." in page.text
    report = json.loads((run / "report.json").read_text())
    assert report["config"] is None and "report.fve.base" not in {row["name"] for row in report["rows"]}


@pytest.mark.parametrize("name", [name for name in MADE_BY if name != "latents.json"])
def test_a_run_without_one_optional_file_still_renders(tmp_path: Path, name: str) -> None:
    run = write_run(tmp_path / "run", 10)
    (run / name).unlink()
    assert f"{name}, which is not in this folder" in page_of(run).text.replace("Settings need ", "")


def test_a_run_of_dead_latents_renders(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10, n_examples=0)

    def change(table: dict[str, Any]) -> None:
        table["columns"].update(verdict=["dead"] * 10, rank=[None] * 10, norm_class=[None] * 10, n_active=[0] * 10)

    change_latents(run, change)
    assert "No alive latent has a rank." in page_of(run).text


def test_half_a_last_line_of_the_training_log_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    with (run / "train.jsonl").open("a") as file:
        file.write('{"step": 99999, "to')
    assert len(read_run(run).training) == 160


# ------------------------------------------------------------------------------------------------------------- messages


def test_a_run_without_latents_names_the_command(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    (run / "latents.json").unlink()
    expected = f"'{run}' has no latents.json. Run: diffing scale {run} --cache CACHE"
    with pytest.raises(ValueError, match=re.escape(expected)):
        write_report(run)


def test_a_missing_column_is_named_with_its_file_and_mend(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table["columns"].pop("decoder_cosine"))
    with pytest.raises(ValueError, match=r"latents\.json has no column 'decoder_cosine'.*Run: diffing scale") as caught:
        write_report(run)
    assert "\n" not in str(caught.value)


def test_unequal_columns_are_named_with_both_lengths(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table["columns"]["share_refusal"].pop())
    with pytest.raises(
        ValueError, match=r"latents\.json: column 'share_refusal' has 9 values but 'latent' has 10\. Run: diffing scale"
    ):
        write_report(run)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("verdict", "new", r"column 'verdict', entry 2 is 'new'; expected one of tuned-specific, "),
        ("norm_class", "both", r"column 'norm_class', entry 2 is 'both'; expected one of base-only, "),
        ("nu_error", "0.3", r"column 'nu_error', entry 2 is '0.3'; expected a number"),
        ("main_context", 3, r"column 'main_context', entry 2 is 3; expected text"),
        ("latent", 1, r"column 'latent' names a latent twice"),
    ],
)
def test_a_value_that_does_not_fit_is_quoted(tmp_path: Path, column: str, value: Any, message: str) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table["columns"][column].__setitem__(2, value))
    with pytest.raises(ValueError, match=message):
        write_report(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, r"format_version 2; this version reads 1"),
        ({"thresholds": {"nu_error": 0.2}}, r"has no threshold 'nu_reconstruction'"),
        ({"n_tokens": None}, r"has n_tokens = None; it must be a whole number"),
        ({"columns": []}, r"has no 'columns'"),
    ],
)
def test_a_latents_file_of_another_shape_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    run = write_run(tmp_path / "run", 10)
    change_latents(run, lambda table: table.update(change))
    with pytest.raises(ValueError, match=message):
        write_report(run)


@pytest.mark.parametrize(
    ("latent", "change", "message"),
    [
        ("999", {}, r"examples of latent '999', which is not in latents.json"),
        ("0", {"values": [1.0]}, r"an example of latent '0' lacks 'tokens' and as many 'values'"),
        ("0", {"peak": 40}, r"an example of latent '0' has peak 40 but 40 tokens"),
    ],
)
def test_an_example_that_does_not_fit_is_refused(
    tmp_path: Path, latent: str, change: dict[str, Any], message: str
) -> None:
    run = write_run(tmp_path / "run", 10)
    example = json.loads((run / "examples.json").read_text())["latents"]["0"][0] | change
    put(run, "examples.json", {"format_version": 1, "latents": {latent: [example]}})
    with pytest.raises(ValueError, match=message):
        write_report(run)


def test_a_broken_line_inside_the_training_log_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 10)
    lines = (run / "train.jsonl").read_text().splitlines()
    (run / "train.jsonl").write_text("\n".join([lines[0], '{"step": 3', *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 2 is not JSON"):
        write_report(run)
