"""The files of the report: equal bytes, a bound on their size, and nothing in them that a token could run."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from report_pages import (
    PAYLOADS,
    Inventory,
    change_latents,
    page_of,
    put,
    setup,
    write_run,
)

from crosscoders import CorruptData
from diffing import write_report
from diffing.report import figures
from diffing.report.text import visible


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered run of 40 latents; do not change it."""
    made = write_run(tmp_path_factory.mktemp("report") / "run")
    write_report(made)
    return made


def test_two_renders_of_a_run_give_equal_bytes(run: Path, tmp_path: Path) -> None:
    first = [(run / name).read_bytes() for name in ("report.html", "report.json")]
    other = write_report(run, html=tmp_path / "a.html", json=tmp_path / "b.json")
    assert other == (tmp_path / "a.html", tmp_path / "b.json")
    assert [path.read_bytes() for path in other] == first
    assert sorted(path.name for path in run.glob("*report*")) == ["report.html", "report.json"]


@pytest.mark.whole
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
    for name, words in (("a", [f"x{i}" for i in range(len(PAYLOADS))]), ("b", PAYLOADS)):
        run = write_run(tmp_path / name)

        def change(table: dict[str, Any], words: list[str] = words) -> None:
            table["columns"]["main_context"] = [words[i % len(words)] for i in range(40)]
            table["columns"]["note" if words is not PAYLOADS else "<img src=x>"] = [
                words[-i % len(words)] for i in range(40)
            ]

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


def test_the_page_says_how_many_rows_of_the_data_were_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    setup = json.loads((run / "run.json").read_text())
    assert "left out" not in page_of(run).text
    setup["inputs"]["cache"]["refused"] = {"no_messages": 1200, "broken_json": 3}
    put(run, "run.json", setup)
    said = "Rows of the data that could not be read and were left out: 1,200 no_messages, 3 broken_json."
    assert said in page_of(run).text


def html_of(run: Path) -> str:
    return write_report(run).html.read_text(encoding="utf-8")


def test_a_card_has_histogram_lens_and_neighbours_where_the_run_has_them(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert 'class="spread"' not in html_of(run)
    latent = next(iter(json.loads((run / "examples.json").read_text())["latents"]))
    cards = {"format_version": 1, "histograms": {latent: [0, 16, 1, 4]}, "neighbours": {latent: [[7, 0.81], [9, 0.5]]}}
    put(run, "cards.json", cards)
    put(run, "lens.json", {"latents": {latent: {"base": [" the", PAYLOADS[0]], "tuned": [" cannot"]}}})
    html = html_of(run)
    assert 'd="M0 28V28h8V0h8V21h8V14h8V28z"' in html  # heights 28 sqrt(n / 16)
    assert ", at most 16 tokens a bin" in html
    assert ">7</a> (0.81)" in html and ">9</a> (0.50)" in html
    assert "tuned decoder writes for: <code> cannot</code>" in html and PAYLOADS[0] not in html
    (run / "cards.json").write_text('{"format_version": 1, "histograms": 3, "neighbours": {}}')
    with pytest.raises(CorruptData, match=r"cards.json has histograms = 3"):
        write_report(run)
