"""A run folder with a made-up latent table, and what a rendered page holds, for the tests of the report."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from diffing import write_report

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
        "frequency": [round(16 * v / sum(n_active), 8) for v in n_active],  # an L0 of k
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
        "same_direction": 0.9,
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
        "tokenizer_hash": "cc" * 20, "template_hash": "dd" * 20,
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


def rows_of(folder: Path) -> dict[str, dict[str, Any]]:
    report = json.loads(write_report(folder).json.read_text())
    return {row["name"]: row for row in report["rows"]}
