"""`diffing topk-lora`: fit and eval, as functions of their settings that return a JSON object."""

import dataclasses
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from jaxtyping import Float

from crosscoders.common import files
from crosscoders.common.checks import config_of, to_dict
from crosscoders.common.errors import InputError
from crosscoders.common.progress import say
from crosscoders.common.records import Record
from crosscoders.common.results import legend, result, row, say_closing
from crosscoders.common.statistics import bootstrap_interval, resample
from crosscoders.models.names import hash_model
from crosscoders.text.settings import DataSource
from diffing.topk_lora.distil import Faithfulness, Setting, distil, measure_faithfulness, open_setting
from diffing.topk_lora.readouts import read_directions
from diffing.topk_lora.settings import DistilConfig, TopKEvalSettings, TopKFitSettings
from sae_lora.lora.topk import TopKLoRA, n_directions

RUN, ADAPTER, DIRECTIONS = "topk-run.json", "adapter", "directions.parquet"
ELSEWHERE = ("base", "tuned", "device")
"""Settings that may differ when a finished run is read again: models go by their hashes."""


class RunRecord(Record):
    """topk-run.json: what was distilled, with which settings."""

    again = "fit again"
    config: dict[str, Any]
    base_hash: str
    tuned_hash: str


def fit(settings: TopKFitSettings) -> dict[str, Any]:
    """Run `diffing topk-lora fit`: distil, save, evaluate."""
    started = time.perf_counter()
    config, out = config_of(DistilConfig, settings), Path(settings.out)
    record = {
        "config": to_dict(config), "base_hash": hash_model(config.base), "tuned_hash": hash_model(config.tuned),
    }  # fmt: skip
    if (out / RUN).is_file():
        if _without_places(files.read_model(out / RUN, RunRecord)) != _without_places(record):
            raise InputError(f"{out} holds a TopKLoRA with other settings or models. Choose another --out.")
        say(f"{out} is complete already")
        setting, adapter = _opened(config, out)
    else:
        with files.exclusive(out):
            setting = open_setting(config)
            say(f"distil {config.tuned} into {config.base} with a TopKLoRA, {config.steps} steps")
            adapter = distil(setting, config)
            adapter.save(out / ADAPTER)
            files.write_json(out / RUN, record)
    rows, text = _evaluated(setting, adapter, out, 10)
    say_closing(started, f"adapter in {out / ADAPTER}")
    say(f"next: diffing report {shlex.quote(settings.out)}")
    return result("topk-lora fit", to_dict(config), rows) | {"text": text}


def _without_places(record: Mapping[str, Any]) -> dict[str, Any]:
    return {**record, "config": {key: value for key, value in record["config"].items() if key not in ELSEWHERE}}


def evaluate(settings: TopKEvalSettings) -> dict[str, Any]:
    """Run `diffing topk-lora eval`."""
    out = Path(settings.run)
    if not (out / RUN).is_file():
        raise InputError(f"{out} holds no TopKLoRA: there is no {RUN}. Run diffing topk-lora fit first.")
    config = read_config(out, settings.device)
    setting, adapter = _opened(config, out)
    rows, text = _evaluated(setting, adapter, out, settings.top)
    return result("topk-lora eval", to_dict(settings), rows) | {"text": text}


def read_config(run: Path, device: str) -> DistilConfig:
    """Return the settings of a run, for this device."""
    saved = dict(files.read_model(run / RUN, RunRecord)["config"])
    if isinstance(saved["data"], list):
        saved["data"] = [DataSource(**item) if isinstance(item, dict) else item for item in saved["data"]]
    return dataclasses.replace(DistilConfig(**saved), device=device)


def open_adapter(run: Path, device: str) -> tuple[Setting, TopKLoRA]:
    """Load both models of a run, and its adapter on the base."""
    return _opened(read_config(run, device), run)


def _opened(config: DistilConfig, out: Path) -> tuple[Setting, TopKLoRA]:
    setting = open_setting(config)
    return setting, TopKLoRA.load(setting.base, out / ADAPTER)


def _evaluated(setting: Setting, adapter: TopKLoRA, out: Path, top: int) -> tuple[list[dict[str, Any]], str]:
    measured = measure_faithfulness(setting, adapter)
    table = read_directions(setting, adapter)
    table.to_parquet(out / DIRECTIONS)
    rows = faithfulness_rows(measured)
    n = n_directions(adapter)
    rows.append(row("topk-lora.dead", float((table["firing_rate"] == 0).mean()), "fraction of directions", n))
    per_site = table.groupby("site")["firing_rate"].sum()
    rows.append(row("topk-lora.l0", float(per_site.mean()), "directions per token and module", len(per_site)))
    files.write_json(out / "eval.json", {"rows": rows})
    return rows, summary(rows, measured, table.head(top))


def mean_with_interval(
    sums: Float[np.ndarray, " documents"], n_tokens: Float[np.ndarray, " documents"]
) -> tuple[float, float, float]:
    """Return sum over sum, and its 95% bootstrap interval over documents."""
    weights = resample(len(sums), 0)
    values = (weights @ sums) / np.maximum(weights @ n_tokens, 1)
    return float(values[0]), *bootstrap_interval(values)


def faithfulness_rows(measured: Faithfulness) -> list[dict[str, Any]]:
    """Return the rows of held-out KL, in all and by group, and of the internal errors."""
    n = int(measured.n_tokens.sum())
    rows = [
        row(f"topk-lora.{name}", mean, "nats/token", n, low, high)
        for name, values in zip(("kl", "kl_base"), measured.kl, strict=True)
        for mean, low, high in [mean_with_interval(values, measured.n_tokens)]
    ]
    rows.append(row("topk-lora.share_closed", float(1 - measured.kl[0].sum() / measured.kl[1].sum()), "fraction", n))
    labels = np.array(measured.labels)
    for label in sorted(set(measured.labels)):
        of = labels == label
        mean, low, high = mean_with_interval(measured.kl[0][of], measured.n_tokens[of])
        rows.append(row(f"topk-lora.kl.{label}", mean, "nats/token", int(measured.n_tokens[of].sum()), low, high))
    for layer, (error, change, spread) in enumerate(zip(measured.error, measured.change, measured.spread, strict=True)):
        rows.append(row(f"topk-lora.nmse.layer_{layer}", float(error / spread), "of the variance", n))
        rows.append(row(f"topk-lora.nmse_of_change.layer_{layer}", float(error / change), "of the change", n))
    return rows


def summary(rows: list[dict[str, Any]], measured: Faithfulness, table: pandas.DataFrame) -> str:
    """Say the figures and the first directions in words."""
    value = {entry["name"]: entry for entry in rows}
    adapted, base = value["topk-lora.kl"], value["topk-lora.kl_base"]
    header = "  write share  fires on  mostly in               where it fires most (>>token<<)"
    lines = [
        "",
        f"held-out KL(tuned || adapted base): {adapted['value']:.4f} ({adapted['low']:.4f} to {adapted['high']:.4f}) "
        f"nats/token; the base alone {base['value']:.4f}; {value['topk-lora.share_closed']['value']:.1%} closed "
        f"({adapted['n']:,} tokens of {len(measured.labels)} documents)",
        "residual stream, error of the adapted base / change from base to tuned, by layer: "
        + "  ".join(f"{e / c:.2f}" for e, c in zip(measured.error, measured.change, strict=True)),
        f"directions that never fire: {value['topk-lora.dead']['value']:.1%}; "
        f"{value['topk-lora.l0']['value']:.1f} fire per token and module",
        "",
        "The directions that write most:",
        header,
    ]
    for entry in table.itertuples():
        lines.append(
            f"  {entry.write_share:>10.1%}  {entry.firing_rate:>8.1%}  "
            f"{f'{entry.main_label_share:.0%} {entry.main_label}':<22}  {entry.context}   "
            f"[{entry.site} {entry.direction}]"
        )
    meanings = {
        "write share": "of all that the adapter writes", "fires on": "share of tokens",
        "mostly in": "share and label of the documents where it is active",
        "where it fires most (>>token<<)": "and [module direction]",
    }  # fmt: skip
    return "\n".join([*lines, *legend(header, meanings)])
