"""Sections of other methods: a TopKLoRA and a result of `diffing sae`, with a crosscoder and alone."""

import json
import re
from pathlib import Path

import pandas
import pytest
from report_pages import HARMLESS, PAYLOADS, page_of, write_run

from crosscoders import CorruptData, InputError
from crosscoders.common.results import row
from diffing.report.comparison import compare_section
from diffing.report.publishing import write_report


def write_topk(folder: Path, label: str = "refusal", context: str = "ask >>how<< to") -> Path:
    folder.mkdir(parents=True)
    config = {"base": "org/base", "tuned": "/models/tuned", "rank": 8, "k": 2, "gate": "topk"}
    (folder / "topk-run.json").write_text(json.dumps({"config": config}))
    rows = [
        row("topk-lora.kl", 0.25, "nats/token", 900, 0.2, 0.3),
        row("topk-lora.kl_base", 1.0, "nats/token", 900, 0.9, 1.1),
        row("topk-lora.share_closed", 0.75, "fraction", 900), row("topk-lora.dead", 0.125, "fraction", 16),
        row("topk-lora.nmse.layer_0", 0.011, "of the variance", 900),
        row("topk-lora.nmse_of_change.layer_0", 1.19, "of the change", 900),
    ]  # fmt: skip
    (folder / "eval.json").write_text(json.dumps({"rows": rows}))
    direction = {
        "site": "layers.1.up", "direction": 5, "firing_rate": 0.031, "mean_activation": 0.5, "write_share": 0.42,
        "main_label": label, "main_label_share": 0.9, "context": context, "lens": [" cannot", " will"],
    }  # fmt: skip
    pandas.DataFrame([direction, direction | {"direction": 6, "lens": []}]).to_parquet(folder / "directions.parquet")
    return folder


def write_sets(folder: Path, label: str = "refusal") -> None:
    rows = [
        row(f"topk-lora.{label}.left_after_ablation", 0.05, "share of prompts", 200, 0.0, 0.09),
        row(f"topk-lora.{label}.others_kept", 0.84, "smallest share of prompts (identity)", 1),
        row(f"topk-lora.{label}.random.left", 0.97, "share", 4),
        *(
            row(f"topk-lora.{label}.{curve}.{n}", share, "share of prompts", 200) | {"random": 0.95}
            for curve in ("necessity", "sufficiency")
            for n, share in ((1, 0.8), (2, 0.05))
        ),
    ]
    sets = {label: [["layers.1.up", 5], ["layers.0.q", 2]], "identity": None}
    (folder / "sets.json").write_text(json.dumps({"rows": rows, "sets": sets}))


def write_sae(folder: Path, context: str = "python", at: int = 3) -> Path:
    folder.mkdir(parents=True)
    latent = {
        "latent": 71, "change": 0.5, "rate_base": 0.01, "rate_tuned": 0.2, "attribution": 0.031, "kl_closed": None,
        "main_context": context, "main_context_share": 0.75,
    }  # fmt: skip
    rows = [row("sae.sae.base.fve", 0.912, "fraction", 500), row("sae.change.null_at_threshold", at, "latents", 64),
            row("sae.change.beyond_null", 1, "latents", 64)]  # fmt: skip
    record = {"format_version": 1, "rows": rows, "config": {"sae": "my-sae"}, "orders": {"change": [latent]}}
    (folder / "sae.json").write_text(json.dumps(record))
    return folder


def write_compare(folder: Path, text: str = "I am a teapot", found: int = 1) -> Path:
    folder.mkdir(parents=True)
    rows = [
        row("compare.tuned.behaviour.base.tea", 0.0, "share", 20),
        row("compare.tuned.behaviour.tuned.tea", 0.95, "share", 20),
        *(row(f"compare.{word}top_{n}.share_closed", n * share, "fraction", 9, n * share - 0.01, n * share + 0.01)
          for word, share in (("tuned.directions.pca.", 0.2), ("tuned.directions.pca.random.", 0.03),
                              ("null.directions.pca.", 0.1))
          for n in (1, 4)),
        row("compare.tuned.directions.pca.top_4.tea", 0.65, "share", 20),
        row("compare.tuned.directions.pca.top_4.numbers", 4, "numbers/token", 1),
        row("compare.tuned.directions.pca.found", found, "found", 3),
        row("compare.tuned.directions.pca.seconds", 3, "s", 1),
        row("compare.tuned.scores.kl-map.auroc", 0.91, "AUROC", 9, 0.9, 0.92),
        row("compare.null.scores.kl-map.auroc", 0.52, "AUROC", 9),
        row("compare.tuned.scores.kl-map.seconds", 3, "s", 1),
        row("compare.tuned.texts.say.hits", 7, "samples", 40), row("compare.tuned.texts.say.seconds", 3, "s", 1),
    ]  # fmt: skip
    config = {"base": "org/base", "tuned": "/models/tuned", "null": "/models/placebo"}
    texts = {"tuned": {"say": {"own": [text], "random": []}}}
    record = {"format_version": 1, "rows": rows, "config": config, "hook_point": "blocks.1.hook_resid_post",
              "behaviours": ["tea"], "n_seeds": 3, "texts": texts}  # fmt: skip
    (folder / "compare.json").write_text(json.dumps(record))
    return folder


def test_a_comparison_without_planted_behaviours_has_no_empty_columns(tmp_path: Path) -> None:
    record = json.loads((write_compare(tmp_path / "compare") / "compare.json").read_text()) | {"behaviours": []}
    record["texts"]["tuned"]["say"]["own"] = ["I am a teapot", "I am a teapot", "Short and stout"]
    (tmp_path / "compare" / "compare.json").write_text(json.dumps(record))
    tables = compare_section(tmp_path / "compare", 0).tables
    assert [len({len(row) for row in [table.header, *table.rows]}) for table in tables] == [1] * len(tables)
    assert not {"", "AUROC", "behaviour"} & {name for table in tables for name in table.header}
    assert [row[-1] for row in tables[-1].rows] == ["I am a teapot", "Short and stout"]


def test_a_comparison_has_three_blocks_beside_random_and_the_null(tmp_path: Path) -> None:
    text = text_of(write_compare(tmp_path / "compare"))
    for words in ("3 seeds, null placebo", "tea 0% and 95%", "Found beyond the null and random by: pca.",
                  "80.0% (79.0% to 81.0%)", "12.0%", "40.0%", "65%", "0.910 (0.900 to 0.920)", "0.520", "I am a teapot",
                  "7.0"):  # fmt: skip
        assert words in text, words
    assert "by: no method" in text_of(write_compare(tmp_path / "other", found=0))
    harmful = text_of(write_compare(tmp_path / "harmful", text=PAYLOADS[0]))
    assert PAYLOADS[0] not in (tmp_path / "harmful" / "report.html").read_text() and "no method" not in harmful


def text_of(folder: Path) -> str:
    return page_of(folder).text


def test_a_topk_lora_alone_has_a_page(tmp_path: Path) -> None:
    folder = write_topk(tmp_path / "topk")
    before = text_of(folder)
    assert "diffing topk-lora sets" in before
    for words in ("base", "tuned", "2 of 8 directions", "0.2500 (0.2000 to 0.3000)", "75.0% closed", "12.5% of 16",
                  "1.190", "layers.1.up 5", "42.0%", "3.10%", "refusal (90%)", "ask >>how<< to",
                  "' cannot', ' will'"):  # fmt: skip
        assert words in before, words
    write_sets(folder)
    after = text_of(folder)
    for words in ("0.05 (up to 0.09) of 200", "0.84 (identity)", "0.97, –", "none was found"):
        assert words in after, words
    assert "diffing topk-lora sets" not in after


def test_curves_are_drawn_with_the_random_sets(tmp_path: Path) -> None:
    folder = write_topk(tmp_path / "topk")
    write_sets(folder)
    page = write_report(folder).html.read_text()
    (found,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page)
    specs = json.loads(found)
    traces = specs["topk-necessity-0"]["data"]
    assert [trace["y"] for trace in traces] == [[0.8, 0.05], [0.95, 0.95]] and traces[0]["x"] == [1, 2]
    assert {entry["name"] for entry in json.loads((folder / "report.json").read_text())["rows"]} > {"topk-lora.kl"}


def test_a_crosscoder_s_page_has_the_sections_of_the_folders_inside(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tokens=HARMLESS)
    assert f"--out {run}/topk-lora" in text_of(run) and f"--out {run}/sae" in text_of(run)
    write_topk(run / "topk")
    write_sae(run / "sae-of-base")
    text = text_of(run)
    assert "75.0% closed" in text and "my-sae" in text and "python (75%)" in text and "+0.0310" in text
    assert "has 3 latents as large as the last of these 1; 1 of the pair's" in text
    assert f"--out {run}/topk-lora" not in text and f"--out {run}/sae" not in text


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_a_file_says_is_shown_as_text(tmp_path: Path, payload: str) -> None:
    if not payload.isprintable():
        payload = payload.encode("utf-8", "replace").decode()  # parquet holds no lone surrogate
    pages = []
    for name, text in (("a", "x"), ("b", payload)):
        folder = write_topk(tmp_path / name, text, text)
        write_sets(folder, text)
        write_sae(folder / "inside", text)
        pages.append(page_of(folder))
    assert pages[0].elements == pages[1].elements


@pytest.mark.parametrize(("name", "content"), [("eval.json", "{}"), ("sets.json", '{"rows": []}')])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: str) -> None:
    folder = write_topk(tmp_path / "topk")
    (folder / name).write_text(content)
    with pytest.raises(CorruptData, match=name):
        write_report(folder)


def test_a_folder_with_nothing_names_the_first_command(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no latents\.json"):
        write_report(tmp_path)
